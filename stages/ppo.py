"""PPO and PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2): `python stages/ppo.py RECIPE [--variant ppo|ppo-ptx]`.

One iteration, in the order of the functions below:

    rollout     sample a response for each of batch_size prompts from the policy
    score       reference log-probabilities, values and reward-model scores of those episodes
    advantages  per-token rewards (KL penalty, score at the last token), GAE, whitening       rlhf/rollout/experience.py
    ppo step    for every minibatch: clipped policy loss and clipped value loss                rlhf/functional/ppo.py
    ptx step    its gradient added to the same optimiser step: ptx_coef x pretraining NLL
    log         metrics and a table of samples
    checkpoint  everything that the next iteration depends on, sealed

Nothing here keeps a hidden position: prompts, pretraining rows and sampling seeds are functions of (seed, counter), so
a checkpoint is the trainable weights, the optimiser, the average, the KL coefficient and the iteration number; the
random generators are in it too, for models that draw numbers of their own.
Deliberately not done: a pass that recomputes old log-probabilities in float32, where the decode loop's are exact (the
first minibatch of every iteration checks that), and dropout, which is off.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.functional.ppo import adaptive_kl_coef, policy_loss, ptx_loss, value_loss
from rlhf.functional.schedule import lr_factor
from rlhf.functional.seeding import row_seed, shuffled_indices
from rlhf.models.loading import save_model
from rlhf.models.placement import full_state_dict, with_tied_names
from rlhf.recipe import load_recipe
from rlhf.rollout.batches import SequenceBatch, build_batch
from rlhf.rollout.experience import Experience, make_experience, summary
from rlhf.rollout.lm_head import head_chunks
from rlhf.rollout.rescoring import rescore
from rlhf.rollout.sampling import Rollout, sample
from rlhf.rollout.scoring import scores, token_logprobs, token_values
from rlhf.run.stage import StageContext, exit_code, parse_stage_args, run_stage
from rlhf.system.console import Progress, show_drops
from rlhf.system.distributed import all_gather_objects, broadcast_from_main, is_main_process, shard
from rlhf.system.malloc import return_freed_memory
from rlhf.system.phase_timer import PhaseTimer
from rlhf.system.phases import phase
from rlhf.training.clipped_adamw import grad_norm
from rlhf.training.policy_value import Networks, text_pairs
from rlhf.training.ppo_metrics import PHASES, performance
from rlhf.training.ppo_state import Ppo, build, load_checkpoint, save_checkpoint, update_average


def rollout(ppo: Ppo) -> Rollout:
    """Sample one response for each prompt of this iteration."""
    cfg, seed = ppo.recipe.ppo, ppo.recipe.run.seed
    first = ppo.iteration * cfg.batch_size
    chosen = shuffled_indices(len(ppo.prompts), seed, "prompts", first, cfg.batch_size)
    episodes = sample(
        ppo.networks.policy,
        ppo.tokenizer,
        [ppo.prompts[i] for i in chosen],
        max_new_tokens=ppo.recipe.data.max_response_tokens,
        temperature=cfg.temperature,
        seeds=[row_seed(seed, "ppo", first + i) for i in range(cfg.batch_size)],
        stop_ids=ppo.stop_ids,
        engine=cfg.rollout,
        batch_size=cfg.rollout_batch_size,
        launch=ppo.recipe.launch,
    )
    ppo.sampler_gap = rescore(ppo.recipe, episodes, ppo.networks.policy, cfg.temperature)
    return episodes


def score(ppo: Ppo, episodes: Rollout) -> Experience:
    """Reference, value and reward passes; then per-token rewards, advantages and returns."""
    cfg, pairs = ppo.recipe.ppo, episodes.pairs()
    return make_experience(
        episodes,
        token_logprobs(ppo.reference, pairs, cfg.temperature, cfg.score_tokens),
        token_values(ppo.networks.value, pairs, cfg.score_tokens),
        scores(ppo.reward_model, pairs, cfg.score_tokens),
        kl_coef=ppo.kl_coef,
        missing_eos_penalty=cfg.missing_eos_penalty,
        gamma=cfg.gamma,
        lam=cfg.lam,
        whiten_rewards=cfg.whiten_rewards,
    )


def micro_batches(
    ppo: Ppo, experience: Experience, minibatch: Sequence[int]
) -> Iterator[tuple[SequenceBatch, Tensor, Callable[[Tensor], Tensor], bool]]:
    """Of this process, in turn: a batch, its mask, what takes its part [b, r] of [B, R], and whether it is the last.

    Rows of like length share a micro-batch, so that little is spent on padding.
    """
    device, size = ppo.engine.device, ppo.recipe.ppo.micro_batch_size
    mine = shard(sorted(minibatch, key=lambda i: sum(map(len, experience.pairs[i]))))
    for start in range(0, len(mine), size):
        rows = mine[start : start + size]
        width = int(experience.mask[rows].sum(1).max())

        def take(values: Tensor, rows: list[int] = rows, width: int = width) -> Tensor:
            return values[rows][:, :width].to(device)

        batch = build_batch([experience.pairs[i] for i in rows], ppo.tokenizer.pad_token_id).to(device)
        yield batch, take(experience.mask), take, start + size >= len(mine)


def calls_of_head(ppo: Ppo, positions: int) -> int:
    """How often a training pass calls the LM head under ZeRO-3, where that follows from the recipe; else 0, never."""
    return head_chunks(positions) if getattr(ppo.engine, "stage", 0) == 3 else 0


def ppo_step(
    ppo: Ppo, experience: Experience, minibatch: Sequence[int], networks: Networks = ("policy", "value")
) -> dict[str, float]:
    """Accumulate the gradient of the clipped policy loss, the clipped value loss or both over a minibatch of episodes.

    Returns token means of what was asked for, except ratio_max and ratio_error.
    """
    cfg = ppo.recipe.ppo
    tokens = experience.mask[list(minibatch)].sum().to(ppo.engine.device)
    sums: dict[str, float] = defaultdict(float)
    ratio_max = ratio_error = 0.0
    pieces = calls_of_head(ppo, cfg.micro_batch_size * ppo.recipe.data.max_response_tokens)
    for batch, mask, take, ends in micro_batches(ppo, experience, minibatch):
        width, loss = mask.shape[1], torch.zeros((), device=ppo.engine.device)
        with ppo.engine.accumulate(ends and not ("policy" in networks and ppo.ptx_coef > 0)):  # ptx follows it
            out = ppo.engine.model(networks, batch, cfg.temperature, pieces)
            if out.logprobs is not None and out.entropies is not None:
                logprobs = batch.unflatten(out.logprobs, width)
                policy = policy_loss(logprobs, take(experience.logprobs), take(experience.advantages), mask, cfg.clip)
                loss = loss + policy.loss
                sums["ppo/policy_loss"] += float(policy.loss.detach() / tokens)
                sums["ppo/clip_fraction"] += float(policy.clipped / tokens)
                sums["ppo/approx_kl"] += float(policy.approx_kl / tokens)
                sums["ppo/entropy"] += float(out.entropies.sum() / tokens)
                ratio_max = max(ratio_max, float(policy.ratio_max))
                ratio_error = max(ratio_error, float(policy.ratio_error))
            if out.values is not None:
                values = batch.unflatten(out.values, width)
                value = value_loss(values, take(experience.values), take(experience.returns), mask, cfg.value_clip)
                loss = loss + cfg.vf_coef * value
                sums["ppo/value_loss"] += float(value.detach() / tokens)
            # Divided by the tokens of the whole minibatch: any split over micro-batches and processes, one gradient.
            ppo.engine.backward(loss / tokens)
    totals = {name: sum(each[name] for each in all_gather_objects(sums)) for name in sums}
    if "policy" not in networks:
        return totals
    extremes = all_gather_objects((ratio_max, ratio_error))
    return totals | {"ppo/ratio_max": max(r for r, _ in extremes), "ratio_error": max(e for _, e in extremes)}


def ptx_step(ppo: Ppo, step: int) -> dict[str, float]:
    """Add the gradient of ptx_coef x mean per-token NLL of this step's pretraining rows (equation 2, second term)."""
    count, size = ppo.plan.ptx_rows_per_minibatch, ppo.recipe.ppo.micro_batch_size
    chosen = shuffled_indices(len(ppo.ptx_rows), ppo.recipe.run.seed, "ptx", step * count, count)
    rows = [ppo.ptx_rows[i] for i in chosen]
    tokens = sum(len(row) - 1 for row in rows)
    mine, nll = shard(rows), 0.0
    for start in range(0, len(mine), size):
        batch = build_batch(text_pairs(mine[start : start + size]), ppo.tokenizer.pad_token_id).to(ppo.engine.device)
        with ppo.engine.accumulate(start + size >= len(mine)):
            token_nll = ppo.engine.model("ptx", batch, pieces=calls_of_head(ppo, size * ppo.recipe.ppo.ptx_tokens))
            loss = ptx_loss(token_nll, torch.ones_like(token_nll, dtype=torch.bool), ppo.ptx_coef)
            ppo.engine.backward(loss / tokens)
        nll += float(token_nll.detach().sum() / tokens)
    return {"ppo/ptx_loss": sum(all_gather_objects(nll))}


def update(ppo: Ppo, experience: Experience, times: PhaseTimer) -> dict[str, float]:
    """All optimiser steps of one iteration; returns their mean metrics (maxima for ratio_max)."""
    cfg, plan = ppo.recipe.ppo, ppo.plan
    history: dict[str, list[float]] = defaultdict(list)
    factor = lr_factor(ppo.iteration, plan.iterations, cfg.schedule, cfg.warmup_iterations, cfg.final_lr_fraction)
    for epoch in range(cfg.epochs):
        order = shuffled_indices(
            len(experience.pairs),
            row_seed(ppo.recipe.run.seed, "epoch", ppo.iteration, epoch),
            "minibatch",
            0,
            cfg.batch_size,
        )
        for m in range(plan.minibatches):
            minibatch = order[m * cfg.minibatch_size : (m + 1) * cfg.minibatch_size]
            step = (ppo.iteration * cfg.epochs + epoch) * plan.minibatches + m
            phase("update", step)
            # One process takes the networks in turn and steps each, so that activations and gradients of one are held.
            first, *others = ppo.engine.turns
            with times("train"):
                metrics = ppo_step(ppo, experience, minibatch, first)
            if epoch == 0 and m == 0:
                check_first_minibatch(ppo, experience, metrics["ratio_error"])
            if ppo.ptx_coef > 0:
                with times("ptx"):
                    # The two gradients are accumulated one after the other; a copy tells them apart for the log.
                    # DeepSpeed shows none before its step: over several processes the norm of the sum is all there is.
                    copies = [g.clone() for g in ppo.engine.grads("policy")]
                    policy_norm = float(grad_norm(copies))
                    metrics |= ptx_step(ppo, step)
                    if copies:
                        for copy, sum_of_both in zip(copies, ppo.engine.grads("policy"), strict=True):
                            copy.neg_().add_(sum_of_both)
                        metrics["ppo/grad_norm_policy"] = policy_norm
                        metrics["ppo/grad_norm_ptx"] = float(grad_norm(copies))
                    del copies  # as large as the gradient itself, which is gone after the step
            norms, stepped = dict[str, float](), True
            for networks in others:
                with times("optimizer"):
                    part = ppo.engine.step_part(factor)
                    norms, stepped = norms | part.grad_norms, not part.non_finite
                with times("train"):
                    metrics |= ppo_step(ppo, experience, minibatch, networks)
            with times("optimizer"):
                result = ppo.engine.step(factor)
                norms |= result.grad_norms
                if cfg.ema_decay > 0 and (stepped if others else not result.non_finite):
                    update_average(ppo)
            metrics["ppo/grad_norm"] = norms.get("policy", math.nan)
            if ppo.ptx_coef == 0:
                metrics["ppo/grad_norm_policy"] = metrics["ppo/grad_norm"]
            metrics["ppo/grad_norm_value"] = norms.get("value", math.nan)
            for name, value in metrics.items():
                history[name].append(value)
    if ppo.engine.device.type == "cpu":
        return_freed_memory()  # of activations and gradients: the frozen models come in now
    means = {name: sum(values) / len(values) for name, values in history.items() if name != "ratio_error"}
    means["ppo/ratio_max"] = max(history["ppo/ratio_max"])
    return means | {"ppo/lr": cfg.lr * factor, "ppo/skipped_steps": float(ppo.engine.skipped_steps)}


def check_first_minibatch(ppo: Ppo, experience: Experience, ratio_error: float) -> None:
    """Before any update of an iteration the ratio is 1; before the first update of all the KL is 0.

    Raises:
        UserError: with the likely causes, when either is off by more than ppo.ratio_tolerance.
    """
    tolerance = ppo.recipe.ppo.ratio_tolerance
    if ratio_error > tolerance:
        raise UserError(
            f"the probability ratio is off by {ratio_error:.2g} before any update of iteration {ppo.iteration}",
            where="ppo.ratio_tolerance",
            fix="likely causes: dropout left on, sampling that is not the plain softmax, a rollout engine with weights "
            "or kernels of its own, or bfloat16 with a tolerance meant for float32",
        )
    gap = float(torch.where(experience.mask, experience.logprobs - experience.ref_logprobs, 0.0).abs().max())
    if ppo.iteration == 0 and gap > tolerance:
        raise UserError(
            f"policy and reference differ by {gap:.2g} nats on a token before the first update, so KL is not 0",
            where="ppo.ratio_tolerance",
            fix="likely causes: the reference is not the SFT model the policy started from, or dropout is on",
        )


def train(ppo: Ppo, ctx: StageContext) -> dict[str, float]:
    """The loop, until the last iteration or a stop; returns the last iteration's metrics."""
    cfg, stopping = ppo.recipe.ppo, ctx.stop_requested
    done, total = ppo.iteration * cfg.batch_size, ppo.plan.iterations * cfg.batch_size
    times = PhaseTimer(ppo.engine.device, next(ppo.networks.parameters()).dtype, PHASES)
    with Progress(ctx.name, total=total, unit="episodes", initial=done) as progress:
        while ppo.iteration < ppo.plan.iterations and not stopping:
            phase("rollout", ppo.iteration)
            with times("rollout"):
                episodes = rollout(ppo)
            phase("scoring", ppo.iteration)
            with times("score"):
                experience = score(ppo, episodes)
            metrics = summary(experience) | {"ppo/kl_coef": ppo.kl_coef}
            if ppo.sampler_gap is not None:
                metrics["ppo/sampler_logprob_gap"] = ppo.sampler_gap
            metrics |= update(ppo, experience, times)
            if cfg.kl_control == "adaptive":
                ppo.kl_coef = adaptive_kl_coef(
                    ppo.kl_coef, metrics["ppo/kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon
                )
            ppo.iteration += 1
            ppo.metrics = metrics
            # The log is written before the checkpoint that covers it: a resume cuts what lies beyond its checkpoint.
            log(ppo, ctx, episodes, experience, metrics, times)
            if metrics["ppo/kl"] > cfg.max_kl:
                # Before the checkpoint, or running again would go on behind this point.
                raise UserError(
                    f"KL to the reference reached {metrics['ppo/kl']:.1f} nats per response",
                    where="ppo.max_kl",
                    fix="lower ppo.lr or raise ppo.kl_coef; the sealed checkpoints of this run are kept",
                )
            stopping = ctx.stop_requested
            last = ppo.iteration == ppo.plan.iterations
            if last or stopping or (cfg.save_every and ppo.iteration % cfg.save_every == 0):
                phase("save", ppo.iteration)
                save_checkpoint(ppo, ctx.checkpoints)
            progress.advance(cfg.batch_size)
    return ppo.metrics


def log(
    ppo: Ppo,
    ctx: StageContext,
    episodes: Rollout,
    experience: Experience,
    metrics: dict[str, float],
    times: PhaseTimer,
) -> None:
    """One row of metrics.jsonl and wandb, and the first samples of the iteration as a table."""
    cfg, done = ppo.recipe.ppo, ppo.iteration * ppo.recipe.ppo.batch_size
    saved = ctx.checkpoints.metrics()  # of the checkpoint since the last row, if there was one
    perf = saved | performance(ppo, experience.pairs, times, saved["perf/seconds_save"])
    ctx.tracker.log(metrics | perf, done)
    count = min(cfg.samples_logged, len(episodes))
    if count:
        kl, texts = experience.kl_per_response(), episodes.texts(ppo.tokenizer)
        rows = [
            [ppo.tokenizer.decode(episodes.prompt(i)), texts[i], float(experience.scores[i]), float(kl[i])]
            for i in range(count)
        ]
        ctx.tracker.table("samples", ["prompt", "response", "score", "kl"], rows, done)


def run(ctx: StageContext, variant: str) -> dict[str, Any]:
    """The stage: build, resume, train, save the policy and its average."""
    sft_dir = ctx.run.require("sft", "model")
    reward_dir = ctx.run.require("reward", "model")
    ctx.use(sft_dir)
    ctx.use(reward_dir)
    ppo = build(ctx.recipe, variant == "ppo-ptx", sft_dir, reward_dir)
    show_drops(ppo.drops.table())
    sealed = broadcast_from_main(ctx.checkpoints.newest)
    if sealed:
        load_checkpoint(ppo, sealed)
    ctx.tracker.truncate_after(ppo.iteration * ctx.recipe.ppo.batch_size)
    metrics = train(ppo, ctx)
    if ppo.iteration < ppo.plan.iterations:
        return {}
    phase("save")
    save_policies(ppo, ctx.dir)
    return metrics


def save_policies(ppo: Ppo, folder: Path) -> None:
    """The policy as model/ and, where there is one, its average as ema/; all processes must call."""
    policy = ppo.networks.policy
    weights = full_state_dict(policy)
    if is_main_process():
        if ppo.ema:
            average = {name.removeprefix("policy."): tensor for name, tensor in ppo.ema.items()}
            average = {name: tensor.to(weights[name].dtype) for name, tensor in average.items()}
            save_model(policy, ppo.tokenizer, folder / "ema", weights | with_tied_names(policy, average))
        save_model(policy, ppo.tokenizer, folder / "model", weights)
    all_gather_objects(None)  # wait: what was saved belongs to the result of all processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line; `--variant ppo` leaves the pretraining term out."""
    recipe_name, overrides, options = parse_stage_args(argv, "stages/ppo.py")

    def start() -> int:
        variant = options["variant"]
        if variant is None:
            variant = "ppo-ptx" if load_recipe(recipe_name, overrides).ppo.ptx_coef > 0 else "ppo"
        return run_stage(variant, lambda ctx: run(ctx, variant), argv)

    return exit_code(start)


if __name__ == "__main__":
    raise SystemExit(main())
