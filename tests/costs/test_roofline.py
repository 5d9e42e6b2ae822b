"""The least time that phases could take, by hand."""

from __future__ import annotations

import pytest

from rlhf.costs.roofline import mean_row, phase_costs, worst_phase


def test_floors_by_hand() -> None:
    """At 100 FLOP/s and 10 bytes per second."""
    row = {
        "perf/peak_flops": 100.0, "perf/bandwidth": 10.0, "perf/seconds_rollout": 12.0, "perf/seconds_train": 6.0,
        "perf/seconds_optimizer": 2.0, "perf/seconds_ptx": 0.0, "perf/seconds_other": 5.0,
        "perf/flops_prefill": 100.0, "perf/bytes_prefill": 5.0, "perf/flops_decode": 50.0, "perf/bytes_decode": 20.0,
        "perf/flops_train": 400.0, "perf/bytes_train": 10.0, "perf/bytes_optimizer": 1.0,
        "memory/train_gb": 3.0, "perf/padding_train": 0.25, "perf/train_tokens_per_s": 7.0,
    }  # fmt: skip
    costs = {cost.name: cost for cost in phase_costs(row)}
    assert list(costs) == ["rollout", "train", "optimizer", "other"]  # no pretraining, nothing saved
    sampling = costs["rollout"]
    assert [(f.part, f.seconds, f.limited_by) for f in sampling.floors] == [
        ("prefill", 1.0, "arithmetic"), ("decode", 2.0, "bandwidth"),
    ]  # fmt: skip
    assert (sampling.floor, sampling.times_floor, sampling.share) == (3.0, 4.0, 12 / 25)
    assert (costs["train"].floor, costs["train"].times_floor) == (4.0, 1.5)
    assert (costs["train"].peak_gb, costs["train"].padding, costs["train"].tokens_per_s) == (3.0, 0.25, 7.0)
    assert costs["optimizer"].floor == 0.1 and costs["other"].floor is None
    assert worst_phase(list(costs.values())) is sampling  # 9 s above it, though the optimiser takes 20 times its floor
    without = {name: value for name, value in row.items() if name != "perf/peak_flops"}
    assert worst_phase(phase_costs(without)) is None


def test_iterations_are_averaged_and_memory_is_the_largest() -> None:
    rows = [{"perf/mfu": 0.2, "memory/peak_gb": 1.0, "axis": "episodes"}, {"perf/mfu": 0.4, "memory/peak_gb": 3.0}]
    assert mean_row([*rows, {"perf/mfu": None}]) == {"perf/mfu": pytest.approx(0.3), "memory/peak_gb": 3.0}
