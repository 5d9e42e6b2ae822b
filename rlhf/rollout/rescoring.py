"""Log-probabilities of a rollout by the pass that trains, and their gap to the sampler's own.

In float32 the native loop's are those of the training pass. In bfloat16, and with vLLM in any dtype, other kernels
sampled. They are then computed again, because the ratio of the first minibatch must be 1 by the training pass, and a KL
must not count another kernel's rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.rollout.sampling import Rollout
from rlhf.rollout.scoring import token_logprobs

# Largest mean gap to vLLM, in nats per token. One model computed in two ways differs by 1e-6 in float32 and by about
# 0.01 in bfloat16; another model, or another temperature, differs by a multiple of this limit.
GAP_LIMIT = 0.1


def rescore(recipe: Recipe, rollout: Rollout, policy: nn.Module, temperature: float) -> None:
    """Put the training pass's log-probabilities into a rollout of `ppo.rollout`, where another pass has sampled.

    The rollout's `sampler_gap` is then the mean absolute gap between the two. All processes must call. Raises UserError
    if the gap to vLLM's is above GAP_LIMIT, because other weights must have sampled then.
    """
    if recipe.model.dtype == "float32" and recipe.ppo.rollout != "vllm":
        return
    rows = [row.cpu() for row in token_logprobs(policy, rollout.pairs(), temperature, recipe.ppo.score_tokens)]
    gap = float((torch.cat(rows) - torch.cat([rollout.logprobs[i, : len(r)] for i, r in enumerate(rows)])).abs().mean())
    if recipe.ppo.rollout == "vllm" and not gap <= GAP_LIMIT:  # so written that nan fails too
        raise UserError(
            f"vLLM's log-probabilities are {gap:.2g} nats per token from the policy's own",
            where="ppo.rollout",
            fix="likely causes: the server did not take the weights (see its log), computes in another type (--dtype), "
            "or gives log-probabilities of another kind: start it with --logprobs-mode processed_logprobs",
        )
    for i, row in enumerate(rows):
        rollout.logprobs[i, : len(row)] = row
    rollout.sampler_gap = gap
