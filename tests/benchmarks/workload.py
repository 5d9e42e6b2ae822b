"""The work that both sides get: the same models, token ids, sizes and rates, as JSON-able orders."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.measure import Order

PROMPT_TOKENS = 40  # prompts of about this length are taken
RATES = {"lr": 1e-5, "adam_beta2": 0.95, "clip": 0.2, "kl_coef": 0.05, "lam": 0.95, "seed": 1}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `FULL` is the workload of the README's figures, `QUICK` a smaller one."""

    episodes: int
    minibatch: int
    micro_batch: int
    response_tokens: int
    iterations: int
    many_iterations: int  # of the run that looks for a slow-down
    rollout_batch: int
    new_tokens: int
    rounds: int
    reward_ks: tuple[int, ...]
    reward_prompts: int  # per optimiser step
    reward_steps: int
    memory_ks: tuple[int, ...]
    sft_rows: int
    growth_lengths: tuple[int, ...]
    growth_batches: tuple[int, ...]
    growth_depths: tuple[int, ...]
    growth_depth: int  # of lengths and batches
    vllm_compiles: bool  # minutes of start-up for a faster decode


FULL = Sizes(
    episodes=32,
    minibatch=8,
    micro_batch=8,
    response_tokens=48,
    iterations=3,
    many_iterations=10,
    rollout_batch=32,
    new_tokens=64,
    rounds=3,
    reward_ks=(4, 9),
    reward_prompts=2,
    reward_steps=2,
    memory_ks=(2, 4, 9, 16),
    sft_rows=96,
    growth_lengths=(32, 128, 512),
    growth_batches=(8, 16, 32, 64),
    growth_depths=(6, 12, 30),
    growth_depth=30,
    vllm_compiles=True,
)
QUICK = Sizes(
    episodes=8,
    minibatch=4,
    micro_batch=4,
    response_tokens=16,
    iterations=2,
    many_iterations=0,
    rollout_batch=32,
    new_tokens=16,
    rounds=1,
    reward_ks=(4,),
    reward_prompts=1,
    reward_steps=1,
    memory_ks=(),
    sft_rows=28,
    growth_lengths=(32, 64),
    growth_batches=(),
    growth_depths=(6, 12),
    growth_depth=6,
    vllm_compiles=False,
)


class Workload:
    """Orders for every program; models are made once in `folder`."""

    def __init__(self, folder: Path, sizes: Sizes, model: str) -> None:
        self.folder, self.sizes, self.model = folder, sizes, ours.model_folder(model)
        self.models = folder / "models" / Path(self.model).name
        nearest = sorted(ours.encoded_prompts(self.model), key=lambda ids: abs(len(ids) - PROMPT_TOKENS))
        self.prompts = nearest[: max(96, sizes.rollout_batch)]
        probes = [(self.prompts[0], self.prompts[1])]
        self.reward_model = ours.make_reward_model(self.model, self.models / "reward", probes)

    def ppo(self, dtype: str, iterations: int) -> Order:
        """PPO iterations."""
        s = self.sizes
        given = {"model": self.model, "reward_model": self.reward_model, "prompts": self.prompts, "dtype": dtype}
        batches = {"batch": s.episodes, "minibatch": s.minibatch, "micro_batch": s.micro_batch}
        return RATES | given | batches | {"response_tokens": s.response_tokens, "iterations": iterations}

    def rollouts(self, dtype: str) -> Order:
        """Rounds of sampling one batch."""
        s = self.sizes
        given = {"model": self.model, "prompts": self.prompts[: s.rollout_batch], "dtype": dtype, "seed": RATES["seed"]}
        return given | {"new_tokens": s.new_tokens, "rounds": s.rounds, "compile": s.vllm_compiles}

    def rankings(self, k: int, count: int) -> list[dict[str, Any]]:
        """Embedded prompts with K outputs each, in a drawn order; other prompts' outputs fill up where K is large."""
        rng, whole = random.Random(k), ours.encoded_rankings(self.model)
        others = [ids for _, responses in whole for ids in responses]
        groups = []
        for prompt, responses in whole[:count]:
            outputs = (responses + rng.sample(others, k))[:k]
            groups.append({"prompt": prompt, "responses": outputs, "ranks": rng.sample(range(1, k + 1), k)})
        return groups

    def reward(self, k: int, losses: bool) -> Order:
        """Steps of the reward model on rankings of K outputs."""
        s = self.sizes
        return RATES | {
            "model": self.model,
            "reward_model": self.reward_model,
            "dtype": "float32",
            "groups": self.rankings(k, s.reward_prompts * 2),
            "batch": s.reward_prompts,
            "micro_batch": 1,  # a prompt's pairs are a batch that a pairwise trainer can hold in memory, even at K = 9
            # Ours: a pass holds no more, whatever K is. For memory by K so few that two outputs fill it.
            "micro_tokens": 1024 if losses else 128,
            "steps": s.reward_steps,
            "losses": losses,
        }

    def sft(self) -> Order:
        """One pass over demonstrations."""
        rows = ours.sft_rows(self.model)[: self.sizes.sft_rows]
        given = {"model": self.model, "dtype": "float32", "rows": rows}
        return RATES | given | {"batch": 4, "micro_batch": 2, "max_tokens": 256}

    def growth(self, batch: int, response_tokens: int, depth: int) -> Order:
        """One PPO iteration of a given size; micro-batches of about equal token counts."""
        probes = [(self.prompts[0], self.prompts[1])]
        policy = ours.make_cut_policy(self.model, self.models / f"depth-{depth}", depth)
        reward = ours.make_reward_model(policy, self.models / f"reward-{depth}", probes)
        micro = max(1, 8 * (PROMPT_TOKENS + 48) // (PROMPT_TOKENS + response_tokens))
        micro = 1 << (micro.bit_length() - 1)  # a power of two divides the minibatch
        given = {"model": policy, "reward_model": reward, "prompts": self.prompts, "dtype": "float32"}
        batches = {"batch": batch, "minibatch": 8, "micro_batch": min(8, micro)}
        return RATES | given | batches | {"response_tokens": response_tokens, "iterations": 2}
