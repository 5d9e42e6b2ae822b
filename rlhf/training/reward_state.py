"""Build the reward stage's engine, and save and load its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf.config import Recipe
from rlhf.models.loading import check_context, new_reward_model, recompute_activations
from rlhf.models.zero import trained
from rlhf.run.checkpoints import Checkpoints
from rlhf.system.distributed import barrier, broadcast_from_main
from rlhf.system.phases import phase
from rlhf.system.ranks import is_main_process
from rlhf.system.rng import load_rng, save_rng
from rlhf.training.engine import Engine, ParamGroup
from rlhf.training.ranking_passes import ScoringModule
from rlhf.training.zero_engine import make_engine


def build_engine(recipe: Recipe, source: str) -> Engine:
    """Return the engine around a reward model that starts from the policy, or the reward model, in `source`."""
    cfg, peft = recipe.reward, recipe.reward_peft
    torch.manual_seed(recipe.run.seed)
    model = trained(recipe, lambda: new_reward_model(source, recipe.model, cfg.keep_layers, cfg.head_init, peft))
    check_context(model, cfg.max_tokens, "reward.max_tokens")
    model.eval()
    if recipe.launch.gradient_checkpointing:
        recompute_activations(model)
    groups = [ParamGroup("reward", model, cfg.lr, cfg.max_grad_norm)]
    return make_engine(ScoringModule(model), groups, recipe, weight_decay=cfg.weight_decay)


def load_checkpoint(engine: Engine, checkpoints: Checkpoints) -> tuple[int, int]:
    """Restore the newest checkpoint, if any, and return the steps done and the tokens seen."""
    sealed = broadcast_from_main(checkpoints.newest)
    if not sealed:
        return 0, 0
    engine.load(sealed / "engine")
    load_rng(sealed)
    state = json.loads((sealed / "state.json").read_text())
    return state["step"], state["tokens"]


def save_checkpoint(engine: Engine, checkpoints: Checkpoints, done: int, tokens: int) -> None:
    """Write and seal a checkpoint after `done` steps; all processes must call."""

    def write(staged: Path) -> None:
        engine.save(staged / "engine")
        save_rng(staged)
        if is_main_process():
            (staged / "state.json").write_text(json.dumps({"step": done, "tokens": tokens}))

    phase("save", done)
    checkpoints.save(done, write, barrier)
