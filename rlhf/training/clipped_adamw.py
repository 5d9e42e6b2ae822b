"""AdamW that clips every parameter group by the group's own norm, whole or partitioned over processes.

Policy and value model share one optimiser; one norm over both would let a large value gradient shrink the policy's step
(DESIGN: clip and set learning rates per group). DeepSpeed clips by one norm, so its clipping is off and this is done
inside the optimiser it drives: ZeRO calls `step` for one group at a time, on this process's part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.training.sharded_state import MOMENTS

PIECE = 1 << 15


class ClippedAdamW(torch.optim.AdamW):
    """torch's AdamW; groups carry "name" and "max_grad_norm".

    Attributes:
        partitioned: whether each process holds a part of every gradient (ZeRO 1 to 3) and not the whole.
        grad_norms: by group name, of the last step, before clipping.
        non_finite: name of the first group whose norm was not finite; then the call did not step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, partitioned: bool = False, **options: Any) -> None:
        # One pass over memory, a third of the time on a CPU; there it takes a tensor to lie without gaps.
        dense = all(p.is_contiguous() for group in groups for p in group["params"])
        super().__init__(groups, fused=dense, **options)
        self.partitioned = partitioned
        self.grad_norms: dict[str, float] = {}
        self.non_finite = ""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip the groups that have gradients, and step them unless one is not finite."""
        held = [group for group in self.param_groups if any(p.grad is not None for p in group["params"])]
        norms = [self._norm([p.grad for p in group["params"] if p.grad is not None]) for group in held]
        for group, norm in zip(held, norms, strict=True):
            self.grad_norms[group["name"]] = float(norm)
            if not torch.isfinite(norm):
                self.non_finite = self.non_finite or group["name"]
        if self.non_finite:
            return
        for group, norm in zip(held, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group["params"], group["max_grad_norm"], norm)
        super().step(closure)

    def _norm(self, grads: list[Tensor]) -> Tensor:
        norm = grad_norm(grads)
        if self.partitioned:
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm.float()


def step_count(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Adam steps that a tensor has had."""
    return int(optimizer.state.get(parameter, {}).get("step", 0))


def set_step_count(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> None:
    """Give a tensor the state of AdamW after that many steps, its moments zero, for them to be filled in."""
    if steps == 0:
        optimizer.state.pop(parameter, None)
        return
    moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
    optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all of them, a float64 scalar; 0 for none.

    On a CPU torch adds up a float32 tensor from end to end: five million numbers give 2.5e-4 too little, and parts of
    ZeRO's flat gradients another norm than whole tensors. So pieces are taken, and added up in float64.
    """
    pieces = [piece for g in grads for piece in (g.flatten().split(PIECE) if g.device.type == "cpu" else (g,))]
    if not pieces:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms).double())
