"""Everything that a stage program does around its work.

`run_stage` reads the command line and the recipe, opens the run folder and becomes its only writer, holds the recipe to
the run, skips a stage that is finished and unchanged, runs the work, and writes stage.json:

    state         running, done, stopped (asked to) or failed
    fingerprint   hash of the recipe fields that the stage depends on       rlhf/run/fingerprints.py
    identity      whose its checkpoints are                                 rlhf/run/sealing.py
    inputs        path: SHA-256; paths in the run folder are relative to it
    outputs       path: bytes
    metrics, seconds (of all attempts), attempts, error
    accepted      recipe fields that have changed since it began, with --accept-change

Exit codes: 0 done or skipped, 2 a mistake that the user can mend, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM. The first
signal lets the step finish and a checkpoint be sealed, a second Ctrl-C stops at once.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.plan import as_launched
from rlhf.recipe import load_recipe
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.fingerprints import (
    ABSENT,
    changes,
    check_recipe,
    declared_inputs,
    fingerprint,
    identity,
    is_started,
    lost_outputs,
)
from rlhf.run.folder import LOGS, RunFolder
from rlhf.run.preflight import check
from rlhf.run.tracking import Tracker
from rlhf.stage_table import PPO_VARIANTS, STAGES
from rlhf.system.console import close_progress, console, duration, table, warn
from rlhf.system.distributed import (
    broadcast_from_main,
    is_main_process,
    launcher_world_size,
    pick_device,
    process_group,
    world_size,
)
from rlhf.system.files import hash_path, require_writable, size_of
from rlhf.system.malloc import keep_freed_memory
from rlhf.system.quiet import quiet_libraries
from rlhf.system.rank_logs import PeerFailed, own_log
from rlhf.system.rng import seed_rng
from rlhf.system.signals import Signals, StopNow
from rlhf.system.watchdog import cause, run_watchdog

NOT_OUTPUTS = ("stage.json", "metrics.jsonl", "wandb_id.txt", "tables", "checkpoints", "trainer", LOGS)


@dataclass
class StageContext:
    """What the work of a stage gets."""

    recipe: Recipe
    run: RunFolder
    name: str
    tracker: Tracker
    device: torch.device
    inputs: dict[str, str] = field(default_factory=dict)  # hashes by path, filled by `use`
    signals: Signals = field(default_factory=Signals)
    known: dict[str, str] = field(default_factory=dict)  # hashes of the inputs that were declared before the work
    identity: str = ""  # of the stage's checkpoints

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.dir / "checkpoints", self.identity, self.tracker.flush)

    @property
    def dir(self) -> Path:
        """runs/<run>/<stage>."""
        return self.run.stage_dir(self.name)

    @property
    def stop_requested(self) -> bool:
        """Whether to seal a checkpoint and return {}; asked between steps.

        In a distributed run all processes must ask at the same places: they agree on the answer.
        """
        return bool(self.signals.agreed())

    def use(self, path: Path) -> Path:
        """Record the hash of a file or folder that the result depends on; returns the path.

        Raises:
            UserError: when it is not there.
        """
        key = self.run.key(path)
        if key not in self.inputs:
            if not Path(path).exists():
                raise UserError("there is no such file", str(path), "check the path, or run the stage that writes it")
            known = self.known.get(key, ABSENT)
            self.inputs[key] = hash_path(path) if known == ABSENT else known
        return path


def parse_stage_args(argv: Sequence[str] | None, program: str) -> tuple[str, list[str], dict[str, Any]]:
    """Read `RECIPE [section.field=value ...] [--fresh] [--accept-change KEY]`, and `[--variant ppo|ppo-ptx]` for PPO.

    Args:
        argv: arguments without the program's name, None for the process's own.
        program: such as `stages/ppo.py`.

    Returns:
        recipe name or path, overrides, options {"fresh": bool, "accept_change": list, "variant": str or None}.

    Raises:
        SystemExit: after --help (0) or a usage error (2), which argparse has printed.
    """
    stage = Path(program).stem
    parser = argparse.ArgumentParser(
        prog=f"python {program}",
        description=f"Run the {stage} stage of a recipe in runs/NAME. A finished stage whose recipe and inputs are "
        "unchanged is skipped, an interrupted one goes on from its newest sealed checkpoint. "
        "`rlhf run RECIPE` runs all stages in order.",
    )
    parser.add_argument("recipe", help="name from `rlhf recipes`, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="set fields, as sft.lr=1e-5")
    parser.add_argument("--local_rank", type=int, help="the deepspeed launcher's; LOCAL_RANK says the same, so ignored")
    parser.add_argument("--fresh", action="store_true", help="redo from scratch; what is there moves to STAGE.old")
    parser.add_argument(
        "--accept-change", action="append", default=[], metavar="KEY", help="keep what is done under another value"
    )
    if stage == "ppo":
        parser.add_argument("--variant", choices=PPO_VARIANTS, help="default: ppo-ptx where ppo.ptx_coef > 0")
    found = vars(parser.parse_intermixed_args(argv))
    recipe, overrides, _ = found.pop("recipe"), found.pop("overrides"), found.pop("local_rank")
    return recipe, overrides, {"variant": None, **found}


def exit_code(main: Callable[[], int]) -> int:
    """Call `main` and return its exit code; a UserError is printed in red without traceback (2), Ctrl-C is 130."""
    try:
        return main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        text = f"error: {error}" if rank == "0" else f"error on process {rank}: {error.what}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(text, style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130


def run_stage(
    name: str, work: Callable[[StageContext], dict[str, Any] | None], argv: Sequence[str] | None = None
) -> int:
    """Run a stage from the command line and return the exit code of its program.

    Args:
        name: sft, rank, reward, ppo-ptx, ppo or evaluate.
        work: does the stage and returns its headline metrics; {} when it ended early because of `stop_requested`.
        argv: see `parse_stage_args`.

    Any exception but UserError is recorded in stage.json and passes through.
    """
    return exit_code(lambda: _run_stage(name, work, argv))


def _run_stage(name: str, work: Callable[[StageContext], dict[str, Any] | None], argv: Sequence[str] | None) -> int:
    recipe_name, overrides, options = parse_stage_args(argv, f"stages/{STAGES[name].program}.py")
    recipe = as_launched(load_recipe(recipe_name, overrides), launcher_world_size())
    check(recipe, [name])
    device = pick_device(recipe)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
        keep_freed_memory()
    quiet_libraries()
    run = RunFolder(Path(recipe.run.dir) / recipe.run.name)
    require_writable(run.stage_dir(name))
    processes, timeout_s = world_size(), recipe.launch.timeout_s
    with (
        own_log(run.stage_dir(name) / LOGS, processes),
        process_group(device, timeout_s),
        run_watchdog(name, processes, timeout_s),
        run.lock() if is_main_process() else nullcontext(),
    ):
        record = broadcast_from_main(lambda: _prepare(recipe, run, name, options["fresh"], options["accept_change"]))
        if record is None:
            console.print(
                f"{name}: finished, recipe and inputs unchanged; skipped ({run.stage_dir(name)})", markup=False
            )
            return 0
        return _run_work(recipe, run, name, work, record, device)


def _prepare(recipe: Recipe, run: RunFolder, name: str, fresh: bool, accept: Sequence[str]) -> dict[str, Any] | None:
    """Check the run and make the stage's folder ready; returns stage.json to begin with, None to skip the stage."""
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
            console.print(
                f"{name}: done again, for these have changed: {', '.join(changed)}", markup=False, soft_wrap=True
            )
            fresh, before = True, None
    if fresh and (old := run.set_aside(name)):
        console.print(f"{name}: the earlier result is kept in {old}", markup=False, soft_wrap=True)
    before = before or {}
    record = {
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
        record["accepted"] = before["accepted"]
    run.write_stage(name, record)
    return record


def _run_work(
    recipe: Recipe,
    run: RunFolder,
    name: str,
    work: Callable[[StageContext], dict[str, Any] | None],
    record: dict[str, Any],
    device: torch.device,
) -> int:
    """Run the work; whatever happens, stage.json says so at the end."""
    begin, spent = time.monotonic(), record["seconds"]
    seed_rng(recipe.run.seed)
    signals = Signals()
    tracker: Tracker | None = None

    def finish(state: str, inputs: dict[str, str], **more: Any) -> None:
        record.update(
            state=state,
            inputs=record["inputs"] | inputs,
            seconds=spent + time.monotonic() - begin,
            ended=_now(),
            **more,
        )
        if is_main_process():
            run.write_stage(name, record)

    inputs: dict[str, str] = {}
    with signals.watch():
        try:
            tracker = Tracker(
                run.stage_dir(name), recipe.run.name, name, recipe.tracking, recipe.model_dump(), STAGES[name].axis
            )
            ctx = StageContext(
                recipe, run, name, tracker, device, inputs, signals, record["inputs"], record["identity"]
            )
            try:
                metrics = {key: _json_value(value) for key, value in (work(ctx) or {}).items()}
            except Exception:
                with suppress(OSError):  # the work's own error is the one to tell
                    ctx.checkpoints.wait()
                raise
            ctx.checkpoints.wait()
            stopped = bool(signals.received) and not (metrics and (ctx.dir / STAGES[name].product).exists())
            finish("stopped" if stopped else "done", inputs, metrics=metrics, outputs=_outputs(ctx.dir))
        except (StopNow, KeyboardInterrupt):
            stopped, metrics = True, {}
            finish("stopped", inputs)
        except BaseException as error:
            failure = _disk_trouble(error, run.path) or cause(error)
            try:
                told = isinstance(failure, PeerFailed)
                finish("failed", inputs, error=str(failure) if told else f"{type(error).__name__}: {error}")
            except OSError as second:
                warn(f"stage.json could not be written: {second}")  # the first error is the one to show
            if failure is error:
                raise
            raise failure from None
        finally:
            close_progress()
            if tracker is not None:
                tracker.close(failed=record["state"] == "failed")
    if stopped:
        console.print(f"{name}: stopped; run it again to go on", markup=False, soft_wrap=True)
    else:
        rows = [(key, value) for key, value in metrics.items() if value is None or isinstance(value, int | float | str)]
        if rows:
            table(name, ["metric", "value"], rows)
        console.print(
            f"{name}: done in {duration(record['seconds'])}, in {run.stage_dir(name)}", markup=False, soft_wrap=True
        )
    return 128 + (signals.received or signal.SIGINT) if stopped or signals.received else 0


def _outputs(folder: Path) -> dict[str, int]:
    """Bytes of what the stage has left, by name; logs and checkpoints are not results."""
    kept = (p for p in sorted(folder.iterdir()) if p.name not in NOT_OUTPUTS and not p.name.endswith(".tmp"))
    return {p.name: size_of(p) for p in kept}


def _json_value(value: Any) -> Any:
    """A metric as stage.json holds it: no tensors, and null for what is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _disk_trouble(error: BaseException, where: Path) -> UserError | None:
    """A UserError for a disk that is full or has become read-only, else None."""
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        fix = "make it writable and run the stage again: it goes on from its newest sealed checkpoint, which is whole"
        return UserError("the disk has become read-only", str(error.filename or where), fix)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and "No space left on device" not in str(error):  # safetensors has an exception of its own
        return None
    fix = "free some space and run the stage again: it goes on from its newest sealed checkpoint, which is whole"
    return UserError("the disk is full", str(getattr(error, "filename", None) or where), fix)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
