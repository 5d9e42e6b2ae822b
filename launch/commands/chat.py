"""`rlhf chat RUN`: the SFT and the aligned policy answer the same prompt side by side."""

from __future__ import annotations

from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import encode_prompt
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.recipe import load_recipe
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.run.folder import RunFolder
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.console import console
from rlhf.system.distributed import pick_device


def chat_with_policies(run: Path, stage: str, temperature: float, max_tokens: int, once: str) -> None:
    """Answer typed prompts until an empty line, or `once` alone; temperature 0 is greedy.

    The policies are SFT's and that of `stage`, by default the first that exists of ppo-ptx and ppo.
    """
    recipe = load_recipe(str(RunFolder(run).recipe_file()))
    names = ["sft", stage or _aligned(run)]
    folders = [_existing(run / name / "model", f"run the {name} stage first") for name in names]
    console.print(f"loading {' and '.join(names)} from {run}", style="dim")
    tokenizer = load_tokenizer(folders[0], recipe.model)
    device = pick_device(recipe)
    loaded = [load_policy(folder, recipe.model, merged=True).to(device) for folder in folders]
    policies = dict(zip(names, loaded, strict=True))
    if once:
        _show(policies, tokenizer, once, temperature, max_tokens, turn=0)
        return
    console.print("Type a prompt; an empty line ends.", style="dim")
    turn = 0
    while text := _typed():
        _show(policies, tokenizer, text, temperature, max_tokens, turn)
        turn += 1


def answer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> str:
    """Return one response as text."""
    params = SamplingParams(max_tokens, temperature, stop_ids(tokenizer, policy))
    rollout = sample(policy, tokenizer, [encode_prompt(tokenizer, prompt)], params, seeds=[seed])
    return rollout.texts(tokenizer)[0]


def _show(
    policies: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    temperature: float,
    max_tokens: int,
    turn: int,
) -> None:
    prompt = Prompt.from_text(text)
    width = max(20, console.width // len(policies) - 1)
    panels = []
    for name, policy in policies.items():
        response = answer(policy, tokenizer, prompt, temperature, max_tokens, row_seed(0, "chat", turn))
        panels.append(Panel(Text(response.strip()), title=name, width=width))
    console.print(Columns(panels))


def _typed() -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _aligned(run: Path) -> str:
    for name in PPO_VARIANTS:
        if (run / name / "model").is_dir():
            return name
    raise UserError("the run has no aligned policy yet", str(run), "run the ppo-ptx or the ppo stage first")


def _existing(path: Path, fix: str) -> Path:
    if not path.exists():
        raise UserError("there is no such file or folder", str(path), fix)
    return path
