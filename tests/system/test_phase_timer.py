"""How the time, padding and peak memory of phases are measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf.rollout.batches import build_batch
from rlhf.system import machine, phase_timer
from rlhf.system.phase_timer import PhaseTimer
from rlhf.system.phases import now

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock of PhaseTimer; call this to let seconds pass. Memory peaks at 2, then 3 GB, ..."""
    now, peaks = [0.0], iter([2.0, 3.0, 1.0, 9.0])
    monkeypatch.setattr(phase_timer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(phase_timer, "reset_peak", lambda device: True)
    monkeypatch.setattr(phase_timer, "recent_peak_gb", lambda device: next(peaks))

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_phases_add_up_to_the_time_that_passed(clock: Callable[[float], None]) -> None:
    times = PhaseTimer(CPU, ("rollout", "train", "ptx"))
    with times("rollout"):
        clock(4.0)
    clock(0.5)
    for _ in range(2):
        with times("train"):
            clock(3.0)
            build_batch([([1, 2], [3]), ([1], [2])], 0)  # five tokens in six places
    build_batch([([1], [2])], 0)  # of no phase
    clock(0.5)
    found = times.collect().metrics()
    assert found == {
        "perf/seconds_rollout": 4.0, "perf/seconds_train": 6.0, "perf/seconds_ptx": 0.0, "perf/seconds_other": 1.0,
        "memory/rollout_gb": 2.0, "memory/train_gb": 3.0, "perf/padding_train": pytest.approx(1 / 6),
    }  # fmt: skip
    with times("train"):
        clock(1.0)
    again = times.collect().metrics()
    assert (again["perf/seconds_train"], again["memory/train_gb"], again["perf/seconds_other"]) == (1.0, 9.0, 0.0)


def test_the_time_begins_with_the_first_phase_and_a_phase_is_announced(clock: Callable[[float], None]) -> None:
    times = PhaseTimer(CPU)
    clock(5.0)
    with times("train", 3):
        clock(1.0)
        assert (now.phase, now.step) == ("train", 3)
    assert times.collect().metrics()["perf/seconds_other"] == 0.0


def test_a_peak_that_cannot_be_set_back_is_not_shown(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase_timer, "reset_peak", lambda device: False)
    times = PhaseTimer(CPU)
    with times("train"):
        clock(1.0)
    assert times.collect().metrics() == {"perf/seconds_train": 1.0, "perf/seconds_other": 0.0}


def test_a_mark_that_stays_where_it_was_counts_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"VmHWM": 3 << 30, "VmRSS": 1 << 30}  # as in a sandbox that takes the write and does nothing
    monkeypatch.setattr(machine, "_resident", marks.__getitem__)
    monkeypatch.setattr(machine, "_highest", {})
    assert not machine.reset_peak(CPU)
    monkeypatch.setattr(machine.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert not machine.reset_peak(CPU)


def test_the_peak_of_the_process_outlives_a_reset() -> None:
    held = machine._scratch(50_000_000, torch.float32, CPU).fill_(1.0)
    before = machine.peak_memory_gb(CPU)
    del held  # goes back to the system
    if not machine.reset_peak(CPU):
        pytest.skip("this system does not set the mark back")
    assert machine.recent_peak_gb(CPU) < before - 0.15
    assert machine.peak_memory_gb(CPU) >= before - 0.01  # the kernel counts pages in lots
    highest = machine.peak_memory_gb(CPU)
    held = machine._scratch(100_000_000, torch.float32, CPU).fill_(1.0)
    del held
    assert machine.reset_peak(CPU, forget=True)
    assert machine.peak_memory_gb(CPU) < highest + 0.05  # as if it had never been
