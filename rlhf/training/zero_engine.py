"""The training engine of several processes: DeepSpeed, ZeRO stages 0 to 3, with the interface of `Engine`.

The loops call accumulate, backward and step as they do in one process. A step may hold any number of backward passes
(PPO's micro-batches, then those of the pretraining text): DeepSpeed is told that the caller owns the boundary, for with
a fixed count ZeRO 1 and 2 keep the last gradient only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.models.low_memory_layers import use_low_memory_layers
from rlhf.models.zero import connect, settings, zero_stage
from rlhf.system.distributed import pick_device, processes
from rlhf.training.clipped_adamw import ClippedAdamW
from rlhf.training.engine import Engine, ParamGroup, StepResult
from rlhf.training.sharded_state import Fragment


class ZeroEngine(Engine):
    """`Engine` on DeepSpeed; see there for the contract of the losses."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParamGroup],
        recipe: Recipe,
        device: torch.device,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_skipped_steps: int = 3,
    ) -> None:
        import deepspeed  # seconds to import, and one process does without

        connect()
        config = settings(recipe)
        self.stage = zero_stage(recipe)
        self._process = dist.get_rank()
        if self.stage == 0 and recipe.model.dtype != "float32":
            raise UserError(
                f"{recipe.model.dtype} over several processes needs float32 copies of the weights, which ZeRO 1 to 3 "
                "keep and ZeRO 0 does not",
                "launch.zero_stage",
                "set launch.zero_stage=1",
            )
        self.groups = groups
        self._device = device
        model.to(device)
        self._optimizer = ClippedAdamW(
            [{"params": g.parameters(), "lr": g.lr, "name": g.name, "max_grad_norm": g.max_grad_norm} for g in groups],
            partitioned=self.stage > 0,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self.model, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        self.max_skipped_steps = max_skipped_steps
        self.skipped_in_a_row = 0
        self.skipped_steps = 0

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def turns(self) -> list[tuple[str, ...]]:
        """All at once: what has no part in the first backward of a step is added to the last step's gradient (seen
        under ZeRO-3, and under ZeRO-2 with offload)."""
        return [tuple(group.name for group in self.groups)]

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over processes."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Nothing to arrange: gradients meet in `step`, or at every backward where they are partitioned."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this process's share of the global loss."""
        # Data-parallel reduction averages; our losses are shares of a global sum.
        self.model.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def grads(self, group: str) -> list[Tensor]:
        """None of them: they lie in parts on all processes, or have not been summed over them yet."""
        return []

    def step(self, lr_factor: float = 1.0) -> StepResult:
        """Clip each group, step, clear the gradients; a non-finite gradient skips the step and is counted."""
        rates = {group.name: group.lr * lr_factor for group in self.groups}
        for state in self.optimizer.param_groups:
            state["lr"] = rates[state["name"]]
        self._optimizer.grad_norms, self._optimizer.non_finite = {}, ""
        self.model.step()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        bad = self._optimizer.non_finite or ("a gradient on some process" if overflow else "")
        self._count_skipped(bad)
        return StepResult(dict(self._optimizer.grad_norms), bad)

    def weights(self) -> Mapping[str, Tensor]:
        """What the optimiser steps, whole and in float32, by name, each gathered when it is asked for.

        All processes must ask, and in the same order.
        """
        return _Gathered(self.trainable(), self.stage > 0)

    @property
    def _base_optimizer(self) -> ClippedAdamW:
        return self._optimizer

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable().items()}

    def _fragments(self) -> Iterator[Fragment]:
        if self.stage == 0:
            yield from super()._fragments()
            return
        for name, parameter in self.trainable().items():
            held = self._held(parameter)
            if held is None:
                continue
            flat, start, place, size = held
            tensors = self._with_moments(flat).items()
            yield Fragment(name, start, {kind: tensor.narrow(0, place, size) for kind, tensor in tensors})

    def _written(self) -> Iterator[Fragment]:
        if self.stage > 0:
            return self._fragments()
        # All hold the whole: each writes its share.
        return (f for i, f in enumerate(self._fragments()) if i % dist.get_world_size() == dist.get_rank())

    def _held(self, parameter: Tensor) -> tuple[Tensor, int, int, int] | None:
        """This process's part of a partitioned parameter, None for no part.

        Returns:
            the flat float32 tensor that the optimiser steps, the first element of the parameter in it, its place there,
            and how many elements follow.
        """
        if self.stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            there = mapping.hp_fragment_address
            return flat, mapping.lp_fragment_address.start, there.start, there.numel
        group, place, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = dist.get_rank() * padded  # equal parts; the last ones may be padding in part or whole
        size = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return (self.optimizer.fp32_partitioned_groups_flat[group], start, place, size) if size > 0 else None

    def _stepped(self) -> dict[Tensor, list[str]]:
        if self.stage == 0:
            return super()._stepped()
        optimizer = self.optimizer
        flats = optimizer.single_partition_of_fp32_groups if self.stage < 3 else optimizer.fp32_partitioned_groups_flat
        groups = optimizer.bit16_groups if self.stage < 3 else optimizer.fp16_groups
        names = {id(parameter): name for name, parameter in self.trainable().items()}
        return {flat: [names[id(p)] for p in group] for flat, group in zip(flats, groups, strict=True)}

    def _begin_load(self) -> None:
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # small parameters that are kept whole are put in parts too

    def _end_load(self) -> None:
        if 0 < self.stage < 3:
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            pairs = (self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat)
            for rounded, exact in zip(*pairs, strict=True):
                rounded.data.copy_(exact.data)
            self.optimizer.checkpoint_event_epilogue()


class _Gathered(Mapping[str, Tensor]):
    """Trained weights, one at a time: a card that holds a part of each has no room for all of them whole."""

    def __init__(self, parameters: dict[str, Tensor], partitioned: bool) -> None:
        self.parameters, self.partitioned = parameters, partitioned

    def __getitem__(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.parameters[name]
        return safe_get_full_fp32_param(parameter).detach() if self.partitioned else parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def make_engine(model: nn.Module, groups: list[ParamGroup], recipe: Recipe, **options: Any) -> Engine:
    """The engine for as many processes as there are; the model's layers keep less for the backward from now on.

    Args:
        options: betas, eps, weight_decay, max_skipped_steps.
    """
    use_low_memory_layers(model)
    if processes() == 1:
        return Engine(model, groups, device=recipe.run.device, **options)
    return ZeroEngine(model, groups, recipe, pick_device(recipe), **options)
