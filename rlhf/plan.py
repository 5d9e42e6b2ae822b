"""The sizes that follow from a recipe by arithmetic, computed before anything is loaded.

Sizes divide exactly: a remainder is an error that names both fields and the nearest values that work, never a silently
smaller batch. Micro-batches change memory and speed only: losses are divided by the token count of the whole minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from rlhf.config import Recipe
from rlhf.errors import UserError


@dataclass(frozen=True)
class SftPlan:
    """Sizes of supervised fine-tuning; the number of steps needs the data."""

    processes: int
    batch_size: int  # sequences per optimiser step, over all processes
    micro_batch_size: int  # sequences per forward pass and process
    accumulation: int  # forward passes per optimiser step and process


@dataclass(frozen=True)
class RankPlan:
    """Sizes of sampling and ranking; 0 prompts means all, whose number is known once the data is read."""

    prompts: int
    outputs_per_prompt: int
    responses: int  # 0 if prompts is 0
    pairs_per_prompt: int  # K (K - 1) / 2, ties included


@dataclass(frozen=True)
class RewardPlan:
    """Sizes of reward-model training; the number of steps needs the rankings."""

    processes: int
    batch_size: int  # prompts per optimiser step, over all processes
    batch_per_process: int


@dataclass(frozen=True)
class PpoPlan:
    """Sizes of PPO, over all processes unless a comment says otherwise."""

    processes: int
    iterations: int  # rollouts, each of batch_size episodes
    batch_per_process: int  # episodes of one rollout on one process
    minibatches: int  # optimiser steps per pass over the batch
    minibatch_per_process: int
    micro_batches: int  # forward passes per minibatch and process
    steps_per_iteration: int  # minibatches x epochs
    steps: int  # optimiser steps of the whole stage
    response_tokens: int  # at most, per iteration
    ptx_rows_per_minibatch: int  # 0 without the pretraining term
    ptx_rows_per_process: int
    ptx_micro_batches: int  # forward passes per minibatch and process; the last may be smaller


@dataclass(frozen=True)
class RowLimit:
    """The longest row that a stage may put through a model, and the field of the recipe that allows it."""

    model: Literal["policy", "reward"]
    tokens: int
    field: str


def plan_sft(recipe: Recipe) -> SftPlan:
    """Return the sizes of SFT; raise UserError if batch_size does not divide by processes x micro_batch_size."""
    cfg, processes = recipe.sft, recipe_processes(recipe)
    accumulation = _accumulation("sft", cfg.batch_size, cfg.micro_batch_size, processes)
    return SftPlan(processes, cfg.batch_size, cfg.micro_batch_size, accumulation)


def plan_rank(recipe: Recipe) -> RankPlan:
    """Return the numbers of prompts, responses and pairs of the rank stage."""
    k = recipe.rank.outputs_per_prompt
    return RankPlan(recipe.rank.prompts, k, recipe.rank.prompts * k, k * (k - 1) // 2)


def plan_reward(recipe: Recipe) -> RewardPlan:
    """Return the sizes of reward-model training; raise UserError if batch_size does not divide by the processes."""
    size, processes = recipe.reward.batch_size, recipe_processes(recipe)
    return RewardPlan(processes, size, exact_div("reward.batch_size", size, "processes", processes))


def plan_ppo(recipe: Recipe) -> PpoPlan:
    """Return the sizes of PPO; raise UserError if episodes, a kind of batch or pretraining rows leave a remainder."""
    cfg, processes = recipe.ppo, recipe_processes(recipe)
    if cfg.minibatch_size > cfg.batch_size:
        what = f"ppo.minibatch_size {cfg.minibatch_size} is larger than ppo.batch_size {cfg.batch_size}"
        raise UserError(what, "ppo.minibatch_size", f"a minibatch is a part of the batch: at most {cfg.batch_size}")
    iterations = exact_div("ppo.episodes", cfg.episodes, "ppo.batch_size", cfg.batch_size)
    minibatches = exact_div("ppo.batch_size", cfg.batch_size, "ppo.minibatch_size", cfg.minibatch_size)
    per_process = exact_div("ppo.minibatch_size", cfg.minibatch_size, "processes", processes)
    micro_batches = _accumulation("ppo", cfg.minibatch_size, cfg.micro_batch_size, processes, "minibatch_size")
    ptx_rows = _ptx_rows(recipe, processes)
    return PpoPlan(
        processes=processes,
        iterations=iterations,
        batch_per_process=cfg.batch_size // processes,
        minibatches=minibatches,
        minibatch_per_process=per_process,
        micro_batches=micro_batches,
        steps_per_iteration=minibatches * cfg.epochs,
        steps=iterations * minibatches * cfg.epochs,
        response_tokens=cfg.batch_size * recipe.data.max_response_tokens,
        ptx_rows_per_minibatch=ptx_rows,
        ptx_rows_per_process=ptx_rows // processes,
        ptx_micro_batches=-(-(ptx_rows // processes) // cfg.micro_batch_size),
    )


def exact_div(name: str, value: int, by_name: str, by: int) -> int:
    """Return value / by; raise UserError with both names and the nearest values that divide if it is not whole."""
    if value % by == 0:
        return value // by
    below, above = value - value % by, value - value % by + by
    fix = f"{name}={' or '.join(str(v) for v in (below, above) if v)}"
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    smaller, larger = [d for d in divisors if d < by][-1:], [d for d in divisors if d > by][:1]
    fix += f", or {by_name}={' or '.join(str(d) for d in smaller + larger)}"
    raise UserError(f"{name} {value} does not divide by {by_name} {by}", f"{name} and {by_name}", fix)


def recipe_processes(recipe: Recipe) -> int:
    """Return how many processes the recipe asks for: launch.processes on every machine of launch.hostfile."""
    if not recipe.launch.hostfile:
        return recipe.launch.processes
    return recipe.launch.processes * len(read_hosts(recipe.launch.hostfile))


def read_hosts(path: str) -> list[str]:
    """Return the host names of a DeepSpeed hostfile (`host slots=N` on a line, # for comments) in order.

    Raises UserError for a file that cannot be read, another kind of line, or a file without hosts.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        what = f"cannot read the hostfile: {error}"
        raise UserError(what, "launch.hostfile", "give the path of a hostfile") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit():
            raise UserError(f"not a hostfile line: {line!r}", f"{path}, line {number}", "write `host slots=N`")
        hosts.append(words[0])
    if not hosts:
        raise UserError("the hostfile names no machine", path, "write `host slots=N`, one machine a line")
    return hosts


def row_limits(recipe: Recipe, stages: Sequence[str]) -> list[RowLimit]:
    """Return the longest rows that the given stages may put through the recipe's models, as its fields allow them."""
    data, variants = recipe.data, set(stages) & {"ppo-ptx", "ppo"}
    episode = data.max_prompt_tokens + data.max_response_tokens
    whole = "data.max_prompt_tokens + data.max_response_tokens"
    found = []
    sampled = "rank" in stages and recipe.rank.labeler != "file"
    if variants or sampled or set(stages) & {"sft", "evaluate"}:
        found.append(RowLimit("policy", episode, whole))
    if "sft" in stages and recipe.sft.packing:
        found.append(RowLimit("policy", recipe.sft.max_tokens, "sft.max_tokens"))
    if "ppo-ptx" in stages or ("evaluate" in stages and data.pretraining_heldout):
        found.append(RowLimit("policy", recipe.ppo.ptx_tokens, "ppo.ptx_tokens"))
    if "reward" in stages:
        found.append(RowLimit("reward", recipe.reward.max_tokens, "reward.max_tokens"))
    if variants:
        found.append(RowLimit("reward", episode, whole))
    return found


def as_launched(recipe: Recipe, processes: int | None) -> Recipe:
    """Return the recipe for the number of `processes` that the launcher started; results do not depend on it.

    `rlhf run` starts as many as `launch` says, other launchers decide for themselves. Raises UserError without a
    launcher (None), if the recipe is for several processes.
    """
    if processes is None and recipe_processes(recipe) > 1:
        raise UserError(
            f"the recipe is for {recipe_processes(recipe)} processes, and this program runs as one without a launcher",
            "launch.processes",
            "start it with `rlhf run`, `rlhf STAGE`, deepspeed or torchrun (on CPUs `accelerate launch` starts several "
            "with --use_deepspeed alone), or set launch.processes=1",
        )
    if processes in (None, recipe_processes(recipe)):
        return recipe
    launch = recipe.launch.model_copy(update={"processes": processes, "hostfile": "", "node_rank": -1})
    return recipe.model_copy(update={"launch": launch})


def _accumulation(section: str, batch: int, micro: int, processes: int, field: str = "batch_size") -> int:
    if processes == 1:
        return exact_div(f"{section}.{field}", batch, f"{section}.micro_batch_size", micro)
    per_process = exact_div(f"{section}.{field}", batch, "processes", processes)
    return exact_div(f"{section}.{field} / processes", per_process, f"{section}.micro_batch_size", micro)


def _ptx_rows(recipe: Recipe, processes: int) -> int:
    cfg = recipe.ppo
    if cfg.ptx_coef == 0:
        return 0
    # As a fraction of the decimal as written, so that 0.1 x 30 is 3 and not 3.0000000000000004.
    per_episode = Fraction(str(cfg.ptx_examples_per_episode))
    rows = per_episode * cfg.minibatch_size
    if rows.denominator == 1 and int(rows) % processes == 0:
        return int(rows)
    below = int(rows) // processes * processes
    good = [f"{float(Fraction(r, cfg.minibatch_size)):g}" for r in (below, below + processes) if r]
    each = f" for each of {processes} processes" if processes > 1 else ""
    raise UserError(
        f"ppo.ptx_examples_per_episode {cfg.ptx_examples_per_episode:g} x ppo.minibatch_size {cfg.minibatch_size} is"
        f" {float(rows):g} pretraining rows, not a whole number{each}",
        "ppo.ptx_examples_per_episode and ppo.minibatch_size",
        f"ppo.ptx_examples_per_episode={' or '.join(good)}",
    )
