"""A stage's checkpoints: the training loop waits for the write, and runs on while the files are hashed and sealed.

The written files no longer change, so a background thread can seal them without a second copy of the state in memory. A
run that is killed before the seal resumes from the checkpoint before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from rlhf.run.sealing import Sealed, keep_last, newest_sealed, seal, write_aside
from rlhf.stage_table import CHECKPOINTS_KEPT
from rlhf.system.ranks import is_main_process


class Checkpoints:
    """The checkpoints in a stage's `checkpoints/`: all processes write them, the first one seals them.

    They carry the hash `identity` (rlhf/run/sealing.py). The first process calls `before` before it seals: it puts on
    disk what a checkpoint must not outlive.
    """

    def __init__(self, folder: Path, identity: str = "", before: Callable[[], None] = lambda: None) -> None:
        self.folder, self.identity, self.before = folder, identity, before
        self.last: Sealed | None = None  # size and seconds of the last seal
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def newest(self) -> Path | None:
        """Return the newest sound checkpoint, None if there is none."""
        return newest_sealed(self.folder, self.identity)

    def save(self, step: int, write: Callable[[Path], object], barrier: Callable[[], None] | None = None) -> None:
        """Write step-NNNNNN and seal it in the background; for `write` and `barrier` see `write_aside`.

        Raises OSError if the checkpoint before could not be sealed, or this one cannot be written.
        """
        self.wait()
        final = self.folder / f"step-{step:06d}"
        staged = write_aside(final, write, barrier)
        if barrier is None or is_main_process():
            # A daemon thread, so that a second Ctrl-C ends the program at once.
            self._thread = Thread(target=self._seal, args=(staged, final), daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is sealed; raise OSError if it could not be."""
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
        seconds = {"perf/seconds_seal": self.last.seconds, "perf/seconds_hash": self.last.hash_seconds}
        return seconds | {"perf/checkpoint_gb": self.last.bytes / 1e9}

    def _seal(self, staged: Path, final: Path) -> None:
        try:
            self.before()
            self.last = seal(staged, final, self.identity)
            keep_last(self.folder, CHECKPOINTS_KEPT, self.identity)
        except BaseException as error:
            self._error = error
            shutil.rmtree(staged, ignore_errors=True)
