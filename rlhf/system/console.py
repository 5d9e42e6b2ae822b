"""What a person sees of a run: progress bars with rate and time left, tables, notes and warnings.

On a terminal progress is a bar. Elsewhere it is a plain line at the start, about every ten seconds, and at the end:
`sampling 64/256 12.3 responses/s 0:15 left`. Of a distributed run only the first process shows anything, and it shows
lines even on a terminal, because they go to its log file as well.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.system.phases import heartbeat
from rlhf.system.ranks import is_main_process, launcher_world_size

T = TypeVar("T")
PLAIN_INTERVAL = 10.0  # seconds between lines when the output is not a terminal
# Without a terminal rich assumes 80 columns, which breaks the tables of a log file for no reason.
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
console = Console(quiet=not is_main_process(), width=_width, highlight=False)
_errors = Console(stderr=True, quiet=not is_main_process(), highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning as one yellow line to standard error."""
    _errors.print(f"warning: {text}", style="yellow", markup=False)


def note(line: str) -> None:
    """Print a line to standard error, from the first process only."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


def show_drops(counts: Iterable[tuple[str, int]]) -> None:
    """Print a line for each reason why rows were dropped; `counts` is `Drops.table()`."""
    for reason, n in counts:
        console.print(f"dropped {n}: {reason}", markup=False)


def duration(seconds: float | None) -> str:
    """Return seconds as 0:15, 12:03 or 1:02:45, and None as a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: Any) -> str:
    """Return a table cell: floats with four significant digits, whole numbers with separators, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table, cells as they are (no markup), numbers to the right; no header if all column names are empty."""
    rows = [list(row) for row in rows]
    view = Table(title=Text(title), title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        view.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text(number(cell)) for cell in row))
    console.print(view)


class Progress:
    """Progress of a loop, as a context manager; `advance(n)` reports that n more units are done.

    `unit` is a plural; `total` is None if unknown. The `initial` units, which a run did before it was resumed, do not
    count for the rate.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "it", initial: int = 0) -> None:
        self.description, self.total, self.unit, self.done, self._initial = description, total, unit, initial, initial
        self._task: bars.TaskID | None = None
        self._first: tuple[float, int] | None = None  # time and count at the first advance

    def __enter__(self) -> Progress:
        self._start = self._last = self._printed = time.monotonic()
        if not is_main_process():
            return self
        if console.is_terminal and launcher_world_size() in (None, 1):
            self._task = _live.show(self)
        else:
            self._line(f"{self._count()} {self.unit}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            _live.hide()
        elif is_main_process():
            took = f"{'done' if kind is None else 'broken off'} in {duration(time.monotonic() - self._start)}"
            self._line(" ".join(filter(None, [self._count(), self.rate_text(), took])))

    def advance(self, n: int = 1) -> None:
        """Count n more as done."""
        self.done = self.done + n if self.total is None else min(self.done + n, self.total)
        self._last = time.monotonic()
        heartbeat()
        if self._first is None:
            self._first = (self._last, self.done)
        if self._task is not None:
            _live.update(self._task, self.done)
        elif self._task is None and is_main_process() and self._last - self._printed >= PLAIN_INTERVAL:
            self._printed = self._last
            left = self.seconds_left()
            rest = f"{duration(left)} left" if left is not None else ""
            self._line(" ".join(filter(None, [self._count(), self.rate_text(), rest])))

    def rate(self) -> float | None:
        """Return units per second, None before it can be known.

        The first advance does not count if there are others: it contains warm-up, or what a resumed run did before.
        """
        if self._first is None:
            return None
        when, count = self._first
        if self._last > when:
            return (self.done - count) / (self._last - when)
        elapsed = self._last - self._start
        return (self.done - self._initial) / elapsed if elapsed > 1e-3 else None

    def rate_text(self) -> str:
        """Return the rate as `12.3 responses/s` or, below 0.1 per second, as seconds per unit; empty if unknown."""
        rate = self.rate()
        if not rate:
            return ""
        if rate < 0.1:
            return f"{1 / rate:.1f} s/{self.unit}"
        return f"{rate:,.0f} {self.unit}/s" if rate >= 1000 else f"{rate:.3g} {self.unit}/s"

    def seconds_left(self) -> float | None:
        """Return the seconds until the end at the rate so far, None if unknown."""
        rate = self.rate()
        if not rate or self.total is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (time.monotonic() - self._last))

    def _count(self) -> str:
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done)

    def _line(self, text: str) -> None:
        console.print(f"{self.description} {text}", markup=False, soft_wrap=True)


def track(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items and show progress; `total` defaults to the length of the iterable if it has one."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with Progress(description, total, unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


def close_progress() -> None:
    """Take down bars that an error left open, so that the terminal is as it was."""
    _live.close()


class _Rate(bars.ProgressColumn):
    """The column for rate and time left; rich's own forgets a step that took longer than half a minute."""

    def render(self, task: bars.Task) -> Text:
        progress: Progress = task.fields["progress"]
        left = progress.seconds_left()
        text = progress.rate_text() + (f"  {duration(left)} left" if left is not None and not task.finished else "")
        return Text(text, style="cyan")


class _LiveDisplay:
    """The bars on the terminal: rich draws one live display at a time, so nested bars share it."""

    def __init__(self) -> None:
        self._display: bars.Progress | None = None
        self._open = 0  # bars shown now

    def show(self, progress: Progress) -> bars.TaskID:
        """Add a bar, and start the display with the first one."""
        if self._display is None:
            self._display = bars.Progress(
                bars.TextColumn("{task.description}", markup=False),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                _Rate(),
                console=console,
            )
            self._display.start()
        self._open += 1
        return self._display.add_task(
            progress.description, total=progress.total, completed=progress.done, progress=progress
        )

    def update(self, task: bars.TaskID, done: int) -> None:
        """Set how many units of a bar are done."""
        if self._display is not None:
            self._display.update(task, completed=done)

    def hide(self) -> None:
        """Close a bar, and stop the display with the last one."""
        self._open -= 1
        if self._open <= 0:
            self.close()

    def close(self) -> None:
        """Stop the display, whatever is open."""
        if self._display is not None:
            self._display.stop()
        self._display, self._open = None, 0


_live = _LiveDisplay()
