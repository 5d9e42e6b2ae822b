"""The watchdog ends a distributed stage when one of its processes dies or hangs, and names it and its last phase.

    runs/<run>/<stage>/logs/rank-1.json    {"rank": 1, "machine": ..., "pid": 4711, "phase": "train", "step": 3, ...}

Every process updates such a file from a thread of its own, and two on each machine read the files of all. A file that
no longer changes belongs to a process that is stopped, dead or cut off. When no file shows progress, the processes wait
for one that hangs. Nothing here is a collective, so the watchdog works while those are stuck, with gloo and with NCCL;
on several machines it works through the shared run folder. Times are read from this machine's clock when it sees a
change.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from rlhf.system import phases, rank_logs
from rlhf.system.phases import PhaseState, now
from rlhf.system.rank_logs import PeerFailed, RankLog
from rlhf.system.ranks import local_rank

HUNG = 124  # exit code of a process that ends because another one hangs, the same as of timeout(1)
GRACE = 5.0  # seconds that a process gets to end by itself after another one reported an error
_watch: Watchdog | None = None  # of the stage that this process runs; `root_cause` reads it wherever an error is caught


@dataclass
class Peer:
    """The last report of a process, and when it changed (time.monotonic)."""

    report: dict[str, Any]
    alive: float  # last sign of life
    moved: float  # last sign of progress


class Watchdog:
    """The thread that writes this process's report to `folder`, logs/ of the stage, and `reads` those of the others.

    The stage ends after `timeout` seconds without a sign of life of one process, or without progress of all.
    """

    def __init__(self, folder: Path, stage: str, rank: int, processes: int, timeout: float, reads: bool) -> None:
        self.folder, self.stage, self.rank, self.timeout, self.reads = folder, stage, rank, timeout, reads
        self.interval = min(10.0, max(0.25, timeout / 100))
        self._ticks, self._write_lock, self._ended = 0, threading.Lock(), threading.Event()
        self._main, self._machine = threading.main_thread().ident, _machine()
        begin = time.monotonic()
        self._peers = {r: Peer({}, begin, begin) for r in range(processes)}
        self._error_seen: float | None = None

    def start(self, log: RankLog) -> None:
        """Write the first report, and start the thread."""
        self.write()
        self._thread = threading.Thread(target=self._run, args=(log,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def write(self) -> None:
        """Replace this process's report in one step."""
        with self._write_lock:  # the thread writes, and the main thread does when a phase begins
            self._ticks += 1
            report = {"rank": self.rank, "machine": self._machine, "pid": os.getpid(), **vars(now)}
            report |= {"waits": _in_collective(sys._current_frames().get(self._main)), "tick": self._ticks}
            staged = self.folder / f"rank-{self.rank}.json.tmp"
            staged.write_text(json.dumps(report))
            staged.replace(self.folder / f"rank-{self.rank}.json")

    def note_phase(self) -> None:
        """Write the report of a new phase; a disk that fails for a moment does not end training, the thread warns."""
        with suppress(OSError):
            self.write()

    def read_reports(self) -> None:
        """Read the reports of all processes."""
        at = time.monotonic()
        for rank, peer in self._peers.items():
            path = self.folder / f"rank-{rank}.json"
            report = json.loads(path.read_text()) if path.exists() else {}
            if report.get("tick") != peer.report.get("tick"):
                peer.alive = at
            if report.get("activity") != peer.report.get("activity"):
                peer.moved = at
            peer.report = report

    def stuck(self) -> str:
        """Describe the processes without a sign of life, or those that all others wait for; empty if there are none."""
        if words := self.silent(self.timeout):
            return words
        at = time.monotonic()
        if all(at - peer.moved > self.timeout for peer in self._peers.values()):
            return self._describe(self._holding_up(), f"makes no progress for {self.timeout:g} s")
        return ""

    def silent(self, seconds: float) -> str:
        """Describe the processes whose report has not changed for `seconds`; empty if there are none."""
        at = time.monotonic()
        silent = [rank for rank, peer in self._peers.items() if at - peer.alive > seconds]
        return self._describe(silent, f"gives no sign of life for {seconds:g} s") if silent else ""

    def dead(self) -> str:
        """Describe the processes of this machine that have ended; empty if there are none."""
        found = {}
        for rank, peer in self._peers.items():
            if peer.report.get("machine") == self._machine:
                ended, number = _ended(peer.report["pid"])
                if ended:
                    found[rank] = f"died (signal {number})" if number else "has ended"
        return "\n".join(self._describe([rank], how) for rank, how in found.items())

    def _holding_up(self) -> list[int]:
        """Return the ranks that the others wait for: of those furthest behind, the ones not in a collective."""
        reports = {rank: peer.report for rank, peer in self._peers.items()}
        least = min(report.get("beat", 0) for report in reports.values())
        behind = [rank for rank, report in sorted(reports.items()) if report.get("beat", 0) == least]
        return [rank for rank in behind if not reports[rank].get("waits")] or behind

    def _describe(self, ranks: list[int], how: str) -> str:
        lines = []
        for rank in ranks[:4]:
            report = self._peers[rank].report
            where = PhaseState(report["phase"], report["step"]).words() if report else "phase start"
            lines.append(f"rank {rank} {how}, in {where}, of {self.stage}\n  log: {self.folder}/rank-{rank}.txt")
        if len(ranks) > 4:
            lines.append(f"the same holds for {len(ranks) - 4} more")
        return "\n".join(lines)

    def _run(self, log: RankLog) -> None:
        while not self._ended.wait(self.interval):
            try:
                self.write()
                if self.reads:
                    self.read_reports()
                    if words := self.stuck():
                        log.report_error(words)
                        self._end(log, words)
                    if not log.error_reported() and (words := self.dead()):
                        log.report_error(words)
            except (OSError, ValueError, psutil.Error) as error:  # a full or slow disk may recover later
                os.write(log.terminal, f"warning: the watchdog of rank {self.rank}: {error}\n".encode())
                continue
            if log.error_reported():
                self._error_seen = self._error_seen or time.monotonic()
                if time.monotonic() - self._error_seen > GRACE:  # in a collective that will never end
                    self._end(log, "ended: another process has failed")

    def _end(self, log: RankLog, why: str) -> None:
        """End this process from the thread, and write the stack of its main thread to the log."""
        log.file.write(f"{why}\nthis process was at:\n")
        if frame := sys._current_frames().get(self._main):
            traceback.print_stack(frame, file=log.file)
        os._exit(HUNG)


@contextmanager
def run_watchdog(stage: str, processes: int, timeout: float) -> Iterator[None]:
    """Watch the processes of a stage inside the block, which must be inside `own_log`; do nothing for a single one."""
    global _watch
    log = rank_logs.current()
    if log is None:
        yield
        return
    # Two processes of every machine read: each sees when the other one hangs. More would only load a shared disk.
    reads = local_rank() < 2
    _watch = Watchdog(log.folder, stage, log.rank, processes, timeout, reads)
    phases.on_phase_change(_watch.note_phase)
    _watch.start(log)
    try:
        yield
    finally:
        phases.on_phase_change(None)
        _watch.stop()
        _watch = None


def root_cause(error: BaseException) -> BaseException:
    """Return the error to report: PeerFailed if `error` only follows from the end of another process, else `error`."""
    log = rank_logs.current()
    if _watch is None or log is None or not _from_collective(error):
        return error
    traceback.print_exception(error, file=log.file)
    deadline = time.monotonic() + 4 * _watch.interval + 2
    while time.monotonic() < deadline:
        if log.error_reported():
            return PeerFailed((log.folder / rank_logs.ERROR).read_text().strip())
        _watch.read_reports()
        if words := _watch.dead() or _watch.silent(3 * _watch.interval):
            return PeerFailed(words)
        time.sleep(0.2)
    return error


def last_phases(folder: Path, processes: int) -> list[str]:
    """Return a line for each process that left a report in logs/, with its last phase and its log."""
    lines = []
    for path in (folder / f"rank-{rank}.json" for rank in range(processes)):
        if path.exists():
            report = json.loads(path.read_text())
            where = PhaseState(report["phase"], report["step"]).words()
            lines.append(f"rank {report['rank']} was last in {where}; log: {path.with_suffix('.txt')}")
    return lines


def _from_collective(error: BaseException) -> bool:
    """Return whether the error came out of a collective operation."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, RuntimeError):
        return False
    # DeepSpeed waits for its gathers on handles that are not implemented in Python.
    return any("torch/distributed" in frame.filename for frame in frames) or "/deepspeed/" in frames[-1].filename


def _in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if "torch/distributed" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _machine() -> str:
    """Return a name that two processes share if they can see each other's ids: host names are not unique enough."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _ended(pid: int) -> tuple[bool, int]:
    """Return whether a process of this machine has ended, and the signal that ended it, 0 if that is unknown."""
    try:
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return False, 0
        status = int(Path(f"/proc/{pid}/stat").read_text().split()[-1])  # as wait(2) gives it
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True, 0
    return True, status & 0x7F
