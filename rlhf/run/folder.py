"""The run folder: where a stage's files are, who may write, what a stage has recorded, and hashes of its inputs.

    runs/<name>/recipe.yaml            the resolved recipe
    runs/<name>/lock                   the process that writes, while there is one
    runs/<name>/<stage>/stage.json     state, inputs, outputs, metrics
    runs/<name>/<stage>/model/         Hugging Face folder
    runs/<name>/<stage>/logs/          one file for each of several processes (rlhf/system/rank_logs.py)

Several machines share the run folder: it must be on a file system that all of them see.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from rlhf.errors import UserError
from rlhf.system.files import write_atomic

LOGS = "logs"


class RunFolder:
    """Paths and records of one run; creates nothing by itself."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def stage_dir(self, stage: str) -> Path:
        """runs/<name>/<stage>."""
        return self.path / stage

    def model_dir(self, stage: str) -> Path:
        """runs/<name>/<stage>/model, there or not."""
        return self.path / stage / "model"

    def read_stage(self, stage: str) -> dict[str, Any] | None:
        """What stage.json holds, None when the stage has never run.

        Raises:
            UserError: when the file cannot be read as JSON.
        """
        path = self.stage_dir(stage) / "stage.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise UserError(f"stage.json cannot be read: {error}", str(path), "redo the stage with --fresh") from None
        return record

    def write_stage(self, stage: str, record: dict[str, Any]) -> None:
        """Write stage.json whole or not at all."""
        write_atomic(self.stage_dir(stage) / "stage.json", json.dumps(record, indent=1) + "\n")

    def is_done(self, stage: str) -> bool:
        """Whether the stage has run to its end."""
        record = self.read_stage(stage)
        return record is not None and record.get("state") == "done"

    def require(self, stage: str, what: str) -> Path:
        """The path <stage>/<what> of a finished stage; a folder put there by hand, without stage.json, will do too.

        Raises:
            UserError: when the stage has not run or not finished: its files may be half written.
        """
        path, record = self.stage_dir(stage) / what, self.read_stage(stage)
        if record is not None and record.get("state") != "done":
            raise UserError(
                f"the {stage} stage has not finished (state: {record.get('state')})",
                str(path),
                f"run the {stage} stage again: it goes on where it stopped",
            )
        if not path.exists():
            raise UserError(f"there is no {stage}/{what} in this run", str(path), f"run the {stage} stage first")
        return path

    def set_aside(self, stage: str) -> Path | None:
        """Move <stage> to <stage>.old, which replaces an earlier one, and drop its checkpoints; None if there is none.

        Checkpoints are only of use to go on with, and what is set aside will not be resumed.
        """
        folder, old = self.stage_dir(stage), self.path / f"{stage}.old"
        if not folder.exists() or [part.name for part in folder.iterdir()] == [LOGS]:
            return None
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
        if (old / "checkpoints").exists():
            shutil.rmtree(old / "checkpoints")
        if (old / LOGS).exists():
            folder.mkdir()
            (old / LOGS).rename(folder / LOGS)  # this attempt writes there already
        return old

    def key(self, path: str | Path) -> str:
        """Name of an input in stage.json: relative to the run folder inside it, absolute elsewhere."""
        resolved, root = Path(path).resolve(), self.path.resolve()
        return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(resolved)

    def from_key(self, key: str) -> Path:
        """The path that `key` named."""
        return self.path / key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer of the run; the lock of a process of this machine that is gone is taken over.

        The system lets go of the file's lock when its holder dies, however it does; the process number in it is looked
        at as well, for file systems that do not lock.

        Raises:
            UserError: when a live process, or one of another machine, holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "lock"
        with _locked(path) as file:
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}))
            file.flush()
            os.fsync(file.fileno())
            try:
                yield
            finally:
                # Somebody may have deleted the file and started another run, which is not ours to unlock.
                if _is_at(path, file):
                    path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """The lock file, open and held; see `RunFolder.lock`."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
            held = False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
            if not _is_at(path, file):
                continue  # the owner removed it between open and flock
            owner = read_owner(file.read())
            if held or (owner and is_alive(owner)):
                whose = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                raise UserError(
                    f"the run is in use by {whose}",
                    str(path),
                    "wait for it or stop it, or take another run.name; delete the lock file if that process is gone",
                )
            yield file
            return


def _is_at(path: Path, file: Any) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def read_owner(text: str) -> dict[str, Any] | None:
    """Who a lock file names, {"pid", "host", "started"}; None for one that was cut off in writing."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"pid", "host", "started"} <= owner.keys() else None


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process of a lock runs, or may run: those of other machines cannot be looked at."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        # A process number is used again: the same one with another start is somebody else.
        return psutil.Process(owner["pid"]).status() != psutil.STATUS_ZOMBIE and (
            abs(_started(owner["pid"]) - owner["started"]) < 2
        )
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def live_owner(run: Path) -> dict[str, Any] | None:
    """The live process that writes a run, None when there is none."""
    try:
        owner = read_owner((run / "lock").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return owner if owner and is_alive(owner) else None


def _started(pid: int) -> float:
    """When a process of this machine started: clock ticks since boot, which no change of the date moves."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():  # not Linux
        return psutil.Process(pid).create_time()
    return float(stat.read_text().rpartition(")")[2].split()[19])  # field 22; the name before it may hold anything
