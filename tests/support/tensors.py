"""Make padded tensors out of rows of different lengths, and compare such tensors with rows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

Rows = list[list[float]]
JUNK = [0.0, 1e9, math.nan, math.inf, -math.inf]
LENGTHS = [4, 1, 3, 2]
WIDTH = 5
junk = pytest.mark.parametrize("junk", JUNK)


def padded(rows: Sequence[Sequence[float]], junk: float, width: int = WIDTH) -> Tensor:
    """Return rows as a tensor [rows, width] with `junk` on the padding."""
    return torch.tensor([list(row) + [junk] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(rows: Sequence[Sequence[float]], width: int = WIDTH) -> Tensor:
    """Return a mask [rows, width] that is true on the real positions."""
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def draws(seed: int, low: float = -2.0, high: float = 2.0) -> Rows:
    """Return random rows of the lengths LENGTHS."""
    rng = random.Random(seed)
    return [[rng.uniform(low, high) for _ in range(n)] for n in LENGTHS]


def assert_rows(got: Tensor, expected: Sequence[Sequence[float]], tolerance: float = 1e-9) -> None:
    """Check that `got` equals the rows on the real positions and is exactly zero on padding."""
    for row, numbers in zip(got.tolist(), expected, strict=True):
        assert row[: len(numbers)] == pytest.approx(numbers, abs=tolerance)
        assert row[len(numbers) :] == [0.0] * (len(row) - len(numbers))


def flat(rows: Rows) -> list[float]:
    """Return the numbers of all rows as one list."""
    return [x for row in rows for x in row]
