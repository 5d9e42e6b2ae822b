"""Sample from a small model on a few short prompts."""

from __future__ import annotations

from rlhf.functional.seeding import row_seed
from rlhf.rollout.sampling import Rollout, sample
from rlhf.rollout.sampling_params import SamplingParams
from support.small_models import EOS


class Tokenizer:
    """Stand in for a tokenizer with the two members that sampling needs."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids if i != EOS)


PROMPTS = [[5, 6, 7], [10], [15, 16, 17, 18, 19], [3, 4], [21, 22, 23]]


def run(model, prompts=PROMPTS, seed=1, engine="native", **options) -> Rollout:
    """Sample a response of at most 12 tokens to each prompt; `options` replace the defaults of its parameters."""
    defaults = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": [EOS], "batch_size": 64}
    params = SamplingParams(engine=engine, **(defaults | options))
    return sample(model, Tokenizer(), prompts, params, seeds=[row_seed(seed, i) for i in range(len(prompts))])
