"""Agreement of labelers, from files to the report; and two simulated labelers, who agree as the paper's did."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launch.commands import agreement
from rlhf.config import Recipe
from rlhf.data.records import Drops, Prompt, Ranking, ranking_row, read_rankings, write_jsonl
from rlhf.errors import UserError
from rlhf.functional.agreement import CONVENTIONS, SharedRankings, labeler_pairs, pairwise
from rlhf.labeling.base import Output
from rlhf.labeling.matched_rankings import match
from rlhf.labeling.outputs import Outputs
from rlhf.labeling.page.stored_ranking import StoredRanking, labelled_row
from rlhf.labeling.rubric import rubric_score
from rlhf.labeling.rubric_labeler import RubricLabeler, noise_for_agreement

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


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
    assert [s.ranks for s in found.shared] == [{"a": [1, 2, 3], "b": [1, 2, 2]}, {"a": [2, 2, 1], "b": [1, 1, 1]}]
    assert [s.times for s in found.shared] == [{}, {}]
    assert (found.outputs, found.repeats, dict(found.rankings)) == (4, 0, {"a": 2, "b": 3, "c": 1})


def test_the_last_ranking_of_a_labeler_counts() -> None:
    by_time = [
        ranking("p", "xy", (1, 2), "a", 5),
        ranking("p", "xy", (2, 1), "a", 3),
        ranking("p", "xy", (1, 1), "b", 1),
        ranking("p", "xy", (1, 2), "b"),  # no time: in the order of the file
    ]
    found = match([(r.labeler, r) for r in by_time])
    times = {"a": NOON + timedelta(minutes=5)}
    assert found.shared == [SharedRankings(by_time[0].prompt.key, {"a": [1, 2], "b": [1, 2]}, times)]
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
    agreement.print_agreement([path], parts=2, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["labelers"], result["outputs"], result["outputs_shared"], result["units"]) == (3, 3, 2, 5)
    assert [result["pairwise"][ties]["value"] for ties in CONVENTIONS] == pytest.approx([2 / 3, 2 / 4, 2.5 / 4])
    assert result["kendall_tau_b"]["value"] == pytest.approx((2 / math.sqrt(6) - 1) / 2)
    ann, bob, cem = result["by_labeler"]
    assert (ann["labeler"], ann["rankings"], ann["shared"], ann["ties"]) == ("ann", 2, 2, 0)
    assert bob["ties"] == pytest.approx(1 / 4) and bob["agreement"]["value"] == pytest.approx(2 / 3)
    assert (cem["shared"], cem["ties"], cem["agreement"]["value"], cem["over_time"]) == (0, None, None, [])
    counts = {"concordant": 2, "discordant": 1, "first_ties": 0, "second_ties": 1, "both_tie": 0}
    assert result["by_pair"] == [{"first": "ann", "second": "bob", "rankings": 2} | counts]
    over_time = [(w["from"], w["agreement"]["value"]) for w in result["over_time"]]
    assert over_time == [("2026-05-01T12:10:00+00:00", 1.0), ("2026-05-01T12:30:00+00:00", 0.0)]
    agreement.print_agreement([path])
    text = capsys.readouterr().out
    assert "2 of 3 sets of outputs" in text and "66.7%" in text and "72.6 +- 1.5 %" in text
    assert "Over time" in text and "cem" in text


def test_what_the_labelling_page_writes_is_read(tmp_path: Path) -> None:
    outputs = Outputs(Prompt.from_text("p"), ("x", "y"), (True, False))
    about = {"quality": [7, 2], "shown": [1, 0], "seconds": 4.5, "time": NOON.isoformat(timespec="seconds"), "id": "1"}
    ranked = {"ann": (1, 2), "bob": (1, 1)}
    rows = [labelled_row(StoredRanking(outputs, ranks, who, about)) for who, ranks in ranked.items()]
    write_jsonl(tmp_path / "rankings.jsonl", rows)
    found = match((r.labeler, r) for r in read_rankings([str(tmp_path / "rankings.jsonl")], Drops()))
    times = dict.fromkeys(ranked, NOON)
    assert found.shared == [SharedRankings(outputs.prompt.key, {"ann": [1, 2], "bob": [1, 1]}, times)]


def test_files_without_labelers_are_a_labeler_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", ranking("p", "xyz", (1, 2, 3)))
    two = write(tmp_path / "two.jsonl", ranking("p", "xyz", (1, 3, 2)))
    agreement.print_agreement([one, two], as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert [r["labeler"] for r in result["by_labeler"]] == [one, two]
    assert result["pairwise"]["untied"]["value"] == pytest.approx(2 / 3)
    assert result["pairwise"]["untied"]["low"] is None  # one prompt has no interval
    assert result["over_time"] == [] and result["without_time"] == 1


def test_nothing_ranked_twice_is_an_error(tmp_path: Path) -> None:
    anonymous = write(tmp_path / "a.jsonl", ranking("p", "xy", (1, 2)), ranking("p", "xy", (2, 1)))
    with pytest.raises(UserError, match="all rankings are by one labeler") as caught:
        agreement.print_agreement([anonymous])
    assert caught.value.where == anonymous and "`labeler`" in (caught.value.fix or "")
    apart = write(tmp_path / "b.jsonl", ranking("p", "xy", (1, 2), "a"), ranking("q", "xy", (2, 1), "b"))
    with pytest.raises(UserError, match="no outputs were ranked by two of the 2 labelers"):
        agreement.print_agreement([apart])


# The demo's labelers


def test_two_rubric_labelers_agree_as_the_papers_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The noise that rank.agreement = 0.73 sets, over the outputs of the embedded rankings, measured from a file."""
    rank = Recipe().rank
    ranked = read_rankings(["embedded:rankings"], Drops())
    groups = [(r, [Output(t, f) for t, f in zip(r.responses, r.finished, strict=True)]) for r in ranked]
    scores = [[rubric_score(r.prompt.text, *output) for output in group] for r, group in groups]
    labeler = RubricLabeler(noise_for_agreement(scores, rank.agreement, rank.tie_margin), rank.tie_margin)
    rows = [
        Ranking(r.prompt, r.responses, labeler.rank(r.prompt, group, seed), r.finished, f"labeler {seed}")
        for r, group in groups
        for seed in range(6)
    ]
    path = write(tmp_path / "two.jsonl", *(r for r in rows if r.labeler[-1] in "01"))
    agreement.print_agreement([path], as_json=True)
    two = json.loads(capsys.readouterr().out)["pairwise"]["untied"]
    assert two["value"] == pytest.approx(0.73, abs=0.03) and two["counted"] > 1000
    assert two["low"] < 0.73 < two["high"]
    # Fifteen pairs of six labelers narrow it down.
    six = pairwise(labeler_pairs(match([(r.labeler, r) for r in rows]).shared))
    assert six.value == pytest.approx(0.73, abs=0.015)
