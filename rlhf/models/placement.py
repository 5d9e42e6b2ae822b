"""Make a model's weights ready for passes without gradients, wherever they are kept in between.

    whole        every process holds all weights
    partitioned  every process holds a part of each weight (ZeRO-3), from the moment of loading
    on the CPU   in the host's memory, and on the device only while they are needed
    in a file    mapped, on a CPU, and in memory only while they are needed

Sampling and scoring enter `materialized`, which handles all four. Training passes do not: DeepSpeed's own hooks gather
partitioned weights there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rlhf.models.layers import decoder_layers
from rlhf.models.mapped_weights import drop_resident_pages
from rlhf.system.distributed import any_rank
from rlhf.system.ranks import is_main_process


@dataclass(frozen=True)
class Placement:
    """What `materialized` does with a model; the default is for a whole model that stays where it is."""

    by_layer: bool = False  # gather a partitioned model's layers one at a time, for models that no process can hold
    onload_to: torch.device | None = None  # where a model on the CPU is moved to while it is needed
    drop_after_use: bool = False  # drop a frozen model's mapped weights from the CPU's memory after use


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether each process holds a part of the parameter, whose own size is 0 then."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def writable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Make parameters whole for writing; of partitioned ones, the first process's values are kept."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    with ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0))
        yield


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Make a model's weights ready for any number of forward passes without gradients.

    All processes must enter, and each may make another number of passes. With `by_layer` every pass is made in step
    with the other processes, and leaving waits for them; other collectives inside would hang.
    """
    placement: Placement = getattr(model, "placement", Placement())
    partitioned = [p for p in model.parameters() if is_partitioned(p)]
    if partitioned:
        with _gathered(model, partitioned, placement.by_layer):
            yield
        return
    if placement.onload_to is not None:
        model.to(placement.onload_to)
    try:
        yield
    finally:
        if placement.onload_to is not None:
            model.to("cpu")
        if placement.drop_after_use:
            drop_resident_pages(model)


@contextmanager
def _gathered(model: nn.Module, partitioned: list[nn.Parameter], by_layer: bool) -> Iterator[None]:
    """Gather the partitioned parameters: all of them now, or each layer's only during its forward."""
    import deepspeed

    layers = list(decoder_layers(model)) if by_layer else []
    later = {id(p) for layer in layers for p in layer.parameters()}
    with (
        deepspeed.zero.GatheredParameters([p for p in partitioned if id(p) not in later]),
        _without_engine_hooks(partitioned),
        _gathered_by_layer(model, layers),
    ):
        yield


@contextmanager
def _gathered_by_layer(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Gather each layer during its own forward only; does nothing for an empty list.

    All processes gather a layer together, so they make their passes in step. Before each pass they ask whether any of
    them has one to make; a process without further passes joins the gathers until none has any left.
    """
    if not layers:
        yield
        return
    import deepspeed

    held: dict[nn.Module, ExitStack] = {}

    def gather(layer: nn.Module, *_: object) -> None:
        held[layer] = ExitStack()
        held[layer].enter_context(deepspeed.zero.GatheredParameters(list(layer.parameters())))

    def release(layer: nn.Module, *_: object) -> None:
        held.pop(layer).close()

    def take_turn(*_: object) -> None:
        any_rank(True)

    hooks = [getattr(model, model.base_model_prefix).register_forward_pre_hook(take_turn)]
    hooks += [layer.register_forward_pre_hook(gather) for layer in layers]
    hooks += [layer.register_forward_hook(release, always_call=True) for layer in layers]
    try:
        yield
        while any_rank(False):
            for layer in layers:
                gather(layer)
                release(layer)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_engine_hooks(partitioned: list[nn.Parameter]) -> Iterator[None]:
    """Take the training engine's hooks away, which would partition a module again after its forward."""
    owners = {id(o): o for p in partitioned if (o := getattr(p, "_z3_optimizer", None)) is not None}
    if not owners:
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    engines = [SimpleNamespace(optimizer=owner) for owner in owners.values()]
    for engine in engines:
        remove_hooks(engine)
    try:
        yield
    finally:
        for engine in engines:
            add_hooks(engine)


def with_tied_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under all names that the model has for them; `weights` may name a tied head once only."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: same for same in names.values() for name in same}
    return {name: tensor for given, tensor in weights.items() for name in tied[given]}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole weights by name; all processes must call.

    Partitioned weights are gathered one at a time into the first process's host memory. The others get empty tensors in
    their place.
    """
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    known: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in state.items():
        if not is_partitioned(tensor):
            state[name] = tensor.detach()
            continue
        if id(tensor) not in known:
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                known[id(tensor)] = tensor.detach().cpu().clone() if is_main_process() else torch.empty(0)
        state[name] = known[id(tensor)]
    return state
