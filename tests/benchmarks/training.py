"""Which share of the machine's arithmetic our PPO update uses: model FLOPs over its time, against matrix products
timed in the same process just before and after it.

The peak is the best of several shapes, so that no poor one flatters the share.
"""

from __future__ import annotations

import torch

from benchmarks.flops import update_flops
from benchmarks.measure import read_order, report, seconds_of
from benchmarks.ours import collect, lengths, make_ppo, shape_of, train

SQUARES = (1024, 1536, 2048)  # the smallest is below the peak on some machines; larger ones add nothing but time
REPEATS = 3


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products."""
    best = 0.0
    for n in SQUARES:
        own = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, n, generator=own).to(dtype) for _ in range(2))
        best = max(best, *(2 * n**3 / seconds_of(lambda a=a, b=b: a @ b) for _ in range(REPEATS)))
    return best


def main() -> None:
    """Run the ordered iterations; the first one, which allocates the optimiser's state, is left out."""
    order = read_order()
    dtype = getattr(torch, order["dtype"])
    ppo, updates = make_ppo(order), []
    for _ in range(order["iterations"]):
        seconds: dict[str, float] = {}
        experience = collect(ppo, seconds)
        before = peak_flops(dtype)
        train(ppo, experience, seconds)
        after = peak_flops(dtype)
        flops, took, peak = update_flops(shape_of(ppo), lengths(experience)), seconds["train"], max(before, after)
        updates.append({"flops": flops, "seconds": took, "peaks": [before, after], "share": flops / took / peak})
    report(updates=updates[1:])


if __name__ == "__main__":
    main()
