"""A trained reward model as labeler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.labeling.base import Output, preference, ranks_of
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.rollout.probes import check_probes
from rlhf.rollout.scoring import scores

if TYPE_CHECKING:
    from rlhf.run.folder import RunFolder


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
    return RewardModelLabeler(model, load_tokenizer(where, recipe.model))
