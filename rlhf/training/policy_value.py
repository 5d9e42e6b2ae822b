"""Policy and value model under one engine.

A process has one DeepSpeed engine, so the two networks are in one module whose `forward` dispatches: every pass, PPO or
ptx, is one forward and one backward of the engine. Calling an inner model directly would skip the engine's hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from rlhf.rollout.batches import Pair, SequenceBatch
from rlhf.rollout.lm_head import head_chunks
from rlhf.rollout.scoring import response_logprobs, response_values

GroupNames = tuple[str, ...]  # ("policy",), ("value",) or both


class PpoForward(NamedTuple):
    """Results for each response token, flat [N]; None for a network that was not run."""

    logprobs: Tensor | None
    entropies: Tensor | None  # no gradient
    values: Tensor | None


class PolicyValue(nn.Module):
    """The two trained networks of PPO: a causal language model, and a model with a scalar head.

    `max_tokens` are, under ZeRO-3, which partitions the LM head, the most predicted tokens that a PPO and a pretraining
    micro-batch can have; else None. Each call of the head gathers it from all processes, so that all must call it
    equally often, however many tokens each of them has.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, max_tokens: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self._ppo_chunks, self._ptx_chunks = (head_chunks(n) for n in max_tokens) if max_tokens else (0, 0)

    def forward(
        self, what: GroupNames | Literal["ptx"], batch: SequenceBatch, temperature: float = 1.0
    ) -> PpoForward | Tensor:
        """Run the named networks on the responses of a batch, or the policy on pretraining text.

        Return a PpoForward; for "ptx" the negative log-likelihoods [N] of all tokens but the first of each row.
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
