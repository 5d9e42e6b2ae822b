"""Time and memory of the phases of an iteration, and the padding of the batches that were built in them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rlhf.system.machine import peak_memory_gb, recent_peak_gb, reset_peak, synchronize
from rlhf.system.phases import phase


@dataclass
class PaddingCounts:
    """The number of padded batches, their tokens, and their slots (tokens and padding)."""

    number: int = 0
    tokens: int = 0
    slots: int = 0

    @property
    def padding(self) -> float:
        """Return the share of the slots that is padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


@dataclass
class PhaseMeasurements:
    """Seconds, peak in GB (if the system measures it) and batches by phase; `other` is the time outside all phases."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, float] = field(default_factory=dict)
    batches: dict[str, PaddingCounts] = field(default_factory=lambda: defaultdict(PaddingCounts))

    def metrics(self) -> dict[str, float]:
        """Return perf/seconds_PHASE, memory/PHASE_gb, and perf/padding_PHASE where batches were padded."""
        found = {f"perf/seconds_{name}": seconds for name, seconds in self.seconds.items()}
        found |= {f"memory/{name}_gb": peak for name, peak in self.peaks.items()}
        return found | {f"perf/padding_{name}": batches.padding for name, batches in self.batches.items()}


_open: list[PaddingCounts] = []  # of the phase that this process is in


def count_batch(tokens: int, slots: int) -> None:
    """Add a batch to the counts of the phase that this process is in, if it is in one."""
    if _open:
        _open[-1].number += 1
        _open[-1].tokens += tokens
        _open[-1].slots += slots


class PhaseTimer:
    """Announces and measures the phases of a loop: `with phases("score", step): ...`. A phase may come several times.

    The memory of `device` is measured, and its queued work belongs to the phase that queued it. Every result of
    `collect` has the phases in `names`, also if they took no time.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = ()) -> None:
        self.device, self._names = device, names
        self._begin()
        self._since: float | None = None  # the time begins with the first phase

    @contextmanager
    def __call__(self, name: str, step: int | None = None) -> Iterator[None]:
        """Announce a phase (rlhf/system/phases.py; phases do not nest), and add time and memory of the block to it."""
        phase(name, step)
        if self._since is None:
            self._since = time.perf_counter()
        counts = reset_peak(self.device)
        _open.append(self._measured.batches[name] if name in self._measured.batches else PaddingCounts())
        begin = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            batches = _open.pop()
        self._measured.seconds[name] += time.perf_counter() - begin
        if batches.number:
            self._measured.batches[name] = batches
        if counts:
            peaks = self._measured.peaks
            peaks[name] = max(peaks.get(name, 0.0), recent_peak_gb(self.device))

    def collect(self) -> PhaseMeasurements:
        """Return the measurements since the last call, and begin new ones."""
        done, now = self._measured, time.perf_counter()
        since = now if self._since is None else self._since
        done.seconds["other"] = max(0.0, now - since - sum(done.seconds.values()))
        self._begin()
        return done

    def peak_gb(self) -> float:
        """Return the peak of the whole process so far, in GB."""
        return peak_memory_gb(self.device)

    def _begin(self) -> None:
        self._since, self._measured = time.perf_counter(), PhaseMeasurements()
        self._measured.seconds.update(dict.fromkeys(self._names, 0.0))
