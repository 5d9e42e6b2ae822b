"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and C.1): `python stages/sft.py RECIPE`.

data       demonstrations, split by prompt; too long ones dropped and counted; optionally rows of pretraining text
rows       prompt and response as one row; loss on the response and its EOS only, on every token of a text
train      TRL's SFTTrainer: packed rows whose documents do not see each other, cosine to a tenth of the rate
validate   mean loss per response token on held-out demonstrations, before and after
save       a plain Hugging Face folder, or the adapter alone (rlhf/models/peft/folder.py)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig

from rlhf.config import STEPPED_WHOLE, Recipe
from rlhf.data.encoding import Encoded, fit_demonstrations
from rlhf.data.records import Demonstration, Drops, read_demonstrations, read_texts
from rlhf.data.splits import split_by_prompt
from rlhf.data.text_blocks import Row, demonstration_row, text_rows
from rlhf.errors import UserError
from rlhf.models.loading import check_context, load_policy, load_tokenizer, resolve_model, save_model
from rlhf.models.peft.folder import has_adapter
from rlhf.models.peft.methods import add_adapter
from rlhf.models.placement import is_partitioned, whole_state
from rlhf.models.zero import config_path, connect, trained, zero_stage
from rlhf.plan import plan_sft
from rlhf.rollout.scoring import token_logprobs
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.stage import StageContext, run_stage
from rlhf.run.tracking import Tracker
from rlhf.sft_batches import Trainer
from rlhf.system.console import Progress, console
from rlhf.system.distributed import from_first, processes
from rlhf.system.phases import phase
from rlhf.system.quiet import quiet_transformers

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports to the Hub's maker otherwise


def load_demonstrations(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops
) -> tuple[list[Encoded[Demonstration]], list[Encoded[Demonstration]]]:
    """Training and held-out demonstrations within the limits; no prompt is in both."""
    data = recipe.data
    whole = read_demonstrations(data.demonstrations, drops)
    limits = (data.max_prompt_tokens, data.max_response_tokens, recipe.sft.max_tokens)
    train, heldout = (
        fit_demonstrations(part, tokenizer, *limits, drops)
        for part in split_by_prompt(whole, data.validation_fraction, recipe.run.seed)
    )
    if not train:
        raise UserError(
            f"no demonstration is left to train on ({drops.total} dropped)",
            where="data.demonstrations",
            fix="raise data.max_prompt_tokens or data.max_response_tokens, or add data",
        )
    return train, heldout


def mix_rows(rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> list[Row]:
    """The demonstrations' rows and as many rows of text as make `sft.pretraining_mix` of the whole."""
    mix, data = recipe.sft.pretraining_mix, recipe.data
    count = round(len(rows) * mix / (1 - mix))
    if not count:
        return list(rows)
    # As long as a demonstration may be, so that the share of rows is about the share of tokens.
    length = min(data.max_prompt_tokens + data.max_response_tokens, recipe.sft.max_tokens)
    return [*rows, *text_rows(read_texts(data.pretraining, drops), tokenizer, length, count, recipe.run.seed)]


def trainer_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """The recipe in TRL's words; what the recipe does not name is set here so that no default of TRL's decides."""
    sft = recipe.sft
    schedule, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": sft.final_lr_fraction}),
        "linear": ("polynomial", {"lr_end": sft.lr * sft.final_lr_fraction, "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
    }["constant" if sft.final_lr_fraction == 1 else sft.schedule]  # which polynomial decay refuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that change in transformers 6
        return SFTConfig(
            output_dir=str(folder),
            # data
            packing=sft.packing,
            packing_strategy="bfd",
            max_length=sft.max_tokens if sft.packing else None,
            completion_only_loss=True,
            seed=recipe.run.seed,
            # sizes
            num_train_epochs=1,  # of the loader, which makes all passes: see rlhf/sft_batches.py
            per_device_train_batch_size=sft.micro_batch_size,
            gradient_accumulation_steps=plan_sft(recipe).accumulation,
            gradient_checkpointing=recipe.launch.gradient_checkpointing,
            # optimiser: Adam as in the paper, C.1
            optim="adamw_torch",
            learning_rate=sft.lr,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=sft.weight_decay,
            max_grad_norm=sft.max_grad_norm,
            lr_scheduler_type=schedule,
            lr_scheduler_kwargs=options,
            warmup_steps=sft.warmup_steps,
            # machine
            bf16=recipe.model.dtype == "bfloat16",
            use_cpu=recipe.run.device == "cpu" or not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            deepspeed=deepspeed_file(recipe),
            # logs and checkpoints are ours
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            save_strategy="steps" if sft.save_every else "no",
            save_steps=sft.save_every or 1,
            eval_strategy="no",
        )


def deepspeed_file(recipe: Recipe) -> str | None:
    """DeepSpeed's settings for a run that its launcher started, with the processes connected; none without ZeRO."""
    launch = recipe.launch
    if "WORLD_SIZE" not in os.environ or not (launch.zero_stage or launch.deepspeed_config):
        return None
    connect()  # before the trainer's settings, or ZeRO on CPUs is not switched on
    return str(config_path(recipe))


class Reporter(TrainerCallback):
    """What a run shows and keeps of the trainer's work: metrics, a progress bar, sealed checkpoints, a clean stop."""

    def __init__(
        self, checkpoints: Checkpoints, tracker: Tracker, stop_requested: Callable[[], bool], layout: dict[str, int]
    ) -> None:
        self.checkpoints, self.tracker, self.stop_requested = checkpoints, tracker, stop_requested
        self.layout = layout

    def on_train_begin(self, args: SFTConfig, state: Any, control: Any, train_dataloader: DataLoader, **_: Any) -> None:
        seen = train_dataloader.batch_sampler.tokens_after(state.global_step)
        self.tracker.truncate_after(seen, again=("sft/validation_loss",))  # what came after the checkpoint comes again
        self.progress = Progress("sft", total=state.max_steps, unit="steps")
        self.progress.__enter__()
        self.progress.advance(state.global_step)
        phase("update", state.global_step)

    def on_step_end(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(1)
        phase("update", state.global_step)
        control.should_training_stop |= self._any_process_stops(args)
        # The last step is sealed too, so that a run killed while it validates does not train again.
        control.should_save |= control.should_training_stop or state.global_step == state.max_steps

    def on_log(
        self,
        args: SFTConfig,
        state: Any,
        control: Any,
        logs: dict[str, float],
        train_dataloader: DataLoader,
        **_: Any,
    ) -> None:
        if "loss" not in logs:
            return  # the summary at the end of training
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
            raise UserError(
                f"loss {logs['loss']}, gradient norm {logs['grad_norm']} at step {state.global_step}",
                where="sft.lr",
                fix="lower the learning rate, use float32, or look for broken rows in the data",
            )
        names = {"sft/loss": "loss", "sft/lr": "learning_rate", "sft/grad_norm": "grad_norm"}
        names["sft/token_accuracy"] = "mean_token_accuracy"
        metrics = {ours: float(logs[theirs]) for ours, theirs in names.items()}
        self.tracker.log(metrics, train_dataloader.batch_sampler.tokens_after(state.global_step))

    def on_save(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        # The trainer writes in place, which a kill leaves half done: what it wrote is moved under a seal.
        phase("save", state.global_step)
        group = PartialState()
        group.wait_for_everyone()
        if group.is_main_process:
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"

            def write(staged: Path) -> None:
                for part in written.iterdir():
                    shutil.move(part, staged)
                (staged / "layout.json").write_text(json.dumps(self.layout))

            self.checkpoints.save(state.global_step, write)
            written.rmdir()
        group.wait_for_everyone()

    def on_train_end(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.__exit__(None, None, None)

    def _any_process_stops(self, args: SFTConfig) -> bool:
        if args.world_size == 1:
            return self.stop_requested()
        flag = torch.tensor(float(self.stop_requested()), device=args.device)
        torch.distributed.all_reduce(flag)
        return bool(flag)


def layout_of(recipe: Recipe) -> dict[str, int]:
    """How the trainer cuts its checkpoints into files."""
    return {"processes": processes(), "zero_stage": zero_stage(recipe)}


def check_layout(recipe: Recipe, folder: Path) -> None:
    """Refuse a checkpoint that cannot be read here: DeepSpeed's, as the trainer writes them, bind to their layout.

    Raises:
        UserError: when it was written by another number of processes or ZeRO stage, and one of the two has ZeRO.
    """
    theirs, ours = json.loads((folder / "layout.json").read_text()), layout_of(recipe)
    if theirs == ours or theirs["zero_stage"] == ours["zero_stage"] == 0:
        return
    words = [f"{each['processes']} processes under ZeRO {each['zero_stage']}" for each in (theirs, ours)]
    raise UserError(
        f"the SFT checkpoint is of {words[0]}, and this run has {words[1]}; the trainer cannot read it",
        str(folder),
        f"go on with launch.processes={theirs['processes']} launch.zero_stage={theirs['zero_stage']}, "
        "or redo the stage with --fresh (rank, reward and PPO may change both)",
    )


def build_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    folder: Path,
    reporter: Reporter,
) -> Trainer:
    """TRL's trainer on rows that are tokenised already, without its own bars and tables."""
    datasets.disable_progress_bars()
    with quiet_transformers():
        trainer = Trainer(
            epochs=recipe.sft.epochs,
            batch_size=recipe.sft.batch_size,
            model=policy,
            args=trainer_config(recipe, folder),
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            callbacks=[reporter],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_sft(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    folder: Path,
    tracker: Tracker,
    checkpoints: Checkpoints,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Train `policy` in place on `rows`, from the newest sealed checkpoint if there is one.

    Args:
        policy: a causal language model, with an adapter or without.
        rows: what `demonstration_row` and `text_rows` return.
        folder: the trainer's own files go to `trainer/` in it, which is removed at the end.
        tracker: gets every step's metrics, by tokens seen.
        stop_requested: asked after every step; when true a checkpoint is sealed and training ends.

    Returns:
        the trainer, whose state holds the steps done and their losses.
    """
    reporter = Reporter(checkpoints, tracker, stop_requested, layout_of(recipe))
    trainer = build_trainer(policy, tokenizer, rows, recipe, folder / "trainer", reporter)
    sealed = from_first(checkpoints.newest)
    if sealed:
        check_layout(recipe, sealed)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=str(sealed) if sealed else None)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    return trainer


def validation_loss(policy: torch.nn.Module, heldout: Sequence[Encoded[Demonstration]]) -> float:
    """Mean negative log-likelihood per response token, EOS included, in nats."""
    logprobs = torch.cat(token_logprobs(policy, [(row.prompt, row.responses[0]) for row in heldout]))
    return -float(logprobs.mean())


def write_policy(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the trained policy from the first process; all of them must call."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_state(policy)
    if trainer.is_world_process_zero():
        save_model(policy, tokenizer, folder, weights)
    trainer.accelerator.wait_for_everyone()


def work(ctx: StageContext) -> dict[str, Any]:
    """The stage, from demonstrations to the SFT policy."""
    recipe, drops = ctx.recipe, Drops()
    if has_adapter(recipe.model.name):
        raise UserError(
            f"{recipe.model.name} holds an adapter, and SFT starts from plain weights",
            "model.name",
            "name its base, or what `rlhf export` writes of it",
        )
    base = resolve_model(recipe.model.name)
    if Path(base).is_dir():
        ctx.use(Path(base))
    tokenizer = load_tokenizer(base, recipe.model.prompt_format, recipe.model.trust_remote_code)
    train, heldout = load_demonstrations(recipe, tokenizer, drops)
    rows = mix_rows([demonstration_row(d) for d in train], recipe, tokenizer, drops)
    for reason, n in drops.table():
        console.print(f"dropped {n}: {reason}")
    console.print(f"{len(train)} demonstrations and {len(rows) - len(train)} rows of text to train on")

    torch.manual_seed(recipe.run.seed)
    section = recipe.model
    if section.peft.method in STEPPED_WHOLE:
        # The optimiser needs float32 weights: an update of 1e-5 is lost in a bfloat16 weight of 0.01. Adapters are.
        section = section.model_copy(update={"dtype": "float32"})

    def start() -> PreTrainedModel:
        policy = load_policy(recipe.model.name, section, recipe.sft.dropout, tokenizer)
        # Here: some methods start from weights of the base, which ZeRO-3 gathers while the model is being loaded.
        return add_adapter(policy, section.peft) if section.peft.on else policy

    policy = trained(recipe, start)
    rows_of = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    check_context(policy, rows_of, "data.max_prompt_tokens + data.max_response_tokens")
    if recipe.sft.packing:
        check_context(policy, recipe.sft.max_tokens, "sft.max_tokens")
    if not any(is_partitioned(p) for p in policy.parameters()):
        policy.to(ctx.device)
    metrics = {"sft/demonstrations": float(len(train)), "sft/heldout_demonstrations": float(len(heldout))}
    if heldout:
        metrics["sft/validation_loss_before"] = validation_loss(policy, heldout)

    trainer = train_sft(
        policy, tokenizer, rows, recipe, ctx.dir, ctx.tracker, ctx.checkpoints, lambda: ctx.stop_requested
    )
    if trainer.state.global_step < trainer.state.max_steps:
        return {}
    tokens = trainer.tokens
    last_loss = next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row)
    metrics |= {"sft/loss": last_loss, "sft/steps": float(trainer.state.global_step), "sft/tokens": float(tokens)}
    phase("scoring")
    if heldout:
        metrics["sft/validation_loss"] = validation_loss(trainer.model, heldout)
        ctx.tracker.log({"sft/validation_loss": metrics["sft/validation_loss"]}, tokens)
    phase("save")
    write_policy(trainer, tokenizer, ctx.dir / "model")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("sft", work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
