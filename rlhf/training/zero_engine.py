"""The training engine of several processes: DeepSpeed, ZeRO stages 0 to 3, with the interface of `Engine`.

The loops call backward and step as they do in one process. A step may hold any number of backward passes (PPO's
micro-batches, then those of the pretraining text), so the caller and not DeepSpeed decides where a step ends: with a
fixed count ZeRO 1 and 2 keep the last gradient only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from rlhf.training.engine import Engine, LocalEngine, ParamGroup, StepResult
from rlhf.training.sharded_state import Fragment


class ZeroEngine(Engine):
    """`Engine` on DeepSpeed, with the same contract for the losses."""

    def __init__(
        self, model: nn.Module, groups: list[ParamGroup], device: torch.device, recipe: Recipe, **options: Any
    ) -> None:
        import deepspeed  # seconds to import, and one process does without

        super().__init__(groups, device, **options)
        connect()
        self.stage, self.process = zero_stage(recipe), dist.get_rank()
        if self.stage == 0 and recipe.model.dtype != "float32":
            what = f"{recipe.model.dtype} over several processes needs float32 copies of the weights"
            what += ", which ZeRO 1 to 3 keep and ZeRO 0 does not"
            raise UserError(what, "launch.zero_stage", "set launch.zero_stage=1")
        model.to(device)
        self.adamw = self._make_adamw(lambda p: p)
        self.model, self._zero, *_ = deepspeed.initialize(model=model, optimizer=self.adamw, config=settings(recipe))

    @property
    def groups_in_turn(self) -> list[tuple[str, ...]]:
        # All at once: DeepSpeed adds the gradient of a parameter that is not in the first backward pass of a step to
        # that of the previous step (seen under ZeRO-3, and under ZeRO-2 with offload).
        return [tuple(group.name for group in self.groups)]

    @property
    def module(self) -> nn.Module:
        return self.model.module  # type: ignore[return-value]

    def backward(self, loss: Tensor) -> None:
        # Data-parallel reduction averages; our losses are shares of a global sum.
        self.model.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, groups: Sequence[str], lr_factor: float = 1.0) -> StepResult:
        self._prepare_step(lr_factor)
        self.model.step()
        overflow = bool(getattr(self._zero, "overflow", False))
        bad = self.adamw.non_finite or ("a gradient on some process" if overflow else "")
        self._count_skipped(bad)
        return StepResult(dict(self.adamw.grad_norms), bad)

    def weights(self) -> Mapping[str, Tensor]:
        return _Gathered(self.trainable(), self.stage > 0)

    def optimizer_tensors(self) -> dict[Tensor, list[str]]:
        if self.stage == 0:
            return super().optimizer_tensors()
        zero = self._zero
        flats = zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat
        groups = zero.bit16_groups if self.stage < 3 else zero.fp16_groups
        names = {id(parameter): name for name, parameter in self.trainable().items()}
        return {flat: [names[id(p)] for p in group] for flat, group in zip(flats, groups, strict=True)}

    def fragments(self) -> Iterator[Fragment]:
        if self.stage == 0:
            yield from super().fragments()
            return
        for name, parameter in self.trainable().items():
            if partition := self.partition_of(parameter):
                flat, start, offset, size = partition
                tensors = self._with_moments(flat).items()
                yield Fragment(name, start, {kind: tensor.narrow(0, offset, size) for kind, tensor in tensors})

    def owned_fragments(self) -> Iterator[Fragment]:
        if self.stage > 0:
            return self.fragments()
        # All processes hold everything, so each one writes its share.
        return (f for i, f in enumerate(self.fragments()) if i % dist.get_world_size() == dist.get_rank())

    def partition_of(self, parameter: Tensor) -> tuple[Tensor, int, int, int] | None:
        """Return this process's part of a partitioned parameter, None where it has no part.

        It is (the flat float32 tensor that the optimiser steps, the index in the parameter of the first element that is
        in it, the offset of that element in the flat tensor, the number of elements).
        """
        if self.stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            there = mapping.hp_fragment_address
            return flat, mapping.lp_fragment_address.start, there.start, there.numel
        group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = dist.get_rank() * padded  # equal shares; the last ones may hold padding
        size = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return (self._zero.fp32_partitioned_groups_flat[group], start, offset, size) if size > 0 else None

    @contextmanager
    def _loading(self) -> Iterator[None]:
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()  # partitions small parameters too, which are otherwise kept whole
        yield
        if 0 < self.stage < 3:
            self._zero.update_lp_params()
        elif self.stage == 3:
            pairs = (self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat)
            for rounded, exact in zip(*pairs, strict=True):
                rounded.data.copy_(exact.data)
            self._zero.checkpoint_event_epilogue()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable().items()}


class _Gathered(Mapping[str, Tensor]):
    """Gathers each trained weight when it is read: a card that holds a part of each cannot hold all of them whole."""

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
    """Return the engine for this number of processes, after switching the model to layers that keep fewer activations.

    The recipe says where, and on several processes how, to train. `options` are betas, eps, weight_decay and
    max_skipped_steps (see `Engine`).
    """
    use_low_memory_layers(model)
    device = pick_device(recipe)
    if processes() == 1:
        return LocalEngine(model, groups, device, **options)
    return ZeroEngine(model, groups, device, recipe, **options)
