"""Train with TRL's SFTTrainer on rows in an order of our own, which is the same for any number of processes.

TRL's loader repeats rows until all processes have equally many, so the last batch of an epoch would depend on their
number. Here every optimiser step takes the next rows of one shuffled order, each once. The last step of an epoch is
filled up with rows that train nothing.
"""

from __future__ import annotations

import json
import math
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

from rlhf.config import Recipe, SftSection
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
from rlhf.system.ranks import launcher_world_size


class MicroBatches(Sampler[list[int]]):
    """Yields this process's micro-batches of row indices, step after step over all epochs.

    `lengths` are the tokens of every row; index len(lengths) stands for the filling row, which trains nothing.
    `batch_size` is the rows of an optimiser step over all processes, `micro_batch_size` those of one forward pass.
    """

    def __init__(
        self, lengths: Sequence[int], epochs: float, batch_size: int, micro_batch_size: int, seed: int
    ) -> None:
        self.rows, self.seed = len(lengths), seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.steps = math.ceil(epochs * self.steps_per_epoch)
        self._tokens = [0, *accumulate(sum(lengths[i] for i in batch) for batch in self._batches())]

    def __len__(self) -> int:
        return self.steps * self.batch_size // (self.micro_batch_size * processes())

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            mine = shard(batch + [self.rows] * (self.batch_size - len(batch)))
            for start in range(0, len(mine), self.micro_batch_size):
                yield mine[start : start + self.micro_batch_size]

    def tokens_after(self, steps: int) -> int:
        """Return the tokens of the rows of the first `steps` optimiser steps, over all processes."""
        return self._tokens[steps]

    def _batches(self) -> Iterator[list[int]]:
        """Yield the rows of every optimiser step, for all processes together."""
        order: list[int] = []
        for step in range(self.steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            if i == 0:
                order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


class Trainer(SFTTrainer):
    """TRL's trainer on `MicroBatches`; its `num_train_epochs` is 1, since one pass of the loader makes all epochs."""

    def __init__(self, *, epochs: float, batch_size: int, **options: object) -> None:
        super().__init__(**options)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        micro_batch_size, seed = self.args.per_device_train_batch_size, self.args.seed
        self.order = MicroBatches(lengths, epochs, batch_size, micro_batch_size, seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights of a checkpoint; with an adapter only the trained ones, since the base is an input.

        The trainer reads them with `strict=False`. Under ZeRO-3 `state_dict` may lack them; DeepSpeed's files do not.
        """
        if peft_of(self.model) is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            weights = self.model.state_dict() if state_dict is None else state_dict
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            names = [name for name in trainable(self.model) if name in weights]
            trained = {name: weights[name].detach().cpu().contiguous() for name in names}
            save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    @property
    def tokens(self) -> int:
        """Return the tokens trained on so far, prompts included."""
        return self.order.tokens_after(self.state.global_step)

    @property
    def finished(self) -> bool:
        """Return whether all optimiser steps are done; they are not after a stop."""
        return self.state.global_step >= self.state.max_steps

    def metrics(self) -> dict[str, float]:
        """Return the loss of the last step, and the steps and tokens so far."""
        loss = next(row["loss"] for row in reversed(self.state.log_history) if "loss" in row)
        return {"sft/loss": loss, "sft/steps": float(self.state.global_step), "sft/tokens": float(self.tokens)}

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of the rows and the filling row after them, in the order of `MicroBatches`."""
        rows = self.train_dataset
        # The filling row is one token, which is not trained on; TRL's packing adds `seq_lengths`.
        known = {"labels": [-100], "seq_lengths": [1]}
        filling = {name: known.get(name, value[:1]) for name, value in rows[0].items()}
        whole = datasets.concatenate_datasets([rows, datasets.Dataset.from_list([filling], features=rows.features)])
        return DataLoader(whole, batch_sampler=self.order, collate_fn=self.data_collator)


def trainer_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """Return TRL's settings; what the recipe does not name is set here, so that none of TRL's defaults decides."""
    sft = recipe.sft
    schedule, options = _schedule(sft)
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
            num_train_epochs=1,  # one pass of the loader makes all epochs: see `Trainer`
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
            # logs and checkpoints, which `Reporter` writes
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            save_strategy="steps" if sft.save_every else "no",
            save_steps=sft.save_every or 1,
            eval_strategy="no",
        )


def _schedule(sft: SftSection) -> tuple[str, dict[str, float]]:
    """Return the name and the options of transformers' learning rate schedule."""
    if sft.schedule == "constant" or sft.final_lr_fraction == 1:  # polynomial decay refuses to end where it begins
        return "constant_with_warmup", {}
    if sft.schedule == "linear":
        return "polynomial", {"lr_end": sft.lr * sft.final_lr_fraction, "power": 1.0}
    return "cosine_with_min_lr", {"min_lr_rate": sft.final_lr_fraction}


def deepspeed_file(recipe: Recipe) -> str | None:
    """Return the path of DeepSpeed's settings after connecting the processes; None without ZeRO or a launcher."""
    launch = recipe.launch
    if launcher_world_size() is None or not (launch.zero_stage or launch.deepspeed_config):
        return None
    connect()  # without this before the trainer's settings are made, ZeRO stays off on CPUs
    return str(config_path(recipe))


class Reporter(TrainerCallback):
    """Logs every step's metrics by tokens seen, shows a progress bar, seals checkpoints and stops the trainer cleanly.

    `stop_requested` is asked after every step; when true a checkpoint is sealed and training ends. `layout` is what
    `layout_of` returns, written into every checkpoint.
    """

    def __init__(
        self, checkpoints: Checkpoints, tracker: Tracker, stop_requested: Callable[[], bool], layout: dict[str, int]
    ) -> None:
        self.checkpoints, self.tracker, self.layout = checkpoints, tracker, layout
        self.stop_requested = stop_requested

    def on_train_begin(self, args: SFTConfig, state: Any, control: Any, train_dataloader: DataLoader, **_: Any) -> None:
        seen = train_dataloader.batch_sampler.tokens_after(state.global_step)
        self.tracker.truncate_after(seen, again=("sft/validation_loss",))  # steps after the checkpoint are made again
        self.progress = Progress("sft", total=state.max_steps, unit="steps")
        self.progress.__enter__()
        self.progress.advance(state.global_step)
        phase("train", state.global_step)

    def on_step_end(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(1)
        phase("train", state.global_step)
        control.should_training_stop |= self._any_process_stops(args)
        # The last step is sealed too, so that a run that is killed during validation does not train again.
        control.should_save |= control.should_training_stop or state.global_step == state.max_steps

    def on_log(
        self, args: SFTConfig, state: Any, control: Any, logs: dict[str, float], train_dataloader: DataLoader, **_: Any
    ) -> None:
        if "loss" not in logs:
            return  # the summary at the end of training
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
            what = f"loss {logs['loss']}, gradient norm {logs['grad_norm']} at step {state.global_step}"
            fix = "lower the learning rate, use float32, or look for broken rows in the data"
            raise UserError(what, "sft.lr", fix)
        names = {"sft/loss": "loss", "sft/lr": "learning_rate", "sft/grad_norm": "grad_norm"}
        names["sft/token_accuracy"] = "mean_token_accuracy"
        metrics = {ours: float(logs[theirs]) for ours, theirs in names.items()}
        self.tracker.log(metrics, train_dataloader.batch_sampler.tokens_after(state.global_step))

    def on_save(self, args: SFTConfig, state: Any, control: Any, **_: Any) -> None:
        # The trainer writes in place, and a kill would leave half a checkpoint: its files are moved under a seal.
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
    """Return what decides into which files the trainer cuts its checkpoints."""
    return {"processes": processes(), "zero_stage": zero_stage(recipe)}


def check_layout(recipe: Recipe, folder: Path) -> None:
    """Refuse a checkpoint that cannot be read here: DeepSpeed's own files can be read in the same layout only.

    Raises UserError if the number of processes or the ZeRO stage was another, and one of the two runs has ZeRO.
    """
    theirs, ours = json.loads((folder / "layout.json").read_text()), layout_of(recipe)
    if theirs == ours or theirs["zero_stage"] == ours["zero_stage"] == 0:
        return
    words = [f"{each['processes']} processes under ZeRO {each['zero_stage']}" for each in (theirs, ours)]
    raise UserError(
        f"the SFT checkpoint is of {words[0]}, and this run has {words[1]}; the trainer cannot read it",
        str(folder),
        f"resume with launch.processes={theirs['processes']} launch.zero_stage={theirs['zero_stage']}, "
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
    """Return TRL's trainer on rows that are tokenised already, without its own bars and tables."""
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
    reporter: Reporter,
) -> Trainer:
    """Train `policy` in place on `rows`, from the newest sealed checkpoint if there is one, and return the trainer.

    `rows` are what `demonstration_row` and `text_rows` return. The trainer's own files go to `trainer/` in `folder`,
    which is removed at the end.
    """
    trainer = build_trainer(policy, tokenizer, rows, recipe, folder / "trainer", reporter)
    sealed = broadcast_from_main(reporter.checkpoints.newest)
    if sealed:
        check_layout(recipe, sealed)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=str(sealed) if sealed else None)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    return trainer
