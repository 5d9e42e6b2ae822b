"""The reward model on K-way rankings (Ouyang et al. 2022, section 3.5, equation 1): `python stages/reward.py RECIPE`.

data       rankings of the rank stage, split by prompt; too long ones dropped and counted
step       each output of a prompt run through the model once, its prompt once for all; mean pair loss a prompt
measure    held-out pair accuracy with its interval, margins, calibration
normalise  demonstrations score 0 on average, ranked outputs have unit variance; both stored in the model
probes     a few texts with their scores, checked whenever the model is loaded
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import fit_demonstrations, fit_rankings
from rlhf.data.records import Drops, read_demonstrations, read_rankings
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.functional.ranking import PairCounts, accuracy_interval, calibration, count_pairs, has_pairs, tied_pairs
from rlhf.functional.schedule import lr_factor
from rlhf.functional.seeding import shuffled_indices
from rlhf.models.loading import check_context, load_tokenizer, new_reward_model, recompute_activations, save_model
from rlhf.models.placement import full_state_dict, materialized
from rlhf.models.zero import trained
from rlhf.rollout.batches import Pair, SequenceBatch, build_batch
from rlhf.rollout.probes import write_probes
from rlhf.rollout.scoring import raw_scores, scores
from rlhf.rollout.shared_prompts import SharedBatch, build_shared, can_share, share_prompts, shared_scores
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import Progress, show_drops
from rlhf.system.distributed import (
    all_gather_objects,
    barrier,
    broadcast_from_main,
    gather_shards,
    is_main_process,
    shard,
)
from rlhf.system.phases import phase
from rlhf.system.rng import load_rng, save_rng
from rlhf.training.engine import Engine, ParamGroup
from rlhf.training.ranking_passes import Group, by_length, split_passes, whole_passes
from rlhf.training.zero_engine import make_engine

PROBES = 8
SCALE_SAMPLE = 128  # outputs, spread evenly, that the deviation is estimated on


def load_groups(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> tuple[list[Group], list[Group]]:
    """Training and held-out groups; no prompt is in both."""
    recipe = ctx.recipe
    ranked = ctx.run.path / "rank" / "rankings.jsonl"
    paths = [str(ranked)] if ranked.exists() else []
    if recipe.rank.labeler != "file" or not paths:
        paths += recipe.data.rankings
    if not paths:
        raise UserError(
            "there are no rankings to learn from",
            where=str(ranked),
            fix="run the rank stage first, or set data.rankings",
        )
    usable = []
    for ranking in read_rankings(paths, drops):
        if has_pairs(ranking.ranks, recipe.reward.ties):
            usable.append(ranking)
        else:
            drops.add("all outputs of the prompt tie")
    split = split_by_prompt(usable, recipe.data.validation_fraction, recipe.run.seed)
    # An output that was cut off when it was sampled is encoded without EOS, and the model can see that.
    return tuple(
        [
            Group([(row.prompt, ids) for ids in row.responses], row.item.ranks)
            for row in fit_rankings(part, tokenizer, recipe.reward.max_tokens, drops)
        ]
        for part in split
    )


class ScoringModule(nn.Module):
    """The reward model as the engine's module: a batch in, raw scores [B] out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shares = can_share(model)

    def build(self, pairs: Sequence[Pair], pad_id: int) -> SharedBatch | SequenceBatch:
        """The batch of some outputs, prompts shared where the architecture lets them be."""
        return build_shared(pairs) if self.shares else build_batch(pairs, pad_id)

    def forward(self, batch: SharedBatch | SequenceBatch) -> torch.Tensor:
        return shared_scores(self.model, batch) if isinstance(batch, SharedBatch) else raw_scores(self.model, batch)


def step(engine: Engine, groups: Sequence[Group], recipe: Recipe, pad_id: int) -> tuple[float, list[PairCounts]]:
    """Accumulate the gradient of one batch of prompts; returns the loss and the pair counts before the update."""
    # Every prompt weighs the same whatever its K, and whatever pass and process it falls in.
    scored: ScoringModule = engine.module
    with share_prompts(scored.model) if scored.shares else nullcontext():
        return _step(engine, scored, by_length(groups), recipe, pad_id)


def _step(
    engine: Engine, scored: ScoringModule, groups: list[Group], recipe: Recipe, pad_id: int
) -> tuple[float, list[PairCounts]]:
    size, ties = recipe.reward.micro_tokens, recipe.reward.ties
    large = [g for g in groups if not g.fits_one_pass(size)]

    def score(parts: list[list[Pair]]) -> list[list[float]]:
        with torch.no_grad(), materialized(scored.model):
            return [scored(scored.build(part, pad_id).to(engine.device)).tolist() for part in parts]

    parts, ahead, known = split_passes(large, size, ties, score)
    counts, loss = [], 0.0
    passes = whole_passes(shard([g for g in groups if g.fits_one_pass(size)]), size) + shard(parts)
    forwards = max(all_gather_objects(len(passes)))
    for i in range(forwards):
        # A process with fewer passes goes along with one that does not count: the engine's gradients meet in every one.
        here = passes[i] if i < len(passes) else None
        batch = scored.build(here.pairs if here else groups[0].pairs[:1], pad_id).to(engine.device)
        flat = engine.model(batch)
        share = here.loss(flat, ties) / len(groups) if here else 0.0 * flat.sum()
        engine.backward(share)
        if here and here.groups:
            loss += float(share.detach())
            rows = flat.detach().cpu().split([len(g.ranks) for g in here.groups])
            counts += [count_pairs(s.tolist(), g.ranks) for s, g in zip(rows, here.groups, strict=True)]
    counted = [count_pairs(s, g.ranks) for s, g in zip(ahead, large, strict=True)]
    return sum(all_gather_objects(loss)) + known / len(groups), gather_shards(counts) + counted


def pair_counts(model: nn.Module, groups: Sequence[Group]) -> list[PairCounts]:
    """Pair counts of groups under the model, one forward per output."""
    flat = scores(model, [pair for g in groups for pair in g.pairs])
    split = flat.split([len(g.ranks) for g in groups])
    return [count_pairs(s.tolist(), g.ranks) for s, g in zip(split, groups, strict=True)]


def heldout_metrics(counts: Sequence[PairCounts], seed: int) -> dict[str, float]:
    """Held-out accuracy with its 95 % interval, and the mean margin of the better output."""
    accuracy, low, high = accuracy_interval(counts, seed)
    margins = [m for c in counts for m in c.margins]
    return {
        "reward/accuracy": accuracy,
        "reward/accuracy_low": low,
        "reward/accuracy_high": high,
        "reward/margin": sum(margins) / max(1, len(margins)),
        "reward/heldout_pairs": float(len(margins)),
        "reward/heldout_prompts": float(len(counts)),
    }


def train(engine: Engine, groups: list[Group], ctx: StageContext, pad_id: int) -> int | None:
    """`reward.epochs` passes over the training prompts, resumable at optimiser steps; returns the tokens seen, None
    when stopped early."""
    cfg, seed = ctx.recipe.reward, ctx.recipe.run.seed
    total = cfg.epochs * len(groups)
    steps = -(-total // cfg.batch_size)
    done, tokens = 0, 0
    sealed = broadcast_from_main(ctx.checkpoints.newest)
    if sealed:
        engine.load(sealed / "engine")
        load_rng(sealed)
        state = json.loads((sealed / "state.json").read_text())
        done, tokens = state["step"], state["tokens"]
    ctx.tracker.truncate_after(tokens, again=("reward/accuracy", "calibration"))
    stopping = ctx.stop_requested
    with Progress("reward", total=total, unit="prompts", initial=min(done * cfg.batch_size, total)) as progress:
        while done < steps and not stopping:
            first = done * cfg.batch_size
            chosen = shuffled_indices(len(groups), seed, "rankings", first, min(cfg.batch_size, total - first))
            batch = [groups[i] for i in chosen]
            factor = lr_factor(done, steps, cfg.schedule, cfg.warmup_steps, cfg.final_lr_fraction)
            phase("train", done)
            loss, counts = step(engine, batch, ctx.recipe, pad_id)
            result = engine.step(("reward",), factor)
            done, tokens = done + 1, tokens + sum(g.tokens for g in batch)
            pairs = sum(c.pairs for c in counts)
            ctx.tracker.log(
                {
                    "reward/loss": loss,
                    "reward/train_accuracy": sum(c.correct for c in counts) / max(1, pairs),
                    "reward/train_margin": sum(m for c in counts for m in c.margins) / max(1, pairs),
                    "reward/grad_norm": result.grad_norms.get("reward", math.nan),  # nan: DeepSpeed skipped the step
                    "reward/lr": cfg.lr * factor,
                },
                tokens,
            )
            progress.advance(len(batch))
            stopping = ctx.stop_requested
            if stopping or done == steps or (cfg.save_every and done % cfg.save_every == 0):
                state = {"step": done, "tokens": tokens}

                def write(staged: Path, state: dict[str, int] = state) -> None:
                    engine.save(staged / "engine")
                    save_rng(staged)
                    if is_main_process():
                        (staged / "state.json").write_text(json.dumps(state))

                phase("save", done)
                ctx.checkpoints.save(done, write, barrier)
    return tokens if done == steps else None


def random_outputs(groups: Sequence[Group], count: int, seed: int) -> list[Pair]:
    """About `count` ranked outputs, prompts drawn without replacement, each with all its outputs.

    All of them: in files that hold the chosen output first, every second row would be a sample of chosen ones.
    """
    pairs: list[Pair] = []
    for i in shuffled_indices(len(groups), seed, "scale", 0, len(groups)):
        if len(pairs) >= count:
            break
        pairs += groups[i].pairs
    return pairs


def normalise(model: nn.Module, demonstrations: list[Pair], ranked: list[Pair], scale: bool) -> dict[str, float]:
    """Store the bias that makes demonstrations score 0 on average, and optionally the deviation of ranked outputs."""
    config = model.config
    config.reward_mean, config.reward_std = 0.0, 1.0
    mean = float(scores(model, demonstrations).mean())
    std = float(scores(model, ranked).std()) if scale else 1.0
    if not std > 1e-6:
        raise UserError(
            f"the reward model scores all ranked outputs alike (deviation {std:.2g})",
            fix="it has learned nothing: look at reward/loss, raise reward.lr or check the rankings",
        )
    config.reward_mean, config.reward_std = mean, std
    return {"reward/mean": mean, "reward/std": std}


def run(ctx: StageContext) -> dict[str, Any]:
    """The stage, from rankings to a normalised reward model with probe scores."""
    recipe, cfg, drops = ctx.recipe, ctx.recipe.reward, Drops()
    source = str(ctx.run.require("sft", "model")) if cfg.model == "sft" else cfg.model
    if Path(source).exists():
        ctx.use(Path(source))
    tokenizer = load_tokenizer(source, recipe.model)
    train_groups, heldout = load_groups(ctx, tokenizer, drops)
    demonstrations = [
        (row.prompt, row.responses[0])
        for row in fit_demonstrations(
            read_demonstrations(recipe.data.demonstrations, drops),
            tokenizer,
            recipe.data.max_prompt_tokens,
            recipe.data.max_response_tokens,
            cfg.max_tokens,
            drops,
        )
    ]
    show_drops(drops.table())
    for what, rows in (("ranking", train_groups), ("demonstration", demonstrations)):
        if not rows:
            raise UserError(f"no {what} is left for the reward stage", where="data", fix="see the dropped rows above")

    torch.manual_seed(recipe.run.seed)
    peft = recipe.reward_peft
    model = trained(recipe, lambda: new_reward_model(source, recipe.model, cfg.keep_layers, cfg.head_init, peft))
    check_context(model, cfg.max_tokens, "reward.max_tokens")
    model.eval()
    if recipe.launch.gradient_checkpointing:
        recompute_activations(model)
    engine = make_engine(
        ScoringModule(model),
        [ParamGroup("reward", model, cfg.lr, cfg.max_grad_norm)],
        recipe,
        weight_decay=cfg.weight_decay,
    )
    tokens = train(engine, train_groups, ctx, int(tokenizer.pad_token_id))
    if tokens is None:
        return {}

    phase("score")
    ranked = random_outputs(train_groups, SCALE_SAMPLE, recipe.run.seed)
    metrics = normalise(model, demonstrations, ranked, cfg.normalise_scale)
    if heldout:
        counts = pair_counts(model, heldout)
        heldout_row = heldout_metrics(counts, recipe.run.seed)
        metrics |= heldout_row
        ctx.tracker.log(heldout_row, tokens)
        rows = calibration([m for c in counts for m in c.margins])
        if is_main_process():
            (ctx.dir / "calibration.json").write_text(json.dumps(rows, indent=1))
        ctx.tracker.table("calibration", ["confidence", "accuracy", "n"], [list(r.values()) for r in rows], tokens)
    metrics["reward/training_prompts"] = float(len(train_groups))
    metrics["reward/tied_pairs"] = float(sum(len(tied_pairs(g.ranks)) for g in train_groups))
    phase("save")
    weights = full_state_dict(model)
    if is_main_process():
        save_model(model, tokenizer, ctx.dir / "model", weights)
    barrier()  # the probes are written into the folder
    write_probes(model, tokenizer, ranked[:PROBES], ctx.dir / "model")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("reward", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
