"""Log-probabilities of a rollout by the pass that trains, and how far the sampler's own lie from those.

The native loop's are the training pass's in float32. In bfloat16, and with vLLM in any type, other kernels sampled: the
ratio of the first minibatch must be 1 by the training pass, and a KL must not count another kernel's rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.rollout.sampling import Rollout
from rlhf.rollout.scoring import token_logprobs

# Nats per token, on average, from vLLM. One model computed in two ways is 1e-6 apart in float32 and about 0.01 in
# bfloat16; another model, or another temperature, is a multiple of this.
GAP_LIMIT = 0.1


def rescore(recipe: Recipe, rollout: Rollout, policy: nn.Module, temperature: float) -> float | None:
    """Put the training pass's log-probabilities into a rollout of `ppo.rollout`, where they are not there already.

    All processes must call.

    Returns:
        The mean absolute gap between the two, None where one pass is both.

    Raises:
        UserError: when vLLM's are further than GAP_LIMIT from the policy's: then something else sampled.
    """
    if recipe.model.dtype == "float32" and recipe.ppo.rollout != "vllm":
        return None
    rows = [row.cpu() for row in token_logprobs(policy, rollout.pairs(), temperature, recipe.ppo.score_tokens)]
    gap = float((torch.cat(rows) - torch.cat([rollout.logprobs[i, : len(r)] for i, r in enumerate(rows)])).abs().mean())
    if recipe.ppo.rollout == "vllm" and not gap <= GAP_LIMIT:  # nor where it is no number
        raise UserError(
            f"vLLM's log-probabilities are {gap:.2g} nats per token from the policy's own",
            where="ppo.rollout",
            fix="likely causes: the server did not take the weights (see its log), computes in another type (--dtype), "
            "or gives log-probabilities of another kind: start it with --logprobs-mode processed_logprobs",
        )
    for i, row in enumerate(rows):
        rollout.logprobs[i, : len(row)] = row
    return gap
