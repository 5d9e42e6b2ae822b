"""Agreement of labelers: tables worked by hand, an independent count by brute force, and two simulated labelers."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import agreement_report
from rlhf.agreement import (
    CONVENTIONS,
    HEADLINE,
    Comparison,
    Shared,
    Tally,
    alpha,
    alpha_ordinal,
    comparisons,
    credit,
    kendall,
    of_labeler,
    pairwise,
    positions,
    ratio,
    tally,
    tau_b,
    wilson,
    windows,
)
from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.labelers import Output, RubricLabeler, noise_for_agreement
from rlhf.matching import match
from rlhf.records import Drops, Prompt, Ranking, ranking_row, read_rankings, write_jsonl
from rlhf.rubric import rubric_score

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
nan = pytest.approx(math.nan, nan_ok=True)


def item(prompt: str, times: dict[str, int] | None = None, **ranks: tuple[int, ...]) -> Shared:
    return Shared(prompt, ranks, {name: NOON + timedelta(minutes=m) for name, m in (times or {}).items()})


# Pairs of outputs


def test_pairs_by_hand() -> None:
    # Outputs 0 to 3. Pairs  01: ordered, tied   02: alike   03: alike   12: tied, ordered   13: alike   23: alike
    assert tally((1, 2, 2, 3), (1, 1, 2, 3)) == Tally(alike=4, opposed=0, first_ties=1, second_ties=1, both_tie=0)
    # 01: opposed   02: opposed   12: ordered, tied
    assert tally((1, 2, 3), (2, 1, 1)) == Tally(0, 2, 0, 1, 0)
    # 01: tied in both   02: tied, ordered   12: tied, ordered
    assert tally((5, 5, 5), (1, 1, 4)) == Tally(0, 0, 2, 0, 1)
    with pytest.raises(ValueError):
        tally((1, 2), (1, 2, 3))


def test_conventions_of_ties_by_hand() -> None:
    counts = Tally(alike=6, opposed=2, first_ties=3, second_ties=1, both_tie=4)
    assert HEADLINE == "untied"
    assert credit(counts) == credit(counts, "untied") == (6, 8)
    assert credit(counts, "strict") == (10, 16)
    assert credit(counts, "half") == (12, 16)  # 6 + 4 + (3 + 1) / 2


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ((1, 2, 2, 3), (1, 1, 2, 3), 4 / 5),  # 4 alike; each orders 5 of the 6 pairs
        ((1, 2, 3), (2, 1, 1), -2 / math.sqrt(6)),  # 2 opposed; the first orders 3 pairs, the second 2
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


@given(two_rankings, st.randoms())
def test_any_two_rankings(ranks: tuple[list[int], list[int]], random) -> None:
    """Against the signs of all differences, counted as matrices; and what must not matter does not."""
    first, second = (np.sign(np.subtract.outer(r, r)) for r in ranks)
    counts = tally(*ranks)
    product = first * second
    assert counts.alike == (product > 0).sum() / 2 and counts.opposed == (product < 0).sum() / 2
    # Tau-b is the correlation of the signs over all ordered pairs.
    norm = math.sqrt((first**2).sum() * (second**2).sum())
    assert tau_b(counts) == pytest.approx(product.sum() / norm if norm else math.nan, nan_ok=True)
    off = ~np.eye(len(ranks[0]), dtype=bool)
    assert credit(counts, "strict")[0] == ((first == second) & off).sum() / 2
    assert credit(counts, "half")[0] == pytest.approx((1 - abs(first - second) / 2)[off].sum() / 2)
    assert sum(counts) == off.sum() / 2
    # The order of the outputs, and how far ranks lie apart, are no matter.
    order = random.sample(range(len(ranks[0])), len(ranks[0]))
    assert tally(*([10 * r[i] + 3 for i in order] for r in ranks)) == counts


# Shares over prompts


def test_agreement_of_three_labelers_by_hand() -> None:
    shared = [
        # 01, 02 alike and 12 opposed between a and b; c ties 12 and orders the rest like both
        item("p", a=(1, 2, 3), b=(1, 3, 2), c=(1, 2, 2)),
        item("q", a=(1, 2), c=(2, 1)),
    ]
    compared = comparisons(shared)
    assert [(c.prompt, c.first, c.second) for c in compared] == [
        ("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "a", "c"),
    ]  # fmt: skip
    assert [c.tally for c in compared] == [
        Tally(2, 1, 0, 0, 0),
        Tally(2, 0, 0, 1, 0),
        Tally(2, 0, 0, 1, 0),
        Tally(0, 1, 0, 0, 0),
    ]
    # untied: 6 of 3 + 2 + 2 + 1 = 8; strict: 6 of 10; half: 6 + 2 / 2 = 7 of 10
    assert [pairwise(compared, ties).value for ties in CONVENTIONS] == pytest.approx([6 / 8, 6 / 10, 7 / 10])
    assert pairwise(compared).counted == 8 and pairwise(compared).prompts == 2
    # tau-b: 1/3, 2/sqrt(6), 2/sqrt(6), -1
    assert kendall(compared).value == pytest.approx((1 / 3 + 4 / math.sqrt(6) - 1) / 4)
    # b meets a and c on p: 2 + 2 of 3 + 2
    assert pairwise(of_labeler(compared, "b")).value == pytest.approx(4 / 5)


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
    assert ratio([])[:4] == (nan, nan, nan, nan)


def test_the_interval_is_over_prompts() -> None:
    """100 prompts with 10 pairs that all go one way: as wide as 100 pairs, not as 1000; and near the normal's."""
    rng = np.random.default_rng(5)
    agree = rng.random(100) < 0.7
    estimate = ratio([(str(i), 10 * a, 10) for i, a in enumerate(agree)])
    p = agree.mean()
    deviation = math.sqrt(p * (1 - p) / 99)  # of a mean of 100, with the sample's own variance
    assert estimate.error == pytest.approx(deviation)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert estimate.low < p < estimate.high


def test_single_pairs_have_the_closed_form() -> None:
    # Wilson's interval of 8 in 10 and of 0 in 10, from tables.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    pairs = comparisons(item(str(i), a=(1, 2), b=(1, 2) if i < 8 else (2, 1)) for i in range(10))
    assert pairwise(pairs)[:3] == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert pairwise(pairs).interval == "wilson"
    # A second comparison of one prompt hangs together with the first.
    more = [*pairs, *comparisons([item("0", a=(1, 2), c=(1, 2))])]
    assert pairwise(more).interval == kendall(pairs).interval == "bootstrap"


def test_windows_by_hand() -> None:
    shared = [
        item("1", {"a": 0, "b": 9}, a=(1, 2), b=(1, 2)),  # the later is at 9
        item("2", {"a": 4, "b": 3}, a=(1, 2), b=(2, 1)),  # at 4
        item("3", {"a": 20}, a=(1, 2), b=(1, 2)),  # b's time is not known
        item("4", {"a": 6, "b": 5}, a=(1, 2), b=(1, 2)),
        item("5", {"a": 30, "b": 5}, a=(1, 2), b=(1, 2)),
    ]
    compared = comparisons(shared)
    assert [[c.prompt for c in part] for part in windows(compared, 2)] == [["2", "4"], ["1", "5"]]
    assert [[c.prompt for c in part] for part in windows(compared, 9)] == [["2"], ["4"], ["1"], ["5"]]
    assert [pairwise(part).value for part in windows(compared, 2)] == [0.5, 1.0]
    assert windows(compared[2:3], 3) == []
    assert compared[2] == Comparison("3", "a", "b", Tally(1, 0, 0, 0, 0), None)


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
    assert alpha_ordinal(units_of(OBSERVERS)) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand() -> None:
    # Values 1, 2, 3 come 3, 1, 2 times, so their middles are 1.5, 3.5, 5; distances 4 (12), 12.25 (13), 2.25 (23).
    # Observed 2 * 4 / 6; expected 2 (3*1*4 + 3*2*12.25 + 1*2*2.25) / (6*5) = 6.
    assert alpha_ordinal([[1, 1], [1, 2], [3, 3], [2]]) == pytest.approx(1 - (8 / 6) / 6)
    assert alpha_ordinal([[1, 1], [3, 3], [2, 2]]) == 1
    assert alpha_ordinal([[1, 2], [2, 1]]) == pytest.approx(1 - (2 * 2 * 4 / 4) / (2 * 2 * 2 * 4 / 12))
    assert alpha_ordinal([[1], [2]]) == nan
    assert alpha_ordinal([[2, 2], [2, 2]]) == nan


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


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=8))
def test_alpha_of_any_data(units: list[list[int]]) -> None:
    value = alpha_ordinal(units)
    assert value == pytest.approx(alpha_by_definition(units), nan_ok=True)
    # Only the order of values counts, and not who gave them.
    assert alpha_ordinal([[v**3 - 7 for v in reversed(unit)] for unit in units]) == pytest.approx(value, nan_ok=True)


def test_positions_by_hand() -> None:
    assert positions((1, 4, 4)) == positions((1, 2, 2)) == [0, 0.75, 0.75]  # midranks 1, 2.5, 2.5
    assert positions((2, 1, 3, 4, 5)) == [0.25, 0, 0.5, 0.75, 1]
    assert positions((3, 3)) == [0.5, 0.5]


def test_alpha_of_rankings_by_hand() -> None:
    # Units (0,0) (1,1) (0,1) (1,0): each value 4 times, distance 4^2. Observed 4*16/8, expected 2*4*4*16/(8*7).
    shared = [item("p", a=(1, 2), b=(1, 2)), item("q", a=(1, 2), b=(2, 1))]
    assert alpha(shared) == pytest.approx(1 - 8 / (512 / 56)) == pytest.approx(0.125)
    # Three labelers of whom one missed the second prompt, two sizes of K.
    shared = [item("p", a=(1, 2, 3), b=(1, 3, 3), c=(2, 1, 3)), item("q", a=(1, 2), c=(2, 1))]
    units = [[0, 0, 0.5], [0.5, 0.75, 0], [1, 0.75, 1], [0, 1], [1, 0]]
    assert alpha(shared) == pytest.approx(alpha_by_definition(units))


# Files


def ranking(
    prompt: str, responses: str, ranks: tuple[int, ...], labeler: str = "", minute: int | None = None
) -> Ranking:
    time = None if minute is None else NOON + timedelta(minutes=minute)
    return Ranking(Prompt.from_text(prompt), tuple(responses), ranks, labeler=labeler, time=time)


def test_rankings_are_matched_by_prompt_and_responses_in_any_order() -> None:
    rankings = [
        ranking("p", "xyz", (1, 2, 3), "a"),
        ranking(" p ", "zxy", (2, 1, 2), "b"),
        ranking("p", "xyw", (1, 2, 3), "c"),  # another response
        ranking("q", "xyz", (1, 2, 3), "b"),  # another prompt
        ranking("r", "xxy", (2, 2, 1), "a"),
        ranking("r", "xyx", (1, 1, 1), "b"),
    ]
    found = match([(r.labeler, r) for r in rankings])
    assert [(s.ranks, s.times) for s in found.shared] == [
        ({"a": [1, 2, 3], "b": [1, 2, 2]}, {}),
        ({"a": [2, 2, 1], "b": [1, 1, 1]}, {}),
    ]
    assert (found.outputs, found.repeats, dict(found.rankings)) == (4, 0, {"a": 2, "b": 3, "c": 1})


def test_the_last_ranking_of_a_labeler_counts() -> None:
    by_time = [
        ranking("p", "xy", (1, 2), "a", 5),
        ranking("p", "xy", (2, 1), "a", 3),
        ranking("p", "xy", (1, 1), "b", 1),
        ranking("p", "xy", (1, 2), "b"),  # no time: in the order of the file
    ]
    found = match([(r.labeler, r) for r in by_time])
    assert found.shared == [
        Shared(by_time[0].prompt.key, {"a": [1, 2], "b": [1, 2]}, {"a": NOON + timedelta(minutes=5)})
    ]
    assert found.repeats == 2 and dict(found.rankings) == {"a": 1, "b": 1}


def write(path: Path, *rankings: Ranking) -> str:
    write_jsonl(path, [ranking_row(r) for r in rankings])
    return str(path)


def test_report_of_a_file_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "r.jsonl",
        ranking("p", "xyz", (1, 2, 3), "ann", 0),
        ranking("p", "zyx", (3, 2, 2), "bob", 10),  # x and y tie before z: 2 alike, 1 tied by bob alone
        ranking("q", "xy", (1, 2), "ann", 20),
        ranking("q", "xy", (2, 1), "bob", 30),  # opposed
        ranking("r", "xy", (1, 2), "cem", 40),  # ranked once
    )
    agreement_report.show([path], parts=2, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["labelers"], result["outputs"], result["outputs_shared"], result["units"]) == (3, 3, 2, 5)
    assert [result["pairwise"][ties]["value"] for ties in CONVENTIONS] == pytest.approx([2 / 3, 2 / 4, 2.5 / 4])
    assert result["kendall_tau_b"]["value"] == pytest.approx((2 / math.sqrt(6) - 1) / 2)
    ann, bob, cem = result["by_labeler"]
    assert (ann["labeler"], ann["rankings"], ann["shared"], ann["ties"]) == ("ann", 2, 2, 0)
    assert bob["ties"] == pytest.approx(1 / 4) and bob["agreement"]["value"] == pytest.approx(2 / 3)
    assert (cem["shared"], cem["ties"], cem["agreement"]["value"], cem["over_time"]) == (0, None, None, [])
    assert result["by_pair"] == [
        {"first": "ann", "second": "bob", "rankings": 2}
        | {"alike": 2, "opposed": 1, "first_ties": 0, "second_ties": 1, "both_tie": 0}
    ]
    assert [(w["from"], w["agreement"]["value"]) for w in result["over_time"]] == [
        ("2026-05-01T12:10:00+00:00", 1.0),
        ("2026-05-01T12:30:00+00:00", 0.0),
    ]
    agreement_report.show([path])
    text = capsys.readouterr().out
    assert "2 of 3 sets of outputs" in text and "66.7%" in text and "72.6 +- 1.5 %" in text
    assert "Over time" in text and "cem" in text


def test_files_without_labelers_are_a_labeler_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", ranking("p", "xyz", (1, 2, 3)))
    two = write(tmp_path / "two.jsonl", ranking("p", "xyz", (1, 3, 2)))
    agreement_report.show([one, two], as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert [r["labeler"] for r in result["by_labeler"]] == [one, two]
    assert result["pairwise"]["untied"]["value"] == pytest.approx(2 / 3)
    assert result["pairwise"]["untied"]["low"] is None  # one prompt has no interval
    assert result["over_time"] == [] and result["without_time"] == 1


def test_nothing_ranked_twice_is_an_error(tmp_path: Path) -> None:
    anonymous = write(tmp_path / "a.jsonl", ranking("p", "xy", (1, 2)), ranking("p", "xy", (2, 1)))
    with pytest.raises(UserError, match="all rankings are by one labeler") as caught:
        agreement_report.show([anonymous])
    assert caught.value.where == anonymous and "`labeler`" in (caught.value.fix or "")
    apart = write(tmp_path / "b.jsonl", ranking("p", "xy", (1, 2), "a"), ranking("q", "xy", (2, 1), "b"))
    with pytest.raises(UserError, match="no outputs were ranked by two of the 2 labelers"):
        agreement_report.show([apart])


# The demo's labelers


def test_two_rubric_labelers_agree_as_the_papers_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The noise that rank.agreement = 0.73 sets, over the outputs of the embedded rankings, measured from a file."""
    rank = Recipe().rank
    ranked = read_rankings(["embedded:rankings"], Drops())
    outputs = [[Output(t, f) for t, f in zip(r.responses, r.finished, strict=True)] for r in ranked]
    scores = [
        [rubric_score(r.prompt.text, *output) for output in group] for r, group in zip(ranked, outputs, strict=True)
    ]
    labeler = RubricLabeler(noise_for_agreement(scores, rank.agreement, rank.tie_margin), rank.tie_margin)
    rows = [
        Ranking(r.prompt, r.responses, labeler.rank(r.prompt, group, seed), r.finished, f"labeler {seed}")
        for r, group in zip(ranked, outputs, strict=True)
        for seed in range(6)
    ]
    agreement_report.show([write(tmp_path / "two.jsonl", *(r for r in rows if r.labeler[-1] in "01"))], as_json=True)
    two = json.loads(capsys.readouterr().out)["pairwise"]["untied"]
    assert two["value"] == pytest.approx(0.73, abs=0.03) and two["counted"] > 1000
    assert two["low"] < 0.73 < two["high"]
    # Fifteen pairs of six labelers narrow it down.
    six = pairwise(comparisons(match([(r.labeler, r) for r in rows]).shared))
    assert six.value == pytest.approx(0.73, abs=0.015)
