"""The `rlhf` command: its help and the table of its commands, which the other files launch/cli_*.py declare."""

from __future__ import annotations

import sys

import typer

from launch import cli_rankings, cli_recipe, cli_run
from rlhf.errors import UserError

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

COMMANDS = {  # in the order of `rlhf --help`
    "run": cli_recipe.run,
    "sft": cli_recipe.sft,
    "rank": cli_recipe.rank,
    "reward": cli_recipe.reward,
    "ppo": cli_recipe.ppo,
    "evaluate": cli_recipe.evaluate,
    "compare": cli_recipe.compare,
    "status": cli_run.status,
    "profile": cli_run.profile,
    "report": cli_run.report,
    "label": cli_run.label,
    "chat": cli_run.chat,
    "plan": cli_recipe.plan,
    "export": cli_run.export,
    "peft": cli_recipe.peft,
    "judge-eval": cli_rankings.judge_eval,
    "judge-search": cli_rankings.judge_search,
    "agreement": cli_rankings.agreement,
    "convert": cli_rankings.convert,
    "recipes": cli_recipe.recipes,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command; a user's mistake prints a few lines and exits with 2, Ctrl-C exits with 130."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
