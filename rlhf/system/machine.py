"""The peak memory of a process, and the highest FLOP/s and bytes per second that this machine reaches."""

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

# (rows, inner, columns) of the matrix products tried. Small ones come first, so that those that would take too long can
# be skipped: bfloat16 on a CPU without instructions for it makes 0.3 GFLOP/s.
CPU_PRODUCTS = ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 1024, 2048), (2048, 2048, 2048))
GPU_PRODUCTS = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192))
# For each product: most tries; seconds after which no more are made; estimated seconds of one try above which it and
# larger ones are skipped.
TRIES, BUDGET, LONGEST = 6, 0.4, 3.0
RESET_SLACK = 16 << 20  # bytes: the kernel's counts of resident pages are exact to a few hundred a core

_highest: dict[str, float] = {}  # GB by type of device, before the newest reset


def peak_memory_gb(device: torch.device) -> float:
    """Return the highest memory since the process began, in GB (1e9 bytes).

    It is of tensors that torch allocated on a GPU, or resident on a CPU. `reset_peak` keeps it, except for what
    `forget` leaves out.
    """
    return max(_highest.get(device.type, 0.0), recent_peak_gb(device))


def recent_peak_gb(device: torch.device) -> float:
    """Return the peak since the last `reset_peak`, in GB; on a CPU it includes what the allocator has not released."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":
        # Not ru_maxrss: it begins with what the process was forked from, however large that was.
        return _resident("VmHWM") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def reset_peak(device: torch.device, forget: bool = False) -> bool:
    """Reset the counter of `recent_peak_gb`; return False, without effect on it, if the system cannot.

    On Linux this resets the kernel's own counter, so ru_maxrss also starts again. With `forget` the peak since the last
    reset is left out of `peak_memory_gb`.
    """
    if not forget:
        _highest[device.type] = peak_memory_gb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # Sandboxes accept the write and do nothing.
        return _resident("VmHWM") <= _resident("VmRSS") + RESET_SLACK
    except OSError:
        return False


def _resident(name: str) -> int:
    """Return the bytes in a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@lru_cache(maxsize=4)
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of a few large matrix products, measured once (about a second)."""
    best = 0.0
    for rows, inner, columns in GPU_PRODUCTS if device.type == "cuda" else CPU_PRODUCTS:
        flops = 2 * rows * inner * columns
        if best and flops / best > LONGEST:
            break
        generator = torch.Generator(device).manual_seed(0)  # the global one is the run's, which may be resumed
        a, b = (_scratch(n * m, dtype, device).view(n, m) for n, m in ((rows, inner), (inner, columns)))
        a.normal_(generator=generator)
        b.normal_(generator=generator)
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
    """Return the bytes read and written per second, together, by a copy of 512 MiB on a GPU, 64 MiB on a CPU.

    It is measured once. Some CPUs have larger caches, which make it too high.
    """
    size = 1 << (27 if device.type == "cuda" else 24)  # float32
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
    """Return an uninitialised tensor whose memory is released with it: the allocator of a CPU run would keep it."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)
    return torch.empty(elements, dtype=dtype, device=device)


def _seconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds that `repeats` calls of `action` take together."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all queued work; there is nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
