"""Count the FLOPs and bytes of a model's passes from its parameters, without padding and recomputation.

A weight of a matrix costs 2 FLOPs per token in the forward pass. In the backward pass it costs 2 if the gradient passes
through it to something trained before it, and 2 if it is trained itself. Embeddings are looked up and cost nothing.
Attention's two products cost 2 FLOPs each per channel of the query heads, per layer, and per pair of a token with one
that it attends to; the backward pass costs twice that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.model_config import VIRTUAL_TOKEN_METHODS
from rlhf.models.layers import kv_heads, text_body
from rlhf.models.peft.methods import peft_of
from rlhf.models.placement import full_shape


class PassSize(NamedTuple):
    """The size of a pass, without padding."""

    tokens: float  # that go through the layers
    heads: float  # positions that go through the head
    attended_pairs: float  # pairs of a token with itself or one before it, over all rows


def pass_size(lengths: Sequence[tuple[int, int]]) -> PassSize:
    """Return the size of a pass over rows of (prompt tokens, response tokens) whose responses go through the head."""
    rows = [prompt + response for prompt, response in lengths]
    return PassSize(sum(rows), sum(response for _, response in lengths), sum(n * (n + 1) / 2 for n in rows))


@dataclass(frozen=True)
class ModelCost:
    """The sizes that the cost of a model's passes depends on, in weights unless said otherwise."""

    layers: int  # weights of all matrices that every token is multiplied by
    head: int  # weights of the LM head or scalar head
    attention: int  # channels of the query heads, summed over the layers
    through: int  # the part of `layers` that the gradient passes through to something trained before it
    trained: int  # the part of `layers` that is trained
    head_through: int  # the same parts of `head`
    head_trained: int
    attention_through: int  # the part of `attention` in layers that the gradient passes through
    weight_bytes: int  # bytes of matrices and head, which a pass reads
    kv_bytes: int  # bytes of one token's keys and values
    parameters: int  # trained parameters of any kind, which the optimiser steps
    gradient_bytes: int  # bytes of their gradients

    def forward(self, work: PassSize) -> float:
        """Return the FLOPs of a forward pass."""
        return 2.0 * (self.layers * work.tokens + self.head * work.heads) + 4.0 * self.attention * work.attended_pairs

    def backward(self, work: PassSize) -> float:
        """Return the FLOPs of the backward pass after it."""
        matrices = (self.through + self.trained) * work.tokens + (self.head_through + self.head_trained) * work.heads
        return 2.0 * matrices + 8.0 * self.attention_through * work.attended_pairs

    def training(self, work: PassSize) -> float:
        """Return the FLOPs of both."""
        return self.forward(work) + self.backward(work)


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Count a causal language model, reward or value model, with an adapter or without, on any device or on meta.

    Parameters are taken in the order of the model, which is the order of the forward pass. In the first layer with an
    adapter, the gradient is counted through the matrices of keys and values too, which is not always needed. Virtual
    tokens are counted as free: making them, once a pass, and the layers and attention that they go through.
    """
    config = model.config.get_text_config()
    head_weight = (model.score if hasattr(model, "score") else model.get_output_embeddings()).weight
    head = full_shape(head_weight).numel()
    peft = peft_of(model)
    virtual = peft is not None and peft.method in VIRTUAL_TOKEN_METHODS
    matrices = _layer_matrices(model, head_weight, virtual)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = min((m.layer for m in matrices if m.through or m.trained), default=config.num_hidden_layers)
    heads, size = kv_heads(config)
    queries = config.num_attention_heads * size
    return ModelCost(
        layers=sum(m.weights for m in matrices),
        head=head,
        attention=queries * config.num_hidden_layers,
        through=sum(m.weights for m in matrices if m.through),
        trained=sum(m.weights for m in matrices if m.trained),
        head_through=head if virtual or any(m.trained for m in matrices) else 0,
        head_trained=head if head_weight.requires_grad else 0,
        attention_through=queries * (config.num_hidden_layers - first),
        weight_bytes=sum(m.bytes for m in matrices) + head * head_weight.element_size(),
        kv_bytes=2 * heads * size * config.num_hidden_layers * next(model.parameters()).element_size(),
        parameters=sum(full_shape(p).numel() for p in trained),
        gradient_bytes=sum(full_shape(p).numel() * p.element_size() for p in trained),
    )


class _Matrix(NamedTuple):
    weights: int
    bytes: int
    through: bool  # whether the gradient passes through it to something trained before it
    trained: bool
    layer: int


def _layer_matrices(model: PreTrainedModel, head_weight: Tensor, virtual: bool) -> list[_Matrix]:
    """Return all matrices that every token is multiplied by, in the order of the forward pass; the head is not one.

    `virtual`: trained virtual tokens precede the first layer, so that the gradient passes through all matrices.
    """
    found, reached = [], virtual
    for name, module in text_body(model).named_modules():
        if ".virtual_tokens." in f".{name}":
            continue
        for parameter in module.parameters(recurse=False):
            shape = full_shape(parameter)
            if len(shape) > 1 and parameter is not head_weight and not isinstance(module, nn.Embedding):
                size, trained = shape.numel(), parameter.requires_grad
                found.append(_Matrix(size, size * parameter.element_size(), reached, trained, _layer(name)))
            reached = reached or parameter.requires_grad
    return found


def _layer(name: str) -> int:
    """Return the number of the layer that a module is in, 0 if it is in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
