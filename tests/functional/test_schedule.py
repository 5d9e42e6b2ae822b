"""Learning-rate factors, step by step, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from rlhf.functional.schedule import lr_factor


def factors(schedule: str, total: int, warmup: int = 0, final: float = 0.1) -> list[float]:
    return [lr_factor(step, total, schedule, warmup, final) for step in range(total)]


def test_warmup_starts_at_a_tenth_and_reaches_the_peak_after_it() -> None:
    # 0.1 + 0.9 x step / 4, then constant
    assert factors("constant", 7, warmup=4) == pytest.approx([0.1, 0.325, 0.55, 0.775, 1, 1, 1])
    assert factors("constant", 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("linear", 0.2, [1.0, 0.8, 0.6, 0.4, 0.2]),  # a quarter of 0.8 each
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        # 0.1 + 0.9 x (1 + cos(pi k / 4)) / 2: cos is 1, 0.7071068, 0, -0.7071068, -1
        ("cosine", 0.1, [1.0, 0.8681981, 0.55, 0.2318019, 0.1]),
    ],
)
def test_decay_reaches_the_final_fraction_at_the_last_step(schedule: str, final: float, expected: list[float]) -> None:
    assert factors(schedule, 5, final=final) == pytest.approx(expected, abs=1e-7)
    assert lr_factor(50, 5, schedule, 0, final) == pytest.approx(final)  # a step beyond the last


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_begins_where_warmup_ends(schedule: str) -> None:
    got = factors(schedule, 7, warmup=2, final=0.5)
    assert got[:3] == pytest.approx([0.1, 0.55, 1.0])
    # The decay of 5 steps, shifted by the warm-up.
    assert got[2:] == pytest.approx(factors(schedule, 5, final=0.5))
    assert got[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_short_runs_have_finite_factors(schedule: str) -> None:
    assert factors(schedule, 1) == [1.0]
    for total in (1, 2, 3):
        for warmup in (0, 1, 2, 5):
            assert all(math.isfinite(x) and 0 < x <= 1 for x in factors(schedule, total, warmup))
