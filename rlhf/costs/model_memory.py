"""Memory that one model takes on a process: the models that the stages build, trained or frozen, whole or sharded.

The parts that stay whole and those that are partitioned follow rlhf/training/engine.py, rlhf/training/zero_engine.py
and DeepSpeed 0.19; `trained_state` is the one place that says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf.config import Recipe
from rlhf.costs.model_shapes import ModelSpec, Shapes, count
from rlhf.model_config import TRAINS_BASE_WEIGHTS, UNMERGEABLE, PeftSection
from rlhf.models.peft.shared_base import all_share_base
from rlhf.models.zero import settings
from rlhf.plan import recipe_processes

BUCKET, LIVE = 5e8, 1e9  # DeepSpeed's defaults: numbers in a reduction buffer, and gathered ones that stay
REWARD = "weights: reward model"


@dataclass(frozen=True)
class Component:
    """A component of a process's memory."""

    name: str
    bytes: float
    host: bool = False  # on a GPU it is in the memory of the machine
    mapped: bool = False  # its pages belong to a file, so that no allocator holds them


@dataclass(frozen=True)
class Sharding:
    """DeepSpeed's division of the trained models; stage 0 with one process, which runs without it."""

    stage: int
    processes: int
    bucket: float  # numbers in a reduction buffer
    buckets: int  # reduction buffers
    offload: bool  # of the optimiser
    offload_weights: bool


@dataclass(frozen=True)
class TrainedState:
    """Bytes per process of a trained model."""

    weights: float
    gradients: float
    optimiser: float
    reduction: float  # buffers in which gradients are summed over processes
    gathered: float  # partitioned weights that are whole while training uses them
    step: float  # temporary, in the optimiser's step


def sharding_of(recipe: Recipe) -> Sharding:
    """Return the sharding that follows from the recipe's DeepSpeed file and its number of processes."""
    processes = recipe_processes(recipe)
    if processes == 1:
        return Sharding(0, 1, 0, 0, False, False)
    zero = settings(recipe).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    return Sharding(
        stage,
        processes,
        float(zero.get("reduce_bucket_size", BUCKET)),
        2 if stage == 2 and zero.get("overlap_comm") else 1,
        zero.get("offload_optimizer", {}).get("device", "none") != "none",
        zero.get("offload_param", {}).get("device", "none") != "none",
    )


def trained_state(spec: ModelSpec, sharding: Sharding, on_gpu: bool) -> TrainedState:
    """Return the bytes of a trained model, partitioned as ZeRO does.

    AdamW keeps two float32 moments, and float32 copies of bfloat16 weights. ZeRO 1 and 2 step copies in any type.
    """
    c = count(spec)
    size = c.trained_bytes / max(1, c.trained)  # bytes of a trained weight
    copies = 4 if size < 4 or sharding.stage in (1, 2) else 0
    parts = sharding.processes if sharding.stage else 1
    optimiser = (8 + copies) * c.trained / parts
    gradients = c.trained_bytes / (parts if sharding.stage > 1 else 1)  # added up in the type of the weights
    # torch steps a GPU's tensors in groups that have temporary copies, a CPU's one after the other.
    step = 4 * c.trained / parts if on_gpu and not sharding.offload else 8 * c.largest / parts
    if copies and sharding.stage == 0 or sharding.stage in (1, 2):
        step += 4 * c.trained / parts  # gradients as float32, or flattened
    weights = c.bytes / parts if sharding.stage == 3 else float(c.trained_bytes if spec.shares_base else c.bytes)
    gathered = min(c.bytes, LIVE * c.bytes / c.total) if sharding.stage == 3 else 0.0
    return TrainedState(weights, gradients, optimiser, _reduction(c.trained, size, sharding, on_gpu), gathered, step)


def _reduction(trained: int, size: float, sharding: Sharding, on_gpu: bool) -> float:
    """Return the bytes of the buffers in which `trained` gradients of `size` bytes are summed over processes."""
    if sharding.processes == 1:
        return 0.0
    filled = min(sharding.bucket, trained)
    if not sharding.stage:
        return filled * size
    # The buffers are allocated whole; on a CPU pages that are never written to take no memory.
    buffers = sharding.bucket * sharding.buckets if on_gpu else filled
    # DeepSpeed reduces a flattened copy of the buffer; to parts, gloo makes another.
    copies = 2 if sharding.stage == 3 and not on_gpu else 1
    return buffers * size + copies * filled * size


def frozen_weights(spec: ModelSpec, recipe: Recipe, name: str) -> tuple[Component, float]:
    """Return a frozen model's weights where launch.frozen puts them, and the bytes that a pass over it adds."""
    size, processes = float(count(spec).bytes), recipe_processes(recipe)
    if recipe.launch.frozen == "cpu":
        return Component(name, size, host=True), size
    if recipe.launch.frozen == "partitioned" and processes > 1:
        return Component(name, size / processes), gathered_bytes(spec, recipe)
    return Component(name, size), 0.0


def gathered_bytes(spec: ModelSpec, recipe: Recipe) -> float:
    """Return the bytes of weights gathered at a time to sample or score: all, or one layer and what is outside."""
    c = count(spec)
    if recipe.launch.gather == "once":
        return float(c.bytes)
    return c.bytes * (c.total - (spec.layers - 1) * c.layer) / c.total


def policy_spec(recipe: Recipe, shapes: Shapes, trained: bool = True, sft: bool = False) -> ModelSpec:
    """Return the policy as PPO trains it (SFT with `sft`), or as it samples: merged where its method can be."""
    peft, sharding = recipe.model.peft, sharding_of(recipe)
    # SFT of all weights loads float32 weights, which DeepSpeed converts.
    whole = sft and peft.method in TRAINS_BASE_WEIGHTS and sharding.processes == 1
    dtype, adapter = "float32" if whole else recipe.model.dtype, kept_adapter(peft, trained)
    return ModelSpec(shapes.policy, dtype, recipe.model.attention, peft=adapter, partitioned=sharding.stage == 3)


def reward_spec(recipe: Recipe, shapes: Shapes, trained: bool = True) -> ModelSpec:
    """Return the reward model, as it is trained or plain; the value model is built like the trained one."""
    model, keep, adapter = recipe.model, recipe.reward.keep_layers, kept_adapter(recipe.reward_peft, trained)
    spec = ModelSpec(shapes.reward, model.dtype, model.attention, scalar=True, keep_layers=keep, peft=adapter)
    return replace(spec, partitioned=sharding_of(recipe).stage == 3)


def kept_adapter(peft: PeftSection, trained: bool) -> PeftSection | None:
    """Return the adapter that stays on a model: any on a trained one, else one that cannot be merged."""
    return peft if peft.on and (trained or peft.method in UNMERGEABLE) else None


def value_and_reward_weights(recipe: Recipe, shapes: Shapes) -> tuple[ModelSpec, Component, float]:
    """Return PPO's value model, the frozen reward model's weights, and the bytes that a pass over the latter adds."""
    value, reward = reward_spec(recipe, shapes), reward_spec(recipe, shapes, trained=False)
    if not all_share_base(recipe, sharding_of(recipe).stage):
        return value, *frozen_weights(reward, recipe, REWARD)
    return replace(value, shares_base=True), Component(REWARD, float(count(value).trained_bytes)), 0.0
