"""What the rank stage writes: rows of rank/rankings.jsonl, statistics of rank/summary.json, and a table of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.records import Ranking, ranking_row, write_jsonl
from rlhf.functional.ranking import ordered_pairs, tied_pairs
from rlhf.labeling.outputs import RankResult
from rlhf.system.console import table
from rlhf.system.files import write_atomic
from rlhf.system.ranks import is_main_process

NOT_METRICS = ("tie_margin", "target_agreement")  # settings among the numbers of the summary
SAMPLE_COLUMNS = ["prompt", "rank", "rubric", "finished", "response"]


def summarise(result: RankResult) -> dict[str, Any]:
    """Return counts, shares and the two correlations that show a labeler's bias; None where one is undefined.

    The correlations are Pearson's over outputs, of the rank (1 is best) with the length in tokens and with the position
    at which the output was shown, each minus its mean over the prompt. Below 0, longer (or later) outputs rank better.
    """
    rankings = result.rankings
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
        "correlation_rank_position": centred_correlation(ranks, display_positions(result)),
    }
    if result.lengths:
        summary["response_length"] = sum(map(sum, result.lengths)) / outputs
        summary["correlation_rank_length"] = centred_correlation(ranks, result.lengths)
    return summary | result.label_summary


def write_rankings(
    folder: Path, result: RankResult, scores: Sequence[Sequence[float]], summary: dict[str, Any]
) -> dict[str, float]:
    """Write rankings.jsonl and summary.json to the stage's folder; return the numbers of the summary as metrics.

    A row is a ranking with its use case, its rubric `scores` and its extras. The main process writes for all.
    """
    extras = result.row_extras or [{}] * len(result.rankings)
    rows = [
        ranking_row(r) | {"use_case": r.prompt.use_case, "rubric": s} | extra
        for r, s, extra in zip(result.rankings, scores, extras, strict=True)
    ]
    if is_main_process():
        write_jsonl(folder / "rankings.jsonl", rows)
        write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    return {f"rank/{name}": float(value) for name, value in numbers.items() if name not in NOT_METRICS}


def sample_rows(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> list[list[Any]]:
    """Return the outputs as rows of SAMPLE_COLUMNS, each prompt's best output first."""
    return [
        [r.prompt.text, *row]
        for r, s in zip(rankings, scores, strict=True)
        for row in sorted(zip(r.ranks, s, r.finished, r.responses, strict=True))
    ]


def show_example(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> None:
    """Print the ranking with the most different ranks, so that a person sees what was ranked."""
    i = max(range(len(rankings)), key=lambda i: len(set(rankings[i].ranks)))
    rows = [row for _, *row in sample_rows([rankings[i]], [scores[i]])]
    table(f"one ranked prompt: {rankings[i].prompt.text}", ["rank", "rubric", "finished", "output"], rows)


def display_positions(result: RankResult) -> list[Sequence[int]]:
    """Return the position at which each output was shown: that of the file, except on the page, which shuffles them."""
    if not result.row_extras:
        return [range(len(r.ranks)) for r in result.rankings]
    return [np.argsort(extra["shown"]).tolist() for extra in result.row_extras]


def centred_correlation(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    """Return Pearson's correlation of values minus the mean of their group; None when either does not vary."""
    x, y = (np.concatenate([np.asarray(g, float) - np.mean(g) for g in groups]) for groups in (a, b))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None
