"""Policy and value model under one engine.

DeepSpeed drives one engine a process, so the two networks sit in one module whose `forward` dispatches: every pass, PPO
or ptx, is one forward of the engine and one backward. Calling an inner model directly would skip the engine's hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from rlhf.rollout.batches import Pair, SequenceBatch
from rlhf.rollout.lm_head import head_chunks
from rlhf.rollout.scoring import response_logprobs, response_values

Networks = tuple[str, ...]  # of "policy" and "value"


class PpoForward(NamedTuple):
    """Per response token, flat [N]; None of a network that was not asked for."""

    logprobs: Tensor | None
    entropies: Tensor | None  # no gradient
    values: Tensor | None


class PolicyValue(nn.Module):
    """The two trained networks of PPO.

    Args:
        policy: a causal language model.
        value: a model with a scalar head.
        most_tokens: predicted tokens of the largest PPO and of the largest pretraining micro-batch, where the LM head
            is partitioned (ZeRO-3). All processes gather it together in every call, so they must call it equally often,
            however many tokens each of them has. None where every process has the whole head.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, most_tokens: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self._ppo_chunks, self._ptx_chunks = (head_chunks(n) for n in most_tokens) if most_tokens else (0, 0)

    def forward(
        self, what: Networks | Literal["ptx"], batch: SequenceBatch, temperature: float = 1.0
    ) -> PpoForward | Tensor:
        """Run the networks that `what` names on the responses of a batch, or the policy on pretraining text.

        Returns:
            A PpoForward of the networks; for "ptx" the negative log-likelihoods [N] of all tokens but the first of each
            row.
        """
        if what == "ptx":
            return -response_logprobs(self.policy, batch, temperature, self._ptx_chunks)[0]
        logprobs = entropies = values = None
        if "policy" in what:
            logprobs, entropies = response_logprobs(self.policy, batch, temperature, self._ppo_chunks)
        if "value" in what:
            values = response_values(self.value, batch)
        return PpoForward(logprobs, entropies, values)


def text_pairs(rows: Sequence[Sequence[int]]) -> list[Pair]:
    """Return pretraining rows as pairs: every token but the first is predicted, as a response to the first."""
    return [(row[:1], row[1:]) for row in rows]
