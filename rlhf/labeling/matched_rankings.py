"""Match the rankings of the same outputs by different labelers: the same prompt and the same responses in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf.data.records import Ranking
from rlhf.functional.agreement import SharedRankings


@dataclass
class MatchedRankings:
    """The outputs that two or more labelers ranked, and counts over all rankings that were given."""

    shared: list[SharedRankings]
    outputs: int  # sets of outputs that at least one labeler ranked
    rankings: Counter[str]  # number by labeler, without repeats
    repeats: int  # rankings that a later one by the same labeler replaced


def match(named: Iterable[tuple[str, Ranking]]) -> MatchedRankings:
    """Match (labeler, ranking) by prompt and responses.

    Of a labeler's rankings of the same outputs the later counts: by time where both have one, else in the order given.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, Ranking]] = {}
    repeats = 0
    for name, ranking in named:
        by_labeler = found.setdefault((ranking.prompt.key, tuple(sorted(ranking.responses))), {})
        before = by_labeler.get(name)
        repeats += before is not None
        if before is None or not (before.time and ranking.time and ranking.time < before.time):
            by_labeler[name] = ranking
    shared = [
        SharedRankings(
            key,
            {name: _in_order(ranking) for name, ranking in by_labeler.items()},
            {name: ranking.time for name, ranking in by_labeler.items() if ranking.time},
        )
        for (key, _), by_labeler in found.items()
        if len(by_labeler) > 1
    ]
    rankings = Counter(name for by_labeler in found.values() for name in by_labeler)
    return MatchedRankings(shared, len(found), rankings, repeats)


def _in_order(ranking: Ranking) -> list[int]:
    """Return the ranks in the alphabetical order of the responses; equal responses tie, so any order will do."""
    return [rank for _, rank in sorted(zip(ranking.responses, ranking.ranks, strict=True))]
