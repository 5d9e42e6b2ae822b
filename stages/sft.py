"""Fine-tune a model on demonstrations (Ouyang et al. 2022, section 3.5 and C.1): `python stages/sft.py RECIPE`.

data       demonstrations, split by prompt; too long ones dropped and counted; optionally rows of pretraining text
rows       prompt and response as one row; loss on the response and its end, on earlier answers if sft.loss_on says so,
           and on every token of a text
start      the base model with residual dropout, an adapter on it if the recipe asks for one
validate   mean loss per response token on held-out demonstrations, before and after
train      TRL's SFTTrainer: packed rows whose documents do not see each other, cosine to a tenth of the learning rate
save       a plain Hugging Face folder, or the adapter alone (rlhf/models/peft/folder.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import Encoded, fit_demonstrations
from rlhf.data.records import Demonstration, Drops, read_demonstrations, read_texts
from rlhf.data.splits import split_by_prompt
from rlhf.data.text_blocks import TokenRow, demonstration_row, earlier_answers, text_rows
from rlhf.errors import UserError
from rlhf.model_config import TRAINS_BASE_WEIGHTS
from rlhf.models.loading import check_context, load_policy, load_tokenizer, resolve_model, save_model
from rlhf.models.peft.folder import has_adapter
from rlhf.models.peft.methods import add_adapter
from rlhf.models.placement import full_state_dict, is_partitioned
from rlhf.models.zero import trained
from rlhf.rollout.scoring import token_logprobs
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import console, show_drops
from rlhf.system.phases import phase
from rlhf.training.sft_trainer import Reporter, Trainer, layout_of, train_sft


def load_demonstrations(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops
) -> tuple[list[Encoded[Demonstration]], list[Encoded[Demonstration]]]:
    """Return training and held-out demonstrations within the limits; no prompt is in both.

    Raises UserError if none is left to train on.
    """
    data = recipe.data
    whole = read_demonstrations(data.demonstrations, drops)
    limits = (data.max_prompt_tokens, data.max_response_tokens, recipe.sft.max_tokens)
    train, heldout = (
        fit_demonstrations(part, tokenizer, *limits, drops)
        for part in split_by_prompt(whole, data.validation_fraction, recipe.run.seed)
    )
    if not train:
        what = f"no demonstration is left to train on ({drops.total} dropped)"
        fix = "raise data.max_prompt_tokens or data.max_response_tokens, or add data"
        raise UserError(what, "data.demonstrations", fix)
    return train, heldout


def mix_rows(
    rows: Sequence[TokenRow], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops
) -> list[TokenRow]:
    """Return the rows, and after them as many rows of text as make `sft.pretraining_mix` of the whole."""
    mix, data = recipe.sft.pretraining_mix, recipe.data
    count = round(len(rows) * mix / (1 - mix))
    if not count:
        return list(rows)
    # As long as a demonstration may be, so that the share of rows is about the share of tokens.
    length = min(data.max_prompt_tokens + data.max_response_tokens, recipe.sft.max_tokens)
    return [*rows, *text_rows(read_texts(data.pretraining, drops), tokenizer, length, count, recipe.run.seed)]


def start_policy(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """Return the policy to train, which starts from `model.name`; on the device unless ZeRO-3 has partitioned it.

    Raises UserError if rows may be longer than the model's context.
    """
    torch.manual_seed(recipe.run.seed)
    model = recipe.model
    if model.peft.method in TRAINS_BASE_WEIGHTS:
        # An update of 1e-5 is lost in a bfloat16 weight of 0.01. (Adapters are float32 already.)
        model = model.model_copy(update={"dtype": "float32"})

    def load() -> PreTrainedModel:
        policy = load_policy(model.name, model, recipe.sft.dropout, tokenizer)
        # Some methods start from weights of the base, which ZeRO-3 gathers only while the model is being loaded.
        return add_adapter(policy, model.peft) if model.peft.on else policy

    policy = trained(recipe, load)
    longest = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    check_context(policy, longest, "data.max_prompt_tokens + data.max_response_tokens")
    if recipe.sft.packing:
        check_context(policy, recipe.sft.max_tokens, "sft.max_tokens")
    if not any(is_partitioned(p) for p in policy.parameters()):
        policy.to(device)
    return policy


def validation_loss(policy: torch.nn.Module, heldout: Sequence[Encoded[Demonstration]]) -> float:
    """Return the mean negative log-likelihood per response token, EOS included, in nats."""
    logprobs = torch.cat(token_logprobs(policy, [(row.prompt, row.responses[0]) for row in heldout]))
    return -float(logprobs.mean())


def write_policy(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the trained policy from the first process; all of them must call."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = full_state_dict(policy)
    if trainer.is_world_process_zero():
        save_model(policy, tokenizer, folder, weights)
    trainer.accelerator.wait_for_everyone()


def run(ctx: StageContext) -> dict[str, Any]:
    """Run the stage, from demonstrations to the SFT policy; returns its headline metrics.

    Raises UserError if `model.name` is an adapter.
    """
    recipe, drops = ctx.recipe, Drops()
    if has_adapter(recipe.model.name):
        what = f"{recipe.model.name} holds an adapter, and SFT starts from plain weights"
        raise UserError(what, "model.name", "name its base, or what `rlhf export` writes of it")
    base = resolve_model(recipe.model.name)
    if Path(base).is_dir():
        ctx.use(Path(base))
    tokenizer = load_tokenizer(base, recipe.model)
    train, heldout = load_demonstrations(recipe, tokenizer, drops)
    history = recipe.sft.loss_on == "all"
    said = [demonstration_row(d, earlier_answers(d, tokenizer) if history else ()) for d in train]
    rows = mix_rows(said, recipe, tokenizer, drops)
    show_drops(drops.table())
    console.print(f"{len(train)} demonstrations and {len(rows) - len(train)} rows of text to train on")
    tokens, masks = sum(len(row["input_ids"]) for row in rows), sum(sum(row["completion_mask"]) for row in rows)
    console.print(f"{masks:,} of {tokens:,} tokens are trained")

    policy = start_policy(recipe, tokenizer, ctx.device)
    metrics = {"sft/demonstrations": float(len(train)), "sft/heldout_demonstrations": float(len(heldout))}
    if heldout:
        metrics["sft/validation_loss_before"] = validation_loss(policy, heldout)
    reporter = Reporter(ctx.checkpoints, ctx.tracker, lambda: ctx.stop_requested, layout_of(recipe))
    trainer = train_sft(policy, tokenizer, rows, recipe, ctx.dir, reporter)
    if not trainer.finished:
        return {}

    metrics |= trainer.metrics()
    phase("score")
    if heldout:
        metrics["sft/validation_loss"] = validation_loss(trainer.model, heldout)
        ctx.tracker.log({"sft/validation_loss": metrics["sft/validation_loss"]}, trainer.tokens)
    phase("save")
    write_policy(trainer, tokenizer, ctx.dir / "model")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("sft", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
