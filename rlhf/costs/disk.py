"""Disk space that the stages of a recipe will need for models and checkpoints."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Recipe
from rlhf.plan import recipe_processes
from rlhf.stage_table import CHECKPOINTS_KEPT, TRAINED, is_ppo

SMOLLM2_BYTES = 540_000_000  # the embedded model as float32 safetensors


def disk_need(recipe: Recipe) -> int:
    """Estimate the bytes that the unfinished stages write: models, averages and checkpoints, adapters left out."""
    size = _model_bytes(recipe.model.name)
    run_dir = Path(recipe.run.dir) / recipe.run.name
    copies = 0
    for stage in recipe.run.stages:
        if stage not in TRAINED or (run_dir / stage / "model").is_dir():
            continue
        ppo, reward = is_ppo(stage), stage == "reward"
        if not (recipe.reward_peft if reward else recipe.model.peft).on:
            copies += 2 if ppo and recipe.ppo.ema_decay > 0 else 1
        networks = [] if reward else [recipe.model.peft]
        networks += [recipe.reward_peft] if ppo or reward else []
        save_every = {"sft": recipe.sft, "reward": recipe.reward}.get(stage, recipe.ppo).save_every
        kept = CHECKPOINTS_KEPT + 1 if save_every else 1  # the old ones stay until the new one is complete
        copies += kept * 3 * sum(not peft.on for peft in networks)  # weights and two moments of all that is trained
        if stage == "sft" and recipe.model.peft.on and recipe_processes(recipe) > 1 and recipe.launch.zero_stage:
            copies += kept  # DeepSpeed's own checkpoint holds the frozen base too
    return copies * size


def _model_bytes(name: str) -> int:
    if name == "smollm2-135m":
        return SMOLLM2_BYTES
    folder = Path(name).expanduser()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
