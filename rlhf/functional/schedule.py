"""Compute learning-rate factors from the step number alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

WARMUP_START = 0.1  # the paper warms up from a tenth of the peak (Appendix C.4)


def lr_factor(
    step: int, total: int, schedule: Literal["cosine", "linear", "constant"], warmup: int, final_fraction: float
) -> float:
    """Return the learning rate at `step` (from 0) of `total`, as a fraction of its peak.

    The first `warmup` steps rise linearly from a tenth of the peak. After them the rate is constant, or decays linearly
    or as a cosine to `final_fraction` at the last step.
    """
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_fraction + (1 - final_fraction) * shape
