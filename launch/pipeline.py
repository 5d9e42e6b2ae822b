"""`rlhf run`: show the plan, then start every stage as a program of its own, one after the other.

Stage programs skip themselves when they are finished and resume where they stopped, so the same command continues a
run. One process needs no launcher; several processes or machines are started by DeepSpeed's: through ssh from one
machine, or, with launch.node_rank, by the same command on each, where only the first machine shows anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.launcher import NO_REDO, REFUSED, Redo, how_ended, start
from rlhf.config import Recipe
from rlhf.costs.disk import disk_need
from rlhf.errors import UserError
from rlhf.model_config import BUILT_IN
from rlhf.plan import recipe_processes
from rlhf.recipe import load_recipe
from rlhf.run.fingerprints import check_accepted, check_data_files
from rlhf.run.folder import RunFolder
from rlhf.run.preflight import check, plan_rows
from rlhf.system.console import console, table
from rlhf.system.files import require_disk, require_writable


def stages_from(recipe: Recipe, redo: Redo) -> list[str]:
    """Return the stages to run; raise UserError if `redo` begins at none of them, or before one has not finished."""
    stages = recipe.run.stages
    if not redo.begin:
        return list(stages)
    if redo.fresh:
        raise UserError("--from and --fresh contradict each other", "the command line", "give one of them")
    if redo.begin not in stages:
        raise UserError(f"{redo.begin} is not a stage of the recipe", "--from", f"take one of {', '.join(stages)}")
    before, run_folder = stages[: stages.index(redo.begin)], RunFolder(Path(recipe.run.dir) / recipe.run.name)
    for stage in before:
        if not run_folder.is_done(stage):
            where = str(run_folder.stage_dir(stage))
            raise UserError(f"the {stage} stage has not finished", where, "run it first: without --from")
    return list(stages[len(before) :])


def run_pipeline(name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> int:
    """Run all stages of `run.stages`; return the exit code of the one that stopped, or 0.

    Raises UserError if the recipe cannot run; nothing is loaded before that is known.
    """
    recipe = load_recipe(name_or_path, overrides)
    check(recipe)
    silence_other_machines(recipe)
    check_accepted(redo.accept)
    stages = stages_from(recipe, redo)
    check_data_files(recipe, stages)
    check_judge_context(recipe, stages)
    show_plan(recipe, stages)
    check_disk(recipe)
    for number, stage in enumerate(stages, 1):
        console.rule(f"stage {number} of {len(stages)}: {stage}", align="left")
        code = start(stage, recipe, name_or_path, overrides, redo)
        if code:
            again = shlex.join(["rlhf", "run", name_or_path, *overrides])
            how = how_ended(code, recipe_processes(recipe) > 1)
            go_on = "Once that is corrected, run again" if code == REFUSED else "To go on where it stopped"
            console.print(f"stage {stage} {how}. {go_on}: {again}", markup=False, soft_wrap=True)
            return code
    if is_first_machine(recipe) and "evaluate" in recipe.run.stages:
        report_run(Path(recipe.run.dir) / recipe.run.name)
    return 0


def run_one(stage: str, name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> int:
    """Run a single stage, whatever `run.stages` says, and return its exit code."""
    recipe = load_recipe(name_or_path, overrides)
    check_accepted(redo.accept)
    check(recipe, [stage])
    silence_other_machines(recipe)
    show_plan(recipe, [stage])
    return start(stage, recipe, name_or_path, overrides, redo)


def is_first_machine(recipe: Recipe) -> bool:
    """Return whether this machine shows and reports: the first of several that run the same command."""
    return recipe.launch.node_rank <= 0


def silence_other_machines(recipe: Recipe) -> None:
    """Silence the console unless this is the first machine."""
    console.quiet = not is_first_machine(recipe)


def show_plan(recipe: Recipe, stages: Sequence[str]) -> None:
    """Print the derived numbers of the given stages."""
    table(f"Plan of {recipe.run.dir}/{recipe.run.name}", ["", ""], [list(row) for row in plan_rows(recipe, stages)])


def check_judge_context(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise UserError if evaluate asks a judge longer questions than it takes; one that is not here is let pass."""
    name = recipe.judge.model or recipe.model.name
    local = name in BUILT_IN or Path(name).expanduser().is_dir()
    if "evaluate" in stages and recipe.evaluate.labeler == "judge" and local and not recipe.judge.endpoint:
        from rlhf.labeling.judge.judge import check_context_fits  # imports torch: seconds

        check_context_fits(recipe)


def report_run(run_dir: Path) -> Path:
    """Write the report of a run, print its headline table and path, and return the path."""
    from rlhf.evaluation.report import print_summary, write_report  # draws plots: seconds to import

    path = write_report(run_dir)
    print_summary(run_dir)
    return path


def check_disk(recipe: Recipe) -> None:
    """Raise UserError if the disk cannot hold the run; a model that is still on the Hub counts as nothing."""
    require_writable(Path(recipe.run.dir) / recipe.run.name)
    require_disk(recipe.run.dir, disk_need(recipe), "the run")
