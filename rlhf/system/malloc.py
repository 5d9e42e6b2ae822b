"""Settings of glibc's malloc that keep freed memory in the process.

By default a CPU run returns large tensors to the system and pays to have the same pages filled with zeros again, step
after step. Measured for one PPO-ptx iteration of SmolLM2-135M on two cores: page faults fell from 4.5 to 0.8 million,
training from 38 to 30 s and the pretraining step from 14 to 8 s; peak memory stayed the same. PPO returns the memory
once an iteration, before it loads the models that only score: this costs 0.1 s and the page faults of the next training
and saves a gigabyte of peak memory.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def has_glibc() -> bool:
    """Return whether this process uses glibc's malloc."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Have glibc's malloc take all memory from its heap and never shrink it; return False without glibc."""
    if not has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Return the memory that is free now to the system, before a phase that needs other memory; glibc alone does it."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)
