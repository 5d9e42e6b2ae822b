"""Speed and memory figures for the log: peak memory, and the share of the machine's arithmetic that is used."""

from __future__ import annotations

import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far, in GB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":
        # Not ru_maxrss: it begins with what the process was forked from, however large that was.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


@lru_cache(maxsize=4)
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured once (about 0.3 s)."""
    n = 4096 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # the global one belongs to the run, which may be resumed
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=own) for _ in range(2))
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def training_flops(model: nn.Module, tokens: float) -> float:
    """FLOPs of a forward and backward over `tokens`, attention's own products and the recomputed head left out.

    2 per weight forward, 2 per weight that the gradient passes through, 2 per trained weight.
    """
    total = through = trained = 0
    reached = False
    for parameter in model.parameters():
        reached = reached or parameter.requires_grad
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the parameter itself is empty
        total += size
        through += size if reached else 0
        trained += size if parameter.requires_grad else 0
    return tokens * 2.0 * (total + through + trained)
