"""Train the reward model on K-way rankings (Ouyang et al. 2022, equation 1): `python stages/reward.py RECIPE`.

data       rankings of the rank stage, split by prompt; too long ones dropped and counted
step       one forward per output, prompts shared; equation 1: the mean pair loss of each prompt, averaged over prompts
train      optimiser steps over shuffled prompts, resumable at any of them
normalise  demonstrations score 0 on average, ranked outputs have unit variance; both stored in the model
measure    held-out pair accuracy with its interval, margins, calibration
save       the model, and a few texts with their scores, which are checked whenever it is loaded

With reward.train=false the first three are left out: reward.model is normalised, measured on all rankings that there
are, and saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import fit_demonstrations, fit_rankings
from rlhf.data.records import Drops, read_demonstrations, read_rankings
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.functional.ranking import PairCounts, TieHandling, calibration, has_pairs, ranking_loss, tied_pairs
from rlhf.functional.schedule import lr_factor
from rlhf.functional.seeding import shuffled_indices
from rlhf.models.loading import check_context, load_reward_model, load_tokenizer, save_model
from rlhf.models.placement import full_state_dict, materialized
from rlhf.models.zero import frozen
from rlhf.rollout.batches import Pair
from rlhf.rollout.probes import write_probes
from rlhf.rollout.scoring import scores
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import Progress, show_drops
from rlhf.system.distributed import barrier
from rlhf.system.phases import phase
from rlhf.system.ranks import is_main_process
from rlhf.training.engine import Engine
from rlhf.training.ranking_metrics import count_groups, heldout_metrics, pair_counts, training_metrics
from rlhf.training.ranking_passes import Group, Pass, ScoringModule, by_length, first_round, own_passes, random_outputs
from rlhf.training.reward_state import build_engine, load_checkpoint, save_checkpoint

PROBES = 8
SCALE_SAMPLE = 128  # ranked outputs, spread evenly, that the std of the scores is estimated on


def load_groups(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> tuple[list[Group], list[Group]]:
    """Return training and held-out groups; no prompt is in both.

    Of a model that is not trained all are held out, and there may be none. Raises UserError if there are none to train.
    """
    recipe = ctx.recipe
    ranked = ctx.run.path / "rank" / "rankings.jsonl"
    paths = [str(ranked)] if ranked.exists() else []
    if recipe.rank.labeler != "file" or not paths:
        paths += recipe.data.rankings
    if not paths and recipe.reward.train:
        fix = "run the rank stage first, or set data.rankings"
        raise UserError("there are no rankings to learn from", str(ranked), fix)
    usable = []
    for ranking in read_rankings(paths, drops):
        if has_pairs(ranking.ranks, recipe.reward.ties):
            usable.append(ranking)
        else:
            drops.add("all outputs of the prompt tie")
    # An output that was cut off when it was sampled is encoded without EOS, and the model can see that.
    train, heldout = (
        [
            Group([(row.prompt, ids) for ids in row.responses], row.item.ranks)
            for row in fit_rankings(part, tokenizer, recipe.reward.max_tokens, drops)
        ]
        for part in split_by_prompt(usable, recipe.data.validation_fraction, recipe.run.seed)
    )
    return (train, heldout) if recipe.reward.train else ([], train + heldout)


def load_demonstrations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> list[Pair]:
    """Return the demonstrations that fit, whose scores set the zero of the reward."""
    limits = (recipe.data.max_prompt_tokens, recipe.data.max_response_tokens, recipe.reward.max_tokens)
    demonstrations = read_demonstrations(recipe.data.demonstrations, drops)
    return [(row.prompt, row.responses[0]) for row in fit_demonstrations(demonstrations, tokenizer, *limits, drops)]


def pass_loss(scores: Tensor, outputs: Pass, ties: TieHandling) -> Tensor:
    """Return equation 1 summed over the prompts of a pass.

    For a part of a prompt's outputs, whose loss the first round has taken: what has that loss's gradient.
    """
    if outputs.score_grads is not None:
        return (scores * outputs.score_grads.to(scores.device)).sum()
    return ranking_loss(scores, [group.ranks for group in outputs.groups], ties).loss


def step(engine: Engine, groups: Sequence[Group], recipe: Recipe, pad_id: int) -> tuple[float, list[PairCounts]]:
    """Accumulate the gradient of one batch of prompts; every prompt weighs the same, whatever its K, pass and process.

    Return this process's share of the loss, and the pair counts of its share of the prompts, both before the update.
    """
    module: ScoringModule = engine.module
    tokens, ties = recipe.reward.micro_tokens, recipe.reward.ties
    groups = by_length(groups)
    small, large = ([g for g in groups if g.fits_one_pass(tokens) == fits] for fits in (True, False))

    def score(parts: list[list[Pair]]) -> list[list[float]]:
        with torch.no_grad(), materialized(module.model):
            return [module(module.build(part, pad_id).to(engine.device)).tolist() for part in parts]

    done: list[tuple[Tensor, Tensor, Pass]] = []
    with module.sharing():
        first = first_round(large, tokens, ties, score)
        passes = own_passes(small, first.passes, tokens)
        for outputs in passes:
            batch = module.build(outputs.pairs, pad_id).to(engine.device)
            flat = engine.model(batch)
            loss = pass_loss(flat, outputs, ties) / len(groups)
            engine.backward(loss)
            done.append((loss.detach(), flat.detach(), outputs))
    # Read only now, so that no pass waits for the GPU.
    total, counts = 0.0, []
    for loss, flat, outputs in done:
        if outputs.groups:
            total += float(loss)
            counts += count_groups(flat.tolist(), outputs.groups)
    if is_main_process():  # the first round is known to every process, and counts once
        total += first.loss / len(groups)
        counts += count_groups(first.scores, large)
    return total, counts


def train(engine: Engine, groups: list[Group], ctx: StageContext, pad_id: int) -> int | None:
    """Make `reward.epochs` passes over the training prompts, from the newest checkpoint if there is one.

    Return the tokens seen; None when stopped early.
    """
    cfg, seed = ctx.recipe.reward, ctx.recipe.run.seed
    total = cfg.epochs * len(groups)
    steps = -(-total // cfg.batch_size)
    done, tokens = load_checkpoint(engine, ctx.checkpoints)
    ctx.tracker.truncate_after(tokens, again=("reward/accuracy", "calibration"))
    stopping = ctx.stop_requested
    with Progress("reward", total=total, unit="prompts", initial=min(done * cfg.batch_size, total)) as progress:
        while done < steps and not stopping:
            first = done * cfg.batch_size
            chosen = shuffled_indices(len(groups), seed, "rankings", first, min(cfg.batch_size, total - first))
            batch = [groups[i] for i in chosen]
            factor = lr_factor(done, steps, cfg.schedule, cfg.warmup_steps, cfg.final_lr_fraction)
            phase("train", done)
            metrics = training_metrics(*step(engine, batch, ctx.recipe, pad_id))
            result = engine.step(("reward",), factor)
            done, tokens = done + 1, tokens + sum(g.tokens for g in batch)
            metrics["reward/grad_norm"] = result.grad_norms.get("reward", math.nan)  # nan: DeepSpeed skipped the step
            metrics["reward/lr"] = cfg.lr * factor
            ctx.tracker.log(metrics, tokens)
            progress.advance(len(batch))
            stopping = ctx.stop_requested
            if stopping or done == steps or (cfg.save_every and done % cfg.save_every == 0):
                save_checkpoint(engine, ctx.checkpoints, done, tokens)
    return tokens if done == steps else None


def load_untrained(recipe: Recipe, source: str, device: torch.device) -> nn.Module:
    """Return the reward model in `source` as it is; raise UserError if it is none, or `check_context` refuses it."""
    # Its weights are saved once more, for which every process needs them whole.
    whole = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"frozen": "whole"})})
    model = frozen(whole, device, lambda: load_reward_model(source, recipe.reward_format, merged=True))
    check_context(model, recipe.reward.max_tokens, "reward.max_tokens")
    return model


def normalise(model: nn.Module, demonstrations: list[Pair], ranked: list[Pair], scale: bool) -> dict[str, float]:
    """Store the bias that makes demonstrations score 0 on average, and optionally the std of ranked outputs.

    Raises UserError if the model scores all ranked outputs alike.
    """
    config = model.config
    config.reward_mean, config.reward_std = 0.0, 1.0
    mean = float(scores(model, demonstrations).mean())
    std = float(scores(model, ranked).std()) if scale else 1.0
    if not std > 1e-6:
        fix = "it has learned nothing: look at reward/loss, raise reward.lr or check the rankings"
        raise UserError(f"the reward model scores all ranked outputs alike (std {std:.2g})", fix=fix)
    config.reward_mean, config.reward_std = mean, std
    return {"reward/mean": mean, "reward/std": std}


def measure(ctx: StageContext, model: nn.Module, heldout: Sequence[Group], tokens: int) -> dict[str, float]:
    """Return and log held-out accuracy with its 95 % interval, the mean margin of better outputs, and calibration."""
    counts = pair_counts(model, heldout)
    metrics = heldout_metrics(counts, ctx.recipe.run.seed)
    ctx.tracker.log(metrics, tokens)
    rows = calibration([m for c in counts for m in c.margins])
    if is_main_process():
        (ctx.dir / "calibration.json").write_text(json.dumps(rows, indent=1))
    ctx.tracker.table("calibration", ["confidence", "accuracy", "n"], [list(r.values()) for r in rows], tokens)
    return metrics


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Pair], folder: Path) -> None:
    """Write the reward model with its probe texts; all processes must call."""
    phase("save")
    weights = full_state_dict(model)
    if is_main_process():
        save_model(model, tokenizer, folder, weights)
    barrier()  # the probes are written into the folder
    write_probes(model, tokenizer, probes, folder)


def run(ctx: StageContext) -> dict[str, Any]:
    """Run the stage, from rankings to a normalised reward model with probe scores; returns its headline metrics."""
    recipe, cfg, drops = ctx.recipe, ctx.recipe.reward, Drops()
    source = str(ctx.run.require("sft", "model")) if cfg.model == "sft" else cfg.model
    if Path(source).exists():
        ctx.use(Path(source))
    tokenizer = load_tokenizer(source, recipe.reward_format)
    train_groups, heldout = load_groups(ctx, tokenizer, drops)
    demonstrations = load_demonstrations(recipe, tokenizer, drops)
    show_drops(drops.table())
    for what, rows in (("ranking", train_groups), ("demonstration", demonstrations)):
        if not rows and (cfg.train or what == "demonstration"):
            raise UserError(f"no {what} is left for the reward stage", where="data", fix="see the dropped rows above")

    if cfg.train:
        engine = build_engine(recipe, source)
        tokens = train(engine, train_groups, ctx, int(tokenizer.pad_token_id))
        if tokens is None:
            return {}
        model = engine.module.model
    else:
        model, tokens = load_untrained(recipe, source, ctx.device), 0

    phase("score")
    groups = train_groups or heldout
    ranked = random_outputs(groups, SCALE_SAMPLE, recipe.run.seed) if groups else []
    metrics = normalise(model, demonstrations, ranked, cfg.normalise_scale and bool(ranked))
    if heldout:
        metrics |= measure(ctx, model, heldout, tokens)
    metrics["reward/training_prompts"] = float(len(train_groups))
    metrics["reward/tied_pairs"] = float(sum(len(tied_pairs(g.ranks)) for g in train_groups))
    save(model, tokenizer, (ranked or demonstrations)[:PROBES], ctx.dir / "model")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("reward", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
