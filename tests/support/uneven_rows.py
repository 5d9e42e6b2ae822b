"""A job of support/rank_jobs.py: samples and scores rows that the processes cannot share out evenly.

`main(["OUT.json", "gather", "frozen"])` writes what each case gave; where the model lies and how it comes together must
not change it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config import LaunchSection, Recipe, RunSection
from rlhf.functional.seeding import row_seed
from rlhf.model_config import ModelSection
from rlhf.models.layers import decoder_layers
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.zero import frozen
from rlhf.rollout.sampling import Rollout, sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import token_logprobs
from rlhf.system.ranks import is_main_process

PROMPT, LONG = [5, 6, 7, 8], 128


def rows(rollout: Rollout) -> list[list[int]]:
    return [rollout.response(i) for i in range(len(rollout))]


def check_parts(policy: nn.Module, gather: str) -> None:
    """No weight is whole after loading; during a layer's forward, another layer is only where all are gathered once."""
    assert all(p.numel() == 0 < p.ds_numel for p in policy.parameters())
    seen: list[int] = []
    layers = decoder_layers(policy)
    first = list(layers[0].parameters())
    hook = layers[1].register_forward_pre_hook(lambda layer, _: seen.append(sum(p.numel() for p in first)))
    token_logprobs(policy, [(PROMPT, PROMPT)])
    hook.remove()
    whole = sum(p.ds_numel for p in layers[0].parameters())
    assert set(seen) <= {whole if gather == "once" else 0}, seen
    assert all(p.numel() == 0 for p in policy.parameters())


def main(arguments: list[str]) -> int:
    """Sample and score the cases below, the first process writes the results."""
    out, gather, where = arguments
    launch = LaunchSection(gather=gather, frozen=where)
    recipe = Recipe(run=RunSection(device="cpu"), model=ModelSection(name="tiny"), launch=launch)
    tokenizer = load_tokenizer("tiny")
    policy = frozen(recipe, torch.device("cpu"), lambda: load_policy("tiny", recipe.model, tokenizer=tokenizer))
    if where == "partitioned":
        check_parts(policy, gather)

    def draw(seeds: list[int], stops: list[int], longest: int, engine: Any = "native", size: int = 2) -> Rollout:
        params = SamplingParams(longest, 1.0, stops, engine, batch_size=size)
        return sample(policy, tokenizer, [PROMPT] * len(seeds), params, seeds=seeds)

    first = [r[0] for r in rows(draw([row_seed("uneven", i) for i in range(1000)], [], 1, size=250))]
    stop = max(set(first), key=first.count)
    short = [row_seed("uneven", i) for i, token in enumerate(first) if token == stop]
    others = [row_seed("uneven", i) for i, token in enumerate(first) if token != stop]
    long = [s for s, r in zip(others, rows(draw(others[:12], [stop], LONG, size=12)), strict=False) if len(r) == LONG]
    assert len(short) >= 4 and len(long) >= 4, (len(short), len(long))
    results = {
        # Every second row goes to the other process: one has the short ones, one the long ones.
        "1 and 128 tokens": rows(draw([s for pair in zip(short, long, strict=False) for s in pair][:8], [stop], LONG)),
        "128 and 1 tokens": rows(draw([s for pair in zip(long, short, strict=False) for s in pair][:8], [stop], LONG)),
        "an empty share": rows(draw(long[:1], [stop], LONG)),
        "does not divide": rows(draw([*short[:2], *long[:3]], [stop], LONG)),
    }
    pairs = [(PROMPT, ids[:n]) for ids, n in zip(results["does not divide"][2:] * 3, (1, 128, 40, 7, 90), strict=False)]
    for count in (1, 5):
        found = token_logprobs(policy, pairs[:count], tokens=64)
        results[f"scores of {count}"] = [row.tolist() for row in found]
    if gather == "once":
        results["generate"] = [len(rows(draw(long[:3], [stop], 8, "generate")))]
    if is_main_process():
        Path(out).write_text(json.dumps(results))
    return 0
