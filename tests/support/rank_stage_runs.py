"""Run the rank stage on the tiny model, and read what it left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.rank import main

PROMPTS = ["Is tea good?", "Name a river.", "What is rain?", "Who paints the bridge?", "Boil an egg."]
PROMPTS += ["Name a river.", "word " * 200]  # once more: ranked once; and one over the limit
ARGS = ["model.name=tiny", "run.name=t", "run.device=cpu", "tracking.wandb=disabled"]
ARGS += ["data.max_response_tokens=8", "rank.outputs_per_prompt=3", "rank.batch_size=6"]


def start(folder: Path, tiny_dir: str, *extra: str, prompts: Sequence[str] = PROMPTS) -> int:
    """Run the stage in `folder`, with the tiny model as its SFT policy; return the exit code."""
    model = folder / "runs" / "t" / "sft" / "model"
    if not model.exists():
        shutil.copytree(tiny_dir, model)
    file, recipe = folder / "prompts.jsonl", folder / "recipe.yaml"
    file.write_text("".join(json.dumps({"prompt": p, "use_case": "chat"}) + "\n" for p in prompts))
    recipe.write_text(f"run: {{dir: '{folder / 'runs'}'}}\ndata: {{prompts: ['{file}']}}\n")
    return main([str(recipe), *ARGS, *extra])


def outcome(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Return the text of the rankings, the summary, and the sampled rows."""
    stage = folder / "runs" / "t" / "rank"
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    return (stage / "rankings.jsonl").read_text(), json.loads((stage / "summary.json").read_text()), samples
