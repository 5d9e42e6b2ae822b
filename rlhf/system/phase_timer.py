"""Where the time and the memory of an iteration go: seconds, peak and batches of each of its phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rlhf.system.machine import (
    measured_bandwidth,
    measured_peak_flops,
    peak_memory_gb,
    recent_peak_gb,
    reset_peak,
    synchronize,
)


@dataclass
class PaddingCounts:
    """Padded batches that were built: how many, their tokens, and their places with padding."""

    number: int = 0
    tokens: int = 0
    slots: int = 0

    @property
    def padding(self) -> float:
        """Share of the places that is padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


@dataclass
class PhaseMeasurements:
    """By phase: seconds, peak in GB where it can be had, and the batches; `other` is what no phase was."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, float] = field(default_factory=dict)
    batches: dict[str, PaddingCounts] = field(default_factory=lambda: defaultdict(PaddingCounts))

    def metrics(self) -> dict[str, float]:
        """perf/seconds_PHASE, memory/PHASE_gb, and perf/padding_PHASE where batches were padded."""
        found = {f"perf/seconds_{name}": seconds for name, seconds in self.seconds.items()}
        found |= {f"memory/{name}_gb": peak for name, peak in self.peaks.items()}
        return found | {f"perf/padding_{name}": batches.padding for name, batches in self.batches.items()}


_open: list[PaddingCounts] = []  # of the phase that is going on


def count_batch(tokens: int, slots: int) -> None:
    """A batch of so many tokens and places was built; it counts for the phase that is going on, if any."""
    if _open:
        _open[-1].number += 1
        _open[-1].tokens += tokens
        _open[-1].slots += slots


class PhaseTimer:
    """Measures the phases of a loop: `with times("score"): ...`, any number of times each, and `take` at its end.

    Attributes:
        peak_flops: FLOP/s that this process's device reaches in the type of the weights, measured here.
        bandwidth: bytes per second from and to its memory, likewise.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, phases: tuple[str, ...] = ()) -> None:
        self.device, self._phases = device, phases
        reset_peak(device)
        self.peak_flops = measured_peak_flops(device, dtype)
        self.bandwidth = measured_bandwidth(device)
        reset_peak(device, forget=True)  # what the measurements took was given back, and is no peak of the loop
        self._begin()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add what happens inside to a phase; phases do not nest."""
        counts = reset_peak(self.device)
        _open.append(self._measured.batches[phase] if phase in self._measured.batches else PaddingCounts())
        begin = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            batches = _open.pop()
        self._measured.seconds[phase] += time.perf_counter() - begin
        if batches.number:
            self._measured.batches[phase] = batches
        if counts:
            peaks = self._measured.peaks
            peaks[phase] = max(peaks.get(phase, 0.0), recent_peak_gb(self.device))

    def take(self, elsewhere: float = 0.0) -> PhaseMeasurements:
        """What was measured since the last call; `elsewhere` are seconds of it that another clock has counted."""
        done, now = self._measured, time.perf_counter()
        done.seconds["other"] = max(0.0, now - self._since - elsewhere - sum(done.seconds.values()))
        self._begin()
        return done

    def peak_gb(self) -> float:
        """Peak of the whole process so far."""
        return peak_memory_gb(self.device)

    def _begin(self) -> None:
        self._since, self._measured = time.perf_counter(), PhaseMeasurements()
        self._measured.seconds.update(dict.fromkeys(self._phases, 0.0))
