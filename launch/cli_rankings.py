"""Commands that are given files of rankings: how far labelers agree, and how well a language model judges.

Imports that take seconds, such as torch, are inside the functions, because `rlhf --help` loads this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf.config import Recipe

RankedFiles = Annotated[list[str], typer.Argument(metavar="FILE...", help="Rankings, such as my_rankings.jsonl.")]
RankingFiles = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Ranking files, as in data.rankings; embedded:NAME too.")
]
Templates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="NAME", help="A shipped template or a file; repeatable. Default: all shipped."),
]
JudgeModel = Annotated[str, typer.Option("--model", help="Local folder, Hub name, or the endpoint's name for it.")]
Endpoint = Annotated[str, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible API; key: OPENAI_API_KEY.")]
Limit = Annotated[
    int, typer.Option("--limit", min=0, help="So many prompts (of a search: in each part), chosen by hash; 0: all.")
]
Answers = Annotated[
    Path | None, typer.Option("--answers", metavar="FILE", help="Keep answers there, and take them from there.")
]
BaseRecipe = Annotated[str, typer.Option("--recipe", help="Whose sections model and judge are taken.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Such as judge.max_tokens=1024; repeatable.")
]


def judge_eval(
    files: RankedFiles,
    template: Templates = None,
    model: JudgeModel = "",
    endpoint: Endpoint = "",
    limit: Limit = 0,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Everything as JSON.")] = None,
    answers: Answers = None,
    recipe: BaseRecipe = "demo",
    settings: Settings = None,
) -> None:
    """Compare templates for a language model as judge on ranked data: accuracy, calibration, position bias, speed.

    Every template asks about every pair that people ordered, in both orders; the model is the recipe's own unless one
    is named.
    """
    chosen = _judging_recipe(recipe, model, endpoint, settings)
    from launch.commands.judge import JudgeJob, compare_templates  # takes seconds: mistakes in the recipe come first

    compare_templates(JudgeJob(files, template or [], chosen, limit, answers), out)


def judge_search(
    files: RankedFiles,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The chosen template, for judge.template.")],
    template: Templates = None,
    shots: Annotated[
        list[int] | None, typer.Option("--shots", min=1, help="Demonstrations to draw; repeatable. Default: 2 and 4.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=0, help="Draws of each number; 0 draws none.")] = 2,
    model: JudgeModel = "",
    endpoint: Endpoint = "",
    limit: Limit = 0,
    answers: Answers = None,
    recipe: BaseRecipe = "demo",
    settings: Settings = None,
) -> None:
    """Choose the template and the demonstrations with which a judge agrees best with ranked data.

    Candidates are scored on one part of the prompts and the chosen one again on another; run.seed (--set run.seed=2)
    draws the parts and the demonstrations. Writes the template, and beside it what was measured, as JSON.
    """
    chosen, numbers = _judging_recipe(recipe, model, endpoint, settings), (shots or [2, 4]) if trials else []
    from launch.commands.judge import JudgeJob, search_template  # takes seconds: mistakes in the recipe come first

    search_template(JudgeJob(files, template or [], chosen, limit, answers), numbers, trials, out)


def _judging_recipe(recipe: str, model: str, endpoint: str, settings: list[str] | None) -> Recipe:
    from rlhf.recipe import load_recipe

    given = [f"judge.model={model}"] * bool(model) + [f"judge.endpoint={endpoint}"] * bool(endpoint)
    return load_recipe(recipe, given + (settings or []))


def agreement(
    files: RankingFiles,
    parts: Annotated[int, typer.Option("--windows", min=1, help="Parts of the time table.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Show how far labelers agree who ranked the same outputs: pairs, Kendall tau-b, Krippendorff alpha.

    Also by labeler, and over time. Rankings say who ranked in `labeler` and when in `time`; those of a file that name
    nobody count as one labeler's.
    """
    from launch.commands.agreement import print_agreement

    print_agreement(files, parts, seed, as_json)


def convert(
    files: RankingFiles, out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="New file to write.")]
) -> None:
    """Write ranking files of any layout that is read as one file of plain rankings, with labelers and times.

    Reads Label Studio and Argilla exports and the published data sets that the README names.
    """
    from launch.commands.agreement import convert_rankings

    convert_rankings(files, out)
