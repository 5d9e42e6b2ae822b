"""Pairwise comparison of two policies' outputs by a labeler; rlhf/functional/statistics.py makes win rates of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf.data.records import Prompt
from rlhf.labeling.base import Labeler, Output


def pairwise_wins(
    labeler: Labeler,
    prompts: Sequence[Prompt],
    outputs_a: Sequence[Sequence[Output]],
    outputs_b: Sequence[Sequence[Output]],
    seed: int = 0,
    judgements: int = 1,
) -> Iterator[list[float]]:
    """Yield, prompt by prompt, the wins of side a: for each sample the mean of `judgements` x 2 answers.

    An answer is 1 (a is better), 0 (b is) or 0.5 (a tie). Sample s of a meets sample s of b; outputs are
    [prompts][samples]. Every pair is asked in both orders, each time with a seed of its own, so that a labeler that
    favours the output it sees first favours neither side. The expected win rate does not depend on `judgements`. Only
    the labeler's `prefers` is called, and only for the prompts whose wins are taken. Raises ValueError if the two sides
    have different shapes.
    """
    order_seeds = np.random.default_rng(seed)
    for prompt, side_a, side_b in zip(prompts, outputs_a, outputs_b, strict=True):
        wins = []
        for a, b in zip(side_a, side_b, strict=True):
            answers = []
            for first, second in order_seeds.integers(0, 2**31, size=(judgements, 2)).tolist():
                answers += [labeler.prefers(prompt, a, b, first), 1 - labeler.prefers(prompt, b, a, second)]
            wins.append(sum(answers) / len(answers))
        yield wins
