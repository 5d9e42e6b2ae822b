"""Count the pairs that a reward model orders as the labeler did: of a training step and of held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from rlhf.functional.ranking import PairCounts, accuracy_interval, count_pairs
from rlhf.rollout.scoring import scores
from rlhf.system.distributed import sum_over_processes
from rlhf.training.ranking_passes import Group


def count_groups(scores: Iterable[float], groups: Sequence[Group]) -> list[PairCounts]:
    """Return the pair counts of each group from the scores of their outputs, group after group."""
    values = iter(scores)
    return [count_pairs([next(values) for _ in g.ranks], g.ranks) for g in groups]


def pair_counts(model: nn.Module, groups: Sequence[Group]) -> list[PairCounts]:
    """Return the pair counts of groups under the model, from one forward per output."""
    return count_groups(scores(model, [pair for g in groups for pair in g.pairs]).tolist(), groups)


def training_metrics(loss: float, counts: Sequence[PairCounts]) -> dict[str, float]:
    """Return loss, accuracy and mean margin of a step from every process's share; all processes must call."""
    margins = sum(m for c in counts for m in c.margins)
    shares = (loss, sum(c.correct for c in counts), margins, sum(c.pairs for c in counts))
    loss, correct, margin, pairs = sum_over_processes(shares)
    return {
        "reward/loss": loss,
        "reward/train_accuracy": correct / max(1, pairs),
        "reward/train_margin": margin / max(1, pairs),
    }


def heldout_metrics(counts: Sequence[PairCounts], seed: int) -> dict[str, float]:
    """Return held-out accuracy with its 95 % interval, and the mean margin of the better output."""
    accuracy, low, high = accuracy_interval(counts, seed)
    margins = [m for c in counts for m in c.margins]
    return {
        "reward/accuracy": accuracy,
        "reward/accuracy_low": low,
        "reward/accuracy_high": high,
        "reward/margin": sum(margins) / max(1, len(margins)),
        "reward/heldout_pairs": float(len(margins)),
        "reward/heldout_prompts": float(len(counts)),
    }
