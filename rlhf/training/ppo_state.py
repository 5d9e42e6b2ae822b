"""What a PPO run is made of, how it is put together from the earlier stages, and its checkpoints.

The program that uses it is stages/ppo.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import UNMERGEABLE, Recipe
from rlhf.data.encoding import fit_prompts, stop_ids
from rlhf.data.records import Drops, read_prompts, read_texts
from rlhf.data.text_blocks import token_blocks
from rlhf.errors import UserError
from rlhf.functional.ppo import ema_update
from rlhf.models.loading import check_context, load_tokenizer, recompute_activations, same_tokenizer
from rlhf.plan import PpoPlan, plan_ppo
from rlhf.rollout.probes import check_probes
from rlhf.rollout.scoring import check_plain_head
from rlhf.rollout.vllm_engine import check_server
from rlhf.run.checkpoints import Checkpoints
from rlhf.system.console import console
from rlhf.system.distributed import barrier, is_main_process, pick_device
from rlhf.system.rng import load_rng, save_rng
from rlhf.training.engine import Engine, ParamGroup
from rlhf.training.policy_value import PolicyValue
from rlhf.training.ppo_networks import load_networks
from rlhf.training.zero_engine import make_engine


@dataclass
class Ppo:
    """Everything an iteration works on."""

    recipe: Recipe
    plan: PpoPlan
    ptx_coef: float
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]  # token ids
    ptx_rows: list[list[int]]  # token ids
    stop_ids: list[int]
    engine: Engine
    reference: nn.Module  # the SFT policy, frozen
    reward_model: nn.Module
    ema: dict[str, Tensor]  # of the policy's trainable weights, on the first process's CPU; else empty
    kl_coef: float
    drops: Drops
    iteration: int = 0
    sampler_gap: float | None = None  # of the last rollout, where its log-probabilities were computed anew
    metrics: dict[str, float] = field(default_factory=dict)  # of the last iteration

    @property
    def networks(self) -> PolicyValue:
        return self.engine.module  # type: ignore[return-value]


def build(recipe: Recipe, ptx: bool, sft_dir: Path, reward_dir: Path) -> Ppo:
    """Load the models and the data of a PPO run, and put the trained networks under an engine."""
    cfg, plan = recipe.ppo, plan_ppo(recipe)
    rows_of = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    if cfg.rollout == "vllm" and recipe.model.peft.method not in UNMERGEABLE:  # else it is not asked
        check_server(recipe.launch, rows_of)
    tokenizer = load_tokenizer(sft_dir, recipe.model)
    same_tokenizer(tokenizer, load_tokenizer(reward_dir, recipe.model))
    drops = Drops()
    prompts = fit_prompts(read_prompts(recipe.data.prompts, drops), tokenizer, recipe.data.max_prompt_tokens, drops)
    if not prompts:
        raise UserError("no prompt is left for PPO", where="data.prompts", fix="raise data.max_prompt_tokens")
    ptx_rows = token_blocks(read_texts(recipe.data.pretraining, drops), tokenizer, cfg.ptx_tokens) if ptx else []
    if ptx and not ptx_rows:
        raise UserError("PPO-ptx has no pretraining text", where="data.pretraining", fix="name a text file or run ppo")

    torch.manual_seed(recipe.run.seed)  # new adapters are drawn from the global generator
    loaded = load_networks(recipe, sft_dir, reward_dir, pick_device(recipe))
    if loaded.bases:
        console.print(loaded.bases, markup=False, soft_wrap=True)
    policy, value = loaded.policy, loaded.value
    check_plain_head(policy)
    check_probes(loaded.reward, reward_dir)
    for model in (policy, loaded.reward):
        check_context(model, rows_of, "data.max_prompt_tokens + data.max_response_tokens")
    if ptx:
        check_context(policy, cfg.ptx_tokens, "ppo.ptx_tokens")
    networks = PolicyValue(policy.eval(), value.eval())
    if recipe.launch.gradient_checkpointing:
        recompute_activations(policy)
        recompute_activations(value)
    engine = make_engine(
        networks,
        [
            ParamGroup("policy", networks.policy, cfg.lr, cfg.max_grad_norm),
            ParamGroup("value", networks.value, cfg.value_lr, cfg.max_grad_norm),
        ],
        recipe,
        betas=(0.9, cfg.adam_beta2),
        eps=cfg.adam_eps,
        max_skipped_steps=cfg.max_skipped_steps,
    )
    ppo = Ppo(
        recipe=recipe,
        plan=plan,
        ptx_coef=cfg.ptx_coef if ptx else 0.0,
        tokenizer=tokenizer,
        prompts=[row.prompt for row in prompts],
        ptx_rows=ptx_rows,
        stop_ids=stop_ids(tokenizer, policy),
        engine=engine,
        reference=loaded.reference,
        reward_model=loaded.reward,
        ema={},
        kl_coef=cfg.kl_coef,
        drops=drops,
    )
    if cfg.ema_decay > 0:
        for name, weight in _policy_weights(ppo):
            if is_main_process():
                ppo.ema[name] = weight.cpu().clone()
    return ppo


def update_average(ppo: Ppo) -> None:
    """Take the stepped policy into its average; all processes must call, the first one keeps it."""
    for name, weight in _policy_weights(ppo):
        if is_main_process():
            ema_update({name: ppo.ema[name]}, {name: weight}, ppo.recipe.ppo.ema_decay)


def _policy_weights(ppo: Ppo) -> Iterator[tuple[str, Tensor]]:
    """Name and value of what the policy trains, partitioned weights gathered one at a time on all processes."""
    weights = ppo.engine.weights()
    return ((name, weights[name].detach()) for name in weights if name.startswith("policy."))


def save_checkpoint(ppo: Ppo, checkpoints: Checkpoints) -> None:
    """Save all state as step-NNNNNN, named by the iterations done."""

    def write(staged: Path) -> None:
        ppo.engine.save(staged / "engine")
        save_rng(staged)
        if not is_main_process():
            return
        if ppo.ema:
            save_file(ppo.ema, staged / "ema.safetensors")
        state = {"iteration": ppo.iteration, "kl_coef": ppo.kl_coef, "metrics": ppo.metrics}
        (staged / "state.json").write_text(json.dumps(state))

    checkpoints.save(ppo.iteration, write, barrier())


def load_checkpoint(ppo: Ppo, folder: Path) -> None:
    """Restore what `save_checkpoint` sealed."""
    state = json.loads((folder / "state.json").read_text())
    ppo.engine.load(folder / "engine")
    load_rng(folder)
    if ppo.ema:  # of the first process alone
        ppo.ema = load_file(folder / "ema.safetensors")
    ppo.iteration, ppo.metrics = state["iteration"], state["metrics"]
    if ppo.recipe.ppo.kl_control == "adaptive":  # else the recipe's, which may have been changed knowingly
        ppo.kl_coef = state["kl_coef"]
