"""`rlhf peft`: the weights that each parameter-efficient method trains and stores, and the memory that it takes."""

from __future__ import annotations

from typing import get_args

from pydantic import ValidationError

from launch.commands.plan import device_of
from rlhf.config import Recipe
from rlhf.costs.cards import Card, find_card, this_machine
from rlhf.costs.fit_to_card import Settings, with_settings
from rlhf.costs.model_memory import policy_spec
from rlhf.costs.model_shapes import Shapes, count, shapes_of
from rlhf.costs.stage_memory import stage_memory
from rlhf.errors import UserError
from rlhf.model_config import KV_PREFIX_METHODS, METHODS_OF_SETTING, VIRTUAL_TOKEN_METHODS, PeftMethod, read_settings
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.system.console import console, table
from rlhf.system.quiet import quiet_libraries

COLUMNS = ["method", "settings", "trained", "share", "stored", "PPO iteration", "merged by export"]


def show_peft_methods(recipe: Recipe, card_name: str | None) -> None:
    """Print the table, from the model's config alone; memory is for a card of rlhf/costs/cards.py, or this machine.

    Raises UserError if there is no such card, or the model's config cannot be loaded.
    """
    quiet_libraries()
    card = find_card(card_name) if card_name else this_machine(device_of(recipe))
    shapes = shapes_of(recipe)
    rows, notes = [], []
    for method in get_args(PeftMethod):
        try:
            rows.append(method_row(recipe, method, shapes, card))
        except UserError as error:
            rows.append([method, "", "", "", "", "", "refused"])
            notes.append(f"{method}: {error.what}; {error.fix}")
    table(f"Parameter-efficient methods on {recipe.model.name}", COLUMNS, rows)
    console.print(
        "share: of all weights, with what the method adds. stored: a policy. PPO iteration: peak memory on "
        f"{card.name}, with a value and a reward model of all layers and of the same method.",
        markup=False,
        soft_wrap=True,
    )
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def method_row(recipe: Recipe, method: str, shapes: Shapes, card: Card) -> list[str]:
    """Return a line of the table; raise UserError if the model has nothing for the method to work on."""
    tried = with_method(recipe, method)
    c, peft = count(policy_spec(tried, shapes)), tried.model.peft
    stage = "ppo-ptx" if "ppo-ptx" in recipe.run.stages else "ppo"
    peak = stage_memory(tried, stage, shapes, card).peak
    merged = "no" if why_not_mergeable(peft) else "yes" if peft.on else "is plain"
    name = f"{method} (the recipe's)" if method == recipe.model.peft.method else method
    weights = [f"{c.trained:,}", _share(c.trained / c.total), _size(c.trained_bytes)]
    return [name, read_settings(peft), *weights, _size(peak), merged]


def with_method(recipe: Recipe, method: str) -> Recipe:
    """Return the recipe with another method and its own settings, for all layers of all four networks of PPO."""
    peft = recipe.model.peft
    settings: Settings = {"model.peft.method": method, "reward.peft.method": "model", "reward.keep_layers": 0}
    for name, methods in METHODS_OF_SETTING.items():
        default = type(peft).model_fields[name].default
        settings[f"model.peft.{name}"] = getattr(peft, name) if method in methods else default
    if method in VIRTUAL_TOKEN_METHODS:
        settings["sft.packing"] = False
    if method in KV_PREFIX_METHODS:
        settings["launch.gradient_checkpointing"] = False
    try:
        return with_settings(recipe, settings)
    except ValidationError as error:  # a rule of the recipe's own
        raise UserError(str(error.errors()[0]["msg"]), "model.peft", "change the recipe") from error


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else "100 %"


def _size(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
