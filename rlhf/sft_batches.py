"""The rows of supervised fine-tuning in the order they are trained, the same for any number of processes.

TRL's loader repeats rows until all processes have as many: the last batch of a pass would depend on their number. Here
every optimiser step takes the next rows of one shuffled order, each once, and what is missing at the end of a pass is
filled with rows that train nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.utils import SAFE_WEIGHTS_NAME
from trl import SFTTrainer

from rlhf.models.peft.methods import peft_of, trainable
from rlhf.system.distributed import own, processes


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
            mine = own(batch + [self.rows] * (self.batch_size - len(batch)))
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
