"""SIGKILL at points drawn at random over the life of every stage: resumed until it ends, it ends in the same bits.

`make test` draws a few points, `make faults` at least 25 for each stage. FAULTS_SEED draws others.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from trials import PHASES, STAGES, Bench, plans, served, table

SEED = int(os.environ.get("FAULTS_SEED", "1"))
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with served() as server:
        made = Bench(tmp_path_factory.mktemp("faults"), server)
        made.prepare()
        yield made


def run_trials(bench: Bench, stage: str, count: int, seed: int) -> Counter[str]:
    """Run trials and have them all identical; returns kills by phase."""
    draw = random.Random(seed)
    outcomes = [bench.trial(stage, f"{stage}-{seed}-{i}", p) for i, p in enumerate(plans(bench, stage, count, draw))]
    print(f"\nFAULTS_SEED={SEED}\n{table(outcomes)}")
    wrong = [(outcome.plans, outcome.differences) for outcome in outcomes if outcome.differences]
    assert not wrong
    return sum((outcome.kills for outcome in outcomes), Counter())


@pytest.mark.parametrize("stage", STAGES)
def test_a_few_kills(bench: Bench, stage: str) -> None:
    kills = 0
    for again in range(4):  # a stage may end before the moment that was drawn for its kill
        kills += run_trials(bench, stage, 2, SEED + again).total()
        if kills >= 2:
            return
    raise AssertionError(f"{kills} kills in 8 runs")


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_kills_over_the_whole_life(bench: Bench, stage: str) -> None:
    kills = run_trials(bench, stage, 40 if stage == "ppo" else 30, SEED + 1000)
    assert kills.total() >= 25
    if stage == "ppo":
        assert all(kills[phase] >= 3 for phase in PHASES), kills
