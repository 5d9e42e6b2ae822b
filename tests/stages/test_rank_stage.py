"""The rank stage on the tiny model: contract of its files, resuming, drops, files as labeler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Drops, Prompt, Ranking, read_rankings
from rlhf.functional.seeding import row_seed
from rlhf.labeling.outputs import Outputs, RankResult, SampledOutputs
from rlhf.labeling.rubric import rubric_score
from rlhf.labeling.summary import centred_correlation, summarise
from stages import rank
from support.data_files import write_lines
from support.rank_stage_runs import PROMPTS, outcome, start


def test_the_stage_writes_rankings_in_the_contract(tmp_path: Path, tiny_dir: str, capsys) -> None:
    assert start(tmp_path, tiny_dir) == 0
    text, summary, samples = outcome(tmp_path)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["key"] for row in samples] == sorted(Prompt.from_text(p).key for p in PROMPTS[:5])
    assert {row["prompt"] for row in rows} <= set(PROMPTS[:5])
    for row in rows:
        assert len(row["responses"]) == len(row["ranks"]) == len(row["finished"]) == len(row["rubric"]) >= 2
        assert row["use_case"] == "chat"
        for response, finished, score in zip(row["responses"], row["finished"], row["rubric"], strict=True):
            assert score == rubric_score(row["prompt"], response, finished)
    rankings = read_rankings([str(tmp_path / "runs" / "t" / "rank" / "rankings.jsonl")], Drops())
    assert [list(r.finished) for r in rankings] == [row["finished"] for row in rows]

    assert summary["prompts"] == len(rows) and summary["outputs"] == sum(len(row["ranks"]) for row in rows)
    assert summary["labeler"] == "rubric" and summary["noise_sigma"] >= 0
    assert summary["drops"]["prompt over 64 tokens"] == 1
    metrics = json.loads((tmp_path / "runs" / "t" / "rank" / "stage.json").read_text())["metrics"]
    for name in ("prompts", "outputs", "tie_fraction", "finished_fraction", "response_length"):
        assert metrics[f"rank/{name}"] == summary[name]
    assert "one ranked prompt" in capsys.readouterr().out


def test_an_interrupted_stage_ends_as_one_that_was_not(tmp_path: Path, tiny_dir: str, monkeypatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert start(whole, tiny_dir) == 0

    # Chunks of two prompts. The second dies after its rows are half on disk: one row whole, one in mid-line.
    real, calls = rank.sample, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["seeds"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(rank, "sample", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        raise SystemExit(start(cut, tiny_dir))
    path = cut / "runs" / "t" / "rank" / "samples.jsonl"
    first = path.read_text()
    assert len(first.splitlines()) == 2
    lines = (whole / "runs" / "t" / "rank" / "samples.jsonl").read_text().splitlines(keepends=True)
    fingerprint = json.loads(first.splitlines()[0])["fingerprint"]
    third = json.dumps(json.loads(lines[2]) | {"fingerprint": fingerprint}) + "\n"
    path.write_text(first + third + lines[3][:25])

    calls.clear()
    monkeypatch.setattr(
        rank, "sample", lambda *args, **kwargs: calls.append(len(kwargs["seeds"])) or real(*args, **kwargs)
    )
    assert start(cut, tiny_dir) == 0
    assert calls == [6, 3]  # the first chunk is not sampled again
    (a, summary_a, _), (b, summary_b, _) = outcome(whole), outcome(cut)
    assert a == b and summary_a == summary_b


def test_rankings_from_a_file_are_copied(tmp_path: Path, tiny_dir: str) -> None:
    ranked = {"prompt": "a?", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]}
    file = write_lines(tmp_path / "ranked.jsonl", ranked, {"prompt": "b?", "chosen": "good", "rejected": "bad"})
    assert start(tmp_path, tiny_dir, "rank.labeler=file", f"data.rankings=['{file}']") == 0
    stage = tmp_path / "runs" / "t" / "rank"
    rows = [json.loads(line) for line in (stage / "rankings.jsonl").read_text().splitlines()]
    expected = [("a?", ["x", "y", "z"], [2, 1, 2]), ("b?", ["good", "bad"], [1, 2])]
    assert [(r["prompt"], r["responses"], r["ranks"]) for r in rows] == expected
    summary = json.loads((stage / "summary.json").read_text())
    # Pairs: 3 of the first prompt, one of them tied; 1 of the second.
    assert (summary["prompts"], summary["outputs"], summary["pairs"], summary["tie_fraction"]) == (2, 5, 3, 0.25)
    assert summary["noise_sigma"] == 0.0 and not (stage / "samples.jsonl").exists()


def test_outputs_that_cannot_be_ranked_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts = [Prompt.from_text(text) for text in ("a", "b")]
    samples = SampledOutputs(tmp_path / "samples.jsonl", "f")
    responses = ["x", " x", "", "y", "same", "same", " ", "same"]
    samples.add(prompts, responses, [True] * 8, [1, 2, 3, 4] * 2)
    drops = Drops()
    (kept,) = rank.distinct_outputs(prompts, samples, drops)
    assert kept == Outputs(prompts[0], ("x", "y"), (True, True)) and kept.lengths == (1, 4)
    assert dict(drops.table()) == {
        "empty output": 2,
        "output identical to another of its prompt": 3,
        "prompt with fewer than two distinct outputs": 1,
    }
    # Rows of other settings are not taken over.
    assert SampledOutputs(tmp_path / "samples.jsonl", "f").rows == samples.rows
    assert samples.has_all(prompts) and samples.of(prompts[1]).responses == tuple(responses[4:])
    assert SampledOutputs(tmp_path / "samples.jsonl", "other").rows == {}


def test_centred_correlation_by_hand() -> None:
    # Each group rises by itself; the groups' levels, which fall, are taken out.
    assert centred_correlation([[1, 2], [1, 2]], [[10, 20], [0, 10]]) == pytest.approx(1.0)
    # Centred: (-1, 0, 1) and (1, 1, -2): -3 / sqrt(2 * 6)
    assert centred_correlation([[1, 2, 3]], [[5, 5, 2]]) == pytest.approx(-3 / 12**0.5)
    assert centred_correlation([[1, 1]], [[3, 4]]) is None


def test_summary_by_hand() -> None:
    r = Ranking(Prompt.from_text("a"), ("x", "y", "z"), (1, 2, 2), (True, False, False))
    summary = summarise(RankResult([r], [[6, 3, 3]], {"noise_sigma": 0.5}))
    assert summary["pairs"] == 2 and summary["tie_fraction"] == pytest.approx(1 / 3)
    assert summary["finished_fraction"] == pytest.approx(1 / 3) and summary["response_length"] == 4
    # Ranks less their mean (-2, 1, 1)/3, lengths (2, -1, -1): -1 exactly; positions (-1, 0, 1): 1 / sqrt(2/3 * 2).
    assert summary["correlation_rank_length"] == pytest.approx(-1.0)
    assert summary["correlation_rank_position"] == pytest.approx(1 / (4 / 3) ** 0.5)
    assert summary["noise_sigma"] == 0.5
    # A prompt that several people ranked counts once.
    a, b = Prompt.from_text("a"), Prompt.from_text("b")
    rankings = [Ranking(prompt, ("x", "y"), (1, 2), (True, True)) for prompt in (a, b, a)]
    summary = summarise(RankResult(rankings, [], {}))
    assert (summary["prompts"], summary["rankings"], summary["outputs"]) == (2, 3, 6)


def test_output_seeds_differ_by_prompt_and_output() -> None:
    keys = [Prompt.from_text(p).key for p in PROMPTS[:5]]
    assert len({row_seed(1, "rank", key, i) for key in keys for i in range(4)}) == 20
