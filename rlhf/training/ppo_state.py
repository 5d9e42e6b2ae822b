"""State of a PPO run (stages/ppo.py): how it is built from the results of earlier stages, checkpoints and results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import Encoded, fit_prompts
from rlhf.data.records import Drops, Prompt, read_prompts, read_texts
from rlhf.data.text_blocks import token_blocks
from rlhf.errors import UserError
from rlhf.model_config import UNMERGEABLE
from rlhf.models.loading import check_context, load_tokenizer, recompute_activations, save_model
from rlhf.models.placement import full_state_dict, with_tied_names
from rlhf.models.zero import zero_stage
from rlhf.plan import PpoPlan, plan_ppo
from rlhf.rollout.probes import check_probes
from rlhf.rollout.vllm_engine import check_server
from rlhf.run.checkpoints import Checkpoints
from rlhf.system.console import console, show_drops
from rlhf.system.distributed import barrier, pick_device
from rlhf.system.machine_peaks import machine_peaks
from rlhf.system.malloc import return_freed_memory
from rlhf.system.phase_timer import PhaseTimer
from rlhf.system.phases import PHASES
from rlhf.system.ranks import is_main_process
from rlhf.system.rng import load_rng, save_rng
from rlhf.training.engine import Engine, ParamGroup
from rlhf.training.policy_value import PolicyValue
from rlhf.training.ppo_networks import PpoNetworks, load_networks
from rlhf.training.reward_format import OwnFormat, own_format
from rlhf.training.zero_engine import make_engine


@dataclass
class Ppo:
    """The data, the networks and the state that every iteration of PPO works on."""

    recipe: Recipe
    plan: PpoPlan
    ptx_coef: float  # 0 for plain PPO
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]  # token ids
    ptx_rows: list[list[int]]  # token ids
    stop_ids: list[int]
    engine: Engine
    reference: nn.Module  # the SFT policy, frozen
    reward_model: nn.Module
    kl_coef: float  # beta, per nat
    reward_format: OwnFormat | None = None  # None: the reward model reads the policy's token ids
    ema: dict[str, Tensor] = field(default_factory=dict)  # of the policy, on the first process's CPU; else empty
    iteration: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the last iteration

    def __post_init__(self) -> None:
        self.phases = PhaseTimer(self.engine.device, PHASES)

    @property
    def networks(self) -> PolicyValue:
        """Return policy and value model, for passes without gradients."""
        return self.engine.module  # type: ignore[return-value]

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of each trained weight of the policy, gathered; all processes must read all of them."""
        weights = self.engine.weights()
        return ((name, weights[name].detach()) for name in weights if name.startswith("policy."))

    def end_iteration(self, metrics: dict[str, float]) -> None:
        """Count an iteration and keep its metrics."""
        self.iteration, self.metrics = self.iteration + 1, metrics
        if self.engine.device.type == "cpu":
            return_freed_memory()  # of activations and gradients, before the frozen models need theirs


def build(recipe: Recipe, ptx: bool, sft_dir: Path, reward_dir: Path) -> Ppo:
    """Load the networks and the data of a PPO run, with pretraining text for `ptx` (PPO-ptx), and make its engine.

    Raises UserError if no prompt or no pretraining text is left, or the models do not fit the recipe.
    """
    cfg, plan = recipe.ppo, plan_ppo(recipe)
    if cfg.rollout == "vllm" and recipe.model.peft.method not in UNMERGEABLE:  # others are sampled natively
        check_server(recipe.launch, _longest_episode(recipe))
    tokenizer = load_tokenizer(sft_dir, recipe.model)
    prompts, ptx_rows = _load_data(recipe, ptx, tokenizer)
    own = own_format(recipe, tokenizer, reward_dir, ((row.item, row.prompt) for row in prompts))
    torch.manual_seed(recipe.run.seed)  # new adapters are drawn from the global generator
    loaded = load_networks(recipe, sft_dir, reward_dir, pick_device(recipe), value_from_policy=own is not None)
    if loaded.bases:
        console.print(loaded.bases, markup=False, soft_wrap=True)
    _check_models(recipe, ptx, loaded, reward_dir)
    ppo = Ppo(
        recipe=recipe,
        plan=plan,
        ptx_coef=cfg.ptx_coef if ptx else 0.0,
        tokenizer=tokenizer,
        prompts=[row.prompt for row in prompts],
        ptx_rows=ptx_rows,
        stop_ids=stop_ids(tokenizer, loaded.policy),
        engine=_make_engine(recipe, loaded),
        reference=loaded.reference,
        reward_model=loaded.reward,
        kl_coef=cfg.kl_coef,
        reward_format=own,
    )
    machine_peaks(ppo.engine.device, next(ppo.networks.parameters()).dtype)  # before the first iteration is timed
    if cfg.ema_decay > 0:
        for name, weight in ppo.policy_weights():
            if is_main_process():
                ppo.ema[name] = weight.cpu().clone()
    return ppo


def _longest_episode(recipe: Recipe) -> int:
    """Return the tokens of the longest prompt and the longest response."""
    return recipe.data.max_prompt_tokens + recipe.data.max_response_tokens


def _load_data(
    recipe: Recipe, ptx: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded[Prompt]], list[list[int]]]:
    """Return prompts and the token ids of rows of pretraining text; show how many rows were dropped and why."""
    drops = Drops()
    prompts = fit_prompts(read_prompts(recipe.data.prompts, drops), tokenizer, recipe.data.max_prompt_tokens, drops)
    if not prompts:
        raise UserError("no prompt is left for PPO", where="data.prompts", fix="raise data.max_prompt_tokens")
    texts = read_texts(recipe.data.pretraining, drops) if ptx else []
    ptx_rows = token_blocks(texts, tokenizer, recipe.ppo.ptx_tokens) if ptx else []
    if ptx and not ptx_rows:
        raise UserError("PPO-ptx has no pretraining text", where="data.pretraining", fix="name a text file or run ppo")
    show_drops(drops.table())
    return prompts, ptx_rows


def _check_models(recipe: Recipe, ptx: bool, loaded: PpoNetworks, reward_dir: Path) -> None:
    """Raise UserError for models that PPO would compute wrongly, and for those whose context is too short."""
    check_probes(loaded.reward, reward_dir)
    for model in (loaded.policy, loaded.reward):
        check_context(model, _longest_episode(recipe), "data.max_prompt_tokens + data.max_response_tokens")
    if ptx:
        check_context(loaded.policy, recipe.ppo.ptx_tokens, "ppo.ptx_tokens")


def _make_engine(recipe: Recipe, loaded: PpoNetworks) -> Engine:
    """Put policy and value model under one engine, each with its learning rate and clipped by its gradient norm."""
    cfg, size = recipe.ppo, recipe.ppo.micro_batch_size
    max_tokens = (size * recipe.data.max_response_tokens, size * cfg.ptx_tokens) if zero_stage(recipe) == 3 else None
    networks = PolicyValue(loaded.policy.eval(), loaded.value.eval(), max_tokens)
    if recipe.launch.gradient_checkpointing:
        recompute_activations(networks.policy)
        recompute_activations(networks.value)
    groups = [
        ParamGroup("policy", networks.policy, cfg.lr, cfg.max_grad_norm),
        ParamGroup("value", networks.value, cfg.value_lr, cfg.max_grad_norm),
    ]
    adam = {"betas": (0.9, cfg.adam_beta2), "eps": cfg.adam_eps}
    return make_engine(networks, groups, recipe, **adam, max_skipped_steps=cfg.max_skipped_steps)


def save_checkpoint(ppo: Ppo, checkpoints: Checkpoints) -> None:
    """Seal all state in a checkpoint that is named by the number of iterations done."""

    def write(staged: Path) -> None:
        ppo.engine.save(staged / "engine")
        save_rng(staged)
        if not is_main_process():
            return
        if ppo.ema:
            save_file(ppo.ema, staged / "ema.safetensors")
        state = {"iteration": ppo.iteration, "kl_coef": ppo.kl_coef, "metrics": ppo.metrics}
        (staged / "state.json").write_text(json.dumps(state))

    checkpoints.save(ppo.iteration, write, barrier)


def load_checkpoint(ppo: Ppo, folder: Path) -> None:
    """Restore what `save_checkpoint` sealed."""
    state = json.loads((folder / "state.json").read_text())
    ppo.engine.load(folder / "engine")
    load_rng(folder)
    if ppo.ema:  # on the first process only
        ppo.ema = load_file(folder / "ema.safetensors")
    ppo.iteration, ppo.metrics = state["iteration"], state["metrics"]
    if ppo.recipe.ppo.kl_control == "adaptive":  # a fixed one is the recipe's, which may have been changed on purpose
        ppo.kl_coef = state["kl_coef"]


def save_policies(ppo: Ppo, folder: Path) -> None:
    """Write the policy to model/ and its average, if it has one, to ema/; all processes must call."""
    policy = ppo.networks.policy
    weights = full_state_dict(policy)
    if is_main_process():
        if ppo.ema:
            average = {name.removeprefix("policy."): tensor for name, tensor in ppo.ema.items()}
            average = {name: tensor.to(weights[name].dtype) for name, tensor in average.items()}
            save_model(policy, ppo.tokenizer, folder / "ema", weights | with_tied_names(policy, average))
        save_model(policy, ppo.tokenizer, folder / "model", weights)
    barrier()  # no process may use the folders before they are written
