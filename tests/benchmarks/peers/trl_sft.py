"""Optimiser steps of TRL's own SFTTrainer on the rows that our SFT stage gets, packed in the same way."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import read_order, report
from benchmarks.stepclock import StepClock, trainer_options


def main() -> None:
    """Train once over the rows; report the time after each optimiser step."""
    order, clock = read_order(), StepClock()
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=getattr(torch, order["dtype"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                packing=True,
                packing_strategy="bfd",
                max_length=order["max_tokens"],
                completion_only_loss=True,
                num_train_epochs=1,
                per_device_train_batch_size=order["micro_batch"],
                optim="adamw_torch",
                seed=order["seed"],
                **trainer_options(order, folder),
            ),
            train_dataset=Dataset.from_list(order["rows"]),
            processing_class=AutoTokenizer.from_pretrained(order["model"]),
            callbacks=[clock],
        )
        trainer.train()
    report(times=clock.times, tokens=clock.tokens(trainer))


if __name__ == "__main__":
    main()
