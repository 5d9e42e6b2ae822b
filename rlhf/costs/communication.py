"""Bytes that processes exchange, as gradients and gathered weights; they bound ZeRO-3 on slow networks.

A ring passes (n - 1) / n of a tensor for a gather or a reduction to parts, and twice that for a reduction to all.
"""

from __future__ import annotations

from rlhf.config import Recipe
from rlhf.costs.cards import Card
from rlhf.costs.model_memory import sharding_of
from rlhf.costs.model_shapes import ModelSpec, count
from rlhf.plan import recipe_processes

SHARE = 0.7  # of a link's rate that a collective reaches


def training_traffic(recipe: Recipe, spec: ModelSpec, micro_batches: int) -> float:
    """Return the bytes that every process sends, and receives, in one optimiser step of a trained model."""
    c, stage = count(spec), sharding_of(recipe).stage
    if stage < 2:  # a reduction to all; ZeRO 1 reduces, steps and gathers parts
        return 2.0 * c.trained_bytes
    if stage == 2:  # parts are reduced after every backward
        return float(micro_batches * c.trained_bytes + c.trained_bytes)
    return float(micro_batches * (2 * c.bytes + c.trained_bytes))  # whole weights forward and backward


def gathering_traffic(recipe: Recipe, spec: ModelSpec, passes: float, partitioned: bool) -> float:
    """Return the bytes to gather partitioned weights, once for all forward passes or layer by layer for each."""
    if not partitioned or recipe_processes(recipe) == 1:
        return 0.0
    return count(spec).bytes * (1.0 if recipe.launch.gather == "once" else passes)


def exchange_seconds(recipe: Recipe, card: Card, traffic: float) -> float:
    """Return the seconds to exchange `traffic` bytes by each process; 0 on a CPU, where processes share the memory."""
    processes = recipe_processes(recipe)
    if processes == 1 or not card.is_gpu:
        return 0.0
    link = card.link if processes <= card.per_machine else card.network
    return traffic * (processes - 1) / processes / (link * SHARE)
