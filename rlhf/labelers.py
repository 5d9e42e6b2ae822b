"""Labelers: who says which of several outputs to one prompt is better. Every labeler sees texts, never token ids.

`rubric` is the simulated labeler (rlhf/rubric.py) with noise like a person's; `reward_model` ranks by a trained reward
model, `judge` by the answers of a language model (rlhf/judge_labeler.py). `make_labeler` is the one place that knows
their names. A file of rankings needs no labeler: the rank stage copies it. Deliberately not done: one noise level for
each labeler or prompt, and labelers that err together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.agreement import tally
from rlhf.functional.seeding import row_seed
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.rollout.probes import check_probes
from rlhf.rollout.scoring import scores
from rlhf.rubric import rubric_score

if TYPE_CHECKING:
    from rlhf.run.folder import RunFolder


class Output(NamedTuple):
    """One response as a labeler sees it."""

    text: str
    finished: bool  # whether the model ended it with EOS


class Labeler(Protocol):
    """Anything that ranks the outputs of a prompt; the same seed gives the same answer."""

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """One rank per output: 1 is best, equal ranks are a tie, no rank is left out."""
        ...

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """1 when a is better, 0 when b is, 0.5 for a tie."""
        ...


class RubricLabeler:
    """The rubric's score plus normal noise, drawn for each output from (seed, prompt, position) alone.

    Args:
        noise_sigma: deviation of the noise, in rubric points; 0 labels without noise.
        tie_margin: outputs whose noisy scores are no further than this from the best of their group tie with it.
    """

    def __init__(self, noise_sigma: float = 0.0, tie_margin: float = 0.0) -> None:
        self.noise_sigma, self.tie_margin = noise_sigma, tie_margin

    def utilities(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> list[float]:
        """Noisy scores, one per output."""
        return [
            rubric_score(prompt.text, output.text, output.finished)
            + self.noise_sigma * _standard_normal(seed, prompt.key, i)
            for i, output in enumerate(outputs)
        ]

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """Ranks by noisy score; see `Labeler.rank`."""
        return ranks_of(self.utilities(prompt, outputs, seed), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """See `Labeler.prefers`."""
        return preference(self.rank(prompt, (a, b), order_seed))


class RewardModelLabeler:
    """Ranks by a reward model's normalised score, without noise; only equal scores tie and the seed changes nothing."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int = 0) -> tuple[int, ...]:
        """Ranks by score; see `Labeler.rank`."""
        ids = encode_prompt(self.tokenizer, prompt)
        # Equal outputs are scored once: rows of one batch differ in their last bits, and equal outputs must tie.
        distinct = list(dict.fromkeys(outputs))
        pairs = [(ids, encode_response(self.tokenizer, text, finished)) for text, finished in distinct]
        by_output = dict(zip(distinct, scores(self.model, pairs).tolist(), strict=True))
        return ranks_of([by_output[output] for output in outputs])

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int = 0) -> float:
        """See `Labeler.prefers`."""
        return preference(self.rank(prompt, (a, b), order_seed))


def make_labeler(
    name: str, recipe: Recipe, run: RunFolder, noise_sigma: float | None = None, log: Path | None = None
) -> Labeler:
    """The labeler that a recipe names.

    Args:
        name: `rank.labeler` or `evaluate.labeler`.
        run: where the rank stage left its noise, and the reward stage its model.
        noise_sigma: the rubric's noise; None takes that of the rank stage (rank/summary.json), 0 when there is none.
        log: where a judge's answers are kept, and looked for.

    Raises:
        UserError: for a labeler that ranks nothing here (`file`, `human`), or a reward model that is not there.
    """
    if name == "rubric":
        return RubricLabeler(stored_noise(run) if noise_sigma is None else noise_sigma, recipe.rank.tie_margin)
    if name == "reward_model":
        return _reward_model_labeler(recipe, run)
    if name == "judge":
        from rlhf.judge import load_judge
        from rlhf.judge_labeler import JudgeLabeler

        return JudgeLabeler(load_judge(recipe, log), recipe.judge.tie_margin)
    if name == "file":
        raise UserError(
            "rankings from files are read, nothing is labelled", "rank.labeler", "name the files in data.rankings"
        )
    raise UserError(
        "people rank on the labelling page, which the rank stage serves",
        where="rank.labeler",
        fix="run the rank stage; or name files of rankings in data.rankings, with rank.labeler=file",
    )


def make_judge(recipe: Recipe, run: RunFolder) -> Labeler:
    """The evaluate stage's labeler, as noisy as the one that ranked the training data."""
    return make_labeler(recipe.evaluate.labeler, recipe, run, log=run.stage_dir("evaluate") / "judge.jsonl")


def stored_noise(run: RunFolder) -> float:
    """`noise_sigma` of rank/summary.json; 0 when the rank stage did not run or did not use the rubric."""
    path = run.path / "rank" / "summary.json"
    return float(json.loads(path.read_text()).get("noise_sigma") or 0.0) if path.exists() else 0.0


def ranks_of(utilities: Sequence[float], tie_margin: float = 0.0) -> tuple[int, ...]:
    """Ranks 1, 2, .. without gaps, best first; what lies within `tie_margin` of the best of a group joins the group."""
    ranks, rank, top = [0] * len(utilities), 0, math.inf
    for i in sorted(range(len(utilities)), key=lambda i: -utilities[i]):
        if rank == 0 or top - utilities[i] > tie_margin:
            rank, top = rank + 1, utilities[i]
        ranks[i] = rank
    return tuple(ranks)


def agreement(ranks_a: Sequence[int], ranks_b: Sequence[int]) -> tuple[int, int]:
    """(pairs ordered alike, pairs untied in both rankings) of one prompt's outputs."""
    counts = tally(ranks_a, ranks_b)
    return counts.alike, counts.alike + counts.opposed


def expected_agreement(groups: Sequence[Sequence[float]], sigma: float, tie_margin: float = 0.0) -> float:
    """Agreement of two independent noisy labelers over the pairs that both leave untied; nan when there is no pair.

    Noise on the gap d of a pair has deviation s = sigma sqrt(2). One labeler puts the better output first by more than
    the margin m with probability p = Phi((d - m) / s) and the other first with q = Phi((-d - m) / s); two labelers
    both order the pair with (p + q)^2 and agree with p^2 + q^2. The result is the ratio of the sums of these over all
    pairs. Without a margin that is the mean of p^2 + (1 - p)^2, and a pair without a gap agrees half of the time.
    Ties through a third output of the group are left out of account.

    Args:
        groups: noise-free scores, one list per prompt.
        sigma: deviation of the noise on each score; at 0 the limit of small noise.
    """
    gaps = [abs(a - b) for group in groups for a, b in combinations(group, 2)]
    agree = both = 0.0
    for gap in gaps:
        p, q = _normal_cdf(gap - tie_margin, sigma), _normal_cdf(-gap - tie_margin, sigma)
        agree, both = agree + p * p + q * q, both + (p + q) ** 2
    return agree / both if both > 0 else math.nan


def noise_for_agreement(groups: Sequence[Sequence[float]], target: float, tie_margin: float = 0.0) -> float:
    """The noise at which two labelers are expected to agree on the share `target` of untied pairs, by bisection.

    Returns 0 when even labelers without noise do not agree more than that, or when there is no pair with a gap.

    Args:
        groups: noise-free scores, one list per prompt.
        target: in (0.5, 1]; the paper's labelers agreed on 0.726 of pairs.
    """
    if not 0.5 < target <= 1:
        raise ValueError(f"agreement {target} is not in (0.5, 1]")
    if not any(a != b for group in groups for a, b in combinations(group, 2)):
        return 0.0

    def too_quiet(sigma: float) -> bool:
        # nan: the noise is so small that every pair ties.
        return not expected_agreement(groups, sigma, tie_margin) <= target

    if not too_quiet(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while too_quiet(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if too_quiet(middle) else (low, middle)
    return high


def _normal_cdf(distance: float, sigma: float) -> float:
    """Phi(distance / (sigma sqrt 2)); a step at 0 when there is no noise."""
    if sigma == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return 0.5 * (1 + math.erf(distance / (2 * sigma)))


def _standard_normal(seed: int, key: str, index: int) -> float:
    return float(np.random.Generator(np.random.Philox(key=row_seed(seed, "label", key, index))).standard_normal())


def preference(ranks: tuple[int, ...]) -> float:
    """1 when the first of two outputs ranks better, 0 when the second does, 0.5 for a tie."""
    return 0.5 if ranks[0] == ranks[1] else float(ranks[0] < ranks[1])


def _reward_model_labeler(recipe: Recipe, run: RunFolder) -> RewardModelLabeler:
    """Of the folder or Hub name in rank.reward_model, else of this run's reward stage."""
    if recipe.rank.reward_model:
        where = recipe.rank.reward_model
        model = load_reward_model(where, recipe.model)
    else:
        folder = run.require("reward", "model")
        where, model = str(folder), load_reward_model(folder, recipe.model)
        check_probes(model, folder)
    if recipe.run.device != "cpu" and torch.cuda.is_available():
        model = model.to("cuda")
    return RewardModelLabeler(model, load_tokenizer(where, recipe.model.prompt_format, recipe.model.trust_remote_code))
