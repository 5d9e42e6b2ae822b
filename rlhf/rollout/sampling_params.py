"""What every sampling engine is asked for, and what it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf.config import LaunchSection, Recipe, RolloutEngine

Response = tuple[list[int], list[float]]  # ids of the sampled tokens, and the log-probability of each in nats


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled."""

    max_new_tokens: int
    temperature: float  # 0 is greedy decoding; log-probabilities are then those at temperature 1
    stop_ids: Sequence[int]  # tokens that end a response and belong to it; the first is the end of a turn
    engine: RolloutEngine = "native"
    batch_size: int = 64  # rows that are decoded together, or requests in flight at a vLLM server
    launch: LaunchSection = field(default_factory=LaunchSection)  # says where the vLLM server is

    @classmethod
    def from_recipe(cls, recipe: Recipe, temperature: float, stop_ids: Sequence[int]) -> SamplingParams:
        """Return how PPO and evaluate sample responses: by the engine of `ppo.rollout`, up to the recipe's limit."""
        return cls(
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            engine=recipe.ppo.rollout,
            batch_size=recipe.ppo.rollout_batch_size,
            launch=recipe.launch,
        )
