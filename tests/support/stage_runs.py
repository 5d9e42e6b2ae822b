"""Stand in for the work of a stage, stop a stage, and compare what two runs of it left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.run.stage import StageContext

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
