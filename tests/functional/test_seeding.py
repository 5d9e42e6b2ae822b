"""The endless shuffled stream: every row once per pass, position in and indices out, nothing remembered."""

from __future__ import annotations

import pytest

from rlhf.functional.seeding import shuffled_indices


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_every_pass_holds_every_row_once(n: int) -> None:
    got = shuffled_indices(n, 1, "prompts", 0, 4 * n)
    for epoch in range(4):
        assert sorted(got[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_any_cut_of_the_stream_gives_the_same_indices() -> None:
    whole = shuffled_indices(7, 3, "prompts", 0, 40)
    for size in (1, 3, 7, 8, 20):
        pieces = [shuffled_indices(7, 3, "prompts", start, min(size, 40 - start)) for start in range(0, 40, size)]
        assert [i for piece in pieces for i in piece] == whole
    assert shuffled_indices(7, 3, "prompts", 5, 16) == whole[5:21], "a request may span three passes"


def test_passes_seeds_and_names_have_orders_of_their_own() -> None:
    first = shuffled_indices(50, 1, "prompts", 0, 50)
    streams = ((1, "prompts", 50), (2, "prompts", 0), (1, "ptx", 0))
    others = [*(shuffled_indices(50, *stream, 50) for stream in streams), list(range(50))]
    assert all(sorted(other) == sorted(first) and other != first for other in others)
    assert shuffled_indices(50, 1, "prompts", 0, 50) == first


def test_nothing_asked_is_nothing_and_no_rows_are_refused() -> None:
    assert shuffled_indices(5, 1, "prompts", 3, 0) == []
    with pytest.raises(ValueError, match="no rows to draw prompts from"):
        shuffled_indices(0, 1, "prompts", 0, 1)
