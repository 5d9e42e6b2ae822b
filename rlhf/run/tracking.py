"""Metrics of a stage: always in metrics.jsonl, and in wandb if it works.

A row of metrics.jsonl is {"step": episodes or tokens so far, "axis": "episodes", "time": unix seconds, name: value,
...}. A value that is not finite is written as null (JSON has no NaN) and counted in a warning. wandb never stops a run:
its first exception becomes a warning. Each stage is one wandb run in the group of its run, and a resumed stage
continues it under the id in wandb_id.txt.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from rlhf.config import TrackingSection
from rlhf.system.console import warn
from rlhf.system.files import fsync, write_atomic
from rlhf.system.ranks import is_main_process

INIT_SECONDS, FINISH_SECONDS = 30, 60  # limits, because a server that does not answer must not delay a run


class Tracker:
    """The log of a stage's metrics and tables; processes other than the first log nothing.

    wandb's files go to runs/<run>/wandb. `run_name` is its group, `stage` its job type, and it shows `config`, the
    resolved recipe. wandb=auto follows WANDB_MODE if set, else is online with a key (WANDB_API_KEY, netrc), else
    offline. `axis` is what `step_value` counts.
    """

    def __init__(
        self,
        stage_dir: Path,
        run_name: str,
        stage: str,
        tracking: TrackingSection,
        config: Mapping[str, Any],
        axis: Literal["episodes", "tokens"] = "tokens",
    ) -> None:
        self.dir, self.axis = Path(stage_dir), axis
        self.path = self.dir / "metrics.jsonl"
        self.not_finite = 0
        self._last_step = 0
        self._run: Any = None
        self._active = is_main_process()
        if not self._active:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        for path in [self.path, *self._tables()]:
            _cut_torn_line(path)
        self._run = _start_wandb(self.dir, run_name, stage, tracking, config, axis)

    def log(self, metrics: Mapping[str, float], step_value: int) -> None:
        """Log one point; `step_value` is the number of episodes or tokens so far."""
        if not self._active:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        row = {name: self._finite(name, value) for name, value in values.items()}
        self._append(self.path, {"step": int(step_value), "axis": self.axis, "time": time.time(), **row})
        self._to_wandb(lambda wandb: values, step_value)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step_value: int) -> None:
        """Log a table: rows {"step", "axis", column: cell} of tables/<name>.jsonl, and a wandb table."""
        if not self._active:
            return
        rows = [[_plain(cell) for cell in row] for row in rows]
        for row in rows:
            cells = {column: self._finite(column, cell) for column, cell in zip(columns, row, strict=True)}
            self._append(self.dir / "tables" / f"{name}.jsonl", {"step": int(step_value), "axis": self.axis, **cells})
        self._to_wandb(lambda wandb: {name: wandb.Table(columns=list(columns), data=rows)}, step_value)

    def truncate_after(self, step_value: int, again: Collection[str] = ()) -> None:
        """Drop the rows beyond `step_value` from the files: a resumed stage logs them again.

        Of the metrics and tables in `again`, logged after the checkpoint, rows at `step_value` itself are dropped too.
        """
        if not self._active:
            return
        for path in [self.path, *self._tables()]:
            if not path.exists():
                continue
            # splitlines() would also split at U+2028 and its like, which JSON leaves as they are in a model's text.
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            rows = [json.loads(line) for line in lines]
            kept = [
                line
                for line, row in zip(lines, rows, strict=True)
                if row["step"] < step_value
                or (row["step"] == step_value and path.stem not in again and not any(name in row for name in again))
            ]
            if len(kept) < len(lines):
                write_atomic(path, "".join(f"{line}\n" for line in kept))

    def flush(self) -> None:
        """Wait until all rows are on disk: a checkpoint must not outlive the rows before it."""
        if self._active:
            for path in filter(Path.exists, [self.path, *self._tables()]):
                fsync(path)

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run, marked as failed or not; the files need no finish."""
        if self.not_finite > 1:
            warn(f"{self.not_finite} logged values were not finite; they are null in {self.path}")
        if self._run is not None:
            run, self._run = self._run, None
            what = "wandb could not finish the run; its data stay in the run's wandb folder"
            _warn_on_error(what, lambda: run.finish(exit_code=int(failed)))

    def _finite(self, name: str, value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        self.not_finite += 1
        if self.not_finite == 1:
            warn(f"{name} is {value}; values that are not finite are null in {self.path}")
        return None

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # closed, hence flushed, after every row
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def _to_wandb(self, make: Callable[[Any], Mapping[str, Any]], step_value: int) -> None:
        if self._run is None:
            return
        # wandb drops rows of earlier steps. A resumed stage logs the same rows again, so nothing is lost.
        self._last_step = max(self._last_step, int(step_value))

        def send() -> bool:
            import wandb

            self._run.log({**make(wandb), self.axis: int(step_value)}, step=self._last_step)
            return True

        if not _warn_on_error("wandb stopped taking metrics; they still go to metrics.jsonl", send):
            self._run = None

    def _tables(self) -> list[Path]:
        return sorted((self.dir / "tables").glob("*.jsonl"))


def _plain(value: Any) -> Any:
    """Return the Python value of a tensor or numpy scalar, other values as they are."""
    return value.item() if hasattr(value, "item") else value


def _cut_torn_line(path: Path) -> None:
    """Remove a last line without a newline: the writer was killed in the middle of it."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        warn(f"the last line of {path} was cut off when the run was killed; it is dropped")
        write_atomic(path, content[: content.rfind(b"\n") + 1].decode())


# --- wandb -----------------------------------------------------------------------------------------------------------


def _warn_on_error(what: str, action: Callable[[], Any]) -> Any:
    """Return the result of `action`; an exception becomes a warning and None, since wandb must never stop a run."""
    try:
        return action()
    except Exception as error:
        reason = str(error).strip().splitlines()
        warn(f"{what} ({type(error).__name__}{': ' + reason[0] if reason else ''})")
        return None


def wandb_mode(tracking: TrackingSection) -> str:
    """Return online, offline or disabled."""
    if tracking.wandb != "auto":
        return tracking.wandb
    wished = os.environ.get("WANDB_MODE", "")
    if wished in ("online", "offline", "disabled"):
        return wished
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if not path.is_file():
        return False
    what = f"{path} cannot be read, so wandb stays offline"
    return bool(_warn_on_error(what, lambda: netrc.netrc(str(path)).authenticators(host)))


def _start_wandb(
    stage_dir: Path, run_name: str, stage: str, tracking: TrackingSection, config: Mapping[str, Any], axis: str
) -> Any:
    """Return the wandb run; None if wandb is disabled, or if it does not work, with a warning."""
    mode = wandb_mode(tracking)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise wandb reports its own crashes to its makers
    options = {"project": tracking.project, "entity": tracking.entity or None, "group": run_name, "job_type": stage}
    options |= {"name": f"{run_name}-{stage}", "config": dict(config)}
    if mode == "online":
        what = "wandb cannot be reached, so this stage is tracked offline"
        run = _warn_on_error(what, lambda: _init_wandb(stage_dir, axis, options | {"mode": "online"}))
        if run is not None:
            return run
        _warn_on_error("wandb's service did not end", _end_service)
    what = "wandb does not work here, metrics go to metrics.jsonl alone"
    return _warn_on_error(what, lambda: _init_wandb(stage_dir, axis, options | {"mode": "offline"}))


def _init_wandb(stage_dir: Path, axis: str, options: Mapping[str, Any]) -> Any:
    """Start the wandb run of a stage, or resume it under the id in wandb_id.txt."""
    import wandb

    folder, id_file = stage_dir.parent / "wandb", stage_dir / "wandb_id.txt"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):  # wandb would fall back to the system's temporary folder
        raise PermissionError(f"cannot write to {folder}")
    if not id_file.exists():
        write_atomic(id_file, uuid.uuid4().hex[:12] + "\n")
    # A limit for the login as well: on a terminal wandb asks for a key.
    limits = {"init_timeout": INIT_SECONDS, "login_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
    settings = wandb.Settings(silent=True, console="off", save_code=False, **limits)
    run_id = id_file.read_text().strip()
    run = wandb.init(**options, id=run_id, resume="allow", dir=str(folder.parent), settings=settings)
    run.define_metric(axis)
    run.define_metric("*", step_metric=axis)
    return run


def _end_service() -> None:
    """Have wandb forget the run that could not start: it would refuse the same id a second time."""
    import wandb

    wandb.teardown()
