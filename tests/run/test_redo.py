"""Redoing a run from a stage on, keeping what was done under another recipe, and `rlhf status`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launch import launcher, pipeline
from launch.cli import app
from launch.commands import status
from launch.launcher import Redo
from rlhf.errors import UserError
from rlhf.recipe import fields, load_recipe
from rlhf.run.folder import RunFolder
from rlhf.run.stage import StageContext, run_stage
from rlhf.stage_table import STAGES
from support.command import rlhf
from support.stage_runs import RECIPE, never, stage_json, train

pytestmark = pytest.mark.usefixtures("stage_folder")


def stop(ctx: StageContext) -> dict[str, Any]:
    """Stop at the first step, with a checkpoint."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert ctx.stop_requested
    ctx.checkpoints.save(16, lambda staged: (staged / "state").write_text("x"))
    ctx.tracker.log({"ppo/reward_score": 0.25, "ppo/kl": 1.5}, 16)
    return {}


def resume(ctx: StageContext) -> dict[str, Any]:
    """Resume from the checkpoint of `stop`."""
    newest = ctx.checkpoints.newest()
    assert newest is not None and newest.name == "step-000016"
    return train(ctx)


def test_a_finished_stage_is_kept_when_its_change_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", train, RECIPE) == 0
    changed = [*RECIPE, "sft.lr=0.5"]
    assert run_stage("sft", never, changed) == 2
    told = capsys.readouterr().err
    assert "sft.lr: 0.001 -> 0.5 (of sft; may be accepted)" in told and "--accept-change sft.lr" in told
    assert run_stage("rank", train, [*changed, "--accept-change", "sft.lr"]) == 0  # a later stage, of the new recipe
    assert stage_json("sft")["accepted"] == [{"key": "sft.lr", "old": 0.001, "new": 0.5}]
    assert run_stage("sft", never, changed) == 0  # kept, and from now on without the option
    assert Path("runs/demo/sft/model/weights").read_text() == "sft 0.001"
    assert run_stage("sft", never, RECIPE) == 2  # nor does it change back unasked


def test_a_finished_stage_is_skipped_before_its_program_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(stage: str, *words: str) -> int:
        """Return the exit code of `rlhf STAGE`: 7 where a program would start."""
        with pytest.raises(SystemExit) as ended:
            app([stage, *RECIPE, *words])
        return int(ended.value.code or 0)

    monkeypatch.setattr(launcher, "supervise", lambda *line, **more: 7)
    assert code("sft") == 7 and not Path("runs/demo/sft").exists()
    assert [run_stage(stage, train, RECIPE) for stage in ("sft", "ppo")] == [0, 0]
    before, _ = stage_json("sft"), capsys.readouterr()
    assert code("sft") == 0 and stage_json("sft") == before and not Path("runs/demo/lock").exists()
    assert "sft: finished, recipe and inputs unchanged; skipped (runs/demo/sft)" in capsys.readouterr().out
    assert code("rank") == code("sft", "--fresh") == 7
    assert code("sft", "sft.lr=0.5") == 7  # what stands against it the program names
    assert code("sft", "ppo.kl_coef=0.5") == 7
    with RunFolder("runs/demo").lock():
        assert code("sft") == 7
    Path("runs/demo/sft/model/weights").unlink()
    assert code("sft") == 7


def test_an_interrupted_stage_takes_allowed_changes_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("ppo", stop, RECIPE) == 143
    for change, key in (("ppo.batch_size=32", "ppo.batch_size"), ("run.seed=9", "run.seed")):
        assert run_stage("ppo", never, [*RECIPE, change, "--accept-change", key]) == 2
        told = capsys.readouterr().err
        assert (
            f"{key}:" in told
            and "cannot be accepted: ppo would be made partly" in told
            and "keep what is done" not in told
        )
    changed = [*RECIPE, "ppo.lr=0.5", "ppo.gamma=0.5"]
    assert run_stage("ppo", never, [*changed, "--accept-change", "ppo.lr"]) == 2  # the other one is not accepted
    told = capsys.readouterr().err
    assert "ppo.gamma" in told and "ppo.lr:" not in told
    both = ["--accept-change", "ppo.lr", "--accept-change", "ppo.gamma"]
    assert run_stage("ppo", resume, [*changed, *both]) == 0
    assert [entry["key"] for entry in stage_json("ppo")["accepted"]] == ["ppo.lr", "ppo.gamma"]
    assert stage_json("ppo")["attempts"] == 2
    assert run_stage("ppo", never, changed) == 0


def test_files_of_data_are_never_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", train, RECIPE) == 0
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "response": "b"}\n')
    key = "data.demonstrations"
    assert run_stage("sft", never, [*RECIPE, f"{key}=[{other}]", "--accept-change", key]) == 2
    assert "cannot be accepted: sft would have to be done again" in capsys.readouterr().err


def test_a_key_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", never, [*RECIPE, "--accept-change", "sft.rl"]) == 2
    told = capsys.readouterr().err
    assert "no recipe has a field sft.rl" in told and "did you mean sft.lr?" in told


def test_what_may_change_exists() -> None:
    known = {key for key, _ in fields()}
    assert all(key in known for stage in STAGES.values() for key in stage.may_change)


def test_from_needs_the_stages_before_and_takes_those_after() -> None:
    recipe = load_recipe(RECIPE[0], [*RECIPE[1:], "run.stages=[sft,rank,reward]"])
    assert pipeline.stages_from(recipe, Redo()) == ["sft", "rank", "reward"]
    with pytest.raises(UserError, match="the sft stage has not finished"):
        pipeline.stages_from(recipe, Redo("rank"))
    assert run_stage("sft", train, RECIPE) == 0
    assert pipeline.stages_from(recipe, Redo("rank")) == ["rank", "reward"]
    with pytest.raises(UserError, match=r"evaluate is not a stage[\s\S]*take one of sft, rank, reward"):
        pipeline.stages_from(recipe, Redo("evaluate"))
    with pytest.raises(UserError, match="contradict"):
        pipeline.stages_from(recipe, Redo("rank", fresh=True))


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    status.show_status(run)
    return capsys.readouterr().out


def test_status_of_stages_in_every_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ctx: StageContext) -> dict[str, Any]:
        raise ValueError("boom")

    monkeypatch.setenv("COLUMNS", "160")
    assert run_stage("sft", train, RECIPE) == 0
    assert run_stage("ppo-ptx", stop, RECIPE) == 143
    with pytest.raises(ValueError, match="boom"):
        run_stage("reward", fail, RECIPE)
    capsys.readouterr()
    run = Path("runs/demo")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    lines = {line.split()[1]: line for line in shown(run, capsys).splitlines() if line.startswith("│")}
    assert "done" in lines["sft"] and "sft/loss 0.5" in lines["sft"]
    assert "not started" in lines["rank"]
    assert "failed" in lines["reward"]
    assert "stopped" in lines["ppo-ptx"] and "16 of " in lines["ppo-ptx"] and "ppo/kl 1.5" in lines["ppo-ptx"]
    told = shown(run, capsys)
    assert "reward: ValueError: boom" in told and "next: rank: rlhf run runs/demo/recipe.yaml" in told
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    # A process that was killed leaves `running` and a lock behind; a live one holds it.
    running = stage_json("ppo-ptx") | {"state": "running"}
    (run / "ppo-ptx" / "stage.json").write_text(json.dumps(running))
    assert "interrupted" in shown(run, capsys)
    seen: list[str] = []

    def look(ctx: StageContext) -> dict[str, Any]:
        seen.append(shown(run, capsys))
        return train(ctx)

    assert run_stage("rank", look, RECIPE) == 0
    assert f"running now: process {os.getpid()}" in seen[0] and " running " in seen[0]
    (run / "sft" / "stage.json").write_text("{")
    assert "unreadable" in shown(run, capsys)
    with pytest.raises(UserError, match="not a run folder"):
        status.show_status(run / "sft")


def shown_by(*arguments: str) -> str:
    """Run the command and return what it prints."""
    done = rlhf(*arguments, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_and_fresh_redo_and_status_shows_it() -> None:
    run = ["run", "tiny", "run.name=demo", "run.stages=[sft,rank]", "rank.prompts=4", "tracking.wandb=disabled"]
    run += ["sft.epochs=0.25"]
    shown_by(*run)
    before = {stage: stage_json(stage)["ended"] for stage in ("sft", "rank")}
    weights = Path("runs/demo/sft/model/model.safetensors").stat().st_mtime_ns
    shown_by(*run, "rank.temperature=0.5", "--from", "rank")
    assert stage_json("sft")["ended"] == before["sft"] and stage_json("rank")["attempts"] == 1
    assert Path("runs/demo/rank.old/rankings.jsonl").exists()
    assert Path("runs/demo/sft/model/model.safetensors").stat().st_mtime_ns == weights
    assert "all stages are done" in shown_by("status", "runs/demo")
    shown_by(*run, "rank.temperature=0.5", "--fresh")
    assert Path("runs/demo/sft.old/model").exists()
    assert Path("runs/demo/sft/model/model.safetensors").stat().st_mtime_ns != weights
