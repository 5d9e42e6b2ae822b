"""What PPO learns from: a scored rollout with its rewards, advantages and returns.

All tensors are on the CPU; B episodes, R response positions, right-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.functional.ppo import explained_variance, kl_k1, kl_k3, length_mask, masked_mean, masked_sum
from rlhf.rollout.batches import Pair
from rlhf.rollout.sampling import Rollout


@dataclass
class ScoredEpisodes:
    """The episodes of an iteration with the results of the four networks."""

    pairs: list[Pair]  # (prompt ids, response ids), as sampled
    lengths: Tensor  # [B] int64, tokens of each response
    finished: Tensor  # [B] bool, whether the response ended with a stop id
    mask: Tensor  # [B, R] bool
    logprobs: Tensor  # [B, R] log pi_old(a_t | s_t)
    ref_logprobs: Tensor  # [B, R] log pi_ref(a_t | s_t)
    values: Tensor  # [B, R] V_old(s_t)
    scores: Tensor  # [B] r(x, y), normalised
    other_ends: int = 0  # responses that another id than the end of a turn has stopped
    sampler_gap: float | None = None  # nats per token between the sampler's log-probabilities and `logprobs`

    @classmethod
    def of(
        cls, rollout: Rollout, ref_logprobs: Sequence[Tensor], values: Sequence[Tensor], scores: Tensor
    ) -> ScoredEpisodes:
        """Join a rollout with its scoring results: log pi_ref [T_i] and V [T_i] of each episode, and scores r [B]."""
        width = rollout.response_ids.shape[1]
        return cls(
            pairs=rollout.pairs(),
            lengths=rollout.lengths,
            finished=rollout.finished,
            mask=length_mask(rollout.lengths, width),
            logprobs=rollout.logprobs,
            ref_logprobs=pad_rows(ref_logprobs, width),
            values=pad_rows(values, width),
            scores=scores,
            other_ends=rollout.other_ends(),
            sampler_gap=rollout.sampler_gap,
        )

    def kl_per_response(self) -> Tensor:
        """Return [B] nats: the k1 estimate summed over each response."""
        return torch.where(self.mask, kl_k1(self.logprobs, self.ref_logprobs), 0.0).sum(1)


@dataclass(kw_only=True)
class Experience(ScoredEpisodes):
    """Scored episodes with the rewards, advantages and returns of their tokens."""

    rewards: Tensor  # [B, R] R_t, whitened where asked
    totals: Tensor  # [B] sum of R_t over the response, before whitening
    advantages: Tensor  # [B, R] A_t, whitened
    returns: Tensor  # [B, R] targets of the value model


def pad_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return 1-D tensors as [len(rows), width], zero-padded on the right."""
    return torch.stack([torch.nn.functional.pad(row.float(), (0, width - len(row))) for row in rows])


def summary(experience: Experience) -> dict[str, float]:
    """Return the metrics of a batch that need no gradient; every mean is masked."""
    kl3 = masked_sum(kl_k3(experience.logprobs, experience.ref_logprobs), experience.mask) / len(experience.pairs)
    explained = explained_variance(experience.values, experience.returns, experience.mask)
    found = {
        "ppo/reward_score": float(experience.scores.mean()),
        "ppo/reward_total": float(experience.totals.mean()),
        "ppo/kl": float(experience.kl_per_response().mean()),
        "ppo/kl_k3": float(kl3),
        "ppo/value_mean": float(masked_mean(experience.values, experience.mask)),
        "ppo/value_explained_variance": float(explained),
        "ppo/response_length": float(experience.mask.sum(1).float().mean()),
        "ppo/finished_fraction": float(experience.finished.float().mean()),
    }
    if experience.other_ends:
        found["ppo/other_ends_fraction"] = experience.other_ends / len(experience.pairs)
    if experience.sampler_gap is not None:
        found["ppo/sampler_logprob_gap"] = experience.sampler_gap
    return found
