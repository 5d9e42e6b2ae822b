"""Where a model's weights lie, and how they come together for passes without gradients.

    whole        every process holds them all
    partitioned  every process holds a part of each (ZeRO-3), from the moment of loading
    on the CPU   in the host's memory, on the device only while they are needed
    in a file    mapped, on a CPU, and in memory only while they are needed

Sampling and scoring go through `materialized`, which makes any of them ready. Training passes do not: there DeepSpeed's
own hooks gather partitioned weights.
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
from rlhf.system.distributed import any_rank, is_main_process


@dataclass(frozen=True)
class Placement:
    """How a model is made ready.

    Attributes:
        by_layer: gather a partitioned model's transformer layers one at a time and not all at once: for models that no
            process can hold.
        visits: the device that a model on the CPU is moved to while it is needed.
        leaves: a frozen model's mapped weights leave the CPU's memory when they are not needed.
    """

    by_layer: bool = False
    onload_to: torch.device | None = None
    drop_after_use: bool = False


def is_partitioned(parameter: Tensor) -> bool:
    """Whether each process holds a part of it; then its own size is 0."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole, partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def writable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters are whole and may be written to; of partitioned ones, what the first process wrote counts."""
    parted = [p for p in parameters if is_partitioned(p)]
    with ExitStack() as stack:
        if parted:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parted, modifier_rank=0))
        yield


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Inside, a process runs as many forward passes without gradients as it has rows, without waiting for others.

    All processes must enter; leaving waits for the others where layers are gathered one by one, for every process has a
    part of each layer. Collectives of other kinds inside would hang there.
    """
    place: Placement = getattr(model, "placement", Placement())
    parted = [p for p in model.parameters() if is_partitioned(p)]
    if parted:
        with _gathered(model, parted, place.by_layer):
            yield
    elif place.onload_to is not None:
        model.to(place.onload_to)
        try:
            yield
        finally:
            model.to("cpu")
    else:
        try:
            yield
        finally:
            if place.drop_after_use:
                drop_resident_pages(model)


@contextmanager
def _gathered(model: nn.Module, parted: list[nn.Parameter], by_layer: bool) -> Iterator[None]:
    import deepspeed

    layers = list(decoder_layers(model)) if by_layer else []
    later = {id(p) for layer in layers for p in layer.parameters()}
    with (
        deepspeed.zero.GatheredParameters([p for p in parted if id(p) not in later]),
        _no_engine_hooks(parted),
        _one_by_one(model, layers),
    ):
        yield


@contextmanager
def _one_by_one(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Each layer whole during its own forward only; nothing for an empty list.

    A layer is gathered by all processes together, so that they make their passes in step: before each, they ask whether
    anyone has one to make, and those who have none left go along until nobody has.
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
def _no_engine_hooks(parted: list[nn.Parameter]) -> Iterator[None]:
    """Without the training engine's hooks, which partition a module again after its forward."""
    owners = {id(o): o for p in parted if (o := getattr(p, "_z3_optimizer", None)) is not None}
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
    """The weights under all names that the model has for them: a tied head is listed as embeddings alone."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: same for same in names.values() for name in same}
    return {name: tensor for given, tensor in weights.items() for name in tied[given]}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name, whole; partitioned ones one after the other into the first process's host memory.

    All processes must call; the first gets the weights, the others nothing that is partitioned.
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
