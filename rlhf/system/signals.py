"""The signals that ask a stage to stop, how all processes learn of them, and the exit codes that report them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.system import rank_logs
from rlhf.system.ranks import is_main_process, launcher_world_size

# Two signals this far apart, in seconds, came from a person: the copies of a launcher and a terminal come together.
REPEAT_SECONDS = 0.5
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends SIGUSR1 when the time is nearly up
STOPPED = tuple(128 + number for number in STOPPING)  # exit codes of a stage that a signal stopped


class StopNow(BaseException):
    """Raised in the middle of the stage's work by a Ctrl-C that comes over REPEAT_SECONDS after the first signal."""


@dataclass
class Signals:
    """Remember the first SIGINT, SIGTERM or SIGUSR1; a later SIGINT raises StopNow, the next one ends the process.

    SIGTERM and SIGUSR1 never stop at once, however often they come: schedulers send them to every process of a job, and
    `rlhf run` passes on its own.
    """

    received: int = 0  # number of the first signal, 0 before one came
    at: float = 0.0  # time.monotonic of the first signal, or of when this process learned of another's

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Catch the signals inside the block; only the main thread may call this."""
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> int:
        """Return the highest number of the signals that the processes received, 0 if none; this process remembers it.

        All processes must call this together.
        """
        if (launcher_world_size() or 1) == 1:
            return self.received
        from rlhf.system.distributed import maximum_over_processes  # torch, which the launcher does without

        if number := maximum_over_processes(self.received):  # a signal during the reduction is for the next call
            self.received = number
            self.at = self.at or time.monotonic()  # this process's copy of the same Ctrl-C may still come
        return number

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.at > REPEAT_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise StopNow
            return
        self.received, self.at = number, time.monotonic()
        log = rank_logs.current()
        if is_main_process() and not (log and log.error_reported()):  # after a failure the launcher sends SIGTERM
            # A buffered stream will not do: the signal may have come while it was being written to.
            os.write(2, b"\nstopping after this step; Ctrl-C to stop at once\n")
