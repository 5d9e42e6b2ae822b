"""One small training engine for the reward and PPO loops, on Accelerate: accumulate, backward, step, sum, save.

The loops say what a step is; the engine knows about devices, processes, clipping by group, skipped steps and state.
Losses come in already divided by the token or prompt count of the global minibatch, so gradients are summed over
micro-batches and processes, never averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.clipping import ClippedAdamW
from rlhf.errors import UserError


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


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut into files; another layout cannot read it."""

    processes: int = 1
    zero_stage: int = 0

    def write(self, folder: Path) -> None:
        """Note it in the checkpoint."""
        (folder / "layout.json").write_text(json.dumps(asdict(self)))

    def check(self, folder: Path) -> None:
        """Raises UserError when the checkpoint in the folder was written in another layout."""
        theirs = Layout(**json.loads((folder / "layout.json").read_text()))
        if theirs != self:
            raise UserError(
                f"the checkpoint is of {theirs.words()}, and this run has {self.words()}",
                str(folder),
                "go on with launch.processes and launch.zero_stage as they were, or redo the stage with --fresh",
            )

    def words(self) -> str:
        """`2 processes under ZeRO 3`."""
        return "1 process" if self.processes == 1 else f"{self.processes} processes under ZeRO {self.zero_stage}"


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
        # As rlhf.stage.pick_device: Apple's GPUs have no float64, which sampling needs.
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

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

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
        clipped: ClippedAdamW = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            state["lr"] = group.lr * lr_factor
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        clipped.grad_norms, clipped.non_finite = {}, ""
        self.optimizer.step()
        bad = next((f"{g.name}.{_first_non_finite(g.module)}" for g in self.groups if g.name == clipped.non_finite), "")
        self._round_copies()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._copies:
            parameter.grad = None
        self._count_skipped(bad)
        return StepResult(clipped.grad_norms, bad)

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
        """Write trainable weights and optimiser state; frozen weights are inputs of the stage and are not copied."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in self.weights().items()}, folder / "trainable.safetensors")
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "skipped": [self.skipped_in_a_row, self.skipped_steps],
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(state, folder / "optimizer.pt")
        Layout().write(folder)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            UserError: when the checkpoint is of several processes, or holds other parameters than this recipe trains.
        """
        Layout().check(folder)
        saved = load_file(folder / "trainable.safetensors")
        ours = self.weights()
        if saved.keys() != ours.keys():
            odd = sorted(saved.keys() ^ ours.keys())[0]
            raise UserError(
                f"the checkpoint does not fit the recipe: parameter {odd} is in one of them only", where=str(folder)
            )
        # copy_ would spread a width of 1 over any other: an adapter of rank 1 over one of rank 16.
        for name, parameter in ours.items():
            if saved[name].shape != parameter.shape:
                raise UserError(
                    f"the checkpoint does not fit the recipe: parameter {name} is {tuple(saved[name].shape)} there "
                    f"and {tuple(parameter.shape)} here",
                    where=str(folder),
                )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(saved[name])
        self._round_copies()
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped_in_a_row, self.skipped_steps = state["skipped"]
        torch.set_rng_state(state["torch_rng"])

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
