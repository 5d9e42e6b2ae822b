"""A clock inside transformers' trainers, for both sides."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """The time after every optimiser step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    def tokens(self, trainer: Any) -> list[int]:
        """Tokens seen after every step, as TRL's trainers count and log them."""
        return [int(row["num_tokens"]) for row in trainer.state.log_history if "loss" in row]
