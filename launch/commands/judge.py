"""`rlhf judge-eval` and `rlhf judge-search`: measure judges on files of rankings, as tables and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import Recipe
from rlhf.data.few_shot import why_not_calibrated
from rlhf.data.prompt_template import Template, template_names, write_template
from rlhf.data.records import Drops, read_rankings
from rlhf.errors import UserError
from rlhf.labeling.judge.accuracy import (
    GradedPrompt,
    drop_too_long_for_any,
    graded_prompts,
    measure_judge,
    questions,
    templates_of,
)
from rlhf.labeling.judge.judge import Judge, check_judge, make_reader, question_key
from rlhf.labeling.judge.template_search import candidate_templates, search, split_rankings, template_comments
from rlhf.system.console import Progress, console, show_drops, table, warn
from rlhf.system.distributed import pick_device
from rlhf.system.files import write_atomic
from rlhf.system.malloc import keep_freed_memory
from rlhf.system.quiet import quiet_libraries

MAX_FLIPS, MIN_MASS = 0.5, 0.1  # limits beyond which there is a warning


class JudgeJob(NamedTuple):
    """Arguments that both commands share."""

    files: Sequence[str]  # of rankings
    names: Sequence[str]  # of templates; none means all that are shipped
    recipe: Recipe
    limit: int  # prompts; 0: all
    answers: Path | None  # log of answers, with which a repeated command continues


def compare_templates(job: JudgeJob, out: Path | None) -> None:
    """Measure every template on the same pairs and print a table; `out` is JSON, written again after every template."""
    drops, templates = Drops(), _templates(job)
    rankings = read_rankings(job.files, drops)
    judges = _judges(job, templates)
    items = drop_too_long_for_any(graded_prompts(rankings, drops), judges, job.limit, drops)
    show_drops(drops.table())
    rows: list[dict[str, Any]] = []
    for judge in judges:
        rows.append(_measured(judge, items, job.recipe))
        if out:
            _write(out, job, drops, {"templates": rows})
    _show(f"{_model(job.recipe)} on {rows[0]['pairs']} pairs of {rows[0]['prompts']} prompts", rows)
    if len(rows) == 1:
        _show_reliability(rows[0])


def search_template(job: JudgeJob, shots: Sequence[int], trials: int, out: Path) -> None:
    """Search for the best template, print the candidates, and write the chosen one to `out` and OUT.json beside it.

    For each of `shots`, a number of demonstrations, there are `trials` draws.
    """
    drops, seed, path = Drops(), job.recipe.run.seed, out.with_suffix(".json")
    templates = _templates(job)
    parts = split_rankings(read_rankings(job.files, drops), seed)
    for name, part in zip(parts._fields, parts, strict=True):
        if not part and (name != "pool" or shots):
            raise UserError(f"the part `{name}` of the rankings is empty", ", ".join(job.files), "give more rankings")
    judges = _judges(job, candidate_templates(templates, parts.pool, shots, trials, seed))
    console.print(
        f"{len(judges)} candidate{'s' * (len(judges) > 1)}; {len(parts.pool)} rankings to draw demonstrations from, "
        f"{len(parts.score)} to choose by, {len(parts.confirm)} to confirm on"
    )
    rows: list[dict[str, Any]] = []

    def measure(judge: Judge, items: Sequence[GradedPrompt], part: str) -> dict[str, Any]:
        row = _measured(judge, items, job.recipe, part)
        rows.append({"part": part} | row)
        _write(path, job, drops, {"so_far": rows})
        return row

    result = search(judges, parts, drops, job.limit, seed, measure)
    show_drops(drops.table())
    write_template(result.template, out, template_comments(result.report, job.files))
    _write(path, job, drops, result.report)
    _show(f"{_model(job.recipe)}, by candidate", result.report["candidates"])
    again, first = result.report["confirmation"], result.report["first_candidate_confirmation"]
    if first["template"] == again["template"]:
        _show("The chosen one on other prompts", [again])
    else:
        _show("On other prompts: the chosen one, and the first candidate", [again, first])
    if result.warning:
        warn(result.warning)
    console.print(f"chosen: {result.report['chosen']}; use it with judge.template={out}", markup=False, soft_wrap=True)


def _templates(job: JudgeJob) -> list[Template]:
    """Return the templates of a job, after a check of the recipe's section `judge`."""
    found = templates_of(job.recipe.judge, job.names or template_names("judge"))
    check_judge(job.recipe.judge.model_copy(update={"demonstrations": ""}))
    return found


def _judges(job: JudgeJob, templates: Sequence[Template]) -> list[Judge]:
    """Return a judge for each template, all of one model; raise UserError if judge.calibrate is set and cannot be."""
    quiet_libraries()
    cfg, answers = job.recipe.judge, job.answers
    if pick_device(job.recipe).type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
        keep_freed_memory()
    for template in templates:
        if cfg.calibrate and (why := why_not_calibrated(template)):
            raise UserError(why, "judge.calibrate", "leave the template out, or do not calibrate")
    reader, identity = make_reader(job.recipe)
    if answers:
        answers.parent.mkdir(parents=True, exist_ok=True)
    return [Judge(template, reader, answers, identity, cfg.calibrate) for template in templates]


def _measured(judge: Judge, items: Sequence[GradedPrompt], recipe: Recipe, part: str = "") -> dict[str, Any]:
    seed, tie_margin = recipe.run.seed, recipe.judge.tie_margin
    name = f"{judge.template.name}{f' ({part})' if part else ''}"
    new = [question for question in questions(judge, items) if question_key(question) not in judge.answers]
    with Progress(name, total=len(new), unit="questions") as progress:
        return measure_judge(judge, items, seed, progress.advance, tie_margin)


def _write(path: Path, job: JudgeJob, drops: Drops, found: dict[str, Any]) -> None:
    """Write measurements as JSON, after the settings that they were made with."""
    settings = {
        "files": list(job.files),
        "judge": job.recipe.judge.model_dump(),
        "model": _model(job.recipe),
        "seed": job.recipe.run.seed,
        "drops": dict(drops.table()),
    }
    write_atomic(path, json.dumps(settings | found, indent=1) + "\n")


def _model(recipe: Recipe) -> str:
    return recipe.judge.model or recipe.model.name


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    def interval(row: dict[str, Any], name: str, scale: float = 100, digits: int = 1) -> str:
        mean, *ends = (None if (x := row[name + end]) is None else scale * x for end in ("", "_low", "_high"))
        text = f"{mean:.{digits}f}"
        return text if None in ends else f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"

    lines = []
    for row in rows:
        bias = row["position"]
        flips, shift = (interval(bias, "flips", digits=0), interval(bias, "shift", 1, 2)) if bias else ("-", "-")
        ties = f"{100 * row['ties']:.0f}"
        lines.append([row["template"], interval(row, "accuracy"), ties, flips, shift, row["questions_per_s"]])
    table(title, ["template", "right, %", "ties, %", "flips, %", "shift to first", "questions/s"], lines)
    keys = ("log_loss", "brier", "calibration_error", "label_mass")
    lines = [[row["template"], *(round(row[key], 4) for key in keys)] for row in rows]
    columns = ["template", "log loss", "Brier", "calibration error", "on labels"]
    table("calibration (chance: log loss 0.693, Brier 0.25)", columns, lines)
    text = (
        "right: pairs in the order that people gave them, 95 % intervals over prompts. ties: pairs within "
        "judge.tie_margin. flips: pairs that the two orders decide differently. shift: log-odds toward the first one "
        "shown. on labels: probability that the answer is one of the labels at all."
    )
    console.print(text, markup=False, soft_wrap=True)
    _warn_of(rows)


def _warn_of(rows: Sequence[dict[str, Any]]) -> None:
    """Warn of judges that go by the order, hardly say a label, or have refused or unlabelled answers."""
    for row in (row for row in rows if row["position"] and row["position"]["flips"] > MAX_FLIPS):
        warn(f"{row['template']}: {row['position']['flips']:.0%} of the pairs are decided by their order")
    for row in (row for row in rows if row["label_mass"] < MIN_MASS):
        warn(
            f"{row['template']}: the model hardly says a label (probability {row['label_mass']:.2g}), so it does not "
            "answer the question"
        )
    for row in (row for row in rows if row["prompts_refused"]):
        warn(f"{row['template']}: {row['prompts_refused']} prompts left out: a question is too long for the endpoint")
    for row in (row for row in rows if row["answers_with_bounds"]):
        warn(
            f"{row['template']}: in {row['answers_with_bounds']} of {row['answers']} answers a label was not among the "
            f"likeliest tokens, and a bound is used for it; in {row['answers_without_label']} none was, which is a tie"
        )


def _show_reliability(row: dict[str, Any]) -> None:
    rows = [[bin["confidence"], bin["accuracy"], bin["n"]] for bin in row["reliability"]]
    table(f"Reliability of {row['template']}", ["confidence", "right", "pairs"], rows)
