"""One small training engine for the reward and PPO loops, on Accelerate: accumulate, backward, step, sum, save.

The loops say what a step is; the engine knows about devices, processes, clipping by group, skipped steps and state.
Losses come in already divided by the token or prompt count of the global minibatch, so gradients are summed over
micro-batches and processes, never averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.system.distributed import is_main_process
from rlhf.training.clipped_adamw import ClippedAdamW, set_step_count, step_count
from rlhf.training.sharded_state import MOMENTS, WEIGHT, Fragment, FragmentReader, write_fragments


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate and are clipped together."""

    name: str
    module: nn.Module
    lr: float
    max_grad_norm: float

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


@dataclass
class StepResult:
    """What an optimiser step did: `grad_norms` by group before clipping, and the first non-finite gradient if any."""

    grad_norms: dict[str, float] = field(default_factory=dict)
    non_finite: str = ""


class Engine:
    """Holds the prepared model and its optimiser; see the module's text for the contract of the losses."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParamGroup],
        *,
        device: str = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_skipped_steps: int = 3,
    ) -> None:
        # As rlhf.system.distributed.pick_device: Apple's GPUs have no float64, which sampling needs.
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self.groups = groups
        model.to(self.accelerator.device)
        # An update of 1e-5 is lost in a bfloat16 weight of 0.01: such weights are stepped in float32 copies.
        self._copies = {
            parameter: parameter.detach().float()
            for group in groups
            for parameter in group.parameters()
            if parameter.dtype != torch.float32
        }
        optimizer = ClippedAdamW(
            [
                {
                    "params": [self._copies.get(p, p) for p in g.parameters()],
                    "lr": g.lr,
                    "name": g.name,
                    "max_grad_norm": g.max_grad_norm,
                }
                for g in groups
            ],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.max_skipped_steps = max_skipped_steps
        self.skipped_in_a_row = 0
        self.skipped_steps = 0
        self._bad_part = ""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def _base_optimizer(self) -> ClippedAdamW:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper

    @property
    def turns(self) -> list[tuple[str, ...]]:
        """Groups whose gradients are made together, one turn after the other; `step_part` may stand between turns."""
        return [(group.name,) for group in self.groups]

    @property
    def module(self) -> nn.Module:
        """The model without the wrappers of a distributed run."""
        return self.accelerator.unwrap_model(self.model)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch; gradients meet across processes in the last one only."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this process's share of the global loss."""
        # Data-parallel reduction averages; our losses are shares of a global sum.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def grads(self, group: str) -> list[Tensor]:
        """Gradients accumulated so far in a group (not copies)."""
        return [p.grad for g in self.groups if g.name == group for p in g.parameters() if p.grad is not None]

    def step(self, lr_factor: float = 1.0) -> StepResult:
        """Clip each group, step, clear the gradients; a non-finite gradient skips the step and is counted.

        Raises:
            UserError: after `max_skipped_steps` skipped steps in a row, naming the first bad tensor.
        """
        # What was found in a part skips the rest and is counted with it.
        norms, bad = ({}, self._bad_part) if self._bad_part else self._step(lr_factor)
        self._bad_part = ""
        self._clear()
        self._count_skipped(bad)
        return StepResult(norms, bad)

    def step_part(self, lr_factor: float = 1.0) -> StepResult:
        """Step the groups that have gradients now, before those of the others are made, so that their memory is free.

        `step` ends the optimiser step. Groups are clipped apart, so the result is that of one `step` for all, unless
        a gradient is not finite: one found here skips the groups that follow, one found later comes too late for these.

        Returns:
            of these groups; without norms from an engine that steps all groups at once.
        """
        norms, self._bad_part = self._step(lr_factor)
        self._clear()
        return StepResult(norms, self._bad_part)

    def _step(self, lr_factor: float) -> tuple[dict[str, float], str]:
        """Gradient norms by group, and the first non-finite gradient if any."""
        clipped = self._base_optimizer
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            state["lr"] = group.lr * lr_factor
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        clipped.grad_norms, clipped.non_finite = {}, ""
        self.optimizer.step()
        bad = next((f"{g.name}.{_first_non_finite(g.module)}" for g in self.groups if g.name == clipped.non_finite), "")
        self._round_copies()
        return clipped.grad_norms, bad

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._copies:
            parameter.grad = None

    def _count_skipped(self, bad: str) -> None:
        """Keep the count of steps in a row whose gradient was not finite; `bad` names its first bad tensor, if any."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        self.skipped_steps += bool(bad)
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise UserError(
                f"{self.skipped_in_a_row} optimiser steps in a row had a non-finite gradient; the first bad tensor is "
                f"{bad}",
                fix="lower the learning rate, use float32, or look for broken rows in the data; "
                "the last checkpoint is from before these steps",
            )

    def trainable(self) -> dict[str, Tensor]:
        """Trainable parameters by name, as the model computes with them (not copies)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> Mapping[str, Tensor]:
        """What the optimiser steps, by name: the trainable parameters, or their float32 copies."""
        return {name: self._copies.get(p, p) for name, p in self.trainable().items()}

    def save(self, folder: Path) -> None:
        """Write trainable weights and optimiser state, each process what it holds; all processes must call.

        Frozen weights are inputs of the stage and are not copied.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_fragments(folder, self._written(), self._process)
        if is_main_process():
            state = {
                "shapes": {name: list(shape) for name, shape in self._shapes().items()},
                "steps": self._steps(),
                "skipped": [self.skipped_in_a_row, self.skipped_steps],
            }
            (folder / "engine.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on whatever number of processes and ZeRO stage.

        Raises:
            UserError: when the checkpoint holds other parameters than this recipe trains; nothing is loaded then.
        """
        state = json.loads((folder / "engine.json").read_text())
        saved, ours = state["shapes"], {name: list(shape) for name, shape in self._shapes().items()}
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                shapes = [str(tuple(each[name])) if name in each else "not there" for each in (saved, ours)]
                raise UserError(
                    f"the checkpoint does not fit the recipe: parameter {name} is {shapes[0]} in it and {shapes[1]} "
                    "here",
                    where=str(folder),
                    fix="redo the stage with --fresh, or take another run.name",
                )
        self._begin_load()
        self._set_steps(state["steps"])
        reader = FragmentReader(folder)
        for fragment in self._fragments():
            for kind, tensor in fragment.tensors.items():
                # A parameter that has had no gradient yet has no moments; partitioned with others, it keeps zeros.
                if kind == WEIGHT or reader.has(kind, fragment.name):
                    reader.read_into(tensor, kind, fragment.name, fragment.start)
        self._end_load()
        self.skipped_in_a_row, self.skipped_steps = state["skipped"]

    # --- what a checkpoint is made of: ZeRO holds it in other places

    _process = 0  # whose files this process writes

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the trained parameters by name."""
        return {name: tuple(p.shape) for name, p in self.trainable().items()}

    def _fragments(self) -> Iterator[Fragment]:
        """What this process holds of the weights that the optimiser steps, and of their moments."""
        for name, weight in self.weights().items():
            yield Fragment(name, 0, {kind: tensor.view(-1) for kind, tensor in self._with_moments(weight).items()})

    def _with_moments(self, stepped: Tensor) -> dict[str, Tensor]:
        """By KIND, a tensor that the optimiser steps and its moments where it has any."""
        state = self._base_optimizer.state.get(stepped, {})
        found = {WEIGHT: stepped} | {kind: state[kind] for kind in MOMENTS if kind in state}
        return {kind: tensor.detach() for kind, tensor in found.items()}

    def _stepped(self) -> dict[Tensor, list[str]]:
        """What the optimiser steps in this process, with the names of the parameters in each tensor."""
        return {weight: [name] for name, weight in self.weights().items()}

    def _written(self) -> Iterator[Fragment]:
        """Of `_fragments`, those that this process writes; together the processes write every element once."""
        return self._fragments()

    def _steps(self) -> dict[str, int]:
        """Adam steps that the parameters have had."""
        return {
            name: step_count(self._base_optimizer, each) for each, names in self._stepped().items() for name in names
        }

    def _set_steps(self, steps: dict[str, int]) -> None:
        """Make the moments of parameters that have been stepped, zero for now, and no others."""
        for each, names in self._stepped().items():
            set_step_count(self._base_optimizer, each, max(steps[name] for name in names))

    def _begin_load(self) -> None:
        """Be ready for fragments to be overwritten."""

    def _end_load(self) -> None:
        """Give the model the weights that were loaded."""
        self._round_copies()

    @torch.no_grad()
    def _round_copies(self) -> None:
        """Give the model the stepped values."""
        for parameter, copy in self._copies.items():
            parameter.copy_(copy)


def _first_non_finite(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"{name}.grad"
    return "gradient norm overflow"
