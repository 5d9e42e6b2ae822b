"""`rlhf compare`: order, skipping, arms that fail, stops and refusals; and one real comparison of the tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import launch.commands.compare
from launch.commands.compare import run_comparison
from launch.launcher import Redo
from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import console
from support.command import rlhf
from support.comparison_runs import FILE, leave


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have `rlhf compare` run hand-made stages in this process; return the list of those that did any work."""
    monkeypatch.chdir(tmp_path)
    Path("three.yaml").write_text(FILE)
    worked: list[str] = []
    (tmp_path / "broken").mkdir()

    def start(stage: str, recipe: Recipe, name: str, overrides: list[str], redo: Redo) -> int:
        arm = recipe.run.name

        def work(ctx: StageContext) -> dict[str, float]:
            worked.append(f"{arm} {stage}")
            trouble = tmp_path / "broken" / f"{arm}-{stage}"
            if trouble.exists():
                raise UserError(trouble.read_text())
            return leave(ctx.dir, stage, arm)

        if (code := tmp_path / "broken" / f"{arm}-{stage}-code").exists():
            return int(code.read_text())
        return run_stage(stage, work, [name, *overrides, *redo.options()])

    monkeypatch.setattr(launch.commands.compare, "start", start)
    return worked


ALL = [
    *(f"full {stage}" for stage in ("sft", "rank", "reward", "ppo-ptx", "evaluate")),
    *(f"{arm} {stage}" for arm in ("lora", "prompt") for stage in ("sft", "ppo-ptx", "evaluate")),
]


def test_all_arms_share_the_references_reward_model(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_comparison("three.yaml", []) == 0
    assert started == ALL
    for arm in ("lora", "prompt"):
        assert Path(f"runs/three/{arm}/reward/model/weights").read_text() == "the reference's"
        record = json.loads(Path(f"runs/three/{arm}/ppo-ptx/stage.json").read_text())
        full = json.loads(Path("runs/three/full/ppo-ptx/stage.json").read_text())
        assert record["inputs"]["reward/model"] == full["inputs"]["reward/model"] != "absent"
    shown = capsys.readouterr().out
    assert "arm 2 of 3, lora: stage 1 of 3, sft; about 0:0" in shown and "left" in shown
    assert "arm 1 of 3, full: stage 1 of 5, sft" in shown and "comparison: runs/three/comparison.html" in shown
    html = Path("runs/three/comparison.html").read_text()
    assert 'href="lora/report.html"' in html and Path("runs/three/lora/report.html").is_file()


def test_a_second_start_skips_what_is_finished(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_comparison("three.yaml", [], ["lora"]) == 0
    assert started == [f"full {stage}" for stage in ("sft", "rank", "reward", "evaluate")] + ALL[5:8]
    html = Path("runs/three/comparison.html").read_text()
    assert html.count(">unfinished</td>") == html.count(">not run</td>") == 2  # in both tables
    lora = json.loads(Path("runs/three/comparison.json").read_text())["arms"][1]
    assert lora["win_rate_reference"]["mean"] == 1.0 and lora["versus_reference"] is None
    assert run_comparison("three.yaml", []) == 0
    assert started[7:] == ["full ppo-ptx", "full evaluate", *ALL[8:]]
    capsys.readouterr()
    assert run_comparison("three.yaml", []) == 0 and len(started) == 12
    assert capsys.readouterr().out.count("skipped") == 3
    Path("runs/three/lora/ppo-ptx/model/adapter_model.safetensors").unlink()
    assert run_comparison("three.yaml", []) == 0 and started[12:] == ["lora ppo-ptx"]  # with the same result
    assert run_comparison("three.yaml", [], ["prompt"], fresh=True) == 0
    assert started[13:] == ALL[8:]


def test_an_arm_that_fails_does_not_stop_the_others(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken/lora-ppo-ptx").write_text("KL reached 120 nats")
    Path("broken/prompt-ppo-ptx-code").write_text("137")
    assert run_comparison("three.yaml", []) == 1
    assert started == [*ALL[:7], "prompt sft"]
    shown = capsys.readouterr().out
    assert "lora: failed: ppo-ptx: KL reached 120 nats" in shown
    assert "prompt: failed: ppo-ptx was killed (signal 9, as the system does when memory runs out)" in shown
    data = json.loads(Path("runs/three/comparison.json").read_text())
    assert [row["state"] for row in data["arms"]] == ["done", "failed", "failed"]
    for trouble in Path("broken").iterdir():
        trouble.unlink()
    assert run_comparison("three.yaml", []) == 0
    assert started[8:] == ["lora ppo-ptx", "lora evaluate", "prompt ppo-ptx", "prompt evaluate"]


def test_a_stop_or_a_reference_without_reward_model_ends_the_comparison(started: list[str], capsys) -> None:
    Path("broken/full-reward").write_text("all scores alike")
    with pytest.raises(UserError, match="the reference full has no reward model"):
        run_comparison("three.yaml", ["run.seed=3"])
    assert started == ALL[:3] and "full: reward: all scores alike" in capsys.readouterr().out
    Path("broken/full-reward").unlink()
    Path("broken/lora-sft-code").write_text("130")
    assert run_comparison("three.yaml", ["run.seed=3"]) == 130
    assert started[3:] == ALL[2:5]
    assert "To continue where it stopped: rlhf compare three.yaml run.seed=3" in capsys.readouterr().out


def test_the_second_of_several_machines_leaves_the_writing_to_the_first(started: list[str], monkeypatch) -> None:
    monkeypatch.setattr(console, "quiet", False)  # and back to what it was
    Path("hosts").write_text("a slots=1\nb slots=1\n")
    for stage in ("sft", "rank", "reward", "ppo-ptx", "evaluate"):
        Path(f"broken/full-{stage}-code").write_text("0")
    Path("runs/three/full/reward/model").mkdir(parents=True)
    Path("runs/three/full/reward/stage.json").write_text('{"state": "done"}')  # as the first has written it
    overrides = ["launch.hostfile=hosts", "launch.node_rank=1"]
    overrides += ["sft.micro_batch_size=8", "ppo.micro_batch_size=4"]
    assert run_comparison("three.yaml", overrides, ["full"]) == 0
    assert not started and console.quiet and os.listdir("runs/three") == ["full"]


def test_what_cannot_run_is_refused_before_anything_starts(started: list[str]) -> None:
    with pytest.raises(UserError, match="there is no arm 'lorra'[\\s\\S]*full, lora, prompt"):
        run_comparison("three.yaml", [], ["lorra"])
    with pytest.raises(UserError, match="does not divide"):
        run_comparison("three.yaml", ["ppo.episodes=33"])
    with pytest.raises(UserError, match="nowhere.jsonl"):
        run_comparison("three.yaml", ["data.prompts=[nowhere.jsonl]"])
    assert not started and not Path("runs").exists()
    Path("runs/three/lora/reward").mkdir(parents=True)
    with pytest.raises(UserError, match="that is not the reference's"):
        run_comparison("three.yaml", [])
    assert not started and os.listdir("runs/three") == ["lora"]


def test_a_comparison_that_was_moved_is_drawn_where_it_is(started: list[str], tmp_path: Path) -> None:
    assert run_comparison("three.yaml", [], ["full"]) == 0
    Path("runs/three").rename(tmp_path / "moved")
    shown = rlhf("report", "moved", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "moved/comparison.html" in shown.stdout and not Path("runs/three").exists()
    assert "<h1>moved</h1>" in (tmp_path / "moved" / "comparison.html").read_text()


@pytest.mark.slow
def test_a_real_comparison_of_the_tiny_model(tmp_path: Path) -> None:
    """All weights, prompt tuning, and BitFit, which a Llama has no biases for."""
    sizes = "evaluate.prompts: 20\n  data.max_response_tokens: 32\n  rank.prompts: 8\n  ppo.episodes: 16"
    (tmp_path / "real.yaml").write_text(
        FILE.partition("arms:")[0].replace("reward.peft", f"{sizes}\n  reward.peft")
        + "arms:\n  full: {}\n  bitfit: {model.peft.method: bitfit}\n"
        + "  prompt: {model.peft.method: prompt, sft.lr: 3.0e-2, ppo.lr: 1.0e-2}\n"
    )
    done = rlhf("compare", "real.yaml", cwd=tmp_path, timeout=550)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    data = json.loads((tmp_path / "runs" / "three" / "comparison.json").read_text())
    full, bitfit, prompt = data["arms"]
    assert full["state"] == prompt["state"] == "done"
    assert (bitfit["state"], bitfit["reason"].partition(",")[0]) == ("failed", "sft: bitfit trains bias vectors")
    assert prompt["trained"] == 20 * 64  # virtual tokens x hidden size
    assert full["share"] == 1 and prompt["share"] == pytest.approx(20 * 64 / (full["trained"] + 20 * 64))
    assert full["ppo_bytes"] > 20 * prompt["ppo_bytes"] > 0
    assert full["sft_loss"] < full["sft_loss_before"] and full["peak_gb"] > 0
    for arm in (full, prompt):
        assert arm["prompts"] == 20 and arm["gain"]["low"] <= arm["gain"]["mean"] <= arm["gain"]["high"]
        assert arm["gain"]["mean"] == pytest.approx(arm["score"] - arm["score_sft"], abs=1e-6)
    assert 0 <= prompt["win_rate_reference"]["low"] <= prompt["win_rate_reference"]["high"] <= 1
    assert '<tr class="this">' in (tmp_path / "runs" / "three" / "prompt" / "report.html").read_text()
