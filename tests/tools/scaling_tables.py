"""The tables of docs/scaling.md: `python tests/tools/scaling_tables.py` prints them, `--write` puts them into the file.

Models have the shapes of Brown et al. 2020 (arXiv 2005.14165, table 2.1; the 1.3B row with 16 heads, for its 24 of 128
do not make a width of 2048), the reward and value models 6B as in Ouyang et al. 2022. All is arithmetic: nothing here
was run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this program is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import GPT2Config

from rlhf.config import Recipe
from rlhf.costs.cards import find_card
from rlhf.costs.fit_to_card import with_settings
from rlhf.costs.model_shapes import Shapes
from rlhf.costs.stage_memory import stage_memory
from rlhf.costs.stage_time import stage_time
from rlhf.recipe import load_recipe
from rlhf.system.quiet import quiet_libraries
from support.paths import ROOT

DOCS = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python tests/tools/scaling_tables.py --write -->\n", "<!-- end of tables -->\n"
CARD = "h100-80g"
GPUS = (8, 16, 64, 128, 256)
STAGES = ("sft", "reward", "ppo-ptx")
LARGE = {"launch.zero_stage": 3, "launch.frozen": "partitioned", "launch.gather": "by_layer"}
SIZES = {  # layers, width, heads, settings
    "1.3B": (24, 2048, 16, {"launch.zero_stage": 2}),
    "6B": (32, 4096, 32, {"launch.zero_stage": 3, "launch.frozen": "partitioned"}),
    "175B": (96, 12288, 96, LARGE),
}


def shape(size: str) -> GPT2Config:
    """Return a GPT-3 size as GPT-2's architecture, which differs from it in the sparse attention layers alone."""
    layers, width, heads, _ = SIZES[size]
    return GPT2Config(vocab_size=50257, n_positions=2048, n_layer=layers, n_embd=width, n_head=heads)


def recipe_of(size: str, gpus: int) -> Recipe:
    """Return the recipe instructgpt-1.3b in bfloat16, micro-batches of 1, batches at least as large as `gpus`."""
    quiet_libraries()
    recipe = load_recipe("instructgpt-1.3b", ["model.dtype=bfloat16", "model.attention=sdpa"])
    settings = {f"{stage}.micro_batch_size": 1 for stage in ("sft", "ppo")}
    settings |= {"launch.processes": gpus, "launch.gradient_checkpointing": True, "ppo.score_tokens": 4096}
    settings |= {"ppo.rollout_batch_size": 16}
    for field, paper in (("sft.batch_size", 32), ("reward.batch_size", 64), ("ppo.minibatch_size", 64)):
        settings[field] = max(paper, gpus)
    return with_settings(recipe, settings | SIZES[size][3])


def rows(size: str) -> list[str]:
    """Return the lines of the table of one size."""
    shapes, card, lines = Shapes(shape(size), shape("6B")), find_card(CARD), []
    for gpus in GPUS:
        recipe = recipe_of(size, gpus)
        memories = [stage_memory(recipe, stage, shapes, card) for stage in STAGES]
        times = {stage: stage_time(recipe, stage, shapes, card) for stage in ("reward", "ppo-ptx")}
        fits = all(m.peak <= card.memory for m in memories)
        peaks = [f"{m.peak / 1e9:.0f} ({m.peak_phase})" for m in memories]
        ppo = times["ppo-ptx"]
        between = sum(ppo.parts[name] for name in ("gathering", "exchange")) / ppo.seconds
        hours = times["reward"].seconds / 3600 * (33207 / times["reward"].rows if times["reward"].rows else 1)
        host = max(m.host for m in memories) / 1e9
        cells = [str(gpus), *peaks, f"{host:.0f}", "yes" if fits else "no", f"{hours:.1f}"]
        cells += [f"{ppo.seconds / 86400:.1f}", f"{between:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables() -> str:
    """Return all tables as Markdown."""
    parts = []
    for size, (layers, width, heads, settings) in SIZES.items():
        words = " ".join(f"{field}={value}" for field, value in settings.items())
        parts.append(f"**{size}** ({layers} layers, width {width}, {heads} heads): `{words}`\n")
        names = ["GPUs", *(f"{stage} GB" for stage in STAGES), "host GB", f"fits {CARD}"]
        names += ["reward h", "ppo-ptx days", "between cards"]
        parts.append(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
        parts.append("\n".join(rows(size)) + "\n")
    return "\n".join(parts)


def in_docs() -> str:
    """Return the text of the file between its markers."""
    return DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    found = "\n" + tables() + "\n"
    if "--write" in sys.argv:
        text = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(text.split(BEGIN)[0] + BEGIN + found + END + text.split(END)[1], encoding="utf-8")
    else:
        print(found)
