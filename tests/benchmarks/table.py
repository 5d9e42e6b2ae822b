"""Medians, ratios and the table of results; pure functions on what the programs measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

OURS = "ours"
FEWER_IS_BETTER = ("s", "s/TFLOP", "GB")


@dataclass
class Line:
    """One side of one case: a number of every repeat, or the reason why there is none."""

    part: str
    case: str
    side: str
    unit: str
    values: list[float] = field(default_factory=list)
    peak_gb: list[float] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)  # what the program printed, repeat by repeat
    note: str = ""

    @property
    def median(self) -> float | None:
        return median(self.values) if self.values else None

    @property
    def memory(self) -> float | None:
        return median(self.peak_gb) if self.peak_gb else None


def speedup(ours: Line, theirs: Line) -> float | None:
    """How many times as fast ours is, by the medians."""
    if not ours.median or not theirs.median:
        return None
    return theirs.median / ours.median if ours.unit in FEWER_IS_BETTER else ours.median / theirs.median


def memory_ratio(ours: Line, theirs: Line) -> float | None:
    """Our peak memory as a share of theirs."""
    return ours.memory / theirs.memory if ours.memory and theirs.memory else None


def of_case(lines: Sequence[Line], line: Line) -> Line | None:
    """Our side of a line's case."""
    same = [each for each in lines if (each.part, each.case) == (line.part, line.case)]
    return next((each for each in same if each.side == OURS), None)


def against_ours(lines: Sequence[Line], line: Line) -> tuple[float | None, float | None]:
    """The speed and the memory of ours beside another side's line; None for our own lines."""
    ours = of_case(lines, line)
    return (None, None) if ours is None or ours is line else (speedup(ours, line), memory_ratio(ours, line))


def render(lines: Sequence[Line]) -> str:
    """The table as Markdown, with columns padded so that it reads on a terminal."""
    head = ["part", "case", "side", "median", "spread", "unit", "speed of ours", "peak", "memory of ours", "note"]
    rows = [head]
    for line in lines:
        spread = f"{_number(min(line.values))}-{_number(max(line.values))}" if len(line.values) > 1 else ""
        peak = f"{line.memory:.2f} GB" if line.memory else ""
        speed, memory = (f"{ratio:.2f}x" if ratio else "" for ratio in against_ours(lines, line))
        measured = [_number(line.median), spread, line.unit, speed, peak, memory]
        rows.append([line.part, line.case, line.side, *measured, line.note])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    padded = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {row} |" for row in padded)


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The same with every single measurement."""
    out = []
    for line in lines:
        speed, memory = against_ours(lines, line)
        derived = {"median": line.median, "median_peak_gb": line.memory}
        out.append(vars(line) | derived | {"speedup_of_ours": speed, "memory_ratio_of_ours": memory})
    return out


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
