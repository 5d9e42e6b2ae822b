"""A stage's checkpoints: the loop waits while the state is written, and goes on while it is flushed, hashed and sealed.

What is in the files no longer changes, so they are the copy that the background works on: no second one in memory. A
kill before the seal is a kill before the checkpoint, and a resume goes on from the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from rlhf.run.sealing import Sealed, keep_last, newest_sealed, seal, write_aside
from rlhf.stage_table import CHECKPOINTS_KEPT
from rlhf.system.distributed import is_main_process


class Checkpoints:
    """Written by all processes, sealed by the first one.

    Args:
        folder: `checkpoints/` of the stage.
        of: whose they are, see rlhf/run/sealing.py.
        before: called by the first process before a checkpoint is sealed: makes last what it must not outlive.
    """

    def __init__(self, folder: Path, identity: str = "", before: Callable[[], None] = lambda: None) -> None:
        self.folder, self.identity, self.before = folder, identity, before
        self.last: Sealed | None = None  # what the last seal took
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def newest(self) -> Path | None:
        """The newest sound checkpoint to go on from."""
        return newest_sealed(self.folder, self.identity)

    def save(self, step: int, write: Callable[[Path], object], barrier: Callable[[], None] | None = None) -> None:
        """Write step-NNNNNN and have it sealed behind the caller's back; `write` and `barrier` as in `write_aside`.

        Raises:
            OSError: what kept the checkpoint before from being sealed, or this one from being written.
        """
        self.wait()
        final = self.folder / f"step-{step:06d}"
        staged = write_aside(final, write, barrier)
        if barrier is None or is_main_process():
            # A daemon: a second Ctrl-C ends the program at once.
            self._thread = Thread(target=self._seal, args=(staged, final), daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until the last one is sealed.

        Raises:
            OSError: when it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def metrics(self) -> dict[str, float]:
        """Return perf/ values of the last seal: seconds in all and of hashing, and the size in GB."""
        if self.last is None:
            return {}
        return {
            "perf/seconds_seal": self.last.seconds,
            "perf/seconds_hash": self.last.hash_seconds,
            "perf/checkpoint_gb": self.last.bytes / 1e9,
        }

    def _seal(self, staged: Path, final: Path) -> None:
        try:
            self.before()
            self.last = seal(staged, final, self.identity)
            keep_last(self.folder, CHECKPOINTS_KEPT, self.identity)
        except BaseException as error:
            self._error = error
            shutil.rmtree(staged, ignore_errors=True)
