"""Optimiser steps of our reward stage on whole rankings."""

from __future__ import annotations

from benchmarks.measure import read_order, report, seconds_of
from benchmarks.ours import RewardTraining


def main() -> None:
    """The loss of every prompt at the initial weights, if asked for, then the ordered steps after a first one."""
    order = read_order()
    training = RewardTraining(order)
    losses = training.losses() if order["losses"] else []
    count = order["batch"]
    training.step(0, count)
    seconds = [seconds_of(lambda s=s: training.step(s * count, count)) for s in range(1, 1 + order["steps"])]
    report(losses=losses, seconds=seconds)


if __name__ == "__main__":
    main()
