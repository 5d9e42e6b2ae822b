"""What PPO learns from: a scored rollout with its rewards, advantages and returns.

All tensors are on the CPU; B episodes, R response positions, right-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.functional.ppo import (
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    length_mask,
    masked_mean,
    masked_sum,
    per_token_rewards,
    whiten,
)
from rlhf.rollout.batches import Pair
from rlhf.rollout.sampling import Rollout


@dataclass
class Experience:
    """One iteration's episodes."""

    pairs: list[Pair]  # (prompt ids, response ids)
    finished: Tensor  # [B] bool
    mask: Tensor  # [B, R] bool
    logprobs: Tensor  # [B, R] log pi_old(a_t | s_t)
    ref_logprobs: Tensor  # [B, R] log pi_ref(a_t | s_t)
    values: Tensor  # [B, R] V_old(s_t)
    scores: Tensor  # [B] r(x, y), normalised
    rewards: Tensor  # [B, R] R_t, whitened where asked
    totals: Tensor  # [B] sum of R_t over the response, before whitening
    advantages: Tensor  # [B, R] A_t, whitened
    returns: Tensor  # [B, R] targets of the value model

    def kl_per_response(self) -> Tensor:
        """[B] nats: the k1 estimate summed over each response."""
        return torch.where(self.mask, kl_k1(self.logprobs, self.ref_logprobs), 0.0).sum(1)


def pad_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """1-D tensors as [len(rows), width], zero-padded on the right."""
    return torch.stack([torch.nn.functional.pad(row.float(), (0, width - len(row))) for row in rows])


def make_experience(
    rollout: Rollout,
    ref_logprobs: Sequence[Tensor],
    values: Sequence[Tensor],
    scores: Tensor,
    *,
    kl_coef: float,
    missing_eos_penalty: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> Experience:
    """Rewards, advantages (GAE, whitened over the batch) and returns from the passes over a rollout."""
    width = rollout.response_ids.shape[1]
    mask = length_mask(rollout.lengths, width)
    ref, value = pad_rows(ref_logprobs, width), pad_rows(values, width)
    rewards = per_token_rewards(
        rollout.logprobs, ref, scores, rollout.lengths, rollout.finished, kl_coef, missing_eos_penalty
    )
    totals = rewards.sum(1)  # zero on padding
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, value, rollout.lengths, gamma, lam)
    return Experience(
        pairs=rollout.pairs(),
        finished=rollout.finished,
        mask=mask,
        logprobs=rollout.logprobs,
        ref_logprobs=ref,
        values=value,
        scores=scores,
        rewards=rewards,
        totals=totals,
        advantages=whiten(advantages, mask),
        returns=returns,
    )


def summary(experience: Experience) -> dict[str, float]:
    """The metrics of a batch that need no gradient; every mean is masked."""
    kl3 = masked_sum(kl_k3(experience.logprobs, experience.ref_logprobs), experience.mask) / len(experience.pairs)
    return {
        "ppo/reward_score": float(experience.scores.mean()),
        "ppo/reward_total": float(experience.totals.mean()),
        "ppo/kl": float(experience.kl_per_response().mean()),
        "ppo/kl_k3": float(kl3),
        "ppo/value_mean": float(masked_mean(experience.values, experience.mask)),
        "ppo/value_explained_variance": float(
            explained_variance(experience.values, experience.returns, experience.mask)
        ),
        "ppo/response_length": float(experience.mask.sum(1).float().mean()),
        "ppo/finished_fraction": float(experience.finished.float().mean()),
    }
