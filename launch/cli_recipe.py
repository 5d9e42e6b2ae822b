"""Commands that are given a RECIPE: the stages, alone or in order, and tables of what they need.

Imports that take seconds, such as torch, are inside the functions, because `rlhf --help` loads this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Name from `rlhf recipes`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Set fields: sft.lr=1e-5 'run.stages=\\[sft,rank]'"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Redo from scratch; the old results move to STAGE.old.")]
Accept = Annotated[
    list[str] | None,
    typer.Option("--accept-change", metavar="KEY", help="Keep finished work although this field changed; repeatable."),
]
Variant = Annotated[
    Literal["ppo-ptx", "ppo"] | None,
    typer.Option(help="ppo-ptx mixes pretraining gradients in; default where ppo.ptx_coef is above 0."),
]


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    begin: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Redo this stage and all after it from scratch.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo all stages; old results move to STAGE.old.")] = False,
    accept: Accept = None,
) -> None:
    """Run the stages of a recipe in order, and end with a table and an HTML report.

    Finished stages are skipped and the interrupted one resumes, so the same command continues where it stopped.
    Writes runs/NAME; `rlhf status runs/NAME` shows how far it is.
    """
    from launch.launcher import Redo
    from launch.pipeline import run_pipeline

    raise typer.Exit(run_pipeline(recipe, overrides or [], Redo(begin, fresh, tuple(accept or ()))))


def sft(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Supervised fine-tuning. Reads data.demonstrations; writes runs/NAME/sft/model."""
    _run_stage("sft", recipe, overrides, fresh, accept)


def rank(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Sample K outputs per prompt and rank them. Reads sft/model, data.prompts; writes rank/rankings.jsonl.

    With rank.labeler=file nothing is sampled: it checks data.rankings and copies them. With rank.labeler=human it
    serves the labelling page and continues when enough rankings are in.
    """
    _run_stage("rank", recipe, overrides, fresh, accept)


def reward(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Train the reward model on K-way rankings. Writes reward/model.

    Reads rank/rankings.jsonl, sft/model and data.demonstrations, whose mean score becomes the zero.
    """
    _run_stage("reward", recipe, overrides, fresh, accept)


def ppo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    variant: Variant = None,
    fresh: Fresh = False,
    accept: Accept = None,
) -> None:
    """Align the policy. Reads sft/model, reward/model, data.prompts, data.pretraining; writes VARIANT/model.

    The averaged policy goes to ema/ beside model/ where ppo.ema_decay is above 0.
    """
    from rlhf.recipe import load_recipe

    if variant is None:
        variant = "ppo-ptx" if load_recipe(recipe, overrides or []).ppo.ptx_coef > 0 else "ppo"
    _run_stage(variant, recipe, overrides, fresh, accept)


def evaluate(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Win rate, KL, length, alignment tax. Reads the policies, data.prompts_heldout; writes evaluate/results.json."""
    _run_stage("evaluate", recipe, overrides, fresh, accept)


def _run_stage(stage: str, recipe: str, overrides: list[str] | None, fresh: bool, accept: list[str] | None) -> None:
    from launch.launcher import Redo
    from launch.pipeline import run_one

    raise typer.Exit(run_one(stage, recipe, overrides or [], Redo(fresh=fresh, accept=tuple(accept or ()))))


def compare(
    name: Annotated[str, typer.Argument(metavar="COMPARISON", help="Name from `rlhf recipes`, or a YAML file.")],
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", metavar="ARM", help="Run this arm alone; repeatable. Default: all.")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Run one recipe in several arms, such as full fine-tuning and LoRA, and compare their policies.

    All arms are scored by one reward model and judged alike. Run it again to continue: finished arms are skipped.
    Writes runs/NAME/comparison.html, and a run folder for each arm beside it.
    """
    from launch.commands.compare import run_comparison

    raise typer.Exit(run_comparison(name, overrides or [], arm or [], fresh))


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="CARD", help="Plan for this card, or cpu; default: this machine.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="Processes in all; default: the recipe's.")] = None,
) -> None:
    """Print what follows from a recipe: steps, micro-batches, memory by component, whether it fits, and about how long.

    Loads and writes nothing: memory is computed from the shapes of the models. Cards: a100-40g, a100-80g, h100-80g,
    h200-141g, b200-180g, l40s-48g, a10-24g, rtx4090-24g, v100-32g, cpu.
    """
    from launch.commands.plan import show_memory_and_time
    from launch.pipeline import show_plan
    from rlhf.costs.fit_to_card import with_processes
    from rlhf.recipe import load_recipe
    from rlhf.run.preflight import check

    loaded = load_recipe(recipe, overrides or [])
    if count is not None:
        loaded = with_processes(loaded, count)
    check(loaded)
    show_plan(loaded, loaded.run.stages)
    show_memory_and_time(loaded, gpu)


def peft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="CARD", help="Memory on this card, or cpu; default: this machine.")
    ] = None,
) -> None:
    """Compare the parameter-efficient methods on a recipe's model: what each trains and stores, memory of PPO.

    Loads and writes nothing. A method's settings are the recipe's where it names them, else the defaults.
    """
    from launch.commands.peft import show_peft_methods
    from rlhf.recipe import load_recipe

    show_peft_methods(load_recipe(recipe, overrides or []), gpu)


def recipes() -> None:
    """List the shipped recipes and comparisons."""
    from rlhf.evaluation.comparison_file import comparison_names
    from rlhf.recipe import COMPARISONS, RECIPES, recipe_names

    for names, folder, ends in (
        (recipe_names(), RECIPES, "\n\nComparisons, for `rlhf compare`:\n"),
        (comparison_names(), COMPARISONS, ""),
    ):
        width = max(len(name) for name in names)
        for name, description in names.items():
            typer.echo(f"{name:<{width}}  {description}")
        typer.echo(f"\nTheir files, to copy and change: {folder}{ends}")
