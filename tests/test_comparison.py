"""Comparisons: rows of hand-made runs worked out by hand, the page, and how `rlhf compare` goes through the ways."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_report
from safetensors.numpy import save_file

import launch.compare
from launch.compare import compare
from launch.pipeline import Redo
from rlhf.charts import Named, named_points_chart
from rlhf.comparison import Row, finding, rows
from rlhf.comparison_page import membership, print_rows, verdict, write_page
from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.evaluation import Interval, mean_interval
from rlhf.label_placement import nearest, overlap, place
from rlhf.page import count, share
from rlhf.recipe import recipe_to_yaml
from rlhf.report import write_report
from rlhf.rundir import _started
from rlhf.stage import StageContext, run_stage
from rlhf.ways import Comparison, read_comparison, write_comparison

ROOT = Path(__file__).resolve().parent.parent
FILE = """\
recipe: tiny
reference: full
common:
  run.name: three
  run.stages: [sft, rank, reward, ppo-ptx, evaluate]
  reward.peft.method: none
  sft.packing: false
  tracking.wandb: disabled
ways:
  full: {}
  lora: {model.peft.method: lora, sft.lr: 5.0e-3}
  prompt: {model.peft.method: prompt, ppo.lr: 0.01}
"""
PROMPTS = 20
# Held-out scores by prompt (all samples alike unless they are two): of SFT and of PPO.
SCORES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "full": lambda i: (0.5, 1.5 if i % 2 else -0.5),  # differences +1 and -1: mean 0
    "lora": lambda i: (0.25, [0.5, 1.0]),  # two samples, mean 0.75: + 0.5 in each prompt
    "prompt": lambda i: (1.0, 0.75),
}
GOOD, BAD = "Rain falls because warm air rises, cools and lets its water go.", "the the the the the and"
TEXTS = {"full": (BAD, BAD), "lora": (BAD, GOOD), "prompt": (GOOD, BAD)}  # of SFT and PPO
SHAPES = {"full": {"a": (10, 10), "b": (50,)}, "lora": {"a": (3, 4), "b": (2,)}, "prompt": {"a": (4, 1)}}


def leave(folder: Path, stage: str, way: str) -> dict[str, float]:
    """Write into a stage's folder what the comparison reads, and return its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    if stage in ("sft", "ppo-ptx"):
        (folder / "model").mkdir(exist_ok=True)
        name = "model.safetensors" if way == "full" else "adapter.safetensors"
        save_file({key: np.zeros(shape, np.float32) for key, shape in SHAPES[way].items()}, folder / "model" / name)
    if stage == "sft":
        return {"sft/validation_loss_before": 3.5, "sft/validation_loss": 3.25}
    if stage == "rank":
        (folder / "rankings.jsonl").write_text("{}\n")
    if stage == "reward":
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "weights").write_text("the reference's")
    if stage == "ppo-ptx":
        peaks = [{"step": 16, "memory/peak_gb": 2.5}, {"step": 32, "memory/peak_gb": 2.25}, {"step": 32}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in peaks))
        return {"ppo/reward_score": 0.125, "ppo/kl": 1.0}
    if stage == "evaluate":
        found = results(way)
        if not (folder.parent / "ppo-ptx").exists():  # SFT alone, so far
            found["policies"].pop("ppo-ptx")
            found["comparisons"] = []
        (folder / "results.json").write_text(json.dumps(found))
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples(way)))
    return {}


def results(way: str) -> dict[str, Any]:
    low = {"full": 0.4, "lora": 0.6, "prompt": 0.1}[way]
    found = test_report.results(low, low + 0.2)
    found["comparisons"][0]["win_rate"] = low + 0.1
    found["policies"] = {
        "sft": test_report.policy(3.4, 0.5, 0.25, 0.0),
        "ppo-ptx": test_report.policy(3.4, 0.5, 0.75, 1.5),
    }
    return found


def samples(way: str) -> list[dict[str, Any]]:
    found = []
    for i in range(PROMPTS):
        scores = [each if isinstance(each, list) else [each, each] for each in SCORES[way](i)]
        for sample in range(2):
            found.append(
                {
                    "prompt": f"Why does rain fall in town {i}?",
                    "sample": sample,
                    "responses": dict(zip(("sft", "ppo-ptx"), TEXTS[way], strict=True)),
                    "finished": {"sft": True, "ppo-ptx": True},
                    "scores": {"sft": scores[0][sample], "ppo-ptx": scores[1][sample]},
                    "lengths": {"sft": 9, "ppo-ptx": 9},
                    "kl": {"sft": 0.0, "ppo-ptx": 1.5},
                    "use_case": "",
                    "wins_over_sft": {"ppo-ptx": 0.5},
                }
            )
    return found


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Three finished ways in hand-made run folders."""
    (tmp_path / "three.yaml").write_text(FILE)
    found = read_comparison(str(tmp_path / "three.yaml"), [f"run.dir={tmp_path}"])
    for way in found.ways:
        recipe = found.load(way)
        for stage in recipe.run.stages:
            folder = found.folder / way / stage
            metrics = leave(folder, stage, way)
            record = {"state": "done", "metrics": metrics, "seconds": {"sft": 60.0, "ppo-ptx": 90.0}.get(stage, 5.0)}
            (folder / "stage.json").write_text(json.dumps(record))
        (found.folder / way / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    write_comparison(found)
    return found


def by_way(found: list[Row]) -> dict[str, Row]:
    return {row.way: row for row in found}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_stages_wrote(comparison: Comparison) -> None:
    found = rows(comparison)
    assert [row.way for row in found] == ["full", "lora", "prompt"] and {row.state for row in found} == {"done"}
    full, lora, prompt = found
    assert (full.trained, lora.trained, prompt.trained) == (150, 14, 4)
    assert (full.share, lora.share) == (1.0, pytest.approx(14 / (150 + 14)))
    adapter = comparison.folder / "lora" / "ppo-ptx" / "model" / "adapter.safetensors"
    assert lora.ppo_bytes == lora.sft_bytes == adapter.stat().st_size > 14 * 4
    assert (lora.method, lora.lr) == ("lora", (0.005, 0.0001)) and prompt.lr == (0.001, 0.01)
    assert (lora.sft_loss_before, lora.sft_loss) == (3.5, 3.25)
    assert (lora.train_score, lora.score, lora.score_sft, lora.kl) == (0.125, 0.75, 0.25, 1.5)
    assert (lora.sft_seconds, lora.ppo_seconds, lora.peak_gb, lora.prompts) == (60.0, 90.0, 2.5, 20)
    assert lora.win_rate == Interval(pytest.approx(0.7), 0.6, pytest.approx(0.8))


def test_gains_are_differences_prompt_by_prompt(comparison: Comparison) -> None:
    full, lora, prompt = rows(comparison)
    assert lora.gain == Interval(0.5, 0.5, 0.5) and prompt.gain == Interval(-0.25, -0.25, -0.25)
    assert full.gain is not None and full.gain.mean == 0
    # The mean of 20 values of +1 and -1 has a deviation of 1/sqrt(20) = 0.22, so about +-0.44 is an interval of 95 %.
    assert full.gain.low == pytest.approx(-0.44, abs=0.1) and full.gain.high == pytest.approx(0.44, abs=0.1)
    # Against the reference's SFT policy, 0.5 everywhere: 0.75 - 0.5 and 0.75 - 0.5.
    assert lora.gain_reference == Interval(0.25, 0.25, 0.25) and prompt.gain_reference == Interval(0.25, 0.25, 0.25)
    # Against its policy after PPO, of mean 0.5.
    assert lora.versus_reference is not None and lora.versus_reference.mean == pytest.approx(0.25)
    assert full.gain_reference == full.gain and full.versus_reference is None


def test_the_rubric_judges_a_way_against_the_references_sft_policy(comparison: Comparison) -> None:
    full, lora, prompt = rows(comparison)
    # 20 of 20 prompts: the Wilson interval is 1 / (1 + 1.96^2 / 20) to 1.
    assert lora.win_rate_reference == Interval(1.0, pytest.approx(0.83887, abs=1e-5), 1.0)
    assert prompt.win_rate_reference is not None and prompt.win_rate_reference.mean == 0.5  # the same text: ties
    assert full.win_rate_reference == full.win_rate
    worse = comparison.folder / "prompt" / "evaluate" / "samples.jsonl"
    worse.write_text(worse.read_text().replace(BAD, ""))
    changed = by_way(rows(comparison))["prompt"].win_rate_reference
    assert changed is not None and changed.mean == 0.0 and changed.high == pytest.approx(0.16113, abs=1e-5)


def test_words_claim_no_more_than_the_interval_allows(comparison: Comparison) -> None:
    full, lora, prompt = rows(comparison)
    assert (full.finding, lora.finding, prompt.finding) == ("learned nothing", "learned", "got worse")
    assert (full.preference, lora.preference, prompt.preference) == (
        "no clear difference",
        "preferred",
        "SFT preferred",
    )
    assert (full.standing, lora.standing) == ("", "no clear difference")
    words = ("up", "none", "down")
    assert finding(Interval(0.2, 0.0, 0.4), 0.0, 20, words) == "none"  # it reaches the start
    assert finding(Interval(0.2, 0.1, 0.4), 0.0, 20, words) == "up"
    assert finding(Interval(0.2, 0.1, 0.4), 0.5, 20, words) == "down"
    assert finding(Interval(0.2, 0.1, 0.4), 0.0, 19, words) == "too few prompts to tell"
    assert finding(None, 0.0, 20, words) == ""


def test_prompts_that_differ_are_not_compared(comparison: Comparison) -> None:
    path = comparison.folder / "lora" / "evaluate" / "samples.jsonl"
    path.write_text(path.read_text().replace("town 3?", "town 33?"))
    lora = by_way(rows(comparison))["lora"]
    assert lora.gain == Interval(0.5, 0.5, 0.5)  # its own policies still answer the same prompts
    assert lora.gain_reference is lora.versus_reference is lora.win_rate_reference is None


def test_mean_interval_against_all_resamples() -> None:
    # Two values: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4; both ends are beyond 2.5 %.
    assert mean_interval([0.0, 1.0], seed=1) == Interval(0.5, 0.0, 1.0)
    # Four values of which one is 4: a resample holds it k times with probability C(4,k) 3^(4-k) / 4^4; k = 0 has 0.316
    # and k >= 3 has 0.051, k = 4 0.004: the ends are 0 and 3.
    assert mean_interval([0.0, 0.0, 0.0, 4.0], resamples=20000) == Interval(1.0, 0.0, 3.0)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


# --- runs that are not done, or broken -------------------------------------------------------------------------------


def test_a_way_that_failed_is_told_with_its_reason(comparison: Comparison) -> None:
    record = {"state": "failed", "error": "UserError: KL reached 120 nats\n  where: ppo.max_kl", "metrics": {}}
    (comparison.folder / "lora" / "ppo-ptx" / "stage.json").write_text(json.dumps(record))
    (comparison.folder / "prompt" / "evaluate" / "stage.json").unlink()
    found = by_way(rows(comparison))
    assert (found["lora"].state, found["lora"].reason) == ("failed", "ppo-ptx: KL reached 120 nats")
    assert found["lora"].sft_loss == 3.25 and found["prompt"].state == "unfinished" and found["prompt"].score is None
    found = by_way(rows(comparison, {"prompt": "evaluate was killed (signal 9)"}))
    assert found["prompt"].reason == "evaluate was killed (signal 9)"


def test_states_of_a_way_that_is_not_done(comparison: Comparison) -> None:
    stage = comparison.folder / "lora" / "ppo-ptx" / "stage.json"
    stage.write_text(json.dumps({"state": "running"}))
    assert by_way(rows(comparison))["lora"].state == "interrupted"
    assert by_way(rows(comparison, {"lora": "ppo-ptx was killed"}))["lora"].state == "failed"
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    (comparison.folder / "lora" / "lock").write_text(json.dumps(owner))
    assert by_way(rows(comparison))["lora"].state == "running"
    stage.write_text(json.dumps({"state": "stopped"}))
    assert by_way(rows(comparison))["lora"].reason == "ppo-ptx was stopped"
    (comparison.folder / "prompt").rename(comparison.folder / "elsewhere")
    assert by_way(rows(comparison))["prompt"] == Row("prompt", "prompt", (0.001, 0.01), "not run")


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        (
            "evaluate/samples.jsonl",
            '"ppo-ptx": "Rain',
            '"ppo": "Rain',
            ["samples.jsonl, line 1", "no response of ppo-ptx"],
        ),
        ("evaluate/samples.jsonl", '"scores"', '"score', ["samples.jsonl, line 1", "not JSON"]),
        ("evaluate/results.json", '"b": "sft"', '"b": "x"', ["results.json", "no comparison of ppo-ptx with sft"]),
        (
            "evaluate/results.json",
            '"reward_score": 0.75',
            '"reward": 0.75',
            ["results.json", "(KeyError: 'reward_score')"],
        ),
        ("evaluate/results.json", '{"labeler"', '{labeler"', ["results.json", "not JSON"]),
        ("ppo-ptx/metrics.jsonl", '"step": 32}', "32", ["metrics.jsonl, line 3", "not JSON"]),
        ("sft/model/adapter.safetensors", None, "x", ["adapter.safetensors", "weights cannot be read"]),
        ("sft/stage.json", None, "x", ["stage.json cannot be read"]),
    ],
)
def test_a_broken_file_is_named(
    comparison: Comparison, file: str, before: str | None, after: str, words: list[str]
) -> None:
    path = comparison.folder / "lora" / file
    path.write_text(after if before is None else path.read_text().replace(before, after, 1))
    with pytest.raises(UserError) as caught:
        rows(comparison)
    for word in words:
        assert word in str(caught.value)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_with_every_way(comparison: Comparison) -> None:
    found = rows(comparison)
    html = write_page(comparison, found).read_text()
    assert (
        html.count("<svg") == 2
        and "<script" not in html
        and "<link" not in html
        and "http" not in html.split("<svg")[0]
    )
    for way in comparison.ways:
        assert f"<td>{way}" in html
    assert "learned nothing" in html and "83 – 100\u00a0%" not in html and "84 – 100\u00a0%" in html
    assert "var(--ptx)" in html and "#0a0003" not in html and "#0a0005" not in html
    data = json.loads((comparison.folder / "comparison.json").read_text())
    assert data["reference"] == "full" and [row["way"] for row in data["ways"]] == ["full", "lora", "prompt"]
    assert data["ways"][1]["gain"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert data["ways"][1]["trained"] == 14 and data["ways"][0]["finding"] == "learned nothing"


def test_the_page_of_a_comparison_that_has_only_begun(comparison: Comparison) -> None:
    for way in ("lora", "prompt"):
        (comparison.folder / way).rename(comparison.folder / f"{way}.away")
    (comparison.folder / "full" / "evaluate" / "stage.json").write_text('{"state": "failed", "error": "<b>disk</b>"}')
    html = write_page(comparison, rows(comparison)).read_text()
    assert "No way has been evaluated yet." in html and html.count("not run") >= 2 and "<svg" not in html
    assert "&lt;b&gt;disk&lt;/b&gt;" in html and "<b>disk" not in html


def test_the_verdict_names_the_best_and_who_learned_nothing(comparison: Comparison) -> None:
    found = rows(comparison)
    text = verdict(found, "full")
    # All three have the score of `results`: the first is named.
    assert text.startswith("Highest held-out score: full, 0.75 with 100\u00a0% of the weights trained. ")
    assert "PPO raised the score of lora. It lowered that of prompt. Learned nothing: full." in text
    best = [found[0], Row(**vars(found[1]) | {"score": 2.0}), found[2]]
    assert "lora, 2.00 with 8.5\u00a0% of the weights trained: no clear difference from full (+0.25, −" in verdict(
        best, "full"
    )


def test_a_run_of_a_comparison_shows_it_in_its_report(comparison: Comparison) -> None:
    run = comparison.folder / "lora"
    (run / "evaluate" / "results.json").unlink()
    (run / "evaluate" / "samples.jsonl").unlink()
    assert membership(run) is None and "<h2>Comparison</h2>" not in write_report(run).read_text()
    (run / "evaluate" / "stage.json").unlink()
    write_page(comparison, rows(comparison))
    html = write_report(run).read_text()
    assert "<h2>Comparison</h2>" in html and 'href="../comparison.html"' in html
    assert re.search(r'<tr class="this">\s*<td>lora</td>', html) and "one of 3 ways" in html
    (comparison.folder / "another").mkdir()
    assert membership(comparison.folder / "another") is None  # beside it, but none of its ways


def test_the_terminal_table(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(comparison, rows(comparison, {"prompt": "sft failed"}))
    shown = capsys.readouterr().out
    assert "+0.50 [0.50, 0.50]" in shown and "70 % [60, 80]".replace(" %", "\u00a0%") in shown and "2:30" in shown
    assert "full: learned nothing that 20 prompts can show" in shown


def test_counts_and_shares() -> None:
    assert [count(n) for n in (None, 9, 9216, 4_884_480, 134_515_008, 6.2e9)] == [
        "–", "9", "9.22\u00a0k", "4.88\u00a0M", "135\u00a0M", "6.2\u00a0B",
    ]  # fmt: skip
    assert [share(x) for x in (None, 0.00007, 0.0363, 1.0)] == ["–", "0.007\u00a0%", "3.6\u00a0%", "100\u00a0%"]


def test_labels_cover_nothing() -> None:
    # Nine points of which five are nearly one, as LoRA and DoRA are, in a chart of 260 x 140 with labels of 50 x 10.
    anchors = [
        (100.0, 70.0),
        (102.0, 72.0),
        (101.0, 69.0),
        (103.0, 71.0),
        (99.0, 73.0),
        (10, 5),
        (250, 5),
        (10, 135),
        (250, 70),
    ]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    boxes = place(anchors, [(50.0, 10.0)] * 9, markers, (0, 0, 260, 140))
    for i, box in enumerate(boxes):
        assert (round(box[2] - box[0], 9), round(box[3] - box[1], 9)) == (50, 10)
        assert min(box[:2]) >= 0 and box[2] <= 260 and box[3] <= 140
        assert all(overlap(box, other) == 0 for other in [*markers, *boxes[:i]])
    assert place([(50.0, 50.0)], [(20.0, 8.0)], [], (0, 0, 100, 100)) == [(54.0, 46.0, 74.0, 54.0)]  # right of it
    assert overlap((0, 0, 4, 4), (3, 1, 9, 3)) == 2 and overlap((0, 0, 4, 4), (4, 0, 9, 9)) == 0
    assert nearest((10, 10, 20, 20), (0, 15)) == (10, 15) and nearest((10, 10, 20, 20), (12, 13)) == (12, 13)


def test_a_point_is_hollow_where_its_interval_covers_the_start() -> None:
    points = [Named("a", 1e4, 0.5, 0.2, 0.8), Named("b", 1e8, 0.1, -0.1, 0.3)]
    svg = named_points_chart(points, 0.0, "trained weights")
    assert svg.count("fill: var(--card)") == 1 and ">a</text>" in svg and ">b</text>" in svg
    assert "fill: var(--card)" not in named_points_chart(points[:1], 0.0, "trained weights")
    assert "%</text>" in named_points_chart(points, 0.5, "trained weights", share=True)


# --- rlhf compare ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`rlhf compare` with stage programs that run here, with hand-made work; the list of those that did some."""
    monkeypatch.chdir(tmp_path)
    Path("three.yaml").write_text(FILE)
    worked: list[str] = []
    (tmp_path / "broken").mkdir()

    def start(stage: str, recipe: Recipe, name: str, overrides: list[str], redo: Redo) -> int:
        way = recipe.run.name

        def work(ctx: StageContext) -> dict[str, float]:
            worked.append(f"{way} {stage}")
            trouble = tmp_path / "broken" / f"{way}-{stage}"
            if trouble.exists():
                raise UserError(trouble.read_text())
            return leave(ctx.dir, stage, way)

        if (code := tmp_path / "broken" / f"{way}-{stage}-code").exists():
            return int(code.read_text())
        return run_stage(stage, work, [name, *overrides, *redo.options()])

    monkeypatch.setattr(launch.compare, "start", start)
    return worked


ALL = [
    *(f"full {stage}" for stage in ("sft", "rank", "reward", "ppo-ptx", "evaluate")),
    *(f"{way} {stage}" for way in ("lora", "prompt") for stage in ("sft", "ppo-ptx", "evaluate")),
]


def test_all_ways_share_the_references_reward_model(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("three.yaml", []) == 0
    assert started == ALL
    for way in ("lora", "prompt"):
        assert Path(f"runs/three/{way}/reward/model/weights").read_text() == "the reference's"
        record = json.loads(Path(f"runs/three/{way}/ppo-ptx/stage.json").read_text())
        full = json.loads(Path("runs/three/full/ppo-ptx/stage.json").read_text())
        assert record["inputs"]["reward/model"] == full["inputs"]["reward/model"] != "absent"
    shown = capsys.readouterr().out
    assert "way 2 of 3, lora: stage 1 of 3, sft; about 0:0" in shown and "left" in shown
    assert "way 1 of 3, full: stage 1 of 5, sft" in shown and "comparison: runs/three/comparison.html" in shown
    html = Path("runs/three/comparison.html").read_text()
    assert 'href="lora/report.html"' in html and Path("runs/three/lora/report.html").is_file()


def test_a_second_start_skips_what_is_finished(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("three.yaml", [], ["lora"]) == 0
    assert started == [f"full {stage}" for stage in ("sft", "rank", "reward", "evaluate")] + ALL[5:8]
    html = Path("runs/three/comparison.html").read_text()
    assert html.count("unfinished") == 2 and html.count("not run") == 2 and "100 – 100" not in html
    lora = json.loads(Path("runs/three/comparison.json").read_text())["ways"][1]
    assert lora["win_rate_reference"]["mean"] == 1.0 and lora["versus_reference"] is None
    assert compare("three.yaml", []) == 0
    assert started[7:] == ["full ppo-ptx", "full evaluate", *ALL[8:]]
    capsys.readouterr()
    assert compare("three.yaml", []) == 0 and len(started) == 12
    assert capsys.readouterr().out.count("skipped") == 3
    Path("runs/three/lora/ppo-ptx/model/adapter.safetensors").unlink()
    assert compare("three.yaml", []) == 0 and started[12:] == ["lora ppo-ptx"]  # with the same result
    assert compare("three.yaml", [], ["prompt"], fresh=True) == 0
    assert started[13:] == [*ALL[:3], ALL[4], *ALL[8:]]


def test_a_way_that_fails_does_not_stop_the_others(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken/lora-ppo-ptx").write_text("KL reached 120 nats")
    Path("broken/prompt-ppo-ptx-code").write_text("137")
    assert compare("three.yaml", []) == 1
    assert started == [*ALL[:7], "prompt sft"]
    shown = capsys.readouterr().out
    assert "lora: failed: ppo-ptx: KL reached 120 nats" in shown
    assert "prompt: failed: ppo-ptx was killed (signal 9, as the system does when memory runs out)" in shown
    data = json.loads(Path("runs/three/comparison.json").read_text())
    assert [row["state"] for row in data["ways"]] == ["done", "failed", "failed"]
    for trouble in Path("broken").iterdir():
        trouble.unlink()
    assert compare("three.yaml", []) == 0
    assert started[8:] == ["lora ppo-ptx", "lora evaluate", "prompt ppo-ptx", "prompt evaluate"]


def test_a_stop_ends_the_comparison_and_a_reference_without_reward_model_too(
    started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken/full-reward").write_text("all scores alike")
    with pytest.raises(UserError, match="the reference full has no reward model"):
        compare("three.yaml", ["run.seed=3"])
    assert started == ALL[:3] and "full: reward: all scores alike" in capsys.readouterr().out
    Path("broken/full-reward").unlink()
    Path("broken/lora-sft-code").write_text("130")
    assert compare("three.yaml", ["run.seed=3"]) == 130
    assert started[3:] == ALL[2:5]
    assert "To go on where it stopped: rlhf compare three.yaml run.seed=3" in capsys.readouterr().out


def test_what_cannot_run_is_refused_before_anything_starts(started: list[str]) -> None:
    with pytest.raises(UserError, match="there is no way 'lorra'[\\s\\S]*full, lora, prompt"):
        compare("three.yaml", [], ["lorra"])
    with pytest.raises(UserError, match="does not divide"):
        compare("three.yaml", ["ppo.episodes=33"])
    with pytest.raises(UserError, match="nowhere.jsonl"):
        compare("three.yaml", ["data.prompts=[nowhere.jsonl]"])
    assert not started and not Path("runs").exists()
    Path("runs/three/lora/reward").mkdir(parents=True)
    with pytest.raises(UserError, match="that is not the reference's"):
        compare("three.yaml", [])


def test_a_comparison_that_was_moved_is_drawn_where_it_is(started: list[str], tmp_path: Path) -> None:
    assert compare("three.yaml", [], ["full"]) == 0
    Path("runs/three").rename(tmp_path / "moved")
    shown = rlhf("report", "moved", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "moved/comparison.html" in shown.stdout and not Path("runs/three").exists()
    assert "<h1>moved</h1>" in (tmp_path / "moved" / "comparison.html").read_text()


def rlhf(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=550, check=False)


@pytest.mark.slow
def test_a_real_comparison_of_the_tiny_model(tmp_path: Path) -> None:
    """All weights, prompt tuning, and BitFit, which a Llama has no biases for."""
    (tmp_path / "real.yaml").write_text(
        FILE.partition("ways:")[0].replace("reward.peft", "evaluate.prompts: 20\n  reward.peft")
        + "ways:\n  full: {}\n  bitfit: {model.peft.method: bitfit}\n"
        + "  prompt: {model.peft.method: prompt, sft.lr: 3.0e-2, ppo.lr: 1.0e-2}\n"
    )
    done = rlhf("compare", "real.yaml", cwd=tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    data = json.loads((tmp_path / "runs" / "three" / "comparison.json").read_text())
    full, bitfit, prompt = data["ways"]
    assert full["state"] == prompt["state"] == "done"
    assert (bitfit["state"], bitfit["reason"].partition(",")[0]) == ("failed", "sft: bitfit trains bias vectors")
    assert prompt["trained"] == 20 * 64  # virtual tokens x hidden size
    assert full["share"] == 1 and prompt["share"] == pytest.approx(20 * 64 / (full["trained"] + 20 * 64))
    assert full["ppo_bytes"] > 20 * prompt["ppo_bytes"] > 0
    assert full["sft_loss"] < full["sft_loss_before"] and full["peak_gb"] > 0
    for way in (full, prompt):
        assert way["prompts"] == 20 and way["gain"]["low"] <= way["gain"]["mean"] <= way["gain"]["high"]
        assert way["gain"]["mean"] == pytest.approx(way["score"] - way["score_sft"], abs=1e-6)
    assert 0 <= prompt["win_rate_reference"]["low"] <= prompt["win_rate_reference"]["high"] <= 1
    assert "this" in (tmp_path / "runs" / "three" / "prompt" / "report.html").read_text()
