"""Peak memory of the stages against the plan's: `python tests/benchmarks/peak_memory.py FOLDER [RECIPE ...]`.

Runs the shortened recipes (default: tiny and demo, which is SmolLM2-135M) on one CPU process, then sft, reward and ppo
on two under ZeRO 0, 2 and 3, and prints predicted and measured peaks as a Markdown table, row by row. The measured one
is the kernel's largest resident set of a rank; of two ranks the larger. On two cores it takes an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf.config import Recipe
from rlhf.costs.cards import this_machine
from rlhf.costs.model_shapes import shapes_of
from rlhf.costs.stage_memory import stage_memory
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ZERO = (0, 2, 3)
COMMON = ("tracking.wandb=disabled", "run.device=cpu")
SHORT = {"tiny": ("ppo.episodes=16", "rank.prompts=16")}
SHORT["demo"] = (*SHORT["tiny"], "ppo.batch_size=16")
TWO = ("sft.micro_batch_size=8", "ppo.micro_batch_size=4")
STAGES = ("sft", "rank", "reward", "ppo-ptx")
UPSTREAM = {"sft": (), "reward": ("sft", "rank"), "ppo-ptx": ("sft", "rank", "reward")}

RANK = """
import importlib, sys, torch
from pathlib import Path
from rlhf.system.machine import peak_memory_gb
out, module, *arguments = sys.argv[1:]
code = importlib.import_module(module).main(arguments)
Path(out).write_text(str(peak_memory_gb(torch.device("cpu"))))
raise SystemExit(code)
"""


def full_length_rows(file: Path, recipe: Recipe, count: int = 64) -> None:
    """Demonstrations whose prompts and responses are as long as the recipe allows: what the plan reckons with."""
    tokenizer, data = load_tokenizer(recipe.model.name, recipe.model), recipe.data

    def grown(text: str, tokens: Callable[[str], int], limit: int) -> str:
        while tokens(text + " and") <= limit:
            text += " and"
        return text

    rows = []
    for i in range(count):
        prompt = grown(f"{i}", lambda t: len(encode_prompt(tokenizer, Prompt.from_text(t))), data.max_prompt_tokens)
        response = grown(f"{i}", lambda t: len(encode_response(tokenizer, t)), data.max_response_tokens)
        rows.append(json.dumps({"prompt": prompt, "response": response}))
    file.write_text("\n".join(rows) + "\n")


def measure(stage: str, arguments: list[str], processes: int, folder: Path) -> float:
    """Largest resident set in GB of the stage's ranks."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    module = f"stages.{'ppo' if stage == 'ppo-ptx' else stage}"
    ranks, files = [], [folder / f"peak-{rank}" for rank in range(processes)]
    for rank, file in enumerate(files):
        if processes > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", RANK, str(file), module, *arguments]
        ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in ranks:
        errors = process.communicate()[1].decode()
        if process.returncode:
            raise SystemExit(f"{stage} ended with {process.returncode}:\n{errors[-3000:]}")
    return max(float(file.read_text()) for file in files)


def show(recipe: str, stage: str, overrides: list[str], processes: int, zero: int | str, measured: float) -> None:
    """One row of the table."""
    loaded = load_recipe(recipe, overrides)
    found = stage_memory(loaded, stage, shapes_of(loaded), this_machine())
    cells = (recipe, stage, processes, zero, f"{found.peak / 1e6:.0f}", f"{measured * 1e3:.0f}")
    print(f"| {' | '.join(map(str, cells))} | {found.peak / 1e9 / measured:.2f} |", flush=True)


def main(folder: Path, recipes: list[str]) -> None:
    """Measure and print."""
    folder.mkdir(parents=True, exist_ok=True)
    print("| recipe | stage | processes | ZeRO | predicted MB | measured MB | ratio |\n|---|---|---|---|---|---|---|")
    for recipe in recipes:
        rows = folder / f"{recipe}.jsonl"
        one = [*COMMON, *SHORT[recipe]]
        if not load_recipe(recipe).sft.packing:  # packed rows are full as they are
            full_length_rows(rows, load_recipe(recipe))
            one.append(f"data.demonstrations=[{rows}]")
        for stage in STAGES:
            arguments = [recipe, f"run.dir={folder}", f"run.name={recipe}", *one]
            show(recipe, stage, one, 1, "-", measure(stage, arguments, 1, folder))
        for zero in ZERO:
            for stage, before in UPSTREAM.items():
                name = f"{recipe}-zero{zero}-{stage}"
                two = [*one, *TWO, "launch.processes=2", f"launch.zero_stage={zero}"]
                for part in before:
                    ignore = shutil.ignore_patterns("checkpoints")
                    shutil.copytree(folder / recipe / part, folder / name / part, ignore=ignore)
                arguments = [recipe, f"run.dir={folder}", f"run.name={name}", *two]
                show(recipe, stage, two, 2, zero, measure(stage, arguments, 2, folder))
                shutil.rmtree(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SHORT))
