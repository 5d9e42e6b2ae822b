"""What a PPO iteration logs: the means over its optimiser steps, samples, and its perf/ and memory/ metrics.

For every phase the log has the FLOPs and bytes that one process needs at the least, and the highest that the machine
reaches: rlhf/costs/roofline.py turns them into the least time that the phase could have taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rlhf.models.flops import ModelCost, PassSize, model_cost, pass_size
from rlhf.rollout.batches import Pair
from rlhf.rollout.experience import Experience
from rlhf.rollout.sampling import Rollout
from rlhf.system.distributed import processes, shard
from rlhf.system.machine_peaks import machine_peaks
from rlhf.system.phase_timer import PaddingCounts
from rlhf.system.ranks import is_main_process
from rlhf.training.ppo_state import Ppo

STEP_BYTES = 28  # of a weight in AdamW: gradient read; weight, two moments read and written. In bfloat16 just as many
AVERAGE_BYTES = 12  # of a weight in the average: both read, one written


def mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means over the optimiser steps; of ppo/ratio_max the largest, and ratio_error is left out."""
    history: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for name, value in step.items():
            history[name].append(value)
    means = {name: sum(values) / len(values) for name, values in history.items() if name != "ratio_error"}
    return means | {"ppo/ratio_max": max(history["ppo/ratio_max"])}


def sample_rows(ppo: Ppo, episodes: Rollout, experience: Experience) -> list[list[str | float]]:
    """Return prompt, response, score and KL in nats of the first ppo.samples_logged episodes."""
    count = min(ppo.recipe.ppo.samples_logged, len(episodes))
    kl, texts = experience.kl_per_response(), episodes.texts(ppo.tokenizer)
    return [
        [ppo.tokenizer.decode(episodes.prompt(i)), texts[i], float(experience.scores[i]), float(kl[i])]
        for i in range(count)
    ]


def performance(ppo: Ppo, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the metrics of the iteration that ends now; `pairs` are its (prompt ids, response ids), of all processes.

    A checkpoint that was written since the last call counts for this one.
    """
    peaks = machine_peaks(ppo.engine.device, next(ppo.networks.parameters()).dtype)
    measured, cfg = ppo.phases.collect(), ppo.recipe.ppo
    lengths = [(len(prompt), len(response)) for prompt, response in pairs]
    response_tokens, tokens = sum(response for _, response in lengths), sum(map(sum, lengths))
    costs, seconds = iteration_costs(ppo, pairs, measured.batches), measured.seconds
    found = measured.metrics() | costs
    found["perf/rollout_tokens_per_s"] = response_tokens / seconds["rollout"]
    found["perf/train_tokens_per_s"] = tokens * cfg.epochs / seconds["train"]
    found["perf/score_tokens_per_s"] = tokens / seconds["score"]
    if ppo.ptx_coef > 0:
        text = ppo.plan.steps_per_iteration * ppo.plan.ptx_rows_per_minibatch * cfg.ptx_tokens
        found["perf/ptx_tokens_per_s"] = text / seconds["ptx"]
    updating = seconds["train"] + seconds["ptx"] + seconds["optimizer"]
    flops = costs["perf/flops_train"] + costs["perf/flops_ptx"]
    found["perf/mfu"] = flops / updating / peaks["perf/peak_flops"]
    found |= {"perf/processes": float(processes()), "perf/gpu": float(ppo.engine.device.type == "cuda")}
    return found | peaks | {"memory/peak_gb": ppo.phases.peak_gb()}


def iteration_costs(ppo: Ppo, pairs: Sequence[Pair], batches: dict[str, PaddingCounts]) -> dict[str, float]:
    """Return perf/flops_PART and perf/bytes_PART of this process (parts by phase: rlhf/costs/roofline.py).

    Weights are read once in every forward pass, and again in a backward pass where the gradient goes through; what
    is between the operations of a pass is left out, so the bytes are a bound from below.
    """
    cfg, networks = ppo.recipe.ppo, ppo.networks
    policy, value = model_cost(networks.policy), model_cost(networks.value)
    plain, reward = model_cost(ppo.reference), model_cost(ppo.reward_model)
    share = 1 / processes()
    lengths = [(len(prompt), len(response)) for prompt, response in pairs]
    whole = _scaled(pass_size(lengths), share)
    costs = decoding_costs(policy, pairs, cfg.rollout_batch_size)
    if ppo.recipe.model.dtype != "float32" or cfg.rollout == "vllm":
        costs["perf/flops_rescore"] = policy.forward(whole)
        costs["perf/bytes_rescore"] = float(policy.weight_bytes)
    judged = whole._replace(heads=len(pairs) * share)
    costs["perf/flops_score"] = plain.forward(whole) + value.forward(whole) + reward.forward(judged)
    passes = batches["score"].number / 3 if "score" in batches else 1
    costs["perf/bytes_score"] = passes * (plain.weight_bytes + value.weight_bytes + reward.weight_bytes)
    costs["perf/flops_train"] = cfg.epochs * sum(cost.training(whole) for cost in (policy, value))
    # Where the networks take turns, each goes through every micro-batch by itself.
    turns = len(ppo.engine.groups_in_turn)
    passes = batches["train"].number / turns if "train" in batches else ppo.plan.steps_per_iteration
    costs["perf/bytes_train"] = passes * sum(_training_bytes(cost) for cost in (policy, value))
    costs |= {"perf/flops_ptx": 0.0, "perf/bytes_ptx": 0.0}
    if ppo.ptx_coef > 0:
        rows = ppo.plan.steps_per_iteration * ppo.plan.ptx_rows_per_process
        costs["perf/flops_ptx"] = policy.training(_scaled(pass_size([(1, cfg.ptx_tokens - 1)]), rows))
        passes = batches["ptx"].number if "ptx" in batches else ppo.plan.steps_per_iteration
        costs["perf/bytes_ptx"] = passes * _training_bytes(policy)
    # ZeRO 1 to 3 divide the optimiser's work; without it every process does it all.
    stepped = (policy.parameters + value.parameters) * (share if ppo.engine.stage else 1)
    averaged = policy.parameters if cfg.ema_decay > 0 and is_main_process() else 0
    each = STEP_BYTES * stepped + AVERAGE_BYTES * averaged
    costs["perf/bytes_optimizer"] = ppo.plan.steps_per_iteration * each
    return costs


def decoding_costs(policy: ModelCost, pairs: Sequence[Pair], batch_size: int) -> dict[str, float]:
    """Return what sampling costs this process: a pass over the prompts, then one per further token of the longest row.

    Every pass reads the weights, and the keys and values of every unfinished row. A prompt that a batch has several
    times is prefilled once. perf/decode_steps is the number of passes, and perf/decode_rows the sum of their rows.
    """
    mine = shard(sorted(pairs, key=lambda pair: len(pair[0])))
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    prompts = [len(p) for batch in batches for p in {tuple(prompt) for prompt, _ in batch}]
    steps = sum(max(len(response) for _, response in batch) - 1 for batch in batches)
    rows = sum(len(response) - 1 for _, response in mine)
    # Token s of a response goes through after it is drawn, and sees the prompt and s tokens.
    seen = sum((len(r) - 1) * (len(p) + len(r) / 2) for p, r in mine)
    prefill = PassSize(sum(prompts), len(prompts), sum(n * (n + 1) / 2 for n in prompts))
    return {
        "perf/prefill_tokens": float(prefill.tokens),
        "perf/decode_steps": float(steps),
        "perf/decode_rows": float(rows),
        "perf/flops_prefill": policy.forward(prefill),
        "perf/bytes_prefill": float(len(batches) * policy.weight_bytes),
        "perf/flops_decode": policy.forward(PassSize(rows, rows, seen)),
        "perf/bytes_decode": float(steps * policy.weight_bytes + seen * policy.kv_bytes),
    }


def _scaled(work: PassSize, factor: float) -> PassSize:
    return PassSize(*(part * factor for part in work))


def _training_bytes(cost: ModelCost) -> float:
    """Return a micro-batch's bytes: weights read forward, and backward where gradients pass; gradients written."""
    each = cost.weight_bytes / max(1, cost.layers + cost.head)
    return cost.weight_bytes + (cost.through + cost.head_through) * each + cost.gradient_bytes
