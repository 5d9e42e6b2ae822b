"""Merge a method into the weights, if it is a change of weights.

    lora       W + s B A                                  s = alpha / rank
    dora       m (W + s B A) / |W + s B A|                row norms are replaced by the learned m (Liu et al. 2024)
    ia3        l W and l b; W l in the MLP's last map     l scales outputs; in the MLP's last map it scales inputs
    bitfit     b                                          the trained bias replaces the base's

Virtual tokens and bottleneck adapters change no weight of the base, and cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.model_config import UNMERGEABLE, VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.peft.methods import ADAPTER, peft_of
from rlhf.models.placement import writable

BASE = ".base_layer."
LORA_A, LORA_B = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"
MAGNITUDE, SCALE = f"lora_magnitude_vector.{ADAPTER}.weight", f"ia3_l.{ADAPTER}"
PARTS = (LORA_A, LORA_B, MAGNITUDE, SCALE)


class LinearWeights(NamedTuple):
    """Weight [out, in] and bias [out] of a linear map; the bias may be None."""

    weight: Tensor
    bias: Tensor | None


def why_not_mergeable(peft: PeftSection) -> str:
    """Return why the method cannot be merged into weights; empty if it can."""
    if peft.method not in UNMERGEABLE:
        return ""
    if peft.method in VIRTUAL_TOKEN_METHODS:
        return f"{peft.method} trains tokens that stand before every row, and no weight of the model holds them"
    return "adapter trains layers with an activation between them, which the base does not have"


def merged_linear(base: LinearWeights, parts: Mapping[str, Tensor], peft: PeftSection) -> LinearWeights:
    """Return a linear map with an adapter merged into it, computed in float32 on the CPU, in the map's own dtype.

    `parts` are the adapter's tensors by their names in PARTS.
    """
    weight = base.weight.detach().cpu().float()
    bias = base.bias
    if LORA_A in parts:
        a, b = (parts[name].detach().cpu().float() for name in (LORA_A, LORA_B))
        weight = weight + peft.alpha / peft.rank * (b @ a)
    if MAGNITUDE in parts:
        magnitude = parts[MAGNITUDE].detach().cpu().float()
        weight = (magnitude / weight.norm(dim=1))[:, None] * weight
    if SCALE in parts:
        scale = parts[SCALE].detach().cpu().float()  # [out, 1] scales outputs, [1, in] inputs
        weight = weight * scale
        if bias is not None and scale.shape[1] == 1:
            bias = (bias.detach().cpu().float() * scale[:, 0]).to(base.bias.dtype)
    return LinearWeights(weight.to(base.weight.dtype), bias)


def merged_state_dict(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model that computes what `model` does with its method; `model` is not changed.

    `state` has the model's whole weights under its own names. Raises ValueError if the method cannot be merged.
    """
    peft = peft_of(model)
    if peft is None:
        return dict(state)
    if reason := why_not_mergeable(peft):
        raise ValueError(reason)
    merged = {plain_name(name): tensor for name, tensor in state.items() if not _is_part(name)}
    for owner, parts in _by_owner(state):
        module = model.get_submodule(owner)
        bias = state.get(f"{owner}{BASE}bias")
        linear = _transposed(LinearWeights(state[f"{owner}{BASE}weight"], bias), module.base_layer)
        linear = _transposed(merged_linear(linear, parts, peft), module.base_layer)
        merged[f"{owner}.weight"] = linear.weight
        if linear.bias is not None:
            merged[f"{owner}.bias"] = linear.bias
    return merged


@torch.no_grad()
def merge_into(model: PreTrainedModel, tensors: Mapping[str, Tensor], peft: PeftSection) -> None:
    """Merge an adapter's tensors into the weights of a plain model, in place; layers that it lacks are skipped.

    Raises ValueError if the method cannot be merged.
    """
    if reason := why_not_mergeable(peft):
        raise ValueError(reason)
    modules = dict(model.named_modules())
    for owner, parts in _by_owner(tensors):
        if owner not in modules:
            continue
        module = modules[owner]
        with writable(list(module.parameters())):
            merged = merged_linear(_transposed(LinearWeights(module.weight, module.bias), module), parts, peft)
            merged = _transposed(merged, module)
            module.weight.copy_(merged.weight)
            if merged.bias is not None:
                module.bias.copy_(merged.bias)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if not _is_part(name) and name in parameters:  # bitfit's
            with writable([parameters[name]]):
                parameters[name].copy_(tensor)


def plain_name(name: str) -> str:
    """Return the name of a weight in the model without a method."""
    return name.replace(BASE, ".")


def _is_part(name: str) -> bool:
    return name.endswith(PARTS)


def _by_owner(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each module with adapter tensors, and those tensors by their names in PARTS."""
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for part in PARTS:
            if name.endswith(f".{part}"):
                owners.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    yield from owners.items()


def _transposed(linear: LinearWeights, module: nn.Module) -> LinearWeights:
    """Transpose between the module's own layout and [out, in]; GPT-2's Conv1D keeps [in, out]."""
    return LinearWeights(linear.weight.t().contiguous(), linear.bias) if isinstance(module, Conv1D) else linear
