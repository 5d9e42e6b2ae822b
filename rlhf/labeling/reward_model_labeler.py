"""A trained reward model as labeler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from rlhf.run.folder import RunFolder


class RewardModelLabeler:
    """Ranks by a reward model's normalised score, without noise. Only equal scores tie; the seed has no effect."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int = 0) -> tuple[int, ...]:
        """Return the ranks of the outputs by score; see `Labeler`."""
        ids = encode_prompt(self.tokenizer, prompt)
        # Equal outputs must tie, but rows of one batch differ in their last bits: each distinct output is scored once.
        distinct = list(dict.fromkeys(outputs))
        pairs = [(ids, encode_response(self.tokenizer, text, finished)) for text, finished in distinct]
        by_output = dict(zip(distinct, scores(self.model, pairs).tolist(), strict=True))
        return ranks_of([by_output[output] for output in outputs])

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int = 0) -> float:
        """Return 1, 0 or 0.5 by the ranks of the two outputs; see `Labeler`."""
        return preference(self.rank(prompt, (a, b), order_seed))


def load_reward_model_labeler(recipe: Recipe, run: RunFolder) -> RewardModelLabeler:
    """Load the reward model named in rank.reward_model (a folder or Hub name), or else that of the run's reward stage.

    Raises UserError when there is no such model, or it does not score its probes as it did when it was saved.
    """
    if where := recipe.rank.reward_model:
        section = recipe.model.in_its_own_format()
        model = load_reward_model(where, section)
    else:
        where, section = str(run.require("reward", "model")), recipe.reward_format
        model = load_reward_model(where, section)
        check_probes(model, Path(where))
    if recipe.run.device != "cpu" and torch.cuda.is_available():
        model = model.to("cuda")
    return RewardModelLabeler(model, load_tokenizer(where, section))
