"""Policy and value model under one engine.

DeepSpeed drives one engine a process, so the two networks sit in one module whose `forward` dispatches: every pass, PPO
or ptx, is one forward of the engine and one backward. Calling an inner model directly would skip the engine's hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from rlhf.rollout.batches import Pair, SequenceBatch
from rlhf.rollout.scoring import response_logprobs, response_values

Networks = tuple[Literal["policy", "value"], ...]


class PpoForward(NamedTuple):
    """Per response token, flat [N]; None of a network that was not asked for."""

    logprobs: Tensor | None
    entropies: Tensor | None  # no gradient
    values: Tensor | None


class PolicyValue(nn.Module):
    """The two trained networks of PPO."""

    def __init__(self, policy: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self, what: Networks | Literal["ptx"], batch: SequenceBatch, temperature: float = 1.0, pieces: int = 0
    ) -> PpoForward | Tensor:
        """Networks: a PpoForward of them. `ptx`: negative log-likelihoods [N] of all tokens but the first of each row.

        `pieces`: in how many calls the LM head runs under ZeRO-3, where all processes gather it together each time: one
        number for all of them, which does not follow from the tokens of each. Else 0.
        """
        logprobs = entropies = values = None
        if what == "ptx" or "policy" in what:
            logprobs, entropies = response_logprobs(self.policy, batch, temperature, pieces)
            if what == "ptx":
                return -logprobs
        if "value" in what:
            values = response_values(self.value, batch)
        return PpoForward(logprobs, entropies, values)


def text_pairs(rows: Sequence[Sequence[int]]) -> list[Pair]:
    """Pretraining rows as pairs: every token but the first is predicted, as a response to the first."""
    return [(row[:1], row[1:]) for row in rows]
