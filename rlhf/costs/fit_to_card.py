"""Check whether a recipe fits a card, and search for settings of the recipe that make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.config import Recipe
from rlhf.costs.cards import Card
from rlhf.costs.model_shapes import Shapes
from rlhf.costs.stage_memory import all_stages
from rlhf.errors import UserError
from rlhf.plan import recipe_processes

Settings = dict[str, Any]  # dotted field: value
LORA: Settings = {"model.peft.method": "lora", "reward.peft.method": "model"}


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with fields set, checked like any other."""
    values = recipe.model_dump()
    for field, value in settings.items():
        *sections, name = field.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    return Recipe.model_validate(values)


def memory_budget(recipe: Recipe, card: Card) -> float:
    """Return the bytes that one process may take: its card, or its share of the machine's memory."""
    return card.memory if card.is_gpu else card.memory / recipe.launch.processes


def fits_card(recipe: Recipe, shapes: Shapes, card: Card) -> bool:
    """Return whether the peak of every stage stays within the budget."""
    return all(memory.peak <= memory_budget(recipe, card) for memory in all_stages(recipe, shapes, card))


def settings_that_fit(recipe: Recipe, shapes: Shapes, card: Card) -> Settings | None:
    """Return the first of `settings_to_try` that fits, with the largest micro-batches; None if none fits."""
    for base in settings_to_try(recipe):
        variants = list(micro_batches(recipe))
        # The smallest first: where that does not fit, no other does.
        if not fits_card(with_settings(recipe, base | variants[-1]), shapes, card):
            continue
        return next(base | v for v in variants if fits_card(with_settings(recipe, base | v), shapes, card))
    return None


def settings_to_try(recipe: Recipe) -> Iterator[Settings]:
    """Yield settings, each with all before it, from none to offloading, and at last LoRA in place of them."""
    found: Settings = {}
    yield dict(found)
    launch = recipe.launch
    if not launch.gradient_checkpointing:
        found["launch.gradient_checkpointing"] = True
        yield dict(found)
    first = dict(found)
    if recipe_processes(recipe) > 1 and not launch.deepspeed_config:
        for stage in range(launch.zero_stage + 1, 4):
            found["launch.zero_stage"] = stage
            yield dict(found)
        for field, value in (("launch.frozen", "partitioned"), ("launch.gather", "by_layer"), ("launch.offload", True)):
            found[field] = value
            yield dict(found)
    if not recipe.model.peft.on:
        yield first | LORA
        yield found | LORA


def micro_batches(recipe: Recipe) -> Iterator[Settings]:
    """Yield smaller and smaller micro-batches of every stage that divide the batches; the first changes nothing."""
    processes = recipe_processes(recipe)
    row = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    sizes = {
        "sft.micro_batch_size": (recipe.sft.micro_batch_size, recipe.sft.batch_size // processes, 1),
        "reward.micro_tokens": (recipe.reward.micro_tokens, 0, min(row, recipe.reward.max_tokens)),
        "ppo.micro_batch_size": (recipe.ppo.micro_batch_size, recipe.ppo.minibatch_size // processes, 1),
        "ppo.rollout_batch_size": (recipe.ppo.rollout_batch_size, 0, 1),
        "ppo.score_tokens": (recipe.ppo.score_tokens, 0, row),
        "rank.batch_size": (recipe.rank.batch_size, 0, recipe.rank.outputs_per_prompt),
    }
    seen: list[Settings] = []
    for power in range(12):
        smaller = {}
        for field, (now, whole, least) in sizes.items():
            size = max(min(now, least), now >> power)
            while whole and whole % size:
                size -= 1
            if size != now:
                smaller[field] = size
        if smaller not in seen:
            seen.append(smaller)
            yield smaller


def with_processes(recipe: Recipe, count: int) -> Recipe:
    """Return the recipe on `count` processes in all, whatever its hosts; raise UserError if `count` is below 1."""
    if count < 1:
        raise UserError(f"there cannot be {count} processes", "--count", "give a number from 1")
    return with_settings(recipe, {"launch.processes": count, "launch.hostfile": ""})
