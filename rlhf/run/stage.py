"""Everything that a stage program does around its work.

`run_stage` reads the command line and the recipe, opens the run folder and becomes its only writer, checks the recipe
against the run, skips a stage that is finished and unchanged, runs the work, and writes stage.json, which
rlhf/run/record.py describes.

Exit codes: 0 done or skipped, 2 a mistake that the user can correct, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM. After the
first signal the step finishes and a checkpoint is sealed; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.plan import as_launched, recipe_processes
from rlhf.recipe import load_recipe
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.fingerprints import ABSENT, skip_message
from rlhf.run.folder import LOGS, RunFolder
from rlhf.run.preflight import check
from rlhf.run.record import StageRecord, begin
from rlhf.run.tracking import Tracker
from rlhf.stage_table import PPO_VARIANTS, STAGES
from rlhf.system.console import close_progress, console, duration, table, warn
from rlhf.system.distributed import broadcast_from_main, pick_device, process_group
from rlhf.system.files import hash_path, require_writable
from rlhf.system.malloc import keep_freed_memory
from rlhf.system.quiet import quiet_libraries
from rlhf.system.rank_logs import PeerFailed, own_log
from rlhf.system.ranks import is_main_process, launcher_world_size, process_rank
from rlhf.system.rng import seed_rng
from rlhf.system.signals import Signals, StopNow
from rlhf.system.watchdog import root_cause, run_watchdog


@dataclass
class StageContext:
    """Everything that the work of a stage is given."""

    recipe: Recipe
    run: RunFolder
    name: str
    tracker: Tracker
    device: torch.device
    signals: Signals
    record: StageRecord

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.dir / "checkpoints", self.record.values["identity"], self.tracker.flush)

    @property
    def dir(self) -> Path:
        """Return runs/<run>/<stage>."""
        return self.record.folder

    @property
    def inputs(self) -> dict[str, str]:
        """Return the hashes, by path, of what the work has passed to `use`."""
        return self.record.used

    @property
    def stop_requested(self) -> bool:
        """Return whether the work should seal a checkpoint and return {}; asked between steps.

        In a distributed run all processes must ask at the same places, and all get the same answer.
        """
        return bool(self.signals.agreed())

    def use(self, path: Path) -> Path:
        """Record the hash of a path that the result depends on, and return it; raise UserError if it does not exist."""
        key = self.run.key(path)
        if key not in self.inputs:
            if not Path(path).exists():
                raise UserError("there is no such file", str(path), "check the path, or run the stage that writes it")
            known = self.record.declared.get(key, ABSENT)
            self.inputs[key] = hash_path(path) if known == ABSENT else known
        return path


def parse_stage_args(argv: Sequence[str] | None, program: str) -> tuple[str, list[str], dict[str, Any]]:
    """Read `RECIPE [section.field=value ...] [--fresh] [--accept-change KEY]`, and `[--variant ppo|ppo-ptx]` for PPO.

    `argv` is without the program, which is a path such as `stages/ppo.py`; None: this process's arguments. Returns
    recipe name or path, overrides, options {"fresh": bool, "accept_change": list, "variant": str or None}. Raises
    SystemExit after argparse has printed the help (0) or a usage error (2).
    """
    stage = Path(program).stem
    parser = argparse.ArgumentParser(
        prog=f"python {program}",
        description=f"Run the {stage} stage of a recipe in runs/NAME. A finished stage whose recipe and inputs are "
        "unchanged is skipped, an interrupted one continues from its newest sealed checkpoint. "
        "`rlhf run RECIPE` runs all stages in order.",
    )
    parser.add_argument("recipe", help="name from `rlhf recipes`, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="set fields, as sft.lr=1e-5")
    told = "given by the deepspeed launcher; ignored, since LOCAL_RANK says the same"
    parser.add_argument("--local_rank", type=int, help=told)
    parser.add_argument("--fresh", action="store_true", help="redo from scratch; the earlier result moves to STAGE.old")
    kept = "keep the result although this field of the recipe has changed"
    parser.add_argument("--accept-change", action="append", default=[], metavar="KEY", help=kept)
    if stage == "ppo":
        parser.add_argument("--variant", choices=PPO_VARIANTS, help="default: ppo-ptx where ppo.ptx_coef > 0")
    found = vars(parser.parse_intermixed_args(argv))
    recipe, overrides, _ = found.pop("recipe"), found.pop("overrides"), found.pop("local_rank")
    return recipe, overrides, {"variant": None, **found}


def exit_code(main: Callable[[], int]) -> int:
    """Call `main` and return its exit code; a UserError is printed in red without a traceback (2), Ctrl-C is 130."""
    try:
        return main()
    except UserError as error:
        rank = process_rank()
        text = f"error: {error}" if rank == 0 else f"error on process {rank}: {error.what}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(text, style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130


Work = Callable[[StageContext], dict[str, Any] | None]


def run_stage(name: str, work: Work, argv: Sequence[str] | None = None) -> int:
    """Run a stage from the command line (see `parse_stage_args`) and return the exit code of its program.

    `work` does the stage and returns its headline metrics, {} if it ended early because of `stop_requested`. Every
    exception except UserError is recorded in stage.json and passes through.
    """
    return exit_code(lambda: _run_stage(name, work, argv))


def _run_stage(name: str, work: Work, argv: Sequence[str] | None) -> int:
    recipe_name, overrides, options = parse_stage_args(argv, f"stages/{STAGES[name].program}.py")
    recipe = as_launched(load_recipe(recipe_name, overrides), launcher_world_size())
    check(recipe, [name])
    device = pick_device(recipe)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
        keep_freed_memory()
    quiet_libraries()
    run = RunFolder(Path(recipe.run.dir) / recipe.run.name)
    require_writable(run.stage_dir(name))
    processes, timeout_s = recipe_processes(recipe), recipe.launch.timeout_s
    with (
        own_log(run.stage_dir(name) / LOGS, processes),
        process_group(device, timeout_s),
        run_watchdog(name, processes, timeout_s),
        run.lock() if is_main_process() else nullcontext(),
    ):
        values = broadcast_from_main(lambda: begin(recipe, run, name, options["fresh"], options["accept_change"]))
        if values is None:
            console.print(skip_message(run, name), markup=False)
            return 0
        return _run_work(recipe, StageRecord(run, name, values), work, device)


def _run_work(recipe: Recipe, record: StageRecord, work: Work, device: torch.device) -> int:
    """Run the work and return the exit code; however the work ends, stage.json records it."""
    seed_rng(recipe.run.seed)
    signals = Signals()
    tracker: Tracker | None = None
    with signals.watch():
        try:
            config, axis = recipe.model_dump(), STAGES[record.name].axis
            tracker = Tracker(record.folder, recipe.run.name, record.name, recipe.tracking, config, axis)
            ctx = StageContext(recipe, record.run, record.name, tracker, device, signals, record)
            record.finish(_metrics(work, ctx), bool(signals.received))
        except (StopNow, KeyboardInterrupt):
            record.end("stopped")
        except BaseException as error:
            failure = _disk_error(error, record.run.path) or root_cause(error)
            _record_failure(record, error, failure)
            if failure is error:
                raise
            raise failure from None
        finally:
            close_progress()
            if tracker is not None:
                tracker.close(failed=record.state == "failed")
    _show_end(record)
    if record.state == "stopped" or signals.received:
        return 128 + (signals.received or signal.SIGINT)
    return 0


def _metrics(work: Work, ctx: StageContext) -> dict[str, Any]:
    """Return the metrics of the work, after its last checkpoint is sealed."""
    try:
        metrics = work(ctx) or {}
    except Exception:
        with suppress(OSError):  # the work's own error is the one to report
            ctx.checkpoints.wait()
        raise
    ctx.checkpoints.wait()
    return metrics


def _record_failure(record: StageRecord, error: BaseException, failure: BaseException) -> None:
    """Write `error` into stage.json, or the failure of another process that it follows from."""
    try:
        text = str(failure) if isinstance(failure, PeerFailed) else f"{type(error).__name__}: {error}"
        record.end("failed", error=text)
    except OSError as second:
        warn(f"stage.json could not be written: {second}")  # the first error is the one to show


def _show_end(record: StageRecord) -> None:
    """Print how the stage ended, with a table of its metrics if it is done."""
    if record.state == "stopped":
        console.print(f"{record.name}: stopped; run it again to go on", markup=False, soft_wrap=True)
        return
    metrics = record.values["metrics"]
    rows = [(key, value) for key, value in metrics.items() if value is None or isinstance(value, int | float | str)]
    if rows:
        table(record.name, ["metric", "value"], rows)
    took = duration(record.values["seconds"])
    console.print(f"{record.name}: done in {took}, in {record.folder}", markup=False, soft_wrap=True)


def _disk_error(error: BaseException, where: Path) -> UserError | None:
    """Return a UserError for a disk that is full or has become read-only, else None."""
    again = "and run the stage again: it continues from its newest sealed checkpoint, which is whole"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return UserError("the disk has become read-only", str(error.filename or where), f"make it writable {again}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and "No space left on device" not in str(error):  # safetensors raises an exception of its own
        return None
    return UserError("the disk is full", str(getattr(error, "filename", None) or where), f"free some space {again}")
