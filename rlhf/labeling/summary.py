"""Statistics of a rank stage: what was sampled, how it was ranked, and whether length or position explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.records import Ranking
from rlhf.functional.ranking import ordered_pairs, tied_pairs


class RankResult(NamedTuple):
    """The stage's product and what is known about the labels."""

    rankings: list[Ranking]
    lengths: list[list[int]]
    label_summary: dict[str, Any]
    row_extras: Sequence[dict[str, Any]] = ()  # more fields of each row: what people said, and the order shown


def summarise(ranked: RankResult) -> dict[str, Any]:
    """Counts, shares and the two correlations that show a labeler's bias; None where there is nothing to measure.

    Correlations are Pearson's over outputs, of rank (1 is best) with length in tokens and with the position in which
    the output was shown, each less its mean over the prompt: below 0 means longer, or later, outputs rank better.
    """
    rankings = ranked.rankings
    outputs = sum(len(r.ranks) for r in rankings)
    tied = sum(len(tied_pairs(r.ranks)) for r in rankings)
    ordered = sum(len(ordered_pairs(r.ranks)) for r in rankings)
    ranks = [r.ranks for r in rankings]
    summary = {
        "prompts": len({r.prompt.key for r in rankings}),
        "rankings": len(rankings),
        "outputs": outputs,
        "pairs": ordered,
        "tie_fraction": tied / (tied + ordered),
        "finished_fraction": sum(sum(r.finished) for r in rankings) / outputs,
        "correlation_rank_position": centred_correlation(ranks, display_positions(ranked)),
    }
    if ranked.lengths:
        summary["response_length"] = sum(map(sum, ranked.lengths)) / outputs
        summary["correlation_rank_length"] = centred_correlation(ranks, ranked.lengths)
    return summary | ranked.label_summary


def display_positions(ranked: RankResult) -> list[Sequence[int]]:
    """Where each output stood on the labeler's page: in the order of the file, but for people, who have their own."""
    if not ranked.row_extras:
        return [range(len(r.ranks)) for r in ranked.rankings]
    return [np.argsort(extras["shown"]).tolist() for extras in ranked.row_extras]


def centred_correlation(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    """Pearson's correlation of values less the mean of their group; None when either does not vary."""
    x, y = (np.concatenate([np.asarray(g, float) - np.mean(g) for g in groups]) for groups in (a, b))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None
