"""Starts stages as processes of their own, quickly, and kills them where it is told to: the fork server of the harness.

    python tests/faults/attempts.py < jobs > outcomes

What a stage imports is loaded once; every line of JSON on standard input is an attempt, forked off as a process that
runs `module.main(arguments)`. A line {"status": ...} answers it: the exit code, or -9 for one that was
killed; libraries may print others.

    module, arguments    the stage program and its command line
    run                  its run folder
    log                  gets everything that it prints
    profile              gets what it did: {"phases": [[name, seconds]], "events": [phase of every event]}, if it ends
    mortal               the modes of files hold for it even if this user is root
    clock                seconds that its clock is ahead
    kill                 {"phase": name, "visit": n, "delay": s}   s seconds into the n-th time that it is in that phase
                         {"event": n}                              just before its n-th change to a file of the run

A kill is SIGKILL, or the signal {"number": n}, sent to the process by itself: from a thread, or in the audit event that
comes before a system call.
Phases are those of rlhf/system/phases.py.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import rlhf.system.phase_timer
import stages.ppo
import stages.rank
import stages.reward
import stages.sft

MODULES = (stages.sft, stages.rank, stages.reward, rlhf.system.phase_timer)  # that begin phases
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # audit events, besides open for writing


class Life:
    """Notes what the process does, and kills it where the job says."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.kill, self.run = job.get("kill") or {}, str(job["run"])
        self.now, self.visits = "start", Counter[str]()
        self.phases: list[tuple[str, float]] = []
        self.events: list[str] = []

    def watch(self) -> None:
        """Be told of phases and of changes to files."""
        for module in MODULES:
            module.phase = self._told(module.phase)
        sys.addaudithook(self._event)
        self.enter("start")

    def enter(self, name: str) -> None:
        self.now = name
        self.phases.append((name, time.monotonic()))
        self.visits[name] += 1
        if self.kill.get("phase") == name and self.kill["visit"] == self.visits[name]:
            number = self.kill.get("number", signal.SIGKILL)
            timer = threading.Timer(self.kill["delay"], os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    def profile(self) -> dict[str, Any]:
        """Phases with their durations, and the phase of every event."""
        ends = [begin for _, begin in self.phases[1:]] + [time.monotonic()]
        phases = [(name, end - begin) for (name, begin), end in zip(self.phases, ends, strict=True)]
        return {"phases": phases, "events": self.events}

    def _told(self, phase: Any) -> Any:
        def told(name: str, step: int | None = None) -> None:
            phase(name, step)
            self.enter(name)

        return told

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(self.run):
            return
        self.events.append(self.now)
        if len(self.events) == self.kill.get("event"):
            os.kill(os.getpid(), signal.SIGKILL)


def heed_modes() -> None:
    """Give up root's right to read and write everything: capabilities(7), CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits of each
    if libc.capget(head, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~0b110
    if libc.capset(head, sets):
        raise OSError(ctypes.get_errno(), "capset")


def attempt(job: dict[str, Any]) -> int:
    """Run a job in this process; returns its exit code."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    if job.get("mortal"):
        heed_modes()
    if "clock" in job:
        clock = time.time
        time.time = lambda: clock() + job["clock"]
    life = Life(job)
    life.watch()
    code = importlib.import_module(job["module"]).main(job["arguments"])
    if "profile" in job:
        Path(job["profile"]).write_text(json.dumps(life.profile()))
    sys.stdout.flush()
    return code


def main() -> None:
    """Answer jobs until there are no more."""
    torch.set_num_threads(1)  # a fork has none of the threads of a pool
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = attempt(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
