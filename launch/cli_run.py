"""Commands that are given a RUN: its state, profile and report, its labelling page, its policies and models.

Imports that take seconds, such as torch, are inside the functions, because `rlhf --help` loads this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf.errors import UserError

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/demo.")]


def status(run: RunArgument) -> None:
    """Show the stages of a run, how far each is, and what would run next."""
    from launch.commands.status import show_status

    show_status(run)


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
    from launch.commands.profile import show_profile

    show_profile(run, variant or "", as_json)


def report(run: RunArgument) -> None:
    """Draw the report of a run again: RUN/report.html; of a comparison, as far as it is, RUN/comparison.html."""
    from launch.pipeline import report_run
    from rlhf.evaluation.comparison_file import FILE, read_comparison

    if not run.is_dir():
        raise UserError("there is no such run folder", str(run), "give one that `rlhf run` made, such as runs/demo")
    if (run / FILE).is_file():
        from launch.commands.compare import write_results

        here = run.resolve()  # the folder may have moved since the file was written
        write_results(read_comparison(str(here / FILE), [f"run.dir={here.parent}", f"run.name={here.name}"]))
    else:
        report_run(run)


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
    what people say in RUN/labels.sqlite. Beside a run that waits for its rankings it adds labelers, and changes nothing
    else of what that run waits for.
    """
    from launch.commands.label import export_rankings, revoke_links, serve, settings

    if revoke is not None and (labelers or export):
        fix = "revoke first: new links are printed when the page is served"
        raise UserError("--revoke ends links and does nothing else", "--revoke", fix)
    recipe = settings(run, labelers, host, port)
    if revoke is not None:
        revoke_links(run, recipe, revoke)
    elif export:
        export_rankings(run, recipe, export)
    else:
        serve(run, recipe)


def chat(
    run: RunArgument,
    stage: Annotated[str, typer.Option(help="ppo-ptx or ppo; default: ppo-ptx if the run has it.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    once: Annotated[str, typer.Option(metavar="PROMPT", help="Answer this prompt and end, for scripts.")] = "",
) -> None:
    """Type prompts and see the SFT and the aligned policy answer side by side."""
    from launch.commands.chat import chat_with_policies

    chat_with_policies(run, stage, temperature, max_tokens, once)


def export(
    run: RunArgument,
    stage: Annotated[
        Literal["sft", "reward", "ppo-ptx", "ppo"] | None,
        typer.Option(help="Whose model; default: ppo-ptx, ppo or sft, the first that there is."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged policy of a PPO stage.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: merged/ beside the model.")] = None,
    push: Annotated[
        str, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the folder to this repository too.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")] = False,
) -> None:
    """Write a stage's model as a plain Hugging Face folder with a card, its adapter merged into the weights.

    A method that does not change weights (virtual tokens, bottleneck adapters) is refused with the reason.
    """
    from launch.commands.export import export_model, push_to_hub

    folder = export_model(run, stage or "", ema, out, copy=bool(push))
    if push:
        print(push_to_hub(folder, push, private))
