"""Progress lines, bars on a terminal, tables and number formats."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from rlhf.system import console
from rlhf.system.console import Progress, duration, number, table, track, warn
from support.paths import ROOT


class Clock:
    """Stands in for time.monotonic; the tests say what time it is."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_a_log_gets_a_line_at_the_start_every_ten_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("sampling", total=256, unit="responses") as bar:
        for _ in range(8):
            clock.now += 4
            bar.advance(32)
    assert capsys.readouterr().out.splitlines() == [
        "sampling 0/256 responses",
        "sampling 96/256 8 responses/s 0:20 left",  # 12 s; the first advance is not in the rate
        "sampling 192/256 8 responses/s 0:08 left",
        "sampling 256/256 8 responses/s done in 0:32",
    ]


def test_what_a_resumed_run_did_before_is_not_in_the_rate(clock: Clock) -> None:
    with Progress("ppo", total=100, unit="episodes", initial=60) as bar:
        clock.now += 2
        bar.advance(10)
        assert bar.rate() == 5  # one advance: 10 in 2 s
        assert bar.seconds_left() == 6  # 30 to go
        clock.now += 1
        assert bar.seconds_left() == 5  # time passes between advances too
        clock.now += 1
        bar.advance(20)
        assert bar.rate() == 10  # from the second advance on: 20 in 2 s
    with Progress("ppo", total=100) as bar:
        bar.advance(60)  # the same, told by an advance at the start
        clock.now += 4
        bar.advance(8)
        assert bar.rate() == 2


def test_low_rates_are_seconds_per_unit_and_an_unknown_total_has_no_end(clock: Clock) -> None:
    with Progress("reading", unit="rows") as bar:
        assert bar.rate_text() == "" and bar.seconds_left() is None
        bar.advance()
        clock.now += 50
        bar.advance()
        assert bar.rate_text() == "50.0 s/rows"
        assert bar.seconds_left() is None
        clock.now += 1
        bar.advance(10199)
        assert bar.rate_text() == "200 rows/s"


def test_a_loop_that_breaks_off_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Progress("scoring", total=4) as bar:
        bar.advance()
        raise ValueError
    shown = capsys.readouterr().out  # with its rate, on a machine that is busy for a moment
    assert "scoring 1/4" in shown and "broken off in 0:00" in shown


def test_track_yields_everything_and_finds_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(["a", "b", "c"], "reading", unit="rows")) == ["a", "b", "c"]
    assert list(track(iter("ab"), "more")) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading 0/3 rows" and lines[1].startswith("reading 3/3 ") and lines[2] == "more 0 it"


def test_a_terminal_gets_bars_also_nested_ones_and_the_cursor_back() -> None:
    code = """
from rlhf.system.console import Progress, close_progress, console
with Progress("outer", total=2, unit="steps") as outer:
    for _ in range(2):
        with Progress("inner", total=3, unit="rows") as inner:
            inner.advance(3)
        outer.advance()
        console.print("a line in between")
Progress("left open", total=5).__enter__()
close_progress()
print("end")
"""
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux reports the end of a pseudo-terminal as an error
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait() == 0
    text = shown.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "2/2" in plain and "3/3" in plain and "0/5" in plain and "a line in between" in plain and "end" in plain
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden


def test_other_processes_show_nothing() -> None:
    code = """
from rlhf.system.console import Progress, console, table, warn
with Progress("work", total=1) as bar:
    bar.advance()
console.print("text"); table("t", ["a"], [[1]]); warn("w")
"""
    env = os.environ | {"RANK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_table_shows_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table("Scores [x]", ["name", "value"], [["[bold]a[/bold]", 0.123456], ["b", None], ["c", 12]])
    shown = capsys.readouterr().out
    assert "Scores [x]" in shown and "[bold]a[/bold]" in shown
    assert "│ 0.1235 │" in shown and "│      - │" in shown and "│     12 │" in shown
    table("", ["", ""], [["only", "rows"]])
    assert len(capsys.readouterr().out.strip().splitlines()) == 3  # no header and no rule below one


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e-05, "1e-05"), (3.0, "3"), (2.71828, "2.718"), (123456.0, "123,456"), (1234567, "1,234,567")]
    + [(True, "yes"), (None, "-"), ("text", "text"), (float("nan"), "nan"), (0.0, "0")],
)
def test_number(value: object, shown: str) -> None:
    assert number(value) == shown


def test_duration() -> None:
    shown = ["–", "0:00", "0:15", "1:01", "59:59", "1:00:00", "1:02:45", "0:00"]
    assert [duration(s) for s in (None, 0, 14.6, 61, 3599.4, 3599.6, 3765, -3)] == shown


def test_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    warn("look at [this]")
    captured = capsys.readouterr()
    assert captured.err == "warning: look at [this]\n" and captured.out == ""
