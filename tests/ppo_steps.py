"""The gradients of both networks of PPO in one call, for tests that look at them together."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.experience import Experience
from rlhf.ppo_state import Ppo
from stages.ppo import policy_step, value_step


def ppo_step(ppo: Ppo, experience: Experience, minibatch: Sequence[int]) -> dict[str, float]:
    """Accumulate them, without the optimiser's step between that stages/ppo.py makes."""
    return policy_step(ppo, experience, minibatch) | value_step(ppo, experience, minibatch)
