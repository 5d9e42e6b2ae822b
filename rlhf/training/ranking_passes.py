"""Cut a batch of rankings into passes of bounded size, so that memory does not grow with K.

Prompts of like length go through the model together, as many as `reward.micro_tokens` holds. The loss of a prompt joins
all its outputs. A prompt whose outputs are too many for one pass takes two rounds, which give the same gradient but for
rounding. The first round scores all outputs without gradients, and takes the loss and its derivative with respect to
each score. The second round runs parts of the outputs again and goes backward from score x derivative. That is exact
because dropout is off, and only such prompts pay for the extra forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf.functional.ranking import TieHandling, ranking_loss
from rlhf.functional.seeding import shuffled_indices
from rlhf.rollout.batches import Pair, SequenceBatch, build_batch, token_budget_batches
from rlhf.rollout.scoring import raw_scores
from rlhf.rollout.shared_prompts import SharedBatch, build_shared, can_share, share_prompts, shared_scores
from rlhf.system.distributed import gather_shards, processes, shard


class ScoringModule(nn.Module):
    """The reward model as the engine's module: it takes a batch and returns raw scores [B]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shares = can_share(model)

    def build(self, pairs: Sequence[Pair], pad_id: int) -> SharedBatch | SequenceBatch:
        """Return the batch of some outputs, with shared prompts if the architecture allows them."""
        return build_shared(pairs) if self.shares else build_batch(pairs, pad_id)

    def sharing(self) -> AbstractContextManager[None]:
        """Return the context in which batches of `build` may be scored."""
        return share_prompts(self.model) if self.shares else nullcontext()

    def forward(self, batch: SharedBatch | SequenceBatch) -> Tensor:
        return shared_scores(self.model, batch) if isinstance(batch, SharedBatch) else raw_scores(self.model, batch)


@dataclass
class Group:
    """One prompt with its K ranked outputs, as token ids."""

    pairs: list[Pair]
    ranks: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each output with its prompt."""
        return [len(p) + len(r) for p, r in self.pairs]

    def fits_one_pass(self, tokens: int) -> bool:
        """Return whether its outputs, each padded to the longest, hold at most so many tokens."""
        return len(self.pairs) * max(self.lengths) <= tokens


@dataclass
class Pass:
    """Outputs that go through the model together: whole groups, or part of one group."""

    pairs: list[Pair]
    groups: Sequence[Group] = ()  # the whole groups; empty for a part
    score_grads: Tensor | None = None  # [outputs] of a part, the derivative of the group's loss by each score


class FirstRound(NamedTuple):
    """What is known of groups that do not fit one pass before their second round, the same on every process."""

    passes: list[Pass]  # of the second round, for all processes together
    scores: list[float]  # raw scores of all outputs, group after group
    loss: float  # sum of the groups' losses


def by_length(groups: Sequence[Group]) -> list[Group]:
    """Return the groups shortest first: neighbours make passes with little padding, and every n-th is a fair share."""
    return sorted(groups, key=lambda g: max(g.lengths))


def whole_passes(groups: Sequence[Group], tokens: int) -> list[Pass]:
    """Return passes of groups that fit, in their order: as few as the budget of tokens allows when they are sorted."""
    passes: list[list[Group]] = []
    rows = longest = 0
    for group in groups:
        rows, longest = rows + len(group.pairs), max(longest, *group.lengths)
        if not passes or rows * longest > tokens:
            passes.append([])
            rows, longest = len(group.pairs), max(group.lengths)
        passes[-1].append(group)
    return [Pass([pair for g in part for pair in g.pairs], part) for part in passes]


def own_passes(small: Sequence[Group], parts: Sequence[Pass], tokens: int) -> list[Pass]:
    """Return this process's passes, whole ones of the small groups first; every process gets equally many.

    Gradients are summed over processes in a backward pass of all of them. A process with fewer passes than another
    therefore gets passes of a single output with a gradient of zero.
    """
    n = processes()
    most = max(len(whole_passes(small[rank::n], tokens)) + len(parts[rank::n]) for rank in range(n))
    own = whole_passes(shard(small), tokens) + shard(parts)
    any_output = (small[0] if small else parts[0]).pairs[:1]
    return own + [Pass(any_output, score_grads=torch.zeros(1))] * (most - len(own))


def first_round(
    groups: Sequence[Group], tokens: int, ties: TieHandling, score: Callable[[list[list[Pair]]], list[list[float]]]
) -> FirstRound:
    """Score the groups that do not fit one pass; processes share the work, and all of them must call.

    `score` returns raw scores of this process's parts, without gradients; it is not called for no groups.
    """
    if not groups:
        return FirstRound([], [], 0.0)
    parts = [(i, part) for i, g in enumerate(groups) for part in token_budget_batches(g.lengths, tokens)]
    scored = gather_shards(score([[groups[i].pairs[k] for k in part] for i, part in shard(parts)]))
    found, total = [[0.0] * len(g.pairs) for g in groups], 0.0
    for (i, part), values in zip(parts, scored, strict=True):
        for k, value in zip(part, values, strict=True):
            found[i][k] = value
    score_grads = []
    for group, values in zip(groups, found, strict=True):
        leaf = torch.tensor(values, requires_grad=True)
        loss = ranking_loss(leaf, [group.ranks], ties).loss
        score_grads.append(torch.autograd.grad(loss, leaf)[0])
        total += float(loss.detach())
    passes = [Pass([groups[i].pairs[k] for k in part], score_grads=score_grads[i][part]) for i, part in parts]
    return FirstRound(passes, [value for values in found for value in values], total)


def random_outputs(groups: Sequence[Group], count: int, seed: int) -> list[Pair]:
    """Return about `count` ranked outputs: those of prompts drawn without replacement, all outputs of each.

    In files that hold the chosen output first, every second row alone would be a sample of chosen ones.
    """
    pairs: list[Pair] = []
    for i in shuffled_indices(len(groups), seed, "scale", 0, len(groups)):
        if len(pairs) >= count:
            break
        pairs += groups[i].pairs
    return pairs
