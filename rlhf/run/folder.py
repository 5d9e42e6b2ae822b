"""The run folder: the paths of a run, its lock and the records of its stages.

    runs/<name>/recipe.yaml            the resolved recipe
    runs/<name>/lock                   the process that writes now, if any
    runs/<name>/<stage>/stage.json     state, inputs, outputs, metrics
    runs/<name>/<stage>/model/         Hugging Face folder
    runs/<name>/<stage>/logs/          one file for each of several processes (rlhf/system/rank_logs.py)

The machines of a run share its folder, which must be on a file system that all of them can reach.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rlhf.data.sources import EMBEDDED, embedded_path
from rlhf.errors import UserError
from rlhf.system.files import write_atomic

LOGS = "logs"


class RunFolder:
    """Paths, records and lock of one run; making an instance creates no files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def recipe_file(self) -> Path:
        """Return the path of recipe.yaml; raise UserError if this is not the folder of a run."""
        if not (file := self.path / "recipe.yaml").is_file():
            what = "this is not a run folder: it has no recipe.yaml"
            raise UserError(what, str(self.path), "give one, such as runs/demo")
        return file

    def stage_dir(self, stage: str) -> Path:
        """Return runs/<name>/<stage>."""
        return self.path / stage

    def model_dir(self, stage: str) -> Path:
        """Return runs/<name>/<stage>/model, whether or not it exists."""
        return self.path / stage / "model"

    def read_stage(self, stage: str) -> dict[str, Any] | None:
        """Return the content of stage.json, None if the stage has never run; raise UserError if it is not JSON."""
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
        """Write stage.json completely or not at all."""
        write_atomic(self.stage_dir(stage) / "stage.json", json.dumps(record, indent=1) + "\n")

    def is_done(self, stage: str) -> bool:
        """Return whether the stage has run to its end."""
        record = self.read_stage(stage)
        return record is not None and record.get("state") == "done"

    def require(self, stage: str, what: str) -> Path:
        """Return the path <stage>/<what> of a finished stage, or of a folder made by hand, without stage.json.

        Raises UserError if the stage has not run or not finished: its files may be half written.
        """
        path, record = self.stage_dir(stage) / what, self.read_stage(stage)
        if record is not None and record.get("state") != "done":
            what = f"the {stage} stage has not finished (state: {record.get('state')})"
            raise UserError(what, str(path), f"run the {stage} stage again: it continues where it stopped")
        if not path.exists():
            raise UserError(f"there is no {stage}/{what} in this run", str(path), f"run the {stage} stage first")
        return path

    def set_aside(self, stage: str) -> Path | None:
        """Move <stage> to <stage>.old, in place of an earlier one, and return that path; None if there is no result.

        The checkpoints are removed: they serve to resume a stage, and a stage that is set aside is not resumed.
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
            (old / LOGS).rename(folder / LOGS)  # the attempt that runs now writes there already
        return old

    def key(self, path: str | Path) -> str:
        """Return the name of an input in stage.json: relative inside the run folder, absolute elsewhere."""
        resolved, root = Path(path).resolve(), self.path.resolve()
        return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(resolved)

    def from_key(self, key: str) -> Path:
        """Return the path that `key` names, or the file of embedded data, which is named as in the recipe."""
        if key.startswith(EMBEDDED):
            with suppress(UserError):  # it is not there any more
                return embedded_path(key.removeprefix(EMBEDDED))
        return self.path / key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer of the run inside the block; the lock of a dead process of this machine is taken over.

        The system releases the file lock when its holder dies in any way. The process id in the file is checked as
        well, for file systems without locks. Raises UserError if a live process, or another machine's, has the lock.
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
                # Someone may have deleted the file and started another run, whose lock must stay.
                if _is_at(path, file):
                    path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """Yield the lock file, open and locked; see `RunFolder.lock`."""
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
                continue  # its owner removed it between open and flock
            owner = read_owner(file.read())
            if held or (owner and is_alive(owner)):
                whose = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                fix = "wait for it or stop it, or take another run.name; delete the lock file if that process is gone"
                raise UserError(f"the run is in use by {whose}", str(path), fix)
            yield file
            return


def _is_at(path: Path, file: Any) -> bool:
    """Return whether an open file is still the one at that path."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def read_owner(text: str) -> dict[str, Any] | None:
    """Return the owner in a lock file, {"pid", "host", "started"}; None for a file that was not completely written."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"pid", "host", "started"} <= owner.keys() else None


def is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a lock runs, or may run: processes of other machines cannot be looked up."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        runs = psutil.Process(owner["pid"]).status() != psutil.STATUS_ZOMBIE
        # Process ids are used again: the same id with another start time is another process.
        return runs and abs(_started(owner["pid"]) - owner["started"]) < 2
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def live_owner(run: Path) -> dict[str, Any] | None:
    """Return the live process that writes a run, None if there is none."""
    try:
        owner = read_owner((run / "lock").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return owner if owner and is_alive(owner) else None


def _started(pid: int) -> float:
    """Return when a process of this machine started, in clock ticks since boot: changes of the date do not matter."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():  # not Linux
        return psutil.Process(pid).create_time()
    return float(stat.read_text().rpartition(")")[2].split()[19])  # field 22; the name in field 2 may contain anything
