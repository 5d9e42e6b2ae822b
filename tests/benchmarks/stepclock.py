"""What a comparison of trainers needs: a clock inside them, for both sides, and the options that TRL's get alike."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from benchmarks.measure import Order


class StepClock(TrainerCallback):
    """The time after every optimiser step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    def tokens(self, trainer: Any) -> list[int]:
        """Tokens seen after every step, as TRL's trainers count and log them."""
        return [int(row["num_tokens"]) for row in trainer.state.log_history if "loss" in row]


def trainer_options(order: Order, folder: str) -> dict[str, Any]:
    """Arguments of both trainers' configs: the order's rates, and nothing beside the steps that are timed."""
    accumulated = order["batch"] // order["micro_batch"]
    rates = {"learning_rate": order["lr"], "lr_scheduler_type": "constant", "adam_beta2": 0.95, "weight_decay": 0.0}
    steps = {"gradient_accumulation_steps": accumulated, "gradient_checkpointing": False, "max_grad_norm": 1.0}
    machine = {"bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
    output = {"output_dir": folder, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    return rates | steps | machine | output | {"disable_tqdm": True}
