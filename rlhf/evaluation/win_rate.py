"""The statistics of an evaluation: win rates with intervals, diversity, lengths. No model is touched here.

Outputs come as one list per prompt with S samples each; wins come back in the same shape. The prompt is the unit of
every interval: samples of one prompt are averaged first, since they are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf.data.records import Prompt
from rlhf.labeling.base import Labeler, Output


def pairwise_wins(
    labeler: Labeler,
    prompts: Sequence[Prompt],
    outputs_a: Sequence[Sequence[Output]],
    outputs_b: Sequence[Sequence[Output]],
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    judgements: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> list[list[float]]:
    """How often side a wins: for each prompt and sample the mean of `judgements` x 2 answers, each in {0, 0.5, 1}.

    Every pair is asked in both orders, (a, b) and (b, a), each time with a seed of its own: a labeler that favours the
    output it sees first then favours neither side. A tie counts one half. Sample s of a meets sample s of b.

    Args:
        labeler: anything with `prefers(prompt, a, b, order_seed) -> 1 (a), 0 (b) or 0.5 (tie)`.
        outputs_a, outputs_b: per prompt the same number of samples.
        advance: called with 1 after every prompt, for progress.
        judgements: how often each order is asked, as of so many labelers; leaves the expected win rate as it is.
        stop: asked before every prompt; when true, what follows is left out.

    Raises:
        ValueError: when the two sides have different shapes.
    """
    wins = []
    order_seeds = np.random.default_rng(seed)
    for prompt, side_a, side_b in zip(prompts, outputs_a, outputs_b, strict=True):
        if stop():
            break
        row = []
        for a, b in zip(side_a, side_b, strict=True):
            answers = []
            for first, second in order_seeds.integers(0, 2**31, size=(judgements, 2)).tolist():
                answers += [labeler.prefers(prompt, a, b, first), 1 - labeler.prefers(prompt, b, a, second)]
            row.append(sum(answers) / len(answers))
        wins.append(row)
        if advance:
            advance(1)
    return wins
