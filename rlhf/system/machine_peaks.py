"""What this machine can do at most, measured once and kept in the user's cache."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch

from rlhf.system.build_cache import build_once
from rlhf.system.machine import device_name, measured_bandwidth, measured_peak_flops, reset_peak


@lru_cache(maxsize=4)
def machine_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return perf/peak_flops, FLOP/s in a type of weights, and perf/bandwidth, bytes per second from and to memory.

    Removing the folder `peaks` of the cache (rlhf/system/build_cache.py) measures them again. Where no cache can be
    written they are measured by every process.
    """
    name = f"{device_name(device)} {torch.get_num_threads()} threads {dtype}"
    try:
        folder = build_once(
            f"peaks/{re.sub('[^A-Za-z0-9.]+', '-', name)}", lambda folder: _write(folder, device, dtype)
        )
        return json.loads((folder / "peaks.json").read_text())
    except (OSError, NotImplementedError, ValueError):  # a full disk, one without locks, a file that was damaged
        return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    reset_peak(device)
    found = {"perf/peak_flops": measured_peak_flops(device, dtype), "perf/bandwidth": measured_bandwidth(device)}
    reset_peak(device, forget=True)  # the measurements do not count for the peak of a run
    return found


def _write(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    (folder / "peaks.json").write_text(json.dumps(_measured(device, dtype)))
