"""`rlhf compare`: the ways of a comparison file one after the other, then one table and one page of all of them.

Every stage is a program of its own, started as `rlhf run` starts it. The reference comes first: its rankings and its
reward model are put in place in the other ways' run folders, as links. What is finished and unchanged is skipped; a way
that fails is told in the table with its reason, and the others go on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.launcher import Redo, how_ended, start
from launch.pipeline import speaks
from rlhf.config import Recipe
from rlhf.costs.disk import disk_need
from rlhf.errors import UserError
from rlhf.evaluation.comparison import rows, why_failed
from rlhf.evaluation.comparison_file import SHARED_STAGES, Comparison, read_comparison, write_comparison
from rlhf.plan import world_size
from rlhf.run.fingerprints import check_data_files, unchanged
from rlhf.run.folder import RunFolder
from rlhf.run.preflight import check
from rlhf.system.console import console, duration, table
from rlhf.system.files import require_disk, require_writable
from rlhf.system.signals import STOPPED


def compare(name_or_path: str, overrides: Sequence[str], chosen: Sequence[str] = (), fresh: bool = False) -> int:
    """Run the ways of a comparison and show what came out; returns 0, 1 when a way failed, or a stopped stage's code.

    Args:
        name_or_path: a shipped comparison, or the path of a comparison file.
        overrides: recipe fields for every way.
        chosen: the ways to run, all by default; of the reference always all but PPO.
        fresh: redo all stages of these ways.

    Raises:
        UserError: for a file or a way that cannot be run, before anything is started; a reference without a reward
            model.
    """
    comparison = read_comparison(name_or_path, overrides)
    plan = _plan(comparison, chosen)
    recipes = {way: comparison.load(way) for way in plan}
    for way, stages in plan.items():
        check(recipes[way], stages)
        check_data_files(recipes[way], stages)
    require_writable(comparison.folder)
    require_disk(comparison.folder, sum(disk_need(recipe) for recipe in recipes.values()), "the comparison")
    for way in plan:
        check_place(comparison, way)
    if leads := speaks(comparison.base):  # the first of several machines
        write_comparison(comparison)
    _show(comparison, plan)
    again = shlex.join(["rlhf", "compare", name_or_path, *overrides, *(f"--way={way}" for way in chosen)])
    reasons: dict[str, str] = {}
    for way, stages in plan.items():
        anew = fresh and (not chosen or way in chosen)
        code, reason = _run(comparison, way, stages, recipes[way], anew, list(plan))
        if code in STOPPED:
            console.print(f"{way} stopped. To go on where it stopped: {again}", markup=False, soft_wrap=True)
            return code
        if code:
            reasons[way] = reason
            console.print(f"{way}: {reason}", markup=False, soft_wrap=True)
        if way == comparison.reference and not RunFolder(comparison.folder / way).is_done("reward"):
            raise UserError(
                f"the reference {way} has no reward model, which all ways need",
                str(comparison.folder / way),
                f"the cause is named above; to go on: {again}",
            )
    if leads:
        draw(comparison, reasons)
    return 1 if reasons else 0


def draw(comparison: Comparison, reasons: dict[str, str] | None = None) -> Path:
    """Write the page and the reports of its runs, print the table, return the page's path."""
    from rlhf.evaluation.comparison_page import print_rows, write_page  # draws plots: seconds to import
    from rlhf.evaluation.report import write_report

    found = rows(comparison, reasons)
    page = write_page(comparison, found)
    for row in found:
        if row.score is not None:  # those that the page has links to
            write_report(comparison.folder / row.way)
    print_rows(comparison, found)
    console.print(f"\ncomparison: {page}", markup=False, soft_wrap=True)
    return page


def _plan(comparison: Comparison, chosen: Sequence[str]) -> dict[str, list[str]]:
    """Stages by way in the order in which they run, the reference first."""
    for way in chosen:
        if way not in comparison.ways:
            raise UserError(f"there is no way {way!r}", "--way", f"take one of {', '.join(comparison.ways)}")
    plan = {}
    for way in [comparison.reference, *(way for way in comparison.ways if way != comparison.reference)]:
        stages = comparison.load(way).run.stages
        if way == comparison.reference and chosen and way not in chosen:
            # What the others need of it: rankings, the reward model, and held-out answers of its SFT policy.
            plan[way] = [stage for stage in stages if stage in ("sft", *SHARED_STAGES, "evaluate")]
        elif not chosen or way in chosen:
            plan[way] = list(stages)
    return plan


def _show(comparison: Comparison, plan: dict[str, list[str]]) -> None:
    """The ways that are run, and what each sets."""
    lines = []
    for way, stages in plan.items():
        fields = ", ".join(f"{key}={value}" for key, value in comparison.ways[way].items())
        lines.append([way, ", ".join(stages), fields])
    table(f"Comparison {comparison.folder}", ["way", "stages", "fields of its own"], lines)


def _run(
    comparison: Comparison, way: str, stages: Sequence[str], recipe: Recipe, fresh: bool, order: list[str]
) -> tuple[int, str]:
    """Run a way's stages; returns the exit code of the one that did not end well and why, or 0."""
    run, place = RunFolder(comparison.folder / way), f"way {order.index(way) + 1} of {len(order)}, {way}"
    if way != comparison.reference and not console.quiet:
        put_in_place(comparison, way)
    if not fresh and all(unchanged(recipe, run, stage) for stage in stages):
        console.print(f"{place}: finished, recipe and inputs unchanged; skipped", markup=False, soft_wrap=True)
        return 0, ""
    left = _left(comparison, order, way)
    for number, stage in enumerate(stages, 1):
        console.rule(f"{place}: stage {number} of {len(stages)}, {stage}{left}", align="left")
        code = start(stage, recipe, comparison.recipe, comparison.overrides(way), Redo(fresh=fresh))
        if code:
            told = why_failed(stage, run.read_stage(stage))
            return code, told or f"{stage} {how_ended(code, world_size(recipe) > 1)}"
    return 0, ""


def put_in_place(comparison: Comparison, way: str) -> None:
    """Link the reference's rankings and reward model into the run folder of a way."""
    (comparison.folder / way).mkdir(parents=True, exist_ok=True)
    for stage in SHARED_STAGES:
        target, link = _place(comparison, way, stage)
        if (link.parent / target).is_dir() and not link.is_symlink():  # a recipe may have no rank stage
            link.symlink_to(target, target_is_directory=True)


def check_place(comparison: Comparison, way: str) -> None:
    """Raise UserError when a way's run has rankings or a reward model that are not the reference's."""
    for stage in SHARED_STAGES:
        target, link = _place(comparison, way, stage)
        ours = way == comparison.reference or (link.is_symlink() and os.readlink(link) == target)
        if not ours and os.path.lexists(link):
            what = f"there is a {stage} stage in the run of {way} that is not the reference's"
            raise UserError(what, str(link), "move it away, or take another run.name")


def _place(comparison: Comparison, way: str, stage: str) -> tuple[str, Path]:
    """Where the link of a shared stage leads, seen from the way's run folder, and the link."""
    return os.path.join("..", comparison.reference, stage), comparison.folder / way / stage


def _left(comparison: Comparison, order: Sequence[str], way: str) -> str:
    """`; about 12:30 left`, from the seconds that finished ways took; empty before the first is done."""
    seconds = [s for each in order if each != way and (s := _seconds(comparison, each)) is not None]
    if not seconds:
        return ""
    return f"; about {duration(sum(seconds) / len(seconds) * (len(order) - order.index(way)))} left"


def _seconds(comparison: Comparison, way: str) -> float | None:
    """What the stages of a finished way took, but for those that the reference does for all."""
    run = RunFolder(comparison.folder / way)
    stages = [stage for stage in comparison.load(way).run.stages if stage not in SHARED_STAGES]
    if not all(run.is_done(stage) for stage in stages):
        return None
    return sum(float((run.read_stage(stage) or {}).get("seconds", 0.0)) for stage in stages)
