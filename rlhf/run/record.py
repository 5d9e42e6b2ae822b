"""The record of a stage, stage.json: how an attempt begins and how it ends.

state         running, done, stopped (asked to) or failed
fingerprint   hash of the recipe fields that the stage depends on       rlhf/run/fingerprints.py
identity      hash that the checkpoints of the stage carry              rlhf/run/sealing.py
inputs        path: SHA-256; paths in the run folder are relative to it, embedded data is named as in the recipe
outputs       path: bytes
metrics, seconds (of all attempts), attempts, began, ended, error
accepted      recipe fields that have changed since the stage began, with --accept-change
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.config import Recipe
from rlhf.run.fingerprints import (
    changes,
    check_recipe,
    declared_inputs,
    fingerprint,
    identity,
    is_started,
    lost_outputs,
)
from rlhf.run.folder import LOGS, RunFolder
from rlhf.stage_table import STAGES
from rlhf.system.console import console
from rlhf.system.files import size_of
from rlhf.system.ranks import is_main_process

NOT_OUTPUTS = ("stage.json", "metrics.jsonl", "wandb_id.txt", "tables", "checkpoints", "trainer", LOGS)


def begin(recipe: Recipe, run: RunFolder, name: str, fresh: bool, accept: Sequence[str]) -> dict[str, Any] | None:
    """Check the recipe against the run; write the stage.json of a new attempt and return its content.

    Returns None if the stage is finished and unchanged. A result that no longer matches recipe and inputs is set aside
    first, and so is any result with `fresh`. Raises UserError as `check_recipe` does.
    """
    check_recipe(recipe, run, name if fresh else None, accept)
    before = None if fresh else run.read_stage(name)
    now = declared_inputs(recipe, name, run)
    if before is not None and is_started(run, name):
        changed = changes(before, recipe, name, run, now)
        if before.get("state") == "done":
            changed += [f"{key} (an output)" for key in lost_outputs(run, name, before)]
            if not changed:
                return None
        if changed:
            _say(f"{name}: done again, for these have changed: {', '.join(changed)}")
            fresh, before = True, None
    if fresh and (old := run.set_aside(name)):
        _say(f"{name}: the earlier result is kept in {old}")
    before = before or {}
    values = {
        "stage": name,
        "state": "running",
        "fingerprint": fingerprint(recipe, name),
        "identity": before.get("identity") or identity(recipe, name, now),
        "inputs": now,
        "outputs": {},
        "metrics": {},
        "seconds": before.get("seconds", 0.0),
        "attempts": before.get("attempts", 0) + 1,
        "began": _now(),
        "error": None,
    }
    if before.get("accepted"):
        values["accepted"] = before["accepted"]
    run.write_stage(name, values)
    return values


class StageRecord:
    """stage.json of the running attempt, with `values` of `begin`: every process keeps it, the first one writes it."""

    def __init__(self, run: RunFolder, name: str, values: dict[str, Any]) -> None:
        self.run, self.name, self.values = run, name, values
        self.declared: dict[str, str] = values["inputs"]  # hashes by path of the inputs known before the work
        self.used: dict[str, str] = {}  # hashes by path of what the work has read
        self._seconds_before, self._start = values["seconds"], time.monotonic()

    @property
    def folder(self) -> Path:
        """Return runs/<run>/<stage>."""
        return self.run.stage_dir(self.name)

    @property
    def state(self) -> str:
        """Return running, done, stopped or failed."""
        return self.values["state"]

    def finish(self, metrics: Mapping[str, Any], stop_requested: bool) -> None:
        """Record work that returned: it is stopped if it was asked to stop before it made its product, else done."""
        plain = {key: _json_value(value) for key, value in metrics.items()}
        complete = plain and (self.folder / STAGES[self.name].product).exists()
        state = "stopped" if stop_requested and not complete else "done"
        self.end(state, metrics=plain, outputs=self._outputs())

    def end(self, state: str, **more: Any) -> None:
        """Record the end of the attempt with a state and further fields; the first process writes stage.json."""
        seconds = self._seconds_before + time.monotonic() - self._start
        self.values.update(state=state, inputs=self.values["inputs"] | self.used, seconds=seconds, ended=_now(), **more)
        if is_main_process():
            self.run.write_stage(self.name, self.values)

    def _outputs(self) -> dict[str, int]:
        """Return the bytes of what the stage has left, by name; logs and checkpoints are not results."""
        kept = (p for p in sorted(self.folder.iterdir()) if p.name not in NOT_OUTPUTS and not p.name.endswith(".tmp"))
        return {p.name: size_of(p) for p in kept}


def _json_value(value: Any) -> Any:
    """Return a metric as stage.json holds it: no tensors, and null for values that are not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
