"""Optimiser steps of our SFT stage."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import read_order, report
from benchmarks.ours import sft_trainer
from benchmarks.stepclock import StepClock


def main() -> None:
    """Train once over the rows; report the time after each optimiser step."""
    order, clock = read_order(), StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(order, Path(folder), clock)
        trainer.train()
    report(times=clock.times, tokens=clock.tokens(trainer))


if __name__ == "__main__":
    main()
