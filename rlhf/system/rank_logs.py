"""Output of a distributed run: one process prints to the terminal, every process has a log file, one error is shown.

    runs/<run>/<stage>/logs/rank-0.txt    what the first process printed, which is also on the terminal
    runs/<run>/<stage>/logs/rank-1.txt    everything that process 1 wrote, libraries included; traceback of its error
    runs/<run>/<stage>/logs/error.txt     the error that ended the last attempt, as the terminal showed it

The process whose error comes first creates error.txt and shows it; errors that follow from it in the other processes go
to their log files. A single process keeps no log.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rlhf.errors import UserError
from rlhf.system.phases import now
from rlhf.system.ranks import process_rank

ERROR = "error.txt"
_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_open: RankLog | None = None  # one for the process: signal handlers and threads need it, and get no arguments


class PeerFailed(Exception):
    """Another process of the run has ended or hangs; the text names it and its last phase."""


class RankLog:
    """The log file of this process, and the terminal that it was started from."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank, self.folder = rank, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.txt"
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        # The watchdog writes this file anew once all processes have joined: what it finds then is of this attempt.
        (folder / f"rank-{rank}.json").unlink(missing_ok=True)
        self.file.write(f"--- process {os.getpid()} begins, {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n")
        if rank == 0:
            # Of the previous attempt: no process reports an error before all have joined.
            (folder / ERROR).unlink(missing_ok=True)
        self.terminal = os.dup(2)

    def error_reported(self) -> bool:
        """Return whether some process has reported an error."""
        return (self.folder / ERROR).exists()

    def report_error(self, text: str) -> bool:
        """Show an error on the terminal unless another process was first; return whether this one was first."""
        try:
            descriptor = os.open(self.folder / ERROR, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        self.file.write(text + "\n")
        red = ("\x1b[31m", "\x1b[0m") if os.isatty(self.terminal) and "NO_COLOR" not in os.environ else ("", "")
        os.write(self.terminal, f"{red[0]}{text}{red[1]}\n".encode())
        return True


@contextmanager
def own_log(folder: Path, processes: int) -> Iterator[None]:
    """Write what this process prints inside the block to its log file in `folder`; report an error that leaves it.

    A single process has no log. After the report SystemExit is raised: (2) in place of a UserError, (1) of others.
    """
    global _open
    if processes == 1:
        yield
        return
    log = _open = RankLog(folder, process_rank())
    try:
        with _tee(log.file) if log.rank == 0 else _redirect(log.file), _deepspeed_to(log.file):
            yield
    except UserError as error:
        log.report_error(f"error: {error}" if log.rank == 0 else f"error on rank {log.rank}: {error}")
        raise SystemExit(2) from None
    except PeerFailed as failure:
        log.report_error(str(failure))
        raise SystemExit(1) from None
    except Exception as error:
        traceback.print_exc(file=log.file)
        what = "".join(traceback.format_exception_only(error)).strip()
        log.report_error(f"error on rank {log.rank} in {now.words()}: {what}\n  traceback: {log.path}")
        raise SystemExit(1) from None
    finally:
        os.close(log.terminal)
        log.file.close()
        _open = None


def current() -> RankLog | None:
    """Return the log of this process; None for a single process, and outside of `own_log`."""
    return _open


class _Tee:
    """A text stream that is copied to a log file without its colours."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(_STYLES.sub("", text))
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:  # isatty, encoding, flush and all others come from the stream
        return getattr(self._stream, name)


@contextmanager
def _tee(file: TextIO) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(sys.stdout, file), _Tee(sys.stderr, file)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def _redirect(file: TextIO) -> Iterator[None]:
    """Redirect descriptors 1 and 2 to the file, so that it also gets what libraries print from C++."""
    kept = {number: os.dup(number) for number in (1, 2)}
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    for number in kept:
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, descriptor in kept.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def _deepspeed_to(file: TextIO) -> Iterator[None]:
    """Send DeepSpeed's warnings to the file alone, its errors to the terminal as well; it logs to standard output."""

    def divert(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            file.write(f"DeepSpeed {record.levelname.lower()}: {record.getMessage()}\n")
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("DeepSpeed")  # a filter of the logger also holds for handlers that a later import adds
    logger.addFilter(divert)
    try:
        yield
    finally:
        logger.removeFilter(divert)
