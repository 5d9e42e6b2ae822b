"""Our PPO iterations: seconds of each, whole and by phase."""

from __future__ import annotations

from benchmarks.measure import read_order, report
from benchmarks.ours import collect, make_ppo, train


def main() -> None:
    """Run the ordered number of iterations."""
    order = read_order()
    ppo, done = make_ppo(order), []
    for _ in range(order["iterations"]):
        seconds: dict[str, float] = {}
        train(ppo, collect(ppo, seconds), seconds)
        done.append(seconds)
    report(
        iterations=[sum(seconds.values()) for seconds in done],
        rollouts=[seconds["rollout"] for seconds in done],
        scoring=[seconds["score"] for seconds in done],
        training=[seconds["train"] for seconds in done],
        peak_gb=ppo.phases.peak_gb(),
        optimiser_steps=order["batch"] / order["minibatch"],
    )


if __name__ == "__main__":
    main()
