"""The `rlhf` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""The complete InstructGPT recipe: demonstrations -> SFT -> rankings -> reward model -> PPO-ptx -> evaluation.

A RECIPE is a name from `rlhf recipes` or the path of a YAML file; every field can be set after it.

[bold]Examples[/bold]

rlhf run demo                        every stage; run it again to resume

rlhf run demo run.name=b run.seed=2  another run, in runs/b

rlhf run demo --from reward          its reward model and what follows, again

rlhf status runs/demo                how far it is

rlhf profile runs/demo               where the time of PPO went

rlhf judge-eval my_rankings.jsonl         a language model as judge, on ranked data

rlhf plan demo --gpu h100-80g --count 2   steps, memory, time; nothing loaded

rlhf ppo demo --variant ppo          one stage alone

rlhf label runs/demo                 the page on which people rank its outputs

rlhf chat runs/demo                  SFT and aligned side by side

rlhf agreement rankings.jsonl        how far its labelers agree

rlhf export runs/demo                the aligned policy as a plain model folder

rlhf peft demo                       what each parameter-efficient method would train and store

rlhf compare peft                    full fine-tuning and every parameter-efficient method
""",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Name from `rlhf recipes`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Set fields: sft.lr=1e-5 'run.stages=\\[sft,rank]'"),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/demo.")]


Fresh = Annotated[bool, typer.Option("--fresh", help="Redo from scratch; what is there moves to STAGE.old.")]


Accept = Annotated[
    list[str] | None,
    typer.Option("--accept-change", metavar="KEY", help="Keep what is done though this field has changed; repeatable."),
]


def _stage(name: str, recipe: str, overrides: list[str] | None, fresh: bool, accept: list[str] | None) -> None:
    from launch.launcher import Redo
    from launch.pipeline import run_one

    raise typer.Exit(run_one(name, recipe, overrides or [], Redo(fresh=fresh, accept=accept or [])))


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    begin: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Redo this stage and all after it from scratch.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo all stages; what is there moves to STAGE.old.")] = False,
    accept: Accept = None,
) -> None:
    """Run the stages of a recipe in order, and end with a table and an HTML report.

    Finished stages are skipped and the interrupted one resumes, so the same command always goes on where it stopped.
    Writes runs/NAME; `rlhf status runs/NAME` shows how far it is.
    """
    from launch.launcher import Redo
    from launch.pipeline import run as run_pipeline

    raise typer.Exit(run_pipeline(recipe, overrides or [], Redo(begin, fresh, accept or [])))


@app.command()
def sft(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Supervised fine-tuning. Reads data.demonstrations; writes runs/NAME/sft/model."""
    _stage("sft", recipe, overrides, fresh, accept)


@app.command()
def rank(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Sample K outputs per prompt and rank them. Reads sft/model, data.prompts; writes rank/rankings.jsonl.

    With rank.labeler=file nothing is sampled: it checks data.rankings and copies them. With rank.labeler=human it
    serves the labelling page and goes on when enough rankings are in.
    """
    _stage("rank", recipe, overrides, fresh, accept)


@app.command()
def reward(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Train the reward model on K-way rankings. Writes reward/model.

    Reads rank/rankings.jsonl, sft/model and data.demonstrations, whose mean score becomes the zero.
    """
    _stage("reward", recipe, overrides, fresh, accept)


@app.command()
def ppo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    variant: Annotated[
        Literal["ppo-ptx", "ppo"] | None,
        typer.Option(help="ppo-ptx mixes pretraining gradients in; default where ppo.ptx_coef is above 0."),
    ] = None,
    fresh: Fresh = False,
    accept: Accept = None,
) -> None:
    """Align the policy. Reads sft/model, reward/model, data.prompts, data.pretraining; writes VARIANT/model.

    The averaged policy goes to ema/ beside model/ where ppo.ema_decay is above 0.
    """
    from rlhf.recipe import load_recipe

    if variant is None:
        variant = "ppo-ptx" if load_recipe(recipe, overrides or []).ppo.ptx_coef > 0 else "ppo"
    _stage(variant, recipe, overrides, fresh, accept)


@app.command()
def evaluate(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, accept: Accept = None) -> None:
    """Win rate, KL, length, alignment tax. Reads the policies, data.prompts_heldout; writes evaluate/results.json."""
    _stage("evaluate", recipe, overrides, fresh, accept)


@app.command()
def compare(
    name: Annotated[str, typer.Argument(metavar="COMPARISON", help="Name from `rlhf recipes`, or a YAML file.")],
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None, typer.Option("--way", metavar="WAY", help="Run this way alone; repeatable. Default: all.")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Run one recipe in several ways, such as full fine-tuning and LoRA, and set them side by side.

    All ways are scored by one reward model and judged alike. Run it again to go on: finished ways are skipped. Writes
    runs/NAME/comparison.html, and a run folder for each way beside it.
    """
    from launch.commands.compare import compare as run_ways

    raise typer.Exit(run_ways(name, overrides or [], arm or [], fresh))


@app.command()
def status(run: RunArgument) -> None:
    """Show the stages of a run, how far each is, and what would run next."""
    from launch.commands.status import show

    show(run)


@app.command()
def profile(
    run: RunArgument,
    variant: Annotated[
        Literal["ppo-ptx", "ppo"] | None, typer.Option(help="Which one; default: ppo-ptx if the run has it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Show where the time and memory of PPO's iterations went, beside the least that each phase could take.

    The floor of a phase is its FLOPs at the machine's measured peak, or its bytes at the measured bandwidth, whichever
    takes longer. For any run with a finished iteration.
    """
    from launch.commands.profile import show

    show(run, variant or "", as_json)


@app.command()
def report(run: RunArgument) -> None:
    """Draw the report of a run again: RUN/report.html; of a comparison, as far as it is, RUN/comparison.html."""
    from launch.pipeline import report as write
    from rlhf.evaluation.comparison_file import FILE, read_comparison

    if not run.is_dir():
        raise UserError("there is no such run folder", str(run), "give one that `rlhf run` made, such as runs/demo")
    if (run / FILE).is_file():
        from launch.commands.compare import write_results

        here = run.resolve()  # wherever it was when it was written
        write_results(read_comparison(str(here / FILE), [f"run.dir={here.parent}", f"run.name={here.name}"]))
    else:
        write(run)


@app.command()
def label(
    run: RunArgument,
    labelers: Annotated[
        str | None,
        typer.Option(
            "--labelers",
            metavar="NAME,NAME",
            help="Who ranks, beside those invited already; default: the recipe's label.labelers.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to serve on; default: label.host, this machine alone.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Default: label.port.")] = None,
    revoke: Annotated[
        str | None,
        typer.Option(
            "--revoke", metavar="NAME,NAME", help="Make all links of these labelers useless and end; rankings stay."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the rankings so far and end; changes nothing."),
    ] = None,
) -> None:
    """Serve the page on which people rank the outputs of a run; one link for each labeler. Ctrl-C ends it.

    Reads RUN/rank/outputs.jsonl, which `rlhf run RECIPE rank.labeler=human` samples, or which you put there: a JSON
    object with prompt and responses on each line; else RUN/rank/rankings.jsonl, which another labeler has ranked. Keeps
    what people say in RUN/labels.sqlite. Beside a run that waits for its rankings it adds labelers; whom and what that
    run waits for besides stays as it is.
    """
    from launch.commands.label import export as write
    from launch.commands.label import revoke as end_links
    from launch.commands.label import serve, settings

    if revoke is not None and (labelers or export):
        fix = "revoke first: new links are printed when the page is served"
        raise UserError("--revoke ends links and does nothing else", "--revoke", fix)
    recipe = settings(run, labelers, host, port)
    if revoke is not None:
        end_links(run, recipe, revoke)
    elif export:
        write(run, recipe, export)
    else:
        serve(run, recipe)


@app.command()
def chat(
    run: RunArgument,
    stage: Annotated[str, typer.Option(help="ppo-ptx or ppo; default: ppo-ptx if the run has it.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    once: Annotated[str, typer.Option(metavar="PROMPT", help="Answer this prompt and end, for scripts.")] = "",
) -> None:
    """Type prompts and see the SFT and the aligned policy answer side by side."""
    from launch.commands.chat import chat as talk

    talk(run, stage, temperature, max_tokens, once)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="CARD", help="Plan for this card, or cpu; default: what is here.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="Processes in all; default: the recipe's.")] = None,
) -> None:
    """Print what follows from a recipe: steps, micro-batches, memory by component, whether it fits, and about how long.

    Loads and writes nothing: memory is computed from the shapes of the models. Cards: a100-40g, a100-80g, h100-80g,
    h200-141g, b200-180g, l40s-48g, a10-24g, rtx4090-24g, v100-32g, cpu.
    """
    from launch.pipeline import show_plan
    from rlhf.costs.fit_to_card import with_processes
    from rlhf.recipe import load_recipe
    from rlhf.run.preflight import check

    loaded = load_recipe(recipe, overrides or [])
    if count is not None:
        loaded = with_processes(loaded, count)
    check(loaded)
    show_plan(loaded, loaded.run.stages)
    from launch.commands.plan import show_memory_and_time

    show_memory_and_time(loaded, gpu)


@app.command()
def export(
    run: RunArgument,
    stage: Annotated[
        Literal["sft", "reward", "ppo-ptx", "ppo"] | None,
        typer.Option(help="Whose model; default: ppo-ptx, ppo or sft, the first that there is."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged policy of a PPO stage.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: merged/ beside the model.")] = None,
) -> None:
    """Write a stage's model as a plain Hugging Face folder, its adapter merged into the weights.

    A method that is no change of weights (virtual tokens, bottleneck adapters) is refused with the reason.
    """
    from launch.commands.export import export as write

    write(run, stage or "", ema, out)


@app.command()
def peft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="CARD", help="Memory on this card, or cpu; default: what is here.")
    ] = None,
) -> None:
    """Compare the parameter-efficient methods on a recipe's model: what each trains and stores, memory of PPO.

    Loads and writes nothing. A method's settings are the recipe's where it names them, else the defaults.
    """
    from launch.commands.peft import show
    from rlhf.recipe import load_recipe

    show(load_recipe(recipe, overrides or []), gpu)


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
RankedFiles = Annotated[list[str], typer.Argument(metavar="FILE...", help="Rankings, such as my_rankings.jsonl.")]


def _judging_recipe(recipe: str, model: str, endpoint: str, settings: list[str] | None) -> Recipe:
    from rlhf.recipe import load_recipe

    given = [f"judge.model={model}"] * bool(model) + [f"judge.endpoint={endpoint}"] * bool(endpoint)
    return load_recipe(recipe, given + (settings or []))


@app.command("judge-eval")
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

    Every pair that people ordered is asked about in both orders, by every template; the model is the recipe's own
    unless one is named.
    """
    chosen = _judging_recipe(recipe, model, endpoint, settings)
    from launch.commands.judge import JudgeJob, compare_templates  # after what may be wrong: seconds to import

    compare_templates(JudgeJob(files, template or [], chosen, limit, answers), out)


@app.command("judge-search")
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
    from launch.commands.judge import JudgeJob, search_template  # seconds to import

    search_template(JudgeJob(files, template or [], chosen, limit, answers), numbers, trials, out)


RankingFiles = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Ranking files, as in data.rankings; embedded:NAME too.")
]


@app.command()
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


@app.command()
def convert(
    files: RankingFiles,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="New file to write.")],
) -> None:
    """Write ranking files of any layout that is read as one file of plain rankings, with labelers and times.

    Reads Label Studio and Argilla exports and the published data sets that the README names.
    """
    from launch.commands.agreement import convert as write

    write(files, out)


@app.command()
def recipes() -> None:
    """List the shipped recipes and comparisons."""
    from rlhf.evaluation.comparison_file import COMPARISONS, comparison_names
    from rlhf.recipe import RECIPES, recipe_names

    for names, folder, ends in (
        (recipe_names(), RECIPES, "\n\nComparisons, for `rlhf compare`:\n"),
        (comparison_names(), COMPARISONS, ""),
    ):
        width = max(len(name) for name in names)
        for name, description in names.items():
            typer.echo(f"{name:<{width}}  {description}")
        typer.echo(f"\nTheir files, to copy and change: {folder}{ends}")


def main() -> None:
    """Entry point: a user's mistake is told in a few lines and exits with 2; Ctrl-C exits with 130."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
