"""The rows of supervised fine-tuning in the order they are trained, the same for any number of processes.

TRL's loader repeats rows until all processes have as many: the last batch of a pass would depend on their number. Here
every optimiser step takes the next rows of one shuffled order, each once, and what is missing at the end of a pass is
filled with rows that train nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME
from trl import SFTConfig, SFTTrainer

from rlhf.config import Recipe
from rlhf.data.text_blocks import TokenRow
from rlhf.errors import UserError
from rlhf.models.peft.methods import peft_of, trainable
from rlhf.models.zero import config_path, connect, zero_stage
from rlhf.plan import plan_sft
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.tracking import Tracker
from rlhf.system.console import Progress
from rlhf.system.distributed import broadcast_from_main, processes, shard
from rlhf.system.phases import phase
from rlhf.system.quiet import quiet_transformers


class MicroBatches(Sampler[list[int]]):
    """This process's micro-batches, step after step over all passes; index len(lengths) is a row that fills up.

    Args:
        lengths: tokens of every row.
    """

    def __init__(
        self, lengths: Sequence[int], epochs: float, batch_size: int, micro_batch_size: int, seed: int
    ) -> None:
        self.rows, self.seed = len(lengths), seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.steps_a_pass = -(-len(lengths) // batch_size)
        self.steps = math.ceil(epochs * self.steps_a_pass)
        self._tokens = [0, *accumulate(sum(lengths[i] for i in batch) for batch in self._batches())]

    def __len__(self) -> int:
        return self.steps * self.batch_size // (self.micro_batch_size * processes())

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            mine = shard(batch + [self.rows] * (self.batch_size - len(batch)))
            for start in range(0, len(mine), self.micro_batch_size):
                yield mine[start : start + self.micro_batch_size]

    def tokens_after(self, steps: int) -> int:
        """Tokens of the rows of the first optimiser steps, over all processes."""
        return self._tokens[steps]

    def _batches(self) -> Iterator[list[int]]:
        """The rows of every optimiser step, on all processes together."""
        order: list[int] = []
        for step in range(self.steps):
            done, at = divmod(step, self.steps_a_pass)
            if at == 0:
                order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + done)).tolist()
            yield order[at * self.batch_size : (at + 1) * self.batch_size]


class Trainer(SFTTrainer):
    """TRL's trainer on `MicroBatches`: its `num_train_epochs` is 1, for one pass of the loader is all of them.

    Args:
        epochs, batch_size: of the recipe; the others are SFTTrainer's.
    """

    def __init__(self, *, epochs: float, batch_size: int, **options: object) -> None:
        super().__init__(**options)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        micro_batch_size, seed = self.args.per_device_train_batch_size, self.args.seed
        self.order = MicroBatches(lengths, epochs, batch_size, micro_batch_size, seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights of a checkpoint: with an adapter those that are trained, for the base is an input.

        The trainer reads them with `strict=False`. Under ZeRO-3 it may give none: then DeepSpeed's own files hold them.
        """
        if peft_of(self.model) is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            weights = self.model.state_dict() if state_dict is None else state_dict
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            there = [name for name in trainable(self.model) if name in weights]
            trained = {name: weights[name].detach().cpu().contiguous() for name in there}
            save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, prompts included."""
        return self.order.tokens_after(self.state.global_step)

    def get_train_dataloader(self) -> DataLoader:
        """The rows, the filling row behind them, in the order of `MicroBatches`."""
        rows = self.train_dataset
        # One token, which is not trained; `seq_lengths` is what TRL's packing adds.
        known = {"labels": [-100], "seq_lengths": [1]}
        filling = {name: known.get(name, value[:1]) for name, value in rows[0].items()}
        whole = datasets.concatenate_datasets([rows, datasets.Dataset.from_list([filling], features=rows.features)])
        return DataLoader(whole, batch_sampler=self.order, collate_fn=self.data_collator)


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
            num_train_epochs=1,  # of the loader, which makes all passes: see rlhf/training/sft_trainer.py
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
        phase("train", state.global_step)

    def on_step_end(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(1)
        phase("train", state.global_step)
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
    rows: Sequence[TokenRow],
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
    rows: Sequence[TokenRow],
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
    sealed = broadcast_from_main(checkpoints.newest)
    if sealed:
        check_layout(recipe, sealed)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=str(sealed) if sealed else None)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    return trainer
