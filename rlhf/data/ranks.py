"""Read and check the ranks of a row: 1 is best, equal ranks are a tie, and only order and equality count."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.sources import SourceRow, check_list, check_text, check_whole

MIN_K, MAX_K = 2, 16  # responses of a ranking


def ranks_of_scores(scores: Sequence[float]) -> list[int]:
    """Return ranks of scores, the highest 1, equal scores tied, no rank left out: [7, 9, 7, 1] gives [2, 1, 2, 3]."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def equal_texts_ranked_apart(responses: Sequence[str], ranks: Sequence[int]) -> tuple[int, int] | None:
    """Return the indices of the first two equal responses with different ranks, or None."""
    first: dict[str, int] = {}
    for i, response in enumerate(responses):
        if ranks[first.setdefault(response, i)] != ranks[i]:
            return first[response], i
    return None


def check_equal_texts(row: SourceRow, responses: Sequence[str], ranks: Sequence[int]) -> None:
    """Raise UserError if equal responses have different ranks."""
    if pair := equal_texts_ranked_apart(responses, ranks):
        i, j = pair
        what = f"responses {i} and {j} (from 0) are the same text with ranks {ranks[i]} and {ranks[j]}"
        raise row.fail("ranks", what, "give them one rank, or keep one of them")


def check_rank(row: SourceRow, field: str, value: object) -> int:
    """Return `value` if it is a whole number from 1 on; raise UserError naming `field` otherwise."""
    rank = check_whole(row, field, value)
    if rank < 1:
        raise row.fail(field, f"the rank {rank} is below 1", "count from 1, the best")
    return rank


def read_ranks(row: SourceRow, k: int) -> tuple[int, ...]:
    """Return the ranks of a row's `k` responses from `ranks` or `ranking`; raise UserError if not each has one rank."""
    if {"ranks", "ranking"} <= row.fields.keys():
        raise row.fail("ranking", "both `ranks` and `ranking` are given", "keep one of them")
    if "ranking" in row.fields:
        return _ranks_of_letters(row, k)
    listed = check_list(row, "ranks", row.need("ranks"))
    ranks = tuple(check_whole(row, f"ranks[{i}]", rank) for i, rank in enumerate(listed))
    if len(ranks) != k:
        raise row.fail("ranks", f"there are {len(ranks)} ranks for {k} responses", "give each response one rank")
    return tuple(check_rank(row, f"ranks[{i}]", rank) for i, rank in enumerate(ranks))


def _ranks_of_letters(row: SourceRow, k: int) -> tuple[int, ...]:
    """Return the ranks that "D>C>A=B" gives: each letter's group counted from 1, D being response 3."""
    names = [chr(ord("A") + i) for i in range(k)]
    ranks: dict[str, int] = {}
    fix = f"use each of {' '.join(names)} once, as in {'>'.join(names)}; = is a tie"
    for rank, group in enumerate(check_text(row, "ranking", row.fields["ranking"]).split(">"), start=1):
        for letter in (part.strip() for part in group.split("=")):
            if letter not in names:
                raise row.fail("ranking", f"{letter!r} names none of the {k} responses", fix)
            if letter in ranks:
                raise row.fail("ranking", f"the letter {letter} comes twice", fix)
            ranks[letter] = rank
    if missing := [name for name in names if name not in ranks]:
        raise row.fail("ranking", f"the ranking leaves out {', '.join(missing)}", fix)
    return tuple(ranks[name] for name in names)
