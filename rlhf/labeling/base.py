"""The protocol of a labeler: what it sees of an output, what it answers, and ranks from utilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from rlhf.data.records import Prompt
from rlhf.functional.agreement import tally


class Output(NamedTuple):
    """One response as a labeler sees it."""

    text: str
    finished: bool  # whether the model ended it with EOS


class Labeler(Protocol):
    """Ranks the outputs of a prompt; the same seed gives the same answer."""

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """Return one rank for each output: 1 is best, equal ranks are a tie, and no rank is left out."""
        ...

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """Return 1 when a is better, 0 when b is better, and 0.5 for a tie."""
        ...


def ranks_of(utilities: Sequence[float], tie_margin: float = 0.0) -> tuple[int, ...]:
    """Return ranks 1, 2, .. without gaps, best first; outputs within `tie_margin` of a group's best tie with it."""
    ranks, rank, top = [0] * len(utilities), 0, math.inf
    for i in sorted(range(len(utilities)), key=lambda i: -utilities[i]):
        if rank == 0 or top - utilities[i] > tie_margin:
            rank, top = rank + 1, utilities[i]
        ranks[i] = rank
    return tuple(ranks)


def agreement(ranks_a: Sequence[int], ranks_b: Sequence[int]) -> tuple[int, int]:
    """Return (pairs that both rankings order alike, pairs that neither ties) of one prompt's outputs."""
    counts = tally(ranks_a, ranks_b)
    return counts.concordant, counts.concordant + counts.discordant


def pooled_agreement(rankings: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float | int | None]:
    """Return `agreement` of pairs of rankings, a share of untied pairs (None: no pair), and `agreement_pairs`."""
    counts = [agreement(a, b) for a, b in rankings]
    agreeing, pairs = sum(n for n, _ in counts), sum(n for _, n in counts)
    return {"agreement": agreeing / pairs if pairs else None, "agreement_pairs": pairs}


def preference(ranks: tuple[int, ...]) -> float:
    """Return 1 when the first of two outputs ranks better, 0 when the second does, and 0.5 for a tie."""
    return 0.5 if ranks[0] == ranks[1] else float(ranks[0] < ranks[1])
