"""Sampling with our native decode loop."""

from __future__ import annotations

from benchmarks.measure import read_order, report, seconds_of
from benchmarks.ours import sampler


def main() -> None:
    """Sample the ordered prompts `rounds` times after a short warm-up."""
    order = read_order()
    run = sampler(order)
    run(0, 4)
    report(seconds=[seconds_of(lambda r=r: run(r)) for r in range(1, 1 + order["rounds"])])


if __name__ == "__main__":
    main()
