"""Optimiser steps of TRL's RewardTrainer on the pairs of the same rankings."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from benchmarks.measure import read_order, report
from benchmarks.pairs import expand
from benchmarks.stepclock import StepClock, trainer_options


def main() -> None:
    """The loss of every prompt at the initial weights, then the ordered steps after a first one."""
    order, clock = read_order(), StepClock()
    by_prompt = [
        [dict(zip(("chosen_ids", "rejected_ids"), pair, strict=True)) for pair in expand(**group)]
        for group in order["groups"]
    ]
    rows = [row for pairs in by_prompt for row in pairs]
    pairs = len(by_prompt[0])  # the same of every prompt: no ties
    steps = order["steps"] + 1
    rows *= -(-steps * order["batch"] // len(by_prompt))
    dtype = getattr(torch, order["dtype"])
    model = AutoModelForSequenceClassification.from_pretrained(order["reward_model"], dtype=dtype, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                per_device_train_batch_size=pairs * order["micro_batch"],
                max_steps=steps,
                **trainer_options(order, folder),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(order["model"]),
            callbacks=[clock],
        )
        losses = []
        if order["losses"]:
            trainer.model.eval()
            with torch.no_grad():
                for group in by_prompt:
                    losses.append(float(trainer.compute_loss(trainer.model, trainer.data_collator(group))))
        trainer.train()
    report(losses=losses, seconds=[b - a for a, b in zip(clock.times, clock.times[1:], strict=False)])


if __name__ == "__main__":
    main()
