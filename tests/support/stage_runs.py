"""Stand in for the work of a stage, stop a stage, and compare what two runs of it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.run.stage import StageContext
from support.paths import ROOT
from support.ports import free_port

DATA = ("demonstrations", "prompts", "prompts_heldout", "pretraining", "pretraining_heldout", "cloze")
RECIPE = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "run.name=demo", "run.dir=runs"]
RECIPE += [f"data.{name}=[{name}.jsonl]" for name in DATA]
TIMES = ("time", "perf/", "memory/")  # beginnings of the names of metrics that depend on the clock


def train(ctx: StageContext) -> dict[str, Any]:
    """Leave a model, a metric and a checkpoint, as the work of a stage does."""
    (ctx.dir / "model").mkdir(exist_ok=True)
    (ctx.dir / "model" / "weights").write_text(f"{ctx.name} {ctx.recipe.sft.lr}")
    ctx.checkpoints.save(1, lambda staged: (staged / "state").write_text("x"))
    ctx.tracker.log({f"{ctx.name}/loss": 0.5}, 10)
    return {f"{ctx.name}/loss": 0.5}


def never(ctx: StageContext) -> dict[str, Any]:
    """Fail the test: this work must not be asked for."""
    raise AssertionError("the stage should have been skipped")


def stage_json(name: str = "sft") -> dict[str, Any]:
    """Return the record of a stage of the run `demo`."""
    return json.loads(Path("runs/demo", name, "stage.json").read_text())


def start(program: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """Start the text of a stage program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *RECIPE, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pair(program: str, *arguments: str, **env: str) -> list[subprocess.Popen[str]]:
    """Start the text of a stage program as two processes of one run, without a launcher."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **env}
    arguments = ("launch.processes=2", "sft.micro_batch_size=8", *arguments)
    return [start(program, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]


def stop_at(monkeypatch: pytest.MonkeyPatch, ask: int) -> None:
    """Send this process SIGTERM just before the stage asks for the `ask`-th time whether to stop."""
    asked = 0

    def stop_requested(self: StageContext) -> bool:
        nonlocal asked
        asked += 1
        if asked == ask:
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(self.signals.agreed())

    monkeypatch.setattr(StageContext, "stop_requested", property(stop_requested))


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


def assert_same(whole: Path, resumed: Path) -> None:
    """Check that two folders of a stage hold the same weights, metrics and tables, bit for bit."""
    weights = [path.relative_to(whole) for path in whole.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert weights
    for path in weights:
        assert (whole / path).read_bytes() == (resumed / path).read_bytes(), path
    assert rows(whole / "metrics.jsonl") == rows(resumed / "metrics.jsonl")
    for table in (whole / "tables").glob("*.jsonl"):
        assert table.read_text() == (resumed / "tables" / table.name).read_text()
    ours, theirs = (json.loads((folder / "stage.json").read_text())["metrics"] for folder in (whole, resumed))
    assert ours == theirs
