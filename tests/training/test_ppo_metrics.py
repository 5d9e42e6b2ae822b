"""The peaks of the machine are measured once and kept in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.training import ppo_metrics

CPU = torch.device("cpu")


def test_what_the_machine_does_is_measured_once_for_a_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(ppo_metrics, "measured_peak_flops", lambda device, dtype: measured.append(dtype) or 1e9)
    monkeypatch.setattr(ppo_metrics, "measured_bandwidth", lambda device: 1e8)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        ppo_metrics.machine_peaks.cache_clear()  # as in a process of its own
        assert ppo_metrics.machine_peaks(CPU, dtype) == {"perf/peak_flops": 1e9, "perf/bandwidth": 1e8}
    assert measured == [torch.float32, torch.bfloat16]
    ppo_metrics.machine_peaks.cache_clear()  # what was found here is not for the tests that follow
