"""Time that the phases of PPO's iterations took, and the least they could have taken, from the rows of its log.

A phase cannot take less than its FLOPs at the machine's measured peak, nor less than its bytes at the measured
bandwidth. A phase of several parts, one after the other, takes at least the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.system.phases import PHASES

MetricsRow = Mapping[str, float | None]
WITH_OTHER = (*PHASES, "other")
PARTS = {  # of perf/flops_PART and perf/bytes_PART
    "rollout": ("prefill", "decode", "rescore"),
    "score": ("score",),
    "train": ("train",),
    "ptx": ("ptx",),
    "optimizer": ("optimizer",),
}


@dataclass(frozen=True)
class Bound:
    """Least seconds of a part, by its arithmetic and by its bytes."""

    part: str
    arithmetic: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.bandwidth)

    @property
    def limited_by(self) -> str:
        return "arithmetic" if self.arithmetic >= self.bandwidth else "bandwidth"


@dataclass(frozen=True)
class PhaseCost:
    """Time, least time and memory of a phase of an iteration."""

    name: str
    seconds: float
    share: float  # of the iteration
    tokens_per_s: float | None
    floors: tuple[Bound, ...]  # of its parts; empty where none is known
    peak_gb: float | None
    padding: float | None  # share of the computed slots

    @property
    def floor(self) -> float | None:
        """Return the least seconds, None where unknown."""
        return sum(floor.seconds for floor in self.floors) if self.floors else None

    @property
    def times_floor(self) -> float | None:
        return self.seconds / self.floor if self.floor else None


def mean_row(rows: Sequence[MetricsRow]) -> dict[str, float]:
    """Return the mean of each metric that is a number; of memory, the largest."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, []).append(float(value))
    return {name: max(v) if name.startswith("memory/") else sum(v) / len(v) for name, v in found.items()}


def bounds_of(row: MetricsRow, phase: str) -> tuple[Bound, ...]:
    """Return the bound of each part of a phase that did anything."""
    peak, bandwidth = row.get("perf/peak_flops"), row.get("perf/bandwidth")
    if not peak or not bandwidth:
        return ()
    needs = [(part, *(row.get(f"perf/{kind}_{part}") or 0.0 for kind in ("flops", "bytes"))) for part in PARTS[phase]]
    return tuple(Bound(part, flops / peak, size / bandwidth) for part, flops, size in needs if flops or size)


def phase_costs(row: MetricsRow) -> list[PhaseCost]:
    """Return the phases that took time, in the order of the iteration."""
    seconds = {phase: row.get(f"perf/seconds_{phase}") or 0.0 for phase in WITH_OTHER}
    total = sum(seconds.values())
    costs = []
    for phase, took in seconds.items():
        if took:
            bounds = bounds_of(row, phase) if phase in PARTS else ()
            rate, padding = row.get(f"perf/{phase}_tokens_per_s"), row.get(f"perf/padding_{phase}")
            costs.append(PhaseCost(phase, took, took / total, rate, bounds, row.get(f"memory/{phase}_gb"), padding))
    return costs


def worst_phase(costs: Sequence[PhaseCost]) -> PhaseCost | None:
    """Return the phase with the most seconds above its floor, None where no floor is known."""
    known = [cost for cost in costs if cost.floor is not None]
    return max(known, key=lambda cost: cost.seconds - (cost.floor or 0.0), default=None)
