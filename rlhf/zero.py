"""The training engine of several processes: DeepSpeed, ZeRO stages 0 to 3, behind the interface of rlhf/engine.py.

The loops call accumulate, backward and step as they do in one process. A step may hold any number of backward passes
(PPO's micro-batches, then those of the pretraining text): DeepSpeed is told that the caller owns the boundary, for with
a fixed count ZeRO 1 and 2 keep the last gradient only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.clipping import ClippedAdamW
from rlhf.config import Recipe
from rlhf.engine import Engine, ParamGroup, StepResult
from rlhf.errors import UserError
from rlhf.fragments import Fragment
from rlhf.lean import keep_less
from rlhf.placement import Placement
from rlhf.system.distributed import pick_device, processes

Model = TypeVar("Model", bound=nn.Module)
TEMPLATES = Path(__file__).resolve().parents[1] / "launch" / "deepspeed"


def config_path(recipe: Recipe) -> Path:
    """The DeepSpeed JSON of a recipe: the user's own, or the template of the stage."""
    launch = recipe.launch
    offload = "-offload" if launch.offload else ""
    return Path(launch.deepspeed_config or TEMPLATES / f"zero{launch.zero_stage}{offload}.json").expanduser()


def settings(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings for our loops: the recipe's JSON with what the loops decide filled in.

    Raises:
        UserError: when the user's own file sets what is the recipe's to say.
    """
    path = config_path(recipe)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("optimizer", "scheduler", "torch_autocast"):
        if key in found:
            raise UserError(f"{key} is the recipe's to say", str(path), f"take {key} out of the DeepSpeed file")
    zero = found.get("zero_optimization", {})
    if zero.get("round_robin_gradients") or "nvme" in _devices(zero):
        raise UserError(
            "round_robin_gradients and state on NVMe are laid out in ways that a checkpoint here does not know",
            str(path),
            "take them out of zero_optimization; offloading to cpu is known",
        )
    if zero.get("stage", 0) != 2:
        zero["overlap_comm"] = False  # DeepSpeed overlaps on ZeRO 2 alone where the caller owns the boundary
    if zero.get("stage", 0) == 3:
        zero["sub_group_size"] = 10**15  # else a large group is stepped, and clipped, in pieces with norms of their own
    return found | {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own bookkeeping: the loops cut the micro-batches
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # by group, in ClippedAdamW
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _devices(zero: dict[str, Any]) -> set[str]:
    """Where a file's zero_optimization moves state to."""
    return {str(part.get("device")) for part in zero.values() if isinstance(part, dict)}


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage of the recipe's DeepSpeed file; 0 for a single process, which runs without DeepSpeed."""
    return int(settings(recipe).get("zero_optimization", {}).get("stage", 0)) if processes() > 1 else 0


def trained(recipe: Recipe, load: Callable[[], Model]) -> Model:
    """`load()` for a model that an engine will train: under ZeRO-3 it is in parts from the start."""
    with _loading(recipe, zero_stage(recipe) == 3):
        model = load()
    model.placement = Placement(by_layer=recipe.launch.gather == "by_layer")
    return model


def frozen(recipe: Recipe, device: torch.device, load: Callable[[], Model], leaves: bool = False) -> Model:
    """`load()` for a model that only samples or scores, without gradients, placed as `launch.frozen` says.

    Args:
        leaves: on a CPU it leaves memory between its passes, where it is whole and its weights are mapped from a file.
    """
    how = recipe.launch.frozen
    with _loading(recipe, how == "partitioned"):
        model = load()
    model.requires_grad_(False)
    if how == "cpu":
        model.placement = Placement(visits=device)
    else:
        model.placement = Placement(by_layer=recipe.launch.gather == "by_layer", leaves=leaves)
        model.to(device)
    return model.eval()


@contextmanager
def _loading(recipe: Recipe, parted: bool) -> Iterator[None]:
    """Inside, models are loaded in parts where `parted`: no process ever holds one whole."""
    if not parted or processes() == 1:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    connect()
    config = settings(recipe)
    if zero_stage(recipe) != 3:
        config["zero_optimization"] = {"stage": 3}
    live = HfDeepSpeedConfig(config)  # transformers builds models under deepspeed.zero.Init while it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del live


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


def connect() -> None:
    """Let DeepSpeed use the group of processes that is there."""
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Otherwise every start compiles an operator for a minute or more, which training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def make_engine(model: nn.Module, groups: list[ParamGroup], recipe: Recipe, **options: Any) -> Engine:
    """The engine for as many processes as there are; the model's layers keep less for the backward from now on.

    Args:
        options: betas, eps, weight_decay, max_skipped_steps.
    """
    keep_less(model)
    if processes() == 1:
        return Engine(model, groups, device=recipe.run.device, **options)
    return ZeroEngine(model, groups, recipe, pick_device(recipe), **options)
