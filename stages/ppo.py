"""PPO and PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2): `python stages/ppo.py RECIPE [--variant ppo|ppo-ptx]`.

One iteration, in the order of the functions below:

    rollout     sample a response to each of batch_size prompts from the policy
    score       log-probabilities under the reference, values and normalised reward-model scores of those episodes
    advantages  per-token rewards R_t (KL penalty, score at the last token), GAE, whitening
    update      for each minibatch of each epoch:
        ppo_step    add up the gradients of the clipped policy loss and of the clipped value loss
        ptx_step    add the gradient of ptx_coef x mean negative log-likelihood per token of pretraining text
                    then an optimiser step, and after it the moving average (EMA) of the policy
    log         write metrics and a table of samples
    checkpoint  seal everything that the next iteration depends on

`train` repeats this and adapts beta, the coefficient of the KL penalty. The formulas are in rlhf/functional/ppo.py, the
log-probabilities in rlhf/rollout/lm_head.py, the normalisation of scores in rlhf/rollout/scoring.py, the clipping of
gradients in rlhf/training/clipped_adamw.py. rlhf/training/ppo_networks.py loads the four networks: the reference is the
SFT policy, the value model starts from the reward model, dropout is off. rlhf/training/ppo_checks.py checks that the
ratio is 1 at every first minibatch. Prompts, pretraining rows and sampling seeds are functions of (seed, counter), so a
checkpoint needs no position in the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf.functional.ppo import (
    adaptive_kl_coef,
    ema_update,
    gae,
    per_token_rewards,
    policy_loss,
    ptx_loss,
    value_loss,
    whiten,
)
from rlhf.functional.schedule import lr_factor
from rlhf.functional.seeding import row_seed, shuffled_indices
from rlhf.recipe import load_recipe
from rlhf.rollout.batches import build_batch
from rlhf.rollout.experience import Experience, ScoredEpisodes, summary
from rlhf.rollout.rescoring import rescore
from rlhf.rollout.sampling import Rollout, sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import scores, token_logprobs, token_values
from rlhf.run.stage import StageContext, exit_code, parse_stage_args, run_stage
from rlhf.system.console import Progress
from rlhf.system.distributed import broadcast_from_main, shard
from rlhf.training.minibatch import TokenMeans, micro_batches
from rlhf.training.policy_value import GroupNames, text_pairs
from rlhf.training.ppo_checks import check_first_minibatch, check_kl
from rlhf.training.ppo_metrics import mean_metrics, performance, sample_rows
from rlhf.training.ppo_state import Ppo, build, load_checkpoint, save_checkpoint, save_policies
from rlhf.training.reward_format import reward_pairs


def rollout(ppo: Ppo) -> Rollout:
    """Sample one response for each prompt of this iteration, with the log-probabilities of the training pass."""
    cfg, seed = ppo.recipe.ppo, ppo.recipe.run.seed
    first = ppo.iteration * cfg.batch_size
    chosen = shuffled_indices(len(ppo.prompts), seed, "prompts", first, cfg.batch_size)
    episodes = sample(
        ppo.networks.policy,
        ppo.tokenizer,
        [ppo.prompts[i] for i in chosen],
        SamplingParams.from_recipe(ppo.recipe, cfg.temperature, ppo.stop_ids),
        seeds=[row_seed(seed, "ppo", first + i) for i in range(cfg.batch_size)],
    )
    rescore(ppo.recipe, episodes, ppo.networks.policy, cfg.temperature)  # no pass where they are already
    return episodes


def score(ppo: Ppo, episodes: Rollout) -> ScoredEpisodes:
    """Run the reference, the value model and the reward model over the episodes."""
    cfg, pairs = ppo.recipe.ppo, episodes.pairs()
    return ScoredEpisodes.of(
        episodes,
        ref_logprobs=token_logprobs(ppo.reference, pairs, cfg.temperature, cfg.score_tokens),
        values=token_values(ppo.networks.value, pairs, cfg.score_tokens),
        scores=scores(ppo.reward_model, reward_pairs(episodes, ppo.reward_format), cfg.score_tokens),
    )


def advantages(ppo: Ppo, scored: ScoredEpisodes) -> Experience:
    """Turn scores into per-token rewards, and these into advantages, whitened over the batch, and plain returns."""
    cfg, s = ppo.recipe.ppo, scored
    rewards = per_token_rewards(
        s.logprobs, s.ref_logprobs, s.scores, s.lengths, s.finished, ppo.kl_coef, cfg.missing_eos_penalty
    )
    totals = rewards.sum(1)  # rewards are zero on padding
    if cfg.whiten_rewards:
        rewards = whiten(rewards, s.mask, shift_mean=False)
    raw_advantages, returns = gae(rewards, s.values, s.lengths, cfg.gamma, cfg.lam)
    whitened = whiten(raw_advantages, s.mask)  # by the mean and variance of all: every process holds the whole batch
    return Experience(**vars(s), rewards=rewards, totals=totals, advantages=whitened, returns=returns)


def ppo_step(ppo: Ppo, experience: Experience, minibatch: Sequence[int], groups: GroupNames) -> dict[str, float]:
    """Add up the gradients of the clipped policy loss and the clipped value loss, of those in `groups`.

    Both are divided by the tokens of the whole minibatch, so that no split over micro-batches and processes changes the
    gradient. Returns means over tokens, and the maxima ratio_max and ratio_error (|ratio - 1|, which is not logged).
    """
    cfg, device, means = ppo.recipe.ppo, ppo.engine.device, TokenMeans()
    tokens = int(experience.mask[list(minibatch)].sum())
    for old in micro_batches(experience, minibatch, cfg.micro_batch_size, ppo.tokenizer.pad_token_id, device):
        new = ppo.engine.model(groups, old.sequences, cfg.temperature)
        loss = torch.zeros((), device=device)
        if "policy" in groups:
            policy = policy_loss(old.unflatten(new.logprobs), old.logprobs, old.advantages, old.mask, cfg.clip)
            loss = loss + policy.loss
            means.add({"ppo/policy_loss": policy.loss, "ppo/clip_fraction": policy.clipped})
            means.add({"ppo/approx_kl": policy.approx_kl, "ppo/entropy": new.entropies.sum()})
            means.add_max({"ppo/ratio_max": policy.ratio_max, "ratio_error": policy.ratio_error})
        if "value" in groups:
            value = value_loss(old.unflatten(new.values), old.values, old.returns, old.mask, cfg.value_clip)
            loss = loss + cfg.vf_coef * value
            means.add({"ppo/value_loss": value})
        ppo.engine.backward(loss / tokens)
    return means.reduce(tokens)


def ptx_step(ppo: Ppo, step: int) -> dict[str, float]:
    """Add the gradient of ptx_coef x mean per-token NLL of this step's pretraining rows (equation 2, second term)."""
    count, size, means = ppo.plan.ptx_rows_per_minibatch, ppo.recipe.ppo.micro_batch_size, TokenMeans()
    chosen = shuffled_indices(len(ppo.ptx_rows), ppo.recipe.run.seed, "ptx", step * count, count)
    rows = [ppo.ptx_rows[i] for i in chosen]
    tokens = sum(len(row) - 1 for row in rows)
    mine = shard(rows)
    for first in range(0, len(mine), size):
        batch = build_batch(text_pairs(mine[first : first + size]), ppo.tokenizer.pad_token_id).to(ppo.engine.device)
        token_nll = ppo.engine.model("ptx", batch)
        loss = ptx_loss(token_nll, torch.ones_like(token_nll, dtype=torch.bool), ppo.ptx_coef)
        ppo.engine.backward(loss / tokens)
        means.add({"ppo/ptx_loss": token_nll.sum()})
    return means.reduce(tokens)


def update(ppo: Ppo, experience: Experience) -> dict[str, float]:
    """Take all optimiser steps of one iteration; returns the means of their metrics, of ratio_max the maximum."""
    cfg, plan, history = ppo.recipe.ppo, ppo.plan, list[dict[str, float]]()
    lr_scale = lr_factor(ppo.iteration, plan.iterations, cfg.schedule, cfg.warmup_iterations, cfg.final_lr_fraction)
    first_step = ppo.iteration * plan.steps_per_iteration
    for step, minibatch in enumerate(minibatches(ppo), first_step):
        metrics, norms = dict[str, float](), dict[str, float]()
        for groups in ppo.engine.groups_in_turn:  # one process: policy, then value; several: both at once
            with ppo.phases("train", step):
                metrics |= ppo_step(ppo, experience, minibatch, groups)
            if "policy" in groups:
                if step == first_step:
                    check_first_minibatch(ppo, experience, metrics["ratio_error"])
                if ppo.ptx_coef > 0:
                    with ppo.phases("ptx", step), ppo.engine.added_norm("policy") as sizes:
                        metrics |= ptx_step(ppo, step)
                    if sizes:  # of the PPO part and of the ptx part; empty where the engine cannot tell them apart
                        metrics |= {"ppo/grad_norm_policy": sizes["before"], "ppo/grad_norm_ptx": sizes["added"]}
            with ppo.phases("optimizer", step):
                result = ppo.engine.step(groups, lr_scale)
                norms |= result.grad_norms
                if "policy" in groups and not result.non_finite:
                    update_ema(ppo)
        # The norm of all that a group was clipped by; nan for one that was skipped because of the other's gradient.
        metrics |= {"ppo/grad_norm": norms.get("policy", math.nan), "ppo/grad_norm_value": norms.get("value", math.nan)}
        if ppo.ptx_coef == 0:
            metrics["ppo/grad_norm_policy"] = metrics["ppo/grad_norm"]
        history.append(metrics)
    return mean_metrics(history) | {"ppo/lr": cfg.lr * lr_scale, "ppo/skipped_steps": float(ppo.engine.skipped_steps)}


def minibatches(ppo: Ppo) -> Iterator[list[int]]:
    """Yield the episodes of each optimiser step of this iteration, by index; each epoch in another order."""
    cfg = ppo.recipe.ppo
    for epoch in range(cfg.epochs):
        seed = row_seed(ppo.recipe.run.seed, "epoch", ppo.iteration, epoch)
        order = shuffled_indices(cfg.batch_size, seed, "minibatch", 0, cfg.batch_size)
        for first in range(0, cfg.batch_size, cfg.minibatch_size):
            yield order[first : first + cfg.minibatch_size]


def update_ema(ppo: Ppo) -> None:
    """Update the moving average of the policy, kept by the first process on its CPU; all processes must call."""
    if ppo.recipe.ppo.ema_decay > 0:
        for name, weight in ppo.policy_weights():
            if name in ppo.ema:
                ema_update({name: ppo.ema[name]}, {name: weight}, ppo.recipe.ppo.ema_decay)


def log(ppo: Ppo, ctx: StageContext, episodes: Rollout, experience: Experience) -> None:
    """Write one row of metrics.jsonl and wandb, and the first samples of the iteration as a table."""
    done = ppo.iteration * ppo.recipe.ppo.batch_size
    ctx.tracker.log(ppo.metrics | ctx.checkpoints.metrics() | performance(ppo, experience.pairs), done)
    if rows := sample_rows(ppo, episodes, experience):
        ctx.tracker.table("samples", ["prompt", "response", "score", "kl"], rows, done)


def checkpoint(ppo: Ppo, ctx: StageContext) -> None:
    """Seal everything that the next iteration depends on."""
    with ppo.phases("save", ppo.iteration):
        save_checkpoint(ppo, ctx.checkpoints)


def train(ppo: Ppo, ctx: StageContext) -> dict[str, float]:
    """Iterate until the last iteration or a stop; returns the last iteration's metrics."""
    cfg, stopping = ppo.recipe.ppo, ctx.stop_requested
    done, total = ppo.iteration * cfg.batch_size, ppo.plan.iterations * cfg.batch_size
    with Progress(ctx.name, total=total, unit="episodes", initial=done) as progress:
        while ppo.iteration < ppo.plan.iterations and not stopping:
            with ppo.phases("rollout", ppo.iteration):
                episodes = rollout(ppo)
            with ppo.phases("score", ppo.iteration):
                experience = advantages(ppo, score(ppo, episodes))
            metrics = summary(experience) | {"ppo/kl_coef": ppo.kl_coef} | update(ppo, experience)
            if cfg.kl_control == "adaptive":
                kl, n = metrics["ppo/kl"], cfg.batch_size
                ppo.kl_coef = adaptive_kl_coef(ppo.kl_coef, kl, cfg.kl_target, n, cfg.kl_horizon)
            ppo.end_iteration(metrics)
            # The log is written before the checkpoint that covers it: a resume cuts the rows after its checkpoint.
            log(ppo, ctx, episodes, experience)
            check_kl(ppo)  # before the checkpoint, so that the next attempt repeats the check
            stopping = ctx.stop_requested
            last = ppo.iteration == ppo.plan.iterations
            if last or stopping or (cfg.save_every and ppo.iteration % cfg.save_every == 0):
                checkpoint(ppo, ctx)
            progress.advance(cfg.batch_size)
    return ppo.metrics


def run(ctx: StageContext, variant: str) -> dict[str, Any]:
    """Run the stage: build, resume, train, save the policy and its average."""
    sft_dir = ctx.use(ctx.run.require("sft", "model"))
    reward_dir = ctx.use(ctx.run.require("reward", "model"))
    ppo = build(ctx.recipe, variant == "ppo-ptx", sft_dir, reward_dir)
    sealed = broadcast_from_main(ctx.checkpoints.newest)
    if sealed:
        load_checkpoint(ppo, sealed)
    ctx.tracker.truncate_after(ppo.iteration * ctx.recipe.ppo.batch_size)
    metrics = train(ppo, ctx)
    if ppo.iteration < ppo.plan.iterations:
        return {}  # stopped before the end
    with ppo.phases("save"):
        save_policies(ppo, ctx.dir)
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line; `--variant ppo` leaves the pretraining term out."""
    recipe_name, overrides, options = parse_stage_args(argv, "stages/ppo.py")

    def start() -> int:
        variant = options["variant"] or ("ppo-ptx" if load_recipe(recipe_name, overrides).ppo.ptx_coef > 0 else "ppo")
        return run_stage(variant, lambda ctx: run(ctx, variant), argv)

    return exit_code(start)


if __name__ == "__main__":
    raise SystemExit(main())
