"""Inputs of a stage that a moved checkout does not change, and changes of the recipe that are not accepted."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import sources
from rlhf.run import fingerprints
from rlhf.run.folder import RunFolder
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.files import hash_path
from support.stage_runs import RECIPE, never, stage_json, train

pytestmark = pytest.mark.usefixtures("stage_folder")

MINE = [*RECIPE, "data.demonstrations=[embedded:mine]"]


def checkout(monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Have the project lie in this folder, and return its data set `mine`."""
    path = Path(name, "data", "mine.jsonl").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(sources, "__file__", str(Path(name, "rlhf", "data", "sources.py").resolve()))
    return path


def stop(ctx: StageContext) -> dict[str, Any]:
    """Stop with a checkpoint."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert ctx.stop_requested
    ctx.checkpoints.save(1, lambda staged: (staged / "state").write_text("x"))
    return {}


def resume(ctx: StageContext) -> dict[str, Any]:
    """Resume from the checkpoint of `stop`."""
    assert ctx.checkpoints.newest() is not None
    return train(ctx)


def test_a_moved_checkout_changes_nothing_and_other_data_in_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkout(monkeypatch, "first")
    first.write_text('{"prompt": "a", "response": "b"}\n')
    assert run_stage("sft", train, MINE) == 0
    assert stage_json()["inputs"]["embedded:mine"] == hash_path(first)
    assert RunFolder("runs/demo").from_key("embedded:mine") == first
    second = checkout(monkeypatch, "second")
    first.rename(second)
    assert run_stage("sft", never, MINE) == 0
    second.write_text('{"prompt": "a", "response": "c"}\n')
    assert run_stage("sft", train, MINE) == 0
    assert "these have changed: embedded:mine" in capsys.readouterr().out


def test_a_run_that_recorded_embedded_data_by_its_path_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data = checkout(monkeypatch, "first")
    data.write_text('{"prompt": "a", "response": "b"}\n')
    with monkeypatch.context() as earlier:
        earlier.setattr(fingerprints, "EMBEDDED", "by path, as earlier versions did:")
        assert run_stage("sft", stop, MINE) == 143
    assert stage_json()["inputs"][str(data)] == hash_path(data)
    data.rename(checkout(monkeypatch, "second"))
    assert run_stage("sft", resume, MINE) == 0
    assert stage_json()["attempts"] == 2 and run_stage("sft", never, MINE) == 0


def test_accepting_one_change_does_not_accept_an_earlier_one() -> None:
    assert [run_stage(stage, train, RECIPE) for stage in ("sft", "ppo")] == [0, 0]
    before = stage_json("ppo")
    changed = [*RECIPE, "ppo.lr=0.5"]
    assert run_stage("reward", train, [*changed, "--fresh"]) == 0  # stages that follow are not asked about
    changed += ["ppo.gamma=0.5"]
    assert run_stage("sft", never, [*changed, "--accept-change", "ppo.gamma"]) == 0
    assert stage_json("ppo") == before
    assert run_stage("ppo", train, changed) == 0
    assert stage_json("ppo")["attempts"] == 1 and stage_json("ppo")["fingerprint"] != before["fingerprint"]
