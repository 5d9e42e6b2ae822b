"""What this machine does at its best, and what a process has taken: peak memory, FLOP/s, bytes per second."""

from __future__ import annotations

import mmap
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

# (rows, inner, columns) of the products tried; small ones first, to pass over what would take too long: bfloat16 on a
# CPU without instructions for it makes 0.3 GFLOP/s.
CPU_PRODUCTS = ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 1024, 2048), (2048, 2048, 2048))
GPU_PRODUCTS = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192))
TRIES, BUDGET, LONGEST = 6, 0.4, 3.0  # of each product: tries, seconds for all but the first, seconds for one
RESET_SLACK = 16 << 20  # bytes: the kernel's counts of resident pages are exact to a few hundred a core

_highest: dict[str, float] = {}  # GB by type of device, before the newest reset


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far, in GB: of the GPU where there is one, else of this process. Resets do not lower it."""
    return max(_highest.get(device.type, 0.0), recent_peak_gb(device))


def recent_peak_gb(device: torch.device) -> float:
    """Largest memory since the newest `reset_peak`, in GB. On a CPU it holds what the allocator has not given back."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":
        # Not ru_maxrss: it begins with what the process was forked from, however large that was.
        return _resident("VmHWM") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def reset_peak(device: torch.device, forget: bool = False) -> bool:
    """Reset the counter of `recent_peak_gb`; returns False if the system cannot, and the peak is that of the whole run.

    On Linux the kernel's own mark is set back, so ru_maxrss, read from outside, is then of the time since as well.

    Args:
        forget: what was highest since the last reset is no peak of the run.
    """
    if not forget:
        _highest[device.type] = peak_memory_gb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # Sandboxes take the write and do nothing.
        return _resident("VmHWM") <= _resident("VmRSS") + RESET_SLACK
    except OSError:
        return False


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@lru_cache(maxsize=4)
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large matrix products, measured once (about a second)."""
    best = 0.0
    for rows, inner, columns in GPU_PRODUCTS if device.type == "cuda" else CPU_PRODUCTS:
        flops = 2 * rows * inner * columns
        if best and flops / best > LONGEST:
            break
        own = torch.Generator(device).manual_seed(0)  # the global one belongs to the run, which may be resumed
        a, b = (_scratch(n * m, dtype, device).view(n, m) for n, m in ((rows, inner), (inner, columns)))
        a.normal_(generator=own)
        b.normal_(generator=own)
        out = _scratch(rows * columns, dtype, device).view(rows, columns)
        repeats = 8 if device.type == "cuda" else 1  # a launch takes as long as a small product
        spent = 0.0
        for _ in range(TRIES):
            seconds = _seconds(partial(torch.mm, a, b, out=out), repeats, device)
            best, spent = max(best, repeats * flops / seconds), spent + seconds
            if spent > BUDGET:
                break
    return best


@lru_cache(maxsize=2)
def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, past the caches; measured once."""
    size = 1 << (27 if device.type == "cuda" else 24)  # float32: 512 MB, or 64 MB
    source, target = (_scratch(size, torch.float32, device).fill_(1.0) for _ in range(2))
    repeats = 4 if device.type == "cuda" else 1
    seconds = min(_seconds(partial(target.copy_, source), repeats, device) for _ in range(2 * TRIES))
    return 2 * source.nbytes * repeats / seconds


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that goes back to the system with the tensor: the allocator of a CPU run keeps what it is given."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)
    return torch.empty(elements, dtype=dtype, device=device)


def _seconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds that `action()` takes, done `repeats` times."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait for what was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
