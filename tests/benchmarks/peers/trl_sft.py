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
from benchmarks.stepclock import StepClock


def main() -> None:
    """Train once over the rows; report the time after each optimiser step."""
    order, clock = read_order(), StepClock()
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=getattr(torch, order["dtype"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                packing=True,
                packing_strategy="bfd",
                max_length=order["max_tokens"],
                completion_only_loss=True,
                num_train_epochs=1,
                per_device_train_batch_size=order["micro_batch"],
                gradient_accumulation_steps=order["batch"] // order["micro_batch"],
                gradient_checkpointing=False,
                optim="adamw_torch",
                learning_rate=order["lr"],
                lr_scheduler_type="constant",
                adam_beta2=0.95,
                weight_decay=0.0,
                max_grad_norm=1.0,
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=order["seed"],
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(order["rows"]),
            processing_class=AutoTokenizer.from_pretrained(order["model"]),
            callbacks=[clock],
        )
        trainer.train()
    report(times=clock.times, tokens=clock.tokens(trainer))


if __name__ == "__main__":
    main()
