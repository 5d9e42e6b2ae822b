"""The only place where the benchmarks call the product: every program of ours goes through these functions.

Nothing here is tuned for the benchmark; what stages/*.py do around their loops is done the same way.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import Shape
from benchmarks.measure import Order
from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Drops, read_demonstrations, read_prompts, read_rankings
from rlhf.data.text_blocks import demonstration_row
from rlhf.functional.seeding import row_seed
from rlhf.model_config import ModelSection
from rlhf.models import loading
from rlhf.rollout.experience import Experience
from rlhf.rollout.probes import write_probes
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.system.malloc import keep_freed_memory
from rlhf.training.engine import Engine, ParamGroup
from rlhf.training.ppo_state import Ppo, build
from rlhf.training.sft_trainer import build_trainer
from rlhf.training.zero_engine import make_engine
from stages import ppo as ppo_stage
from stages import reward as reward_stage
from stages import sft as sft_stage

NEVER = [-1]  # a stop id that no token has: every response gets its full length
NO_CLIP = 1e9  # TRL's PPO does not clip outside DeepSpeed; ours does the work and leaves the gradient as it is

keep_freed_memory()  # as rlhf.run.stage.run_stage does for every stage


def encoded_prompts(model: str) -> list[list[int]]:
    """Token ids of all embedded prompts, those of the demonstrations included."""
    tokenizer, drops = loading.load_tokenizer(model), Drops()
    prompts = read_prompts(["embedded:prompts"], drops)
    prompts += [row.prompt for row in read_demonstrations(["embedded:demonstrations"], drops)]
    return [list(ids) for ids in dict.fromkeys(tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts)]


def encoded_rankings(model: str) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of the embedded rankings: prompt and responses."""
    tokenizer = loading.load_tokenizer(model)
    return [
        (encode_prompt(tokenizer, row.prompt), [encode_response(tokenizer, text) for text in row.responses])
        for row in read_rankings(["embedded:rankings"], Drops())
    ]


def sft_rows(model: str) -> list[dict[str, list[int]]]:
    """The embedded demonstrations as the SFT stage trains them."""
    train, _ = sft_stage.load_demonstrations(Recipe(), loading.load_tokenizer(model), Drops())
    return [demonstration_row(row) for row in train]


def model_folder(name: str) -> str:
    """A model that the recipe can name, as a folder that the peers can load."""
    return str(loading.resolve_model(name))


def make_reward_model(policy: str, folder: Path, probes: list[tuple[list[int], list[int]]]) -> str:
    """A reward model with a random head that is not zero, made once."""
    if not folder.exists():
        torch.manual_seed(1)
        tokenizer = loading.load_tokenizer(policy)
        model = loading.new_reward_model(policy, ModelSection(), head_init="normal")
        loading.save_model(model, tokenizer, folder)
        write_probes(model, tokenizer, probes, folder)
    return str(folder)


def make_cut_policy(policy: str, folder: Path, layers: int) -> str:
    """The first `layers` layers of a policy, made once."""
    if not folder.exists():
        model = loading.load_policy(policy, ModelSection())
        loading.cut_layers(model, layers)
        loading.save_model(model, loading.load_tokenizer(policy), folder)
    return str(folder)


def ppo_recipe(order: Order) -> Recipe:
    """The order in our words; all weights are trained, and there is neither ptx nor an average."""
    longest, batch, lr, clip = max(map(len, order["prompts"])), order["batch"], order["lr"], order["clip"]
    section = {"episodes": batch * order["iterations"], "batch_size": batch, "minibatch_size": order["minibatch"]}
    section |= {"micro_batch_size": order["micro_batch"], "epochs": 1, "warmup_iterations": 0}
    section |= {"lr": lr, "value_lr": lr, "adam_beta2": order["adam_beta2"], "max_grad_norm": NO_CLIP}
    section |= {"clip": clip, "value_clip": clip, "vf_coef": 1.0, "kl_coef": order["kl_coef"], "lam": order["lam"]}
    section |= {"ptx_coef": 0.0, "ema_decay": 0.0}
    # A random value head moves far in its first steps; bfloat16 decodes and trains with other last bits.
    section |= {"max_kl": 1e6, "ratio_tolerance": 1e-3 if order["dtype"] == "float32" else 1.0}
    return Recipe.model_validate(
        {
            "run": {"name": "bench", "seed": order["seed"], "device": "cpu"},
            "model": {"name": order["model"], "dtype": order["dtype"]},
            "data": {"max_prompt_tokens": longest, "max_response_tokens": order["response_tokens"]},
            "ppo": section,
            "tracking": {"wandb": "disabled"},
        }
    )


def make_ppo(order: Order) -> Ppo:
    """A PPO run on the order's prompts whose responses never end early."""
    recipe = ppo_recipe(order)
    ppo = build(recipe, False, Path(order["model"]), Path(order["reward_model"]))
    ppo.prompts, ppo.stop_ids = order["prompts"], NEVER
    return ppo


def collect(ppo: Ppo, seconds: dict[str, float]) -> Experience:
    """The rollout and scoring phases of stages/ppo.py; their seconds are added."""
    begin = time.perf_counter()
    episodes = ppo_stage.rollout(ppo)
    sampled = time.perf_counter()
    experience = ppo_stage.advantages(ppo, ppo_stage.score(ppo, episodes))
    seconds["rollout"] = sampled - begin
    seconds["score"] = time.perf_counter() - sampled
    assert all(len(response) == ppo.recipe.data.max_response_tokens for _, response in experience.pairs)
    return experience


def train(ppo: Ppo, experience: Experience, seconds: dict[str, float]) -> None:
    """The update phase, all optimiser steps; its seconds are added."""
    begin = time.perf_counter()
    metrics = ppo_stage.update(ppo, experience)
    seconds["train"] = time.perf_counter() - begin
    ppo.end_iteration(metrics)


def lengths(experience: Experience) -> list[tuple[int, int]]:
    """(prompt tokens, response tokens) of every episode."""
    return [(len(prompt), len(response)) for prompt, response in experience.pairs]


def shape_of(ppo: Ppo) -> Shape:
    """The shape of the policy, which is the value model's too."""
    return Shape.of(ppo.networks.policy.config)


def sampler(order: Order) -> Any:
    """A function that samples the order's prompts once by the native loop; its argument numbers the round."""
    section = ModelSection(name=order["model"], dtype=order["dtype"])
    tokenizer, policy = loading.load_tokenizer(order["model"]), loading.load_policy(order["model"], section)

    def run(round_: int, new_tokens: int = order["new_tokens"]) -> None:
        prompts = order["prompts"]
        params = SamplingParams(new_tokens, 1.0, NEVER, batch_size=len(prompts))
        seeds = [row_seed(order["seed"], round_, i) for i in range(len(prompts))]
        rows = sample(policy, tokenizer, prompts, params, seeds=seeds)
        assert rows.response_ids.shape == (len(prompts), new_tokens)

    return run


class RewardTraining:
    """The reward stage's engine and step on the order's rankings."""

    def __init__(self, order: Order) -> None:
        model = {"name": order["model"], "dtype": order["dtype"]}
        section = {"batch_size": order["batch"], "micro_tokens": order["micro_tokens"]}
        section |= {"lr": order["lr"], "schedule": "constant"}
        self.recipe = Recipe.model_validate({"run": {"device": "cpu"}, "model": model, "reward": section})
        model = loading.load_reward_model(order["reward_model"], self.recipe.model)
        group = ParamGroup("reward", model, order["lr"], self.recipe.reward.max_grad_norm)
        self.engine: Engine = make_engine(reward_stage.ScoringModule(model), [group], self.recipe)
        self.groups = [
            reward_stage.Group([(g["prompt"], response) for response in g["responses"]], tuple(g["ranks"]))
            for g in order["groups"]
        ]
        self.pad_id = int(loading.load_tokenizer(order["model"]).pad_token_id)

    def losses(self) -> list[float]:
        """Loss of every prompt alone at the present weights."""
        found = [reward_stage.step(self.engine, [group], self.recipe, self.pad_id)[0] for group in self.groups]
        self.engine.adamw.zero_grad(set_to_none=True)
        return found

    def step(self, first: int, count: int) -> None:
        """One optimiser step on `count` prompts."""
        chosen = [self.groups[(first + i) % len(self.groups)] for i in range(count)]
        reward_stage.step(self.engine, chosen, self.recipe, self.pad_id)
        self.engine.step(("reward",))


def sft_trainer(order: Order, folder: Path, clock: Any) -> Any:
    """The SFT stage's trainer on the order's rows, with a clock where its reporter is."""
    run, model = {"device": "cpu", "seed": order["seed"]}, {"name": order["model"], "dtype": order["dtype"]}
    section = {"epochs": 1, "batch_size": order["batch"], "micro_batch_size": order["micro_batch"]}
    section |= {"lr": order["lr"], "schedule": "constant", "final_lr_fraction": 1.0}
    section |= {"packing": True, "max_tokens": order["max_tokens"]}
    recipe = Recipe.model_validate({"run": run, "model": model, "sft": section})
    tokenizer, policy = loading.load_tokenizer(order["model"]), loading.load_policy(order["model"], recipe.model)
    return build_trainer(policy, tokenizer, order["rows"], recipe, folder, clock)
