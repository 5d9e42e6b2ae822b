"""Run a stage program to its end: pass signals on to its processes, and end those that a failure leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from rlhf.system.rank_logs import ERROR
from rlhf.system.signals import STOPPING

GRACE = 25.0  # seconds that the launcher gets to end the other processes after one of them reported an error


class ErrorFile:
    """The file of a stage's logs in which a process reports an error; one of an earlier attempt does not count."""

    def __init__(self, logs: Path) -> None:
        self.path = logs / ERROR
        self.before = self._time()

    def is_new(self) -> bool:
        """Return whether an error was reported since this object was made."""
        return self._time() not in (0.0, self.before)

    def _time(self) -> float:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


def supervise(
    arguments: list[str], env: dict[str, str], local_ranks: bool = False, errors: ErrorFile | None = None
) -> int:
    """Run a command in a session of its own and return its exit code, 128 + N when signal N ended it or came here.

    The first Ctrl-C, SIGTERM, SIGUSR1 or closed terminal is passed on (with `local_ranks` to the processes below the
    launcher, which would leave them behind): the stage seals a checkpoint and ends. A second Ctrl-C kills it. Once
    `errors`, of a launched stage, is new, the launcher and all that it started, stopped processes too, have GRACE to
    end before they are killed.
    """
    launched = errors is not None
    # Slurm signals every process of a step: the launcher must outlive that, its processes have handlers of their own.
    ignore = (lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)) if launched else None
    process = subprocess.Popen(arguments, env=env, start_new_session=True, preexec_fn=ignore)
    with _forwarded_signals(process, local_ranks, launched) as received:
        code = _wait(process, errors)
    if launched:
        _kill_group(process)  # processes that a killed launcher has left behind
        if code > 192:  # DeepSpeed's launcher exits with -N for signal N, of which the system keeps a byte
            code -= 256
    if received:
        return 128 + (received[0] if received[0] in STOPPING else signal.SIGTERM)
    return code if code >= 0 else 128 - code


@contextmanager
def _forwarded_signals(process: subprocess.Popen[bytes], local_ranks: bool, launched: bool) -> Iterator[list[int]]:
    """Pass the first signal on to the process, or to the ranks below it; yield the signals that came."""
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        if received and signum == signal.SIGINT:
            os.killpg(process.pid, signal.SIGKILL)
        elif not received:
            targets = ranks_below(process.pid) if local_ranks else [process.pid]
            # DeepSpeed's launcher ignores SIGUSR1, see above; a stage does not handle SIGHUP.
            known = signum in STOPPING and not (signum == signal.SIGUSR1 and launched and targets == [process.pid])
            for target in targets:
                os.kill(target, signum if known else signal.SIGTERM)
        received.append(signum)

    before = {signum: signal.signal(signum, forward) for signum in (*STOPPING, signal.SIGHUP)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(process: subprocess.Popen[bytes], errors: ErrorFile | None) -> int:
    """Return the exit code of the process; kill it and all that it started when GRACE after an error is over."""
    reported_at = 0.0
    while True:
        try:
            return process.wait(timeout=1.0 if errors else None)
        except subprocess.TimeoutExpired:
            if errors and not reported_at and errors.is_new():
                reported_at = time.monotonic()
            if reported_at and time.monotonic() - reported_at > GRACE:
                _kill_group(process)


def _kill_group(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(leader.pid, signal.SIGKILL)


def ranks_below(launcher: int) -> list[int]:
    """Return the process ids of the ranks under DeepSpeed's launcher, or its own while it has none.

    The runner starts a launch process, which starts the ranks. Ranks seal a checkpoint and end when they get a signal;
    the launcher would end at once and leave them behind.
    """
    ranks = [rank.pid for child in psutil.Process(launcher).children() for rank in child.children()]
    return ranks or [launcher]
