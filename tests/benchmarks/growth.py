"""How the cost of our rollout and update grows with response length, batch size and depth, against the work in them."""

from __future__ import annotations

from benchmarks.flops import policy_flops, update_flops
from benchmarks.measure import read_order, report
from benchmarks.ours import collect, lengths, make_ppo, shape_of, train


def main() -> None:
    """One iteration at the ordered size after a small one that allocates the optimiser's state."""
    order = read_order()
    ppo = make_ppo(order | {"iterations": 2})
    train(ppo, collect(ppo, {}), {})
    seconds: dict[str, float] = {}
    experience = collect(ppo, seconds)
    train(ppo, experience, seconds)
    shape, rows = shape_of(ppo), lengths(experience)
    flops = {"rollout_flops": policy_flops(shape, rows), "train_flops": update_flops(shape, rows)}
    report(rollout_s=seconds["rollout"], train_s=seconds["train"], **flops)


if __name__ == "__main__":
    main()
