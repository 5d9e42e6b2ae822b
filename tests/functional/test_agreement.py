"""Agreement of labelers, the arithmetic: tables worked by hand, and independent counts by brute force."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.functional import agreement
from rlhf.functional.agreement import Tally, agreement_counts, kendall, labeler_pairs, pairwise, ratio, tally, tau_b

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
nan = pytest.approx(math.nan, nan_ok=True)


def item(prompt: str, times: dict[str, int] | None = None, **ranks: tuple[int, ...]) -> agreement.SharedRankings:
    moments = {name: NOON + timedelta(minutes=m) for name, m in (times or {}).items()}
    return agreement.SharedRankings(prompt, ranks, moments)


# Pairs of outputs


def test_pairs_by_hand() -> None:
    # Outputs 0 to 3. Pairs 02, 03, 13, 23: concordant; 01: ordered, tied; 12: tied, ordered
    expected = Tally(concordant=4, discordant=0, first_ties=1, second_ties=1, both_tie=0)
    assert tally((1, 2, 2, 3), (1, 1, 2, 3)) == expected
    # 01, 02: discordant; 12: ordered, tied
    assert tally((1, 2, 3), (2, 1, 1)) == Tally(0, 2, 0, 1, 0)
    # 01: tied in both; 02, 12: tied, ordered
    assert tally((5, 5, 5), (1, 1, 4)) == Tally(0, 0, 2, 0, 1)
    with pytest.raises(ValueError):
        tally((1, 2), (1, 2, 3))


def test_conventions_of_ties_by_hand() -> None:
    counts = Tally(concordant=6, discordant=2, first_ties=3, second_ties=1, both_tie=4)
    assert agreement.HEADLINE == "untied"
    assert agreement_counts(counts) == agreement_counts(counts, "untied") == (6, 8)
    assert agreement_counts(counts, "strict") == (10, 16)
    assert agreement_counts(counts, "half") == (12, 16)  # 6 + 4 + (3 + 1) / 2


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ((1, 2, 2, 3), (1, 1, 2, 3), 4 / 5),  # 4 concordant; each orders 5 of the 6 pairs
        ((1, 2, 3), (2, 1, 1), -2 / math.sqrt(6)),  # 2 discordant; the first orders 3 pairs, the second 2
        ((1, 2, 3, 4), (1, 2, 4, 3), (5 - 1) / 6),  # without ties tau-b is tau-a
        ((1, 2, 3), (3, 2, 1), -1.0),
        ((1, 1, 2), (7, 7, 9), 1.0),
        ((1, 1, 1), (1, 2, 3), math.nan),
    ],
)
def test_tau_b_by_hand(first: tuple[int, ...], second: tuple[int, ...], tau: float) -> None:
    assert tau_b(tally(first, second)) == pytest.approx(tau, nan_ok=True)
    assert tau_b(tally(second, first)) == pytest.approx(tau, nan_ok=True)


two_rankings = st.integers(2, 9).flatmap(
    lambda k: st.tuples(*(st.lists(st.integers(1, k), min_size=k, max_size=k) for _ in range(2)))
)


@settings(deadline=None)
@given(two_rankings, st.randoms())
def test_any_two_rankings(ranks: tuple[list[int], list[int]], random) -> None:
    """Against the signs of all differences, counted as matrices; and what must not matter does not."""
    first, second = (np.sign(np.subtract.outer(r, r)) for r in ranks)
    counts = tally(*ranks)
    product = first * second
    assert counts.concordant == (product > 0).sum() / 2 and counts.discordant == (product < 0).sum() / 2
    # Tau-b is the correlation of the signs over all ordered pairs.
    norm = math.sqrt((first**2).sum() * (second**2).sum())
    assert tau_b(counts) == pytest.approx(product.sum() / norm if norm else math.nan, nan_ok=True)
    off = ~np.eye(len(ranks[0]), dtype=bool)
    assert agreement_counts(counts, "strict")[0] == ((first == second) & off).sum() / 2
    assert agreement_counts(counts, "half")[0] == pytest.approx((1 - abs(first - second) / 2)[off].sum() / 2)
    assert sum(counts) == off.sum() / 2
    # The order of the outputs, and how far ranks lie apart, are no matter.
    order = random.sample(range(len(ranks[0])), len(ranks[0]))
    assert tally(*([10 * r[i] + 3 for i in order] for r in ranks)) == counts


# Shares over prompts


def test_agreement_of_three_labelers_by_hand() -> None:
    shared = [
        # 01, 02 concordant and 12 discordant between a and b; c ties 12 and orders the rest like both
        item("p", a=(1, 2, 3), b=(1, 3, 2), c=(1, 2, 2)),
        item("q", a=(1, 2), c=(2, 1)),
    ]
    compared = labeler_pairs(shared)
    assert [(c.prompt, c.first, c.second) for c in compared] == [
        ("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "a", "c"),
    ]  # fmt: skip
    expected = [Tally(2, 1, 0, 0, 0), Tally(2, 0, 0, 1, 0), Tally(2, 0, 0, 1, 0), Tally(0, 1, 0, 0, 0)]
    assert [c.tally for c in compared] == expected
    # untied: 6 of 3 + 2 + 2 + 1 = 8; strict: 6 of 10; half: 6 + 2 / 2 = 7 of 10
    assert [pairwise(compared, ties).value for ties in agreement.CONVENTIONS] == pytest.approx([6 / 8, 6 / 10, 7 / 10])
    assert pairwise(compared).counted == 8 and pairwise(compared).prompts == 2
    # tau-b: 1/3, 2/sqrt(6), 2/sqrt(6), -1
    assert kendall(compared).value == pytest.approx((1 / 3 + 4 / math.sqrt(6) - 1) / 4)
    # A ranking that ties everything has no tau-b.
    assert kendall(labeler_pairs([*shared, item("r", a=(1, 1), b=(1, 2))])) == kendall(compared)
    # b meets a and c on p: 2 + 2 of 3 + 2
    assert pairwise(agreement.pairs_of_labeler(compared, "b")).value == pytest.approx(4 / 5)


def test_interval_and_standard_error_by_hand() -> None:
    # Prompts with 3 of 3 and 1 of 3: r = 2/3, residuals 1 and -1, error = sqrt(2 / 1 * 2) / 6.
    parts = [("p", 1, 1), ("p", 2, 2), ("q", 1, 3), ("r", 0, 0)]
    estimate = ratio(parts)
    assert estimate.value == pytest.approx(2 / 3) and estimate.error == pytest.approx(1 / 3)
    assert (estimate.counted, estimate.prompts, estimate.interval) == (6, 2, "bootstrap")
    # Of the four equal draws of two prompts one gives 1/3, two give 2/3, one gives 1: the quantiles are the ends.
    assert (estimate.low, estimate.high) == pytest.approx((1 / 3, 1))
    assert ratio(parts, seed=1) == ratio(parts, seed=1)
    one = ratio([("p", 1, 2)])
    assert one.value == 0.5 and one[1:4] == (nan, nan, nan)
    assert ratio([]) == (nan, nan, nan, nan, 0, 0, "")


def test_the_interval_is_over_prompts() -> None:
    """100 prompts with 10 pairs that all go one way: as wide as 100 pairs, not as 1000; and near the normal's."""
    rng = np.random.default_rng(5)
    agree = rng.random(100) < 0.7
    parts = [(str(i), 10 * a, 10) for i, a in enumerate(agree)]
    estimate = ratio(parts)
    assert estimate == ratio(parts, seed=0) != ratio(parts, seed=1)
    p = agree.mean()
    error = math.sqrt(p * (1 - p) / 99)  # of a mean of 100, with the sample's own variance
    assert estimate.error == pytest.approx(error)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert estimate.low < p < estimate.high
    pairs = labeler_pairs(item(str(i), a=(1, 2, 3), b=(1, 2, 3) if a else (3, 2, 1)) for i, a in enumerate(agree))
    for measure in (pairwise, kendall):
        assert measure(pairs) == measure(pairs, seed=0) != measure(pairs, seed=1)


def test_single_pairs_have_the_closed_form() -> None:
    # Wilson's interval of 8 in 10, from tables.
    pairs = labeler_pairs(item(str(i), a=(1, 2), b=(1, 2) if i < 8 else (2, 1)) for i in range(10))
    assert pairwise(pairs)[:3] == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert pairwise(pairs).interval == "wilson"
    # Half a pair is none that Wilson's interval knows.
    tied = [*pairs, *labeler_pairs([item("tied", a=(1, 2), b=(1, 1))])]
    assert pairwise(tied, "strict").interval == "wilson" and pairwise(tied, "half").interval == "bootstrap"
    # A second comparison of one prompt hangs together with the first.
    more = [*pairs, *labeler_pairs([item("0", a=(1, 2), c=(1, 2))])]
    assert pairwise(more).interval == kendall(pairs).interval == "bootstrap"


def test_windows_by_hand() -> None:
    shared = [
        item("1", {"a": 0, "b": 9}, a=(1, 2), b=(1, 2)),  # the later is at 9
        item("2", {"a": 4, "b": 3}, a=(1, 2), b=(2, 1)),  # at 4
        item("3", {"a": 20}, a=(1, 2), b=(1, 2)),  # b's time is not known
        item("4", {"a": 6, "b": 5}, a=(1, 2), b=(1, 2)),
        item("5", {"a": 30, "b": 5}, a=(1, 2), b=(1, 2)),
    ]
    compared = labeler_pairs(shared)
    assert [[c.prompt for c in part] for part in agreement.time_windows(compared, 2)] == [["2", "4"], ["1", "5"]]
    assert [[c.prompt for c in part] for part in agreement.time_windows(compared, 9)] == [["2"], ["4"], ["1"], ["5"]]
    assert [pairwise(part).value for part in agreement.time_windows(compared, 2)] == [0.5, 1.0]
    assert agreement.time_windows(compared[2:3], 3) == []
    assert compared[2] == agreement.LabelerPair("3", "a", "b", Tally(1, 0, 0, 0, 0), None)


# Krippendorff's alpha

_ = None
# Krippendorff 2011, section E: four observers, twelve units, values missing.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def units_of(observers: list[list[int | None]]) -> list[list[int]]:
    return [[value for value in unit if value is not None] for unit in zip(*observers, strict=True)]


def test_alpha_of_the_published_example() -> None:
    assert agreement.alpha_ordinal(units_of(OBSERVERS)) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand() -> None:
    # Values 1, 2, 3 come 3, 1, 2 times, so their middles are 1.5, 3.5, 5; distances 4 (12), 12.25 (13), 2.25 (23).
    # Observed 2 * 4 / 6; expected 2 (3*1*4 + 3*2*12.25 + 1*2*2.25) / (6*5) = 6.
    assert agreement.alpha_ordinal([[1, 1], [1, 2], [3, 3], [2]]) == pytest.approx(1 - (8 / 6) / 6)
    assert agreement.alpha_ordinal([[1, 1], [3, 3], [2, 2]]) == 1
    assert agreement.alpha_ordinal([[1, 2], [2, 1]]) == pytest.approx(1 - (2 * 2 * 4 / 4) / (2 * 2 * 2 * 4 / 12))
    assert agreement.alpha_ordinal([[1], [2]]) == nan
    assert agreement.alpha_ordinal([[2, 2], [2, 2]]) == nan


def alpha_by_definition(units: list[list[float]]) -> float:
    """Disagreement within units over disagreement of all pairable values, distances summed value by value."""
    units = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in units for value in unit]

    def distance(c: float, k: float) -> float:
        low, high = min(c, k), max(c, k)
        between = sum(low <= value <= high for value in everything)
        return (between - (everything.count(c) + everything.count(k)) / 2) ** 2

    within = sum(2 * distance(c, k) / (len(unit) - 1) for unit in units for c, k in combinations(unit, 2))
    n = len(everything)
    across = sum(2 * distance(c, k) for c, k in combinations(everything, 2)) / (n - 1) if n else 0.0
    return 1 - within / across if across else math.nan


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=8))
def test_alpha_of_any_data(units: list[list[int]]) -> None:
    value = agreement.alpha_ordinal(units)
    assert value == pytest.approx(alpha_by_definition(units), nan_ok=True)
    # Only the order of values counts, and not who gave them.
    others = [[v**3 - 7 for v in reversed(unit)] for unit in units]
    assert agreement.alpha_ordinal(others) == pytest.approx(value, nan_ok=True)


def test_positions_by_hand() -> None:
    assert agreement.positions((1, 4, 4)) == agreement.positions((1, 2, 2)) == [0, 0.75, 0.75]  # midranks 1, 2.5, 2.5
    assert agreement.positions((2, 1, 3, 4, 5)) == [0.25, 0, 0.5, 0.75, 1]
    assert agreement.positions((3, 3)) == [0.5, 0.5]


def test_alpha_of_rankings_by_hand() -> None:
    # Units (0,0) (1,1) (0,1) (1,0): each value 4 times, distance 4^2. Observed 4*16/8, expected 2*4*4*16/(8*7).
    shared = [item("p", a=(1, 2), b=(1, 2)), item("q", a=(1, 2), b=(2, 1))]
    assert agreement.alpha(shared) == pytest.approx(1 - 8 / (512 / 56)) == pytest.approx(0.125)
    # Three labelers of whom one missed the second prompt, two sizes of K.
    shared = [item("p", a=(1, 2, 3), b=(1, 3, 3), c=(2, 1, 3)), item("q", a=(1, 2), c=(2, 1))]
    units = [[0, 0, 0.5], [0.5, 0.75, 0], [1, 0.75, 1], [0, 1], [1, 0]]
    assert agreement.alpha(shared) == pytest.approx(alpha_by_definition(units))
    with pytest.raises(ValueError):
        agreement.alpha([item("p", a=(1, 2), b=(1, 2, 3))])


def test_where_prompts_agree_alike_the_interval_is_wilsons_over_them() -> None:
    """By hand: of n cases that are all 1 it begins at n / (n + z^2), z^2 = 3.8415."""
    # Three prompts of six pairs, all agreed on: n is 3, not 18.
    found = ratio([(f"p{i}", 6, 6) for i in range(3)], shares=True)
    assert (found.value, found.high, found.interval) == (1.0, pytest.approx(1.0), "wilson")
    assert found.low == pytest.approx(3 / 6.8415, abs=1e-4) and found.counted == 18
    # Two prompts of different sizes, all wrong: it ends at z^2 / (2 + z^2). Half right: 1/2 +- z / (1 + z^2/2) x
    # sqrt(1/8 + z^2/16) = 0.4055.
    assert ratio([("p", 0, 2), ("q", 0, 4)])[:3] == pytest.approx((0, 0, 3.8415 / 5.8415), abs=1e-4)
    assert ratio([("p", 1, 2), ("q", 2, 4)])[:3] == pytest.approx((0.5, 0.0945, 0.9055), abs=1e-4)
    # tau-b goes from -1 to 1: of four prompts at -1 it ends at 1 - 2 x 4 / 7.8415; of four at 0 (share 1/2) it is
    # +- 2 z / (1 + z^2/4) sqrt(1/16 + z^2/64) = 0.7.
    found = ratio([(f"p{i}", -1, 1) for i in range(4)], span=(-1.0, 1.0))
    assert (found.value, found.low) == (-1.0, pytest.approx(-1.0))
    assert found.high == pytest.approx(1 - 8 / 7.8415, abs=1e-4)
    found = ratio([(f"p{i}", 0, 1) for i in range(4)], span=(-1.0, 1.0))
    assert found[:3] == pytest.approx((0, -0.7, 0.7), abs=1e-3)
    found = kendall(labeler_pairs([item(f"p{i}", a=(1, 2), b=(2, 1)) for i in range(4)]))
    assert found[:3] == pytest.approx((-1, -1, 1 - 8 / 7.8415), abs=1e-4)
    # One prompt shows nothing.
    found = ratio([("p", 5, 6)])
    assert math.isnan(found.low) and math.isnan(found.high)
