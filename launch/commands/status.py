"""`rlhf status RUN`: how far the stages of a run are, and which would run next. Only reads."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.plan import plan_ppo
from rlhf.recipe import load_recipe
from rlhf.run.folder import RunFolder, live_owner
from rlhf.run.sealing import list_checkpoints, verify
from rlhf.stage_table import STAGES, is_ppo
from rlhf.system.console import console, duration, table


class StageProgress(NamedTuple):
    """State of a stage."""

    state: str  # not started, running, interrupted, stopped, failed, done, or unreadable
    step: int | None = None  # of the newest sealed checkpoint
    total: int | None = None  # steps in all, where that is known
    age: float | None = None  # seconds since the result or that checkpoint
    seconds: float = 0.0  # of all attempts
    metrics: Mapping[str, float] = {}
    error: str = ""


def show_status(path: Path) -> None:
    """Print the table of a run and what comes next; raise UserError if the folder is not a run."""
    run, owner = RunFolder(path), live_owner(path)
    recipe = load_recipe(str(run.recipe_file()))
    others = [stage for stage in STAGES if stage not in recipe.run.stages and run.stage_dir(stage).is_dir()]
    stages = {stage: progress(run, recipe, stage, owner is not None) for stage in [*recipe.run.stages, *others]}
    columns = ["stage", "state", "sealed step", "age", "time", "metrics"]
    table(str(path), columns, [_row(stage, each) for stage, each in stages.items()])
    for stage, each in stages.items():
        if each.error:
            console.print(f"{stage}: {each.error}", markup=False, soft_wrap=True, style="red")
    console.print(_next(path, recipe, stages, owner), markup=False, soft_wrap=True)


def progress(run: RunFolder, recipe: Recipe, stage: str, in_use: bool) -> StageProgress:
    """Return the progress of a stage from its files; with `in_use`, a process holds the run's lock."""
    try:
        record = run.read_stage(stage)
    except UserError as error:
        return StageProgress("unreadable", error=error.what)
    if record is None:
        return StageProgress("not started")
    state, folder = str(record.get("state")), run.stage_dir(stage)
    newest = _newest(folder / "checkpoints", str(record.get("identity", "")))
    since = newest.stat().st_mtime if newest else None
    if state == "done" and "ended" in record:
        since = datetime.fromisoformat(record["ended"]).timestamp()
    return StageProgress(
        "interrupted" if state == "running" and not in_use else state,
        int(newest.name.removeprefix("step-")) if newest else None,
        plan_ppo(recipe).iterations if is_ppo(stage) else None,
        None if since is None else max(0.0, time.time() - since),  # a clock may have gone backwards
        float(record.get("seconds", 0.0)),
        record.get("metrics") or _last_metrics(folder / "metrics.jsonl"),
        str(record.get("error") or "").split("\n")[0] if state == "failed" else "",
    )


def _newest(checkpoints: Path, identity: str) -> Path | None:
    """Return the newest checkpoint whose files have the sizes that were sealed; their content is not read."""
    sound = (f for f in reversed(list_checkpoints(checkpoints)) if not verify(f, contents=False, identity=identity))
    return next(sound, None)


def _last_metrics(path: Path) -> dict[str, float]:
    """Return the newest values in metrics.jsonl; a line that is being written is left out."""
    found: dict[str, float] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            found |= json.loads(line)
    return found


def _row(stage: str, each: StageProgress) -> list[str]:
    shown = []
    for names in STAGES[stage].headlines:
        name = next((name for name in names if each.metrics.get(name) is not None), None)
        if name:
            shown.append(f"{name} {each.metrics[name]:.4g}")
    age = "" if each.age is None else _age(each.age)
    return [stage, each.state, _step(each), age, duration(each.seconds) if each.seconds else "", ", ".join(shown)]


def _step(each: StageProgress) -> str:
    return "" if each.step is None else f"{each.step} of {each.total}" if each.total else str(each.step)


def _age(seconds: float) -> str:
    """Format an age: `3 min`, `5 h`, `2 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (seconds >= size and unit != "days"):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _next(path: Path, recipe: Recipe, stages: Mapping[str, StageProgress], owner: dict[str, Any] | None) -> str:
    if owner:
        return f"running now: process {owner['pid']} on {owner['host']}"
    command = shlex.join(["rlhf", "run", str(path / "recipe.yaml")])
    for stage in recipe.run.stages:
        if stages[stage].state != "done":
            at = f", from step {_step(stages[stage])}" if stages[stage].step is not None else ""
            return f"next: {stage}{at}: {command}"
    return f"all stages are done; report: {path / 'report.html'}"
