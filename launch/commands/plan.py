"""`rlhf plan`: its tables of memory and time."""

from __future__ import annotations

import torch

from rlhf.config import Recipe
from rlhf.costs.cards import Card, find_card, this_machine
from rlhf.costs.fit_to_card import memory_budget, settings_that_fit
from rlhf.costs.model_shapes import Shapes, shapes_of
from rlhf.costs.stage_memory import StageMemory, all_stages
from rlhf.costs.stage_time import ASSUMPTIONS, stage_time
from rlhf.errors import UserError
from rlhf.plan import recipe_processes
from rlhf.system.console import console, duration, table
from rlhf.system.quiet import quiet_libraries


def show_memory_and_time(recipe: Recipe, card_name: str | None) -> None:
    """Print memory by component and stage, whether it fits, what would make it fit, and about how long it takes.

    Without a card of rlhf/costs/cards.py it is for this machine, where a model without a config is named and left out.
    Raises UserError if there is no such card, or if one was named and a model's config cannot be loaded.
    """
    quiet_libraries()
    card = find_card(card_name) if card_name else this_machine(device_of(recipe))
    try:
        shapes = shapes_of(recipe)
    except UserError as error:
        if card_name:
            raise
        console.print(f"memory and time are not estimated: {error}", markup=False, soft_wrap=True)
        return
    memories = list(all_stages(recipe, shapes, card))
    processes = recipe_processes(recipe)
    columns, rows = memory_rows(memories, memory_budget(recipe, card))
    table(f"Memory of each of {processes} processes on {card.name}, GB", columns, rows)
    console.print(_verdict(recipe, shapes, card, memories), markup=False, soft_wrap=True)
    _show_time(recipe, shapes, card)


def memory_rows(memories: list[StageMemory], allowed: float) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: components at their largest in GB, then the peak, its phase, and whether that fits."""
    names: list[str] = []
    for memory in memories:
        names += [name for name in memory.components() if name not in names]
    rows = [[name, *(_gigabytes(m.components().get(name, 0.0)) for m in memories)] for name in names]
    rows.append(["PEAK", *(_gigabytes(m.peak) for m in memories)])
    rows.append(["  in phase", *(m.peak_phase for m in memories)])
    if any(m.host for m in memories):
        rows.append(["in the host's memory", *(_gigabytes(m.host) for m in memories)])
    rows.append([f"fits {_gigabytes(allowed)}", *("yes" if m.peak <= allowed else "NO" for m in memories)])
    return ["component", *(m.stage for m in memories)], rows


def _verdict(recipe: Recipe, shapes: Shapes, card: Card, memories: list[StageMemory]) -> str:
    if all(memory.peak <= memory_budget(recipe, card) for memory in memories):
        return (
            "It fits. Components of different phases are not there at the same time: the peak is the largest phase's."
        )
    found = settings_that_fit(recipe, shapes, card)
    if found is None:
        return (
            "It does not fit, nor with smaller micro-batches, gradient checkpointing, ZeRO 3 with offload, or LoRA: "
            "take more processes (--count), a larger card or a smaller model."
        )
    words = " ".join(f"{field}={str(value).lower()}" for field, value in found.items())
    return f"It does not fit. It would with: {words}"


def _show_time(recipe: Recipe, shapes: Shapes, card: Card) -> None:
    rows = []
    for stage in recipe.run.stages:
        estimate = stage_time(recipe, stage, shapes, card)
        large = {name: seconds for name, seconds in estimate.parts.items() if seconds > estimate.seconds / 100}
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in large.items())
        rows.append([stage, f"{estimate.rows:,} rows" if estimate.rows else "all", duration(estimate.seconds), parts])
    table("Time, h:mm:ss, an order of magnitude", ["stage", "of", "about", "parts"], rows)
    console.print(f"Assumed: {ASSUMPTIONS}.", markup=False, soft_wrap=True)


def device_of(recipe: Recipe) -> torch.device:
    """Return the device on which the recipe's stages run on this machine."""
    return torch.device("cpu" if recipe.run.device == "cpu" or not torch.cuda.is_available() else "cuda")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else ""
