"""`rlhf compare`: run the arms of a comparison file one after the other, then show all of them in a table and a page.

The reference comes first: its rankings and its reward model are linked into the run folders of the other arms. Finished
and unchanged stages are skipped. If an arm fails, the table gives the reason and the other arms still run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.launcher import Redo, how_ended, start
from launch.pipeline import is_first_machine, silence_other_machines
from rlhf.config import Recipe
from rlhf.costs.disk import disk_need
from rlhf.errors import UserError
from rlhf.evaluation.comparison import arm_results, why_failed
from rlhf.evaluation.comparison_file import SHARED_STAGES, Comparison, read_comparison, write_comparison
from rlhf.plan import recipe_processes
from rlhf.run.fingerprints import check_data_files, is_up_to_date
from rlhf.run.folder import RunFolder
from rlhf.run.preflight import check
from rlhf.system.console import console, duration, table
from rlhf.system.files import require_disk, require_writable
from rlhf.system.signals import STOPPED


def run_comparison(name_or_path: str, overrides: Sequence[str], chosen: Sequence[str] = (), fresh: bool = False) -> int:
    """Run the arms of a comparison and show the results; return 0, 1 if an arm failed, or a stopped stage's exit code.

    Only the arms `chosen` run, by default all, and always the reference's stages except PPO; `fresh` redoes their
    stages. Raises UserError before anything is started if the file or an arm cannot be run; later if the reference has
    no reward model.
    """
    comparison = read_comparison(name_or_path, overrides)
    plan = _plan(comparison, chosen)
    recipes = {arm: comparison.load(arm) for arm in plan}
    _check_plan(comparison, plan, recipes)
    silence_other_machines(comparison.base)
    if is_first_machine(comparison.base):
        write_comparison(comparison)
    _show(comparison, plan)
    again = shlex.join(["rlhf", "compare", name_or_path, *overrides, *(f"--arm={arm}" for arm in chosen)])
    reasons: dict[str, str] = {}
    for arm, stages in plan.items():
        anew = fresh and (not chosen or arm in chosen)
        code, reason = _run(comparison, arm, stages, recipes[arm], anew, list(plan))
        if code in STOPPED:
            console.print(f"{arm} stopped. To continue where it stopped: {again}", markup=False, soft_wrap=True)
            return code
        if code:
            reasons[arm] = reason
            console.print(f"{arm}: {reason}", markup=False, soft_wrap=True)
        if arm == comparison.reference and not RunFolder(comparison.folder / arm).is_done("reward"):
            what = f"the reference {arm} has no reward model, which all arms need"
            raise UserError(what, str(comparison.folder / arm), f"the cause is named above; to continue: {again}")
    if is_first_machine(comparison.base):
        write_results(comparison, reasons)
    return 1 if reasons else 0


def write_results(comparison: Comparison, reasons: dict[str, str] | None = None) -> Path:
    """Write the page and the reports of its runs and print the table; return the page's path."""
    from rlhf.evaluation.comparison_page import print_rows, write_page  # draws plots: seconds to import
    from rlhf.evaluation.report import write_report

    found = arm_results(comparison, reasons)
    page = write_page(comparison, found)
    for row in found:
        if row.score is not None:  # the page has links to these
            write_report(comparison.folder / row.arm)
    print_rows(comparison, found)
    console.print(f"\ncomparison: {page}", markup=False, soft_wrap=True)
    return page


def _plan(comparison: Comparison, chosen: Sequence[str]) -> dict[str, list[str]]:
    """Return the stages of each arm in the order in which they run, the reference first."""
    for arm in chosen:
        if arm not in comparison.arms:
            raise UserError(f"there is no arm {arm!r}", "--arm", f"take one of {', '.join(comparison.arms)}")
    plan = {}
    for arm in [comparison.reference, *(arm for arm in comparison.arms if arm != comparison.reference)]:
        stages = comparison.load(arm).run.stages
        if arm == comparison.reference and chosen and arm not in chosen:
            # The other arms need its rankings, its reward model and the held-out answers of its SFT policy.
            plan[arm] = [stage for stage in stages if stage in ("sft", *SHARED_STAGES, "evaluate")]
        elif not chosen or arm in chosen:
            plan[arm] = list(stages)
    return plan


def _check_plan(comparison: Comparison, plan: dict[str, list[str]], recipes: dict[str, Recipe]) -> None:
    """Raise UserError if a stage, a data file, the disk or a run folder would make an arm fail."""
    for arm, stages in plan.items():
        check(recipes[arm], stages)
        check_data_files(recipes[arm], stages)
    require_writable(comparison.folder)
    require_disk(comparison.folder, sum(disk_need(recipe) for recipe in recipes.values()), "the comparison")
    for arm in plan:
        check_shared_links(comparison, arm)


def _show(comparison: Comparison, plan: dict[str, list[str]]) -> None:
    """Print the arms that are run, with the fields that each sets."""
    lines = []
    for arm, stages in plan.items():
        fields = ", ".join(f"{key}={value}" for key, value in comparison.arms[arm].items())
        lines.append([arm, ", ".join(stages), fields])
    table(f"Comparison {comparison.folder}", ["arm", "stages", "fields of its own"], lines)


def _run(
    comparison: Comparison, arm: str, stages: Sequence[str], recipe: Recipe, fresh: bool, order: list[str]
) -> tuple[int, str]:
    """Run an arm's stages; return (exit code, reason) of the first that failed or was stopped, else (0, "")."""
    run, title = RunFolder(comparison.folder / arm), f"arm {order.index(arm) + 1} of {len(order)}, {arm}"
    if arm != comparison.reference and not console.quiet:
        link_shared_stages(comparison, arm)
    if not fresh and all(is_up_to_date(recipe, run, stage) for stage in stages):
        console.print(f"{title}: finished, recipe and inputs unchanged; skipped", markup=False, soft_wrap=True)
        return 0, ""
    left = _time_left(comparison, order, arm)
    for number, stage in enumerate(stages, 1):
        console.rule(f"{title}: stage {number} of {len(stages)}, {stage}{left}", align="left")
        code = start(stage, recipe, comparison.recipe, comparison.overrides(arm), Redo(fresh=fresh))
        if code:
            recorded = why_failed(stage, run.read_stage(stage))
            return code, recorded or f"{stage} {how_ended(code, recipe_processes(recipe) > 1)}"
    return 0, ""


def link_shared_stages(comparison: Comparison, arm: str) -> None:
    """Link the reference's rankings and reward model into the run folder of an arm."""
    (comparison.folder / arm).mkdir(parents=True, exist_ok=True)
    for stage in SHARED_STAGES:
        target, link = _shared_link(comparison, arm, stage)
        if (link.parent / target).is_dir() and not link.is_symlink():  # a recipe may have no rank stage
            link.symlink_to(target, target_is_directory=True)


def check_shared_links(comparison: Comparison, arm: str) -> None:
    """Raise UserError if an arm's run has rankings or a reward model other than the reference's."""
    for stage in SHARED_STAGES:
        target, link = _shared_link(comparison, arm, stage)
        ours = arm == comparison.reference or (link.is_symlink() and os.readlink(link) == target)
        if not ours and os.path.lexists(link):
            what = f"there is a {stage} stage in the run of {arm} that is not the reference's"
            raise UserError(what, str(link), "move it away, or take another run.name")


def _shared_link(comparison: Comparison, arm: str, stage: str) -> tuple[str, Path]:
    """Return the relative target of the link to a shared stage, and the link's path in the arm's run folder."""
    return os.path.join("..", comparison.reference, stage), comparison.folder / arm / stage


def _time_left(comparison: Comparison, order: Sequence[str], arm: str) -> str:
    """Return `; about 12:30 left`, estimated from the seconds of finished arms; empty before the first is done."""
    seconds = [s for each in order if each != arm and (s := _seconds(comparison, each)) is not None]
    if not seconds:
        return ""
    return f"; about {duration(sum(seconds) / len(seconds) * (len(order) - order.index(arm)))} left"


def _seconds(comparison: Comparison, arm: str) -> float | None:
    """Return the seconds of a finished arm's own stages, without shared ones; None if it is not finished."""
    run = RunFolder(comparison.folder / arm)
    stages = [stage for stage in comparison.load(arm).run.stages if stage not in SHARED_STAGES]
    if not all(run.is_done(stage) for stage in stages):
        return None
    return sum(float((run.read_stage(stage) or {}).get("seconds", 0.0)) for stage in stages)
