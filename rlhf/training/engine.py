"""The training engine of the reward and PPO loops: backward, step, save, load.

The loops say which passes make a step; the engine knows about devices, processes, clipping by group, skipped steps and
state. Losses come in already divided by the token or prompt count of the global minibatch, so gradients are summed over
micro-batches and processes, never averaged.

`Engine` is what the loops see. `LocalEngine` is that of one process; rlhf/training/zero_engine.py has that of several.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.system.ranks import is_main_process
from rlhf.training.clipped_adamw import ClippedAdamW, grad_norm, set_step_count, step_count
from rlhf.training.sharded_state import MOMENTS, WEIGHT, Fragment, FragmentReader, write_fragments


@dataclass(frozen=True)
class ParamGroup:
    """A module whose parameters share a learning rate and are clipped together."""

    name: str
    module: nn.Module
    lr: float
    max_grad_norm: float

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


@dataclass
class StepResult:
    """Result of a step: gradient norms by group before clipping, and the name of the first non-finite gradient."""

    grad_norms: dict[str, float] = field(default_factory=dict)
    non_finite: str = ""


class Engine(ABC):
    """A model, its optimiser and the counts of skipped steps; the base of both engines.

    `skipped_steps` counts the optimiser steps that were skipped for a non-finite gradient over the whole run, and
    `skipped_in_a_row` the newest ones without one between them that was not skipped.
    """

    stage = 0  # of ZeRO; 0 where every process holds everything
    process = 0  # rank of this process, which the names of the files that it writes contain
    model: nn.Module  # called for every pass with gradients
    adamw: ClippedAdamW  # made by the subclass

    def __init__(
        self,
        groups: list[ParamGroup],
        device: torch.device,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_skipped_steps: int = 3,
    ) -> None:
        self.groups, self.device = groups, device
        self._adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.max_skipped_steps = max_skipped_steps
        self.skipped_in_a_row = self.skipped_steps = 0

    # --- training

    @property
    @abstractmethod
    def groups_in_turn(self) -> list[tuple[str, ...]]:
        """Return the names of the groups whose gradients are computed and stepped together, in order."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """Return the model without a wrapper, for passes without gradients."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this process's share of the global loss."""

    @abstractmethod
    def step(self, groups: Sequence[str], lr_factor: float = 1.0) -> StepResult:
        """Clip the gradients of some groups, step these groups and clear the gradients.

        An optimiser step is one call for each entry of `groups_in_turn`, in that order, and the last call counts it.
        Groups are clipped apart, so it does not matter whether they are stepped in one call or in several, unless a
        gradient is not finite. That skips the groups of this call and of the later calls of this optimiser step;
        groups of earlier calls have been stepped already. `lr_factor` multiplies the learning rate of each group.
        Raises UserError after `max_skipped_steps` skipped steps in a row, naming the first bad tensor.
        """

    @contextmanager
    def added_norm(self, group: str) -> Iterator[dict[str, float]]:
        """Measure what the passes of the block add to the gradients of a group, where that can be known.

        When the block has ended, the dict has the gradient norms "before" it and of what it has "added". It stays empty
        where gradients are partitioned or not yet summed over processes.
        """
        yield {}

    # --- weights and state

    def trainable(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, as the model computes with them (not copies)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> Mapping[str, Tensor]:
        """Return what the optimiser steps, whole, by name of the parameter; each may be gathered when it is read.

        All processes must read the same ones in the same order.
        """
        return self.trainable()

    def save(self, folder: Path) -> None:
        """Write trainable weights and optimiser state, each process what it holds; all processes must call.

        Frozen weights are inputs of the stage and are not copied.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_fragments(folder, self.owned_fragments(), self.process)
        if is_main_process():
            state = {
                "shapes": {name: list(shape) for name, shape in self._shapes().items()},
                "steps": self._steps(),
                "skipped": [self.skipped_in_a_row, self.skipped_steps],
            }
            (folder / "engine.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on whatever number of processes and ZeRO stage.

        Raises UserError, and loads nothing, if the checkpoint holds other parameters than this recipe trains.
        """
        state = json.loads((folder / "engine.json").read_text())
        saved, ours = state["shapes"], {name: list(shape) for name, shape in self._shapes().items()}
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                shapes = [str(tuple(each[name])) if name in each else "not there" for each in (saved, ours)]
                what = f"parameter {name} is {shapes[0]} in it and {shapes[1]} here"
                fix = "redo the stage with --fresh, or take another run.name"
                raise UserError(f"the checkpoint does not fit the recipe: {what}", str(folder), fix)
        with self._loading():
            for each, names in self.optimizer_tensors().items():
                set_step_count(self.adamw, each, max(state["steps"][name] for name in names))
            reader = FragmentReader(folder)
            for fragment in self.fragments():
                for kind, tensor in fragment.tensors.items():
                    # A parameter that has had no gradient yet has no moments; partitioned with others, it keeps zeros.
                    if kind == WEIGHT or reader.has(kind, fragment.name):
                        reader.read_into(tensor, kind, fragment.name, fragment.start)
        self.skipped_in_a_row, self.skipped_steps = state["skipped"]

    # --- what a checkpoint is made of: here for parameters that are whole in every process

    def optimizer_tensors(self) -> dict[Tensor, list[str]]:
        """Return the tensors that the optimiser steps in this process, with the names of the parameters in each."""
        return {weight: [name] for name, weight in self.weights().items()}

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this process holds of the weights that the optimiser steps, and of their moments."""
        for name, weight in self.weights().items():
            tensors = self._with_moments(weight)
            yield Fragment(name, 0, {kind: tensor.view(-1) for kind, tensor in tensors.items()})

    def owned_fragments(self) -> Iterator[Fragment]:
        """Yield those of `fragments` that this process writes; together the processes write every element once."""
        return self.fragments()

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Let fragments be overwritten inside the block, and give the model the new weights at its end."""
        yield

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the whole shapes of the trained parameters by name."""
        return {name: tuple(p.shape) for name, p in self.trainable().items()}

    def _with_moments(self, stepped: Tensor) -> dict[str, Tensor]:
        """Return a tensor that the optimiser steps, and its moments if it has any, by kind."""
        state = self.adamw.state.get(stepped, {})
        found = {WEIGHT: stepped} | {kind: state[kind] for kind in MOMENTS if kind in state}
        return {kind: tensor.detach() for kind, tensor in found.items()}

    def _steps(self) -> dict[str, int]:
        """Return the number of Adam steps that each parameter has had."""
        tensors = self.optimizer_tensors().items()
        return {name: step_count(self.adamw, each) for each, names in tensors for name in names}

    # --- what the subclasses share

    def _make_adamw(self, stepped: Callable[[nn.Parameter], Tensor]) -> ClippedAdamW:
        """Return the optimiser of all groups; `stepped` gives the tensor that is stepped for a parameter."""
        groups = [
            {
                "params": [stepped(p) for p in g.parameters()],
                "lr": g.lr,
                "name": g.name,
                "max_grad_norm": g.max_grad_norm,
            }
            for g in self.groups
        ]
        return ClippedAdamW(groups, partitioned=self.stage > 0, **self._adam)

    def _prepare_step(self, lr_factor: float) -> None:
        """Set the learning rates, and clear the norms and the bad gradient of the last step."""
        for group, state in zip(self.groups, self.adamw.param_groups, strict=True):
            state["lr"] = group.lr * lr_factor
        self.adamw.grad_norms, self.adamw.non_finite = {}, ""

    def _count_skipped(self, bad: str) -> None:
        """Keep the count of steps in a row whose gradient was not finite; `bad` names its first bad tensor, if any."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        self.skipped_steps += bool(bad)
        if self.skipped_in_a_row >= self.max_skipped_steps:
            what = f"{self.skipped_in_a_row} optimiser steps in a row had a non-finite gradient"
            fix = "lower the learning rate, use float32, or look for broken rows in the data"
            fix += "; the last checkpoint is from before these steps"
            raise UserError(f"{what}; the first bad tensor is {bad}", fix=fix)


class LocalEngine(Engine):
    """The engine of a single process. It holds the gradients of one group at a time."""

    def __init__(self, model: nn.Module, groups: list[ParamGroup], device: torch.device, **options: Any) -> None:
        super().__init__(groups, device, **options)
        self.model = model.to(device)
        # An update of 1e-5 is lost in a bfloat16 weight of 0.01: such weights are stepped in float32 copies.
        parameters = [p for group in groups for p in group.parameters()]
        self._copies = {p: p.detach().float() for p in parameters if p.dtype != torch.float32}
        self.adamw = self._make_adamw(lambda p: self._copies.get(p, p))
        self._bad = ""  # the first non-finite gradient of the current optimiser step

    @property
    def groups_in_turn(self) -> list[tuple[str, ...]]:
        return [(group.name,) for group in self.groups]

    @property
    def module(self) -> nn.Module:
        return self.model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grads(self, group: str) -> list[Tensor]:
        """Return the gradients accumulated so far in a group (not copies)."""
        return [p.grad for g in self.groups if g.name == group for p in g.parameters() if p.grad is not None]

    @contextmanager
    def added_norm(self, group: str) -> Iterator[dict[str, float]]:
        # A copy as large as the gradient: over several micro-batches no smaller one tells the two parts of a sum apart.
        copies, norms = [g.clone() for g in self.grads(group)], dict[str, float]()
        before = float(grad_norm(copies))
        yield norms
        for copy, both in zip(copies, self.grads(group), strict=True):
            copy.neg_().add_(both)
        norms |= {"before": before, "added": float(grad_norm(copies))}

    def step(self, groups: Sequence[str], lr_factor: float = 1.0) -> StepResult:
        norms: dict[str, float] = {}
        if not self._bad:
            norms, self._bad = self._step(lr_factor)
        self._clear_gradients()
        result = StepResult(norms, self._bad)
        if self.groups[-1].name in groups:
            self._bad = ""
            self._count_skipped(result.non_finite)
        return result

    def _step(self, lr_factor: float) -> tuple[dict[str, float], str]:
        """Step the parameters with gradients; return their norms by group, and the first non-finite gradient if any."""
        self._prepare_step(lr_factor)
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        self.adamw.step()
        bad = next((g for g in self.groups if g.name == self.adamw.non_finite), None)
        self._round_copies()
        return self.adamw.grad_norms, f"{bad.name}.{_first_non_finite(bad.module)}" if bad else ""

    def _clear_gradients(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        for parameter in self._copies:
            parameter.grad = None

    def weights(self) -> Mapping[str, Tensor]:
        return {name: self._copies.get(p, p) for name, p in self.trainable().items()}

    @contextmanager
    def _loading(self) -> Iterator[None]:
        yield
        self._round_copies()

    @torch.no_grad()
    def _round_copies(self) -> None:
        """Copy the stepped float32 values into the model's weights, in their type."""
        for parameter, copy in self._copies.items():
            parameter.copy_(copy)


def _first_non_finite(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"{name}.grad"
    return "gradient norm overflow"
