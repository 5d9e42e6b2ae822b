"""The random generators go on where they were saved; a process that was not there keeps its own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.system.rng import load_rng, save_rng


def draw() -> list[float]:
    # An odd number of normal deviates: numpy's and Python's generators keep the second of a pair for the next call.
    return [
        random.gauss(0, 1),
        random.random(),
        float(np.random.randn()),
        float(np.random.rand()),
        float(torch.rand(())),
    ]


def test_every_generator_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw()
    save_rng(tmp_path)
    expected = draw() + draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    assert draw() != expected[:5]
    load_rng(tmp_path)
    assert draw() + draw() == expected
    monkeypatch.setenv("RANK", "1")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    before = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    load_rng(tmp_path)  # holds process 0's alone
    assert draw() == before
