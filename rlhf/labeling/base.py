"""What a labeler is: an output as it sees one, the protocol it follows, and ranks from utilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rlhf.data.records import Prompt
from rlhf.functional.agreement import tally


class Output(NamedTuple):
    """One response as a labeler sees it."""

    text: str
    finished: bool  # whether the model ended it with EOS


class Labeler(Protocol):
    """Anything that ranks the outputs of a prompt; the same seed gives the same answer."""

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """One rank per output: 1 is best, equal ranks are a tie, no rank is left out."""
        ...

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """1 when a is better, 0 when b is, 0.5 for a tie."""
        ...


def ranks_of(utilities: Sequence[float], tie_margin: float = 0.0) -> tuple[int, ...]:
    """Ranks 1, 2, .. without gaps, best first; what lies within `tie_margin` of the best of a group joins the group."""
    ranks, rank, top = [0] * len(utilities), 0, math.inf
    for i in sorted(range(len(utilities)), key=lambda i: -utilities[i]):
        if rank == 0 or top - utilities[i] > tie_margin:
            rank, top = rank + 1, utilities[i]
        ranks[i] = rank
    return tuple(ranks)


def agreement(ranks_a: Sequence[int], ranks_b: Sequence[int]) -> tuple[int, int]:
    """(pairs ordered alike, pairs untied in both rankings) of one prompt's outputs."""
    counts = tally(ranks_a, ranks_b)
    return counts.concordant, counts.concordant + counts.discordant


def preference(ranks: tuple[int, ...]) -> float:
    """1 when the first of two outputs ranks better, 0 when the second does, 0.5 for a tie."""
    return 0.5 if ranks[0] == ranks[1] else float(ranks[0] < ranks[1])
