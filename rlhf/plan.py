"""Everything that follows from a recipe by arithmetic, computed once and shown before anything is loaded.

Sizes divide exactly: a remainder is an error that names both fields and the nearest values that work, never a silently
smaller batch. Micro-batches change memory and speed only; losses are divided by the token count of the whole minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from rlhf.config import NOT_MERGED, LabelSection, Recipe, settings_of
from rlhf.data.few_shot import check_judge
from rlhf.data.prompt_template import load_template
from rlhf.errors import UserError

ORDER = {"sft": 0, "rank": 1, "reward": 2, "ppo-ptx": 3, "ppo": 3, "evaluate": 4}  # what needs what


@dataclass(frozen=True)
class SftPlan:
    """Sizes of supervised fine-tuning; the number of steps needs the data."""

    processes: int
    batch_size: int  # sequences per optimiser step, over all processes
    micro_batch_size: int  # sequences per forward and process
    accumulation: int  # forwards per optimiser step and process


@dataclass(frozen=True)
class RankPlan:
    """Sizes of sampling and ranking; 0 prompts means all there are, counted once the data is read."""

    prompts: int
    outputs_per_prompt: int
    responses: int  # 0 while prompts is 0
    pairs_per_prompt: int  # K (K - 1) / 2, ties included


@dataclass(frozen=True)
class RewardPlan:
    """Sizes of reward-model training; the number of steps needs the rankings."""

    processes: int
    batch_size: int  # prompts per optimiser step, over all processes
    batch_per_process: int


@dataclass(frozen=True)
class PpoPlan:
    """Sizes of PPO; everything counts over all processes unless it says otherwise."""

    processes: int
    iterations: int  # rollouts of batch_size episodes
    batch_per_process: int  # episodes of one rollout on one process
    minibatches: int  # optimiser steps per pass over the batch
    minibatch_per_process: int
    micro_batches: int  # forwards per minibatch and process
    steps_per_iteration: int  # minibatches x epochs
    steps: int  # optimiser steps of the whole stage
    response_tokens: int  # at most, per iteration
    ptx_rows_per_minibatch: int  # 0 without the pretraining term
    ptx_rows_per_process: int
    ptx_micro_batches: int  # forwards per minibatch and process; the last may be smaller


def plan_sft(recipe: Recipe) -> SftPlan:
    """Raises UserError when sft.batch_size does not divide by processes x sft.micro_batch_size."""
    cfg, processes = recipe.sft, world_size(recipe)
    accumulation = _accumulation("sft", cfg.batch_size, cfg.micro_batch_size, processes)
    return SftPlan(processes, cfg.batch_size, cfg.micro_batch_size, accumulation)


def plan_rank(recipe: Recipe) -> RankPlan:
    """Prompts, responses and pairs of the rank stage."""
    k = recipe.rank.outputs_per_prompt
    return RankPlan(recipe.rank.prompts, k, recipe.rank.prompts * k, k * (k - 1) // 2)


def plan_reward(recipe: Recipe) -> RewardPlan:
    """Raises UserError when reward.batch_size does not divide by the number of processes."""
    size, processes = recipe.reward.batch_size, world_size(recipe)
    return RewardPlan(processes, size, exact_div("reward.batch_size", size, "processes", processes))


def plan_ppo(recipe: Recipe) -> PpoPlan:
    """Raises UserError when episodes, batch, minibatch, micro-batch or pretraining rows leave a remainder."""
    cfg, processes = recipe.ppo, world_size(recipe)
    if cfg.minibatch_size > cfg.batch_size:
        raise UserError(
            f"ppo.minibatch_size {cfg.minibatch_size} is larger than ppo.batch_size {cfg.batch_size}",
            "ppo.minibatch_size",
            f"a minibatch is a part of the batch: at most {cfg.batch_size}",
        )
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
    """value / by, or a UserError naming both fields and the nearest values of each that divide."""
    if value % by == 0:
        return value // by
    below, above = value - value % by, value - value % by + by
    fix = f"{name}={' or '.join(str(v) for v in (below, above) if v)}"
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    smaller, larger = [d for d in divisors if d < by][-1:], [d for d in divisors if d > by][:1]
    fix += f", or {by_name}={' or '.join(str(d) for d in smaller + larger)}"
    raise UserError(f"{name} {value} does not divide by {by_name} {by}", f"{name} and {by_name}", fix)


def world_size(recipe: Recipe) -> int:
    """Processes of the training stages: launch.processes on every machine of launch.hostfile."""
    if not recipe.launch.hostfile:
        return recipe.launch.processes
    return recipe.launch.processes * len(read_hosts(recipe.launch.hostfile))


def read_hosts(path: str) -> list[str]:
    """Names in a DeepSpeed hostfile (`host slots=N` on a line, # for comments), in order."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the hostfile: {error}", "launch.hostfile", "give the path of a hostfile"
        ) from None
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


def as_launched(recipe: Recipe, processes: int | None) -> Recipe:
    """The recipe for as many processes as there are: `launch` says how `rlhf run` starts them, another launcher decides
    itself, and the result does not depend on their number.

    Args:
        processes: the launcher's count; None when the program was started without one.

    Raises:
        UserError: without a launcher, when the recipe is for several processes.
    """
    if processes is None and world_size(recipe) > 1:
        raise UserError(
            f"the recipe is for {world_size(recipe)} processes, and this program runs as one without a launcher",
            "launch.processes",
            "start it with `rlhf run`, `rlhf STAGE`, deepspeed or torchrun (on CPUs `accelerate launch` starts several "
            "with --use_deepspeed alone), or set launch.processes=1",
        )
    if processes in (None, world_size(recipe)):
        return recipe
    launch = recipe.launch.model_copy(update={"processes": processes, "hostfile": "", "node_rank": -1})
    return recipe.model_copy(update={"launch": launch})


def check(recipe: Recipe, stages: Sequence[str] | None = None) -> None:
    """Rules between fields, for the given stages (default: run.stages). Raises UserError at the first one broken."""
    stages = list(recipe.run.stages if stages is None else stages)
    _check_order(stages)
    if recipe.launch.deepspeed_config and not Path(recipe.launch.deepspeed_config).expanduser().is_file():
        raise UserError("there is no such DeepSpeed file", "launch.deepspeed_config", "give the path of a JSON file")
    _check_launch(recipe)
    if "sft" in stages:
        plan_sft(recipe)
        if recipe.sft.pretraining_mix > 0:
            _need_data(recipe, "pretraining", "sft.pretraining_mix is above 0")
    if "rank" in stages:
        _check_rank(recipe)
    if "reward" in stages:
        plan_reward(recipe)
    if "ppo-ptx" in stages or "ppo" in stages:
        _check_ppo(recipe, "ppo-ptx" in stages)
    samples_there = recipe.ppo.rollout == "vllm" and recipe.model.peft.method not in NOT_MERGED
    if samples_there and set(stages) & {"ppo-ptx", "ppo", "evaluate"}:
        _check_vllm(recipe)
    if "evaluate" in stages:
        _need_data(recipe, "prompts_heldout", "evaluate samples from it")
        if recipe.evaluate.labeler == "judge":
            check_judge(recipe.judge)
        for name in recipe.evaluate.prompted:
            load_template(name, "answer")


def plan_rows(recipe: Recipe, stages: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(what, derived number with how it came about) for the given stages, to be shown as a table."""
    stages = list(recipe.run.stages if stages is None else stages)
    rows = [("model", f"{recipe.model.name}, {recipe.model.dtype}")]
    if recipe.model.peft.on:
        only = "" if recipe.reward_peft.on else "; all weights of reward and value model"
        rows.append(("trained", f"{settings_of(recipe.model.peft)}{only}"))
    rows.append(("processes", str(world_size(recipe))))
    if "sft" in stages:
        s = plan_sft(recipe)
        split = _split(s.processes, s.accumulation, s.micro_batch_size)
        step = f"{s.batch_size} sequences per optimiser step = {split}"
        rows.append(("sft", f"{step}, {_count(recipe.sft.epochs, 'epoch')}"))
    if "rank" in stages:
        r = plan_rank(recipe)
        prompts, responses = (f"{r.prompts}", f" = {r.responses} responses") if r.prompts else ("all", "")
        rows.append(("rank", f"{prompts} prompts x {r.outputs_per_prompt} outputs{responses}"))
        rows.append(("rank", f"{r.pairs_per_prompt} pairs per prompt, labeler {recipe.rank.labeler}"))
        if recipe.rank.labeler == "human":
            rows.append(("rank", _people(recipe.label)))
        if recipe.rank.labeler == "judge":
            rows.append(("rank", _judge(recipe)))
    if "reward" in stages:
        w = plan_reward(recipe)
        split = f"{_count(w.processes, 'process')} x {w.batch_per_process}"
        step = f"{w.batch_size} prompts per optimiser step = {split}, {_count(recipe.reward.epochs, 'epoch')}"
        rows.append(("reward", f"{step}, at most {recipe.reward.micro_tokens} tokens per forward"))
    if "ppo-ptx" in stages or "ppo" in stages:
        rows += _ppo_rows(recipe, [stage for stage in stages if stage.startswith("ppo")])
    return rows


# --- parts -----------------------------------------------------------------------------------------------------------


def _split(processes: int, micro_batches: int, size: int) -> str:
    return f"{_count(processes, 'process')} x {_count(micro_batches, 'micro-batch')} x {size}"


def _count(n: float, word: str) -> str:
    return f"{n:g} {word}" if n == 1 else f"{n:g} {word}{'es' if word.endswith(('s', 'tch')) else 's'}"


def _people(label: LabelSection) -> str:
    until = _count(label.rankings, "ranking") if label.rankings else "all that are wanted"
    several = min(label.opinions, len(label.labelers))
    shared = f"{label.overlap:.0%} of the prompts by {several} of them, " if several > 1 else ""
    return f"by {', '.join(label.labelers)}; {shared}goes on after {until}"


def _judge(recipe: Recipe) -> str:
    template, k = load_template(recipe.judge.template), recipe.rank.outputs_per_prompt
    questions = k * (k - 1) if template.kind == "pair" else k
    who = f"{recipe.judge.model or recipe.model.name}{' at ' * bool(recipe.judge.endpoint)}{recipe.judge.endpoint}"
    return f"{_count(questions, 'question')} per prompt to {who}, template {template.name}"


def _ppo_rows(recipe: Recipe, variants: list[str]) -> list[tuple[str, str]]:
    p, cfg, name = plan_ppo(recipe), recipe.ppo, ", ".join(variants)
    per_step = _split(p.processes, p.micro_batches, cfg.micro_batch_size)
    passes = f"{_count(p.minibatches, 'minibatch')} x {_count(cfg.epochs, 'epoch')}"
    rows = [
        (name, f"{cfg.episodes} episodes = {p.iterations} iterations x {cfg.batch_size}"),
        (name, f"{passes} = {p.steps_per_iteration} optimiser steps per iteration"),
        (name, f"{p.steps} optimiser steps in all, each {cfg.minibatch_size} episodes = {per_step}"),
        (name, f"at most {p.response_tokens} response tokens per iteration"),
    ]
    if "ppo-ptx" in variants:
        ptx = f"{p.ptx_rows_per_minibatch} pretraining rows of {cfg.ptx_tokens} tokens per step"
        how = f"{cfg.ptx_examples_per_episode:g} x {cfg.minibatch_size}, {_count(p.ptx_micro_batches, 'micro-batch')}"
        rows.append(("ppo-ptx", f"{ptx} = {how}"))
    return rows


def _accumulation(section: str, batch: int, micro: int, processes: int, field: str = "batch_size") -> int:
    if processes == 1:
        return exact_div(f"{section}.{field}", batch, f"{section}.micro_batch_size", micro)
    per_process = exact_div(f"{section}.{field}", batch, "processes", processes)
    return exact_div(f"{section}.{field} / processes", per_process, f"{section}.micro_batch_size", micro)


def _ptx_rows(recipe: Recipe, processes: int) -> int:
    cfg = recipe.ppo
    if cfg.ptx_coef == 0:
        return 0
    # The fraction of the decimal as written, so that 0.1 x 30 is 3 and not 3.0000000000000004.
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


def _check_launch(recipe: Recipe) -> None:
    launch, machines = recipe.launch, 1
    if launch.hostfile:
        machines = len(read_hosts(launch.hostfile))
    elif launch.node_rank >= 0:
        raise UserError("launch.node_rank is a place in a hostfile", "launch.hostfile", "give the hostfile")
    if launch.node_rank >= machines:
        raise UserError(
            f"launch.node_rank {launch.node_rank} is not of the {machines} machines in the hostfile",
            "launch.node_rank",
            f"the first is 0, the last {machines - 1}",
        )
    if launch.offload and not launch.deepspeed_config and launch.zero_stage < 2:
        raise UserError(
            f"ZeRO {launch.zero_stage} has no template with offload", "launch.offload", "set launch.zero_stage=2 or 3"
        )


def _check_order(stages: list[str]) -> None:
    for stage in stages:
        if stages.count(stage) > 1:
            raise UserError(f"{stage} is listed twice", "run.stages", "name every stage once")
    ordered = sorted(stages, key=ORDER.__getitem__)  # stable: the two variants of PPO may come in either order
    if ordered != stages:
        raise UserError("a stage comes before one that it needs", "run.stages", f"run.stages=[{','.join(ordered)}]")


def _check_rank(recipe: Recipe) -> None:
    cfg = recipe.rank
    if cfg.labeler == "file":
        _need_data(recipe, "rankings", "rank.labeler is file")
        return
    _need_data(recipe, "prompts", "rank samples from it")
    if cfg.labeler == "judge":
        check_judge(recipe.judge)
    if cfg.labeler == "reward_model" and not cfg.reward_model:
        raise UserError(
            "rank.labeler is reward_model, and no model is given", "rank.reward_model", "give a folder or a Hub name"
        )


def _check_ppo(recipe: Recipe, with_ptx: bool) -> None:
    cfg = recipe.ppo
    plan = plan_ppo(recipe)
    _need_data(recipe, "prompts", "PPO samples from it")
    if cfg.kl_control == "adaptive" and cfg.kl_coef == 0:
        raise UserError(
            "adaptive control multiplies ppo.kl_coef, and 0 stays 0", "ppo.kl_coef", "give a start value, as 0.02"
        )
    if not with_ptx:
        return
    if cfg.ptx_coef == 0:
        raise UserError(
            "ppo-ptx needs ppo.ptx_coef above 0", "ppo.ptx_coef and run.stages", "set it, or run ppo instead"
        )
    if plan.ptx_rows_per_minibatch == 0:
        raise UserError(
            "ppo-ptx needs ppo.ptx_examples_per_episode above 0", "ppo.ptx_examples_per_episode", "set it (paper: 8)"
        )
    _need_data(recipe, "pretraining", "ppo-ptx trains on it")


def _check_vllm(recipe: Recipe) -> None:
    url = recipe.launch.vllm_url
    if url:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url} is no URL of a server", "launch.vllm_url", "give it as http://HOST:PORT")
        return
    if find_spec("vllm") is None:
        raise UserError(
            "ppo.rollout is vllm, which is not installed here, and no server is named",
            "launch.vllm_url",
            "start a server in an environment that has vllm and give its URL, or ppo.rollout=native",
        )
    if world_size(recipe) > 1:
        raise UserError(
            f"vllm in process works with one process, and there are {world_size(recipe)}",
            "launch.vllm_url",
            "start a server and give its URL",
        )


def _need_data(recipe: Recipe, field: str, why: str) -> None:
    if not getattr(recipe.data, field):
        raise UserError(f"data.{field} is empty, and {why}", f"data.{field}", f"name a file: 'data.{field}=[FILE]'")
