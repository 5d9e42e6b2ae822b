"""Hand-made runs of a comparison of three arms, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rlhf.evaluation.comparison import ArmResult
from rlhf.evaluation.comparison_file import Comparison, read_comparison, write_comparison
from rlhf.recipe import recipe_to_yaml
from support.evaluation_results import policy, results

FILE = """\
recipe: tiny
reference: full
common:
  run.name: three
  run.stages: [sft, rank, reward, ppo-ptx, evaluate]
  reward.peft.method: none
  sft.packing: false
  tracking.wandb: disabled
arms:
  full: {}
  lora: {model.peft.method: lora, sft.lr: 5.0e-3}
  prompt: {model.peft.method: prompt, ppo.lr: 0.01}
"""
PROMPTS = 20
# Held-out scores of SFT and of PPO by prompt; one number is the score of both samples.
SCORES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "full": lambda i: (0.5, 1.5 if i % 2 else -0.5),  # differences +1 and -1: mean 0
    "lora": lambda i: (0.25, [0.5, 1.0]),  # two samples, mean 0.75: + 0.5 in each prompt
    "prompt": lambda i: (1.0, 0.75),
}
GOOD, BAD = "Rain falls because warm air rises, cools and lets its water go.", "the the the the the and"
TEXTS = {"full": (BAD, BAD), "lora": (BAD, GOOD), "prompt": (GOOD, BAD)}  # of SFT and PPO
FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "prompt": "adapter.safetensors"}
SHAPES = {"full": {"a": (10, 10), "b": (50,)}, "lora": {"a": (3, 4), "b": (2,)}, "prompt": {"a": (4, 1)}}


def leave(folder: Path, stage: str, arm: str) -> dict[str, float]:
    """Write the files of a stage that the comparison reads into its folder, and return its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    if stage in ("sft", "ppo-ptx"):
        (folder / "model").mkdir(exist_ok=True)
        name = FILES[arm]
        save_file({key: np.zeros(shape, np.float32) for key, shape in SHAPES[arm].items()}, folder / "model" / name)
    if stage == "sft":
        return {"sft/validation_loss_before": 3.5, "sft/validation_loss": 3.25}
    if stage == "rank":
        (folder / "rankings.jsonl").write_text("{}\n")
    if stage == "reward":
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "weights").write_text("the reference's")
    if stage == "ppo-ptx":
        peaks = [{"step": 16, "memory/peak_gb": 2.5}, {"step": 32, "memory/peak_gb": 2.25}, {"step": 32}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in peaks))
        return {"ppo/reward_score": 0.125, "ppo/kl": 1.0}
    if stage == "evaluate":
        found = results_of(arm)
        if not (folder.parent / "ppo-ptx").exists():  # SFT alone, so far
            found["policies"].pop("ppo-ptx")
            found["comparisons"] = []
        (folder / "results.json").write_text(json.dumps(found))
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples(arm)))
    return {}


def results_of(arm: str) -> dict[str, Any]:
    low = {"full": 0.4, "lora": 0.6, "prompt": 0.1}[arm]
    found = results(low, low + 0.2)
    found["comparisons"][0]["win_rate"] = low + 0.1
    found["policies"] = {"sft": policy(3.4, 0.5, 0.25, 0.0), "ppo-ptx": policy(3.4, 0.5, 0.75, 1.5)}
    return found


def samples(arm: str) -> list[dict[str, Any]]:
    found = []
    responses = dict(zip(("sft", "ppo-ptx"), TEXTS[arm], strict=True))
    same = {"responses": responses, "finished": {"sft": True, "ppo-ptx": True}, "lengths": {"sft": 9, "ppo-ptx": 9}}
    same |= {"kl": {"sft": 0.0, "ppo-ptx": 1.5}, "use_case": "", "wins_over_sft": {"ppo-ptx": 0.5}}
    for i in range(PROMPTS):
        sft, ppo = (each if isinstance(each, list) else [each, each] for each in SCORES[arm](i))
        for sample in range(2):
            scores = {"sft": sft[sample], "ppo-ptx": ppo[sample]}
            found.append({"prompt": f"Why does rain fall in town {i}?", "sample": sample, "scores": scores} | same)
    return found


def hand_made(folder: Path) -> Comparison:
    """Write three finished arms into run folders below `folder`/three and return their comparison."""
    (folder / "three.yaml").write_text(FILE)
    found = read_comparison(str(folder / "three.yaml"), [f"run.dir={folder}"])
    for arm in found.arms:
        recipe = found.load(arm)
        for stage in recipe.run.stages:
            where = found.folder / arm / stage
            metrics = leave(where, stage, arm)
            record = {"state": "done", "metrics": metrics, "seconds": {"sft": 60.0, "ppo-ptx": 90.0}.get(stage, 5.0)}
            (where / "stage.json").write_text(json.dumps(record))
        (found.folder / arm / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    write_comparison(found)
    return found


def by_arm(found: list[ArmResult]) -> dict[str, ArmResult]:
    return {row.arm: row for row in found}
