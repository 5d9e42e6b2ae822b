"""The peaks of the machine are measured once and kept in the cache, or measured by everyone where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.system import machine_peaks as module
from rlhf.system.machine_peaks import machine_peaks

CPU = torch.device("cpu")
PEAKS = {"perf/peak_flops": 1e9, "perf/bandwidth": 1e8}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Return a list of the types that are measured, by measurements that take no time."""
    found: list[torch.dtype] = []
    monkeypatch.setattr(module, "measured_peak_flops", lambda device, dtype: found.append(dtype) or 1e9)
    monkeypatch.setattr(module, "measured_bandwidth", lambda device: 1e8)
    yield found
    machine_peaks.cache_clear()  # what was found here is not for the tests that follow


def ask(dtype: torch.dtype) -> dict[str, float]:
    """Return the peaks as a process of its own would."""
    machine_peaks.cache_clear()
    return machine_peaks(CPU, dtype)


def test_they_are_measured_once_for_a_type(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        assert ask(dtype) == PEAKS
    assert measured == [torch.float32, torch.bfloat16]


def test_a_cache_that_cannot_be_used_ends_nothing(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made below a file
    assert ask(torch.float32) == PEAKS
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "own"))
    assert ask(torch.float32) == PEAKS
    next((tmp_path / "own").rglob("peaks.json")).write_text("{")
    assert ask(torch.float32) == PEAKS
    assert len(measured) == 3
