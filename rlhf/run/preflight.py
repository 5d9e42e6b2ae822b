"""Check a recipe before a stage starts, and show its plan as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.config import LabelSection, Recipe
from rlhf.data.few_shot import check_judge
from rlhf.data.prompt_template import load_template
from rlhf.errors import UserError
from rlhf.model_config import BUILT_IN, UNMERGEABLE, settings_of
from rlhf.plan import plan_ppo, plan_rank, plan_reward, plan_sft, read_hosts, recipe_processes, row_limits
from rlhf.stage_table import STAGES

SHORTEST_CONTEXT = 1024  # positions of the built-in model that has the fewest


def check(recipe: Recipe, stages: Sequence[str] | None = None) -> None:
    """Check the rules between fields for the given stages (default: run.stages); raise UserError if one is broken."""
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
    if "reward" in stages and recipe.reward.train:
        plan_reward(recipe)
    if "ppo-ptx" in stages or "ppo" in stages:
        _check_ppo(recipe, "ppo-ptx" in stages)
    samples_there = recipe.ppo.rollout == "vllm" and recipe.model.peft.method not in UNMERGEABLE
    if samples_there and set(stages) & {"ppo-ptx", "ppo", "evaluate"}:
        _check_vllm(recipe)
    if "evaluate" in stages:
        _need_data(recipe, "prompts_heldout", "evaluate samples from it")
        if recipe.evaluate.labeler == "judge":
            check_judge(recipe.judge)
        for name in recipe.evaluate.prompted:
            load_template(name, "answer")
    _check_models(recipe, stages)


def plan_rows(recipe: Recipe, stages: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Return rows (name, sizes and how they are computed) about the given stages for a table."""
    stages = list(recipe.run.stages if stages is None else stages)
    rows = [("model", f"{recipe.model.name}, {recipe.model.dtype}")]
    if recipe.model.peft.on:
        only = "" if recipe.reward_peft.on else "; all weights of reward and value model"
        rows.append(("trained", f"{settings_of(recipe.model.peft)}{only}"))
    rows.append(("processes", str(recipe_processes(recipe))))
    if "sft" in stages:
        sft = plan_sft(recipe)
        split = _split(sft.processes, sft.accumulation, sft.micro_batch_size)
        step = f"{sft.batch_size} sequences per optimiser step = {split}"
        rows.append(("sft", f"{step}, {_count(recipe.sft.epochs, 'epoch')}"))
    if "rank" in stages:
        rank = plan_rank(recipe)
        prompts, responses = (f"{rank.prompts}", f" = {rank.responses} responses") if rank.prompts else ("all", "")
        rows.append(("rank", f"{prompts} prompts x {rank.outputs_per_prompt} outputs{responses}"))
        rows.append(("rank", f"{rank.pairs_per_prompt} pairs per prompt, labeler {recipe.rank.labeler}"))
        if recipe.rank.labeler == "human":
            rows.append(("rank", _people(recipe.label)))
        if recipe.rank.labeler == "judge":
            rows.append(("rank", _judge(recipe)))
    if "reward" in stages and not recipe.reward.train:
        rows.append(("reward", f"{recipe.reward.model} as it is"))
    elif "reward" in stages:
        reward = plan_reward(recipe)
        split = f"{_count(reward.processes, 'process')} x {reward.batch_per_process}"
        step = f"{reward.batch_size} prompts per optimiser step = {split}, {_count(recipe.reward.epochs, 'epoch')}"
        rows.append(("reward", f"{step}, at most {recipe.reward.micro_tokens} tokens per forward"))
    if "ppo-ptx" in stages or "ppo" in stages:
        rows += _ppo_rows(recipe, [stage for stage in stages if stage.startswith("ppo")])
    return rows


def _split(processes: int, micro_batches: int, size: int) -> str:
    return f"{_count(processes, 'process')} x {_count(micro_batches, 'micro-batch')} x {size}"


def _count(n: float, word: str) -> str:
    return f"{n:g} {word}" if n == 1 else f"{n:g} {word}{'es' if word.endswith(('s', 'tch')) else 's'}"


def _people(label: LabelSection) -> str:
    until = _count(label.rankings, "ranking") if label.rankings else "all of them"
    several = min(label.opinions, len(label.labelers))
    shared = f"{label.overlap:.0%} of the prompts by {several} of them, " if several > 1 else ""
    return f"by {', '.join(label.labelers)}; {shared}continues after {until}"


def _judge(recipe: Recipe) -> str:
    template, k = load_template(recipe.judge.template), recipe.rank.outputs_per_prompt
    questions = k * (k - 1) if template.kind == "pair" else k
    who = f"{recipe.judge.model or recipe.model.name}{' at ' * bool(recipe.judge.endpoint)}{recipe.judge.endpoint}"
    return f"{_count(questions, 'question')} per prompt to {who}, template {template.name}"


def _ppo_rows(recipe: Recipe, variants: list[str]) -> list[tuple[str, str]]:
    plan, cfg, name = plan_ppo(recipe), recipe.ppo, ", ".join(variants)
    per_step = _split(plan.processes, plan.micro_batches, cfg.micro_batch_size)
    passes = f"{_count(plan.minibatches, 'minibatch')} x {_count(cfg.epochs, 'epoch')}"
    rows = [
        (name, f"{cfg.episodes} episodes = {plan.iterations} iterations x {cfg.batch_size}"),
        (name, f"{passes} = {plan.steps_per_iteration} optimiser steps per iteration"),
        (name, f"{plan.steps} optimiser steps in all, each {cfg.minibatch_size} episodes = {per_step}"),
        (name, f"at most {plan.response_tokens} response tokens per iteration"),
    ]
    if "ppo-ptx" in variants:
        ptx = f"{plan.ptx_rows_per_minibatch} pretraining rows of {cfg.ptx_tokens} tokens per step"
        how = f"{cfg.ptx_examples_per_episode:g} x {cfg.minibatch_size}"
        rows.append(("ppo-ptx", f"{ptx} = {how}, {_count(plan.ptx_micro_batches, 'micro-batch')}"))
    return rows


def _check_models(recipe: Recipe, stages: list[str]) -> None:
    """Look at the models, unless they are built in and every row fits the shortest context of these."""
    judge = "" if recipe.judge.endpoint else recipe.judge.model
    named = {recipe.model.name, judge, recipe.rank.reward_model, recipe.reward.model}
    longest = max((limit.tokens for limit in row_limits(recipe, stages)), default=0)
    if named <= {*BUILT_IN, "", "sft"} and longest + recipe.model.peft.virtual_tokens <= SHORTEST_CONTEXT:
        return
    from rlhf.models.model_check import check_models  # imports torch and transformers: seconds

    check_models(recipe, stages)


def _check_launch(recipe: Recipe) -> None:
    launch, machines = recipe.launch, 1
    if launch.hostfile:
        machines = len(read_hosts(launch.hostfile))
    elif launch.node_rank >= 0:
        raise UserError("launch.node_rank is an index into a hostfile", "launch.hostfile", "give the hostfile")
    if launch.node_rank >= machines:
        what = f"launch.node_rank {launch.node_rank} is none of the {machines} machines in the hostfile"
        raise UserError(what, "launch.node_rank", f"the first is 0, the last {machines - 1}")
    if launch.offload and not launch.deepspeed_config and launch.zero_stage < 2:
        what = f"ZeRO {launch.zero_stage} has no template with offload"
        raise UserError(what, "launch.offload", "set launch.zero_stage=2 or 3")


def _check_order(stages: list[str]) -> None:
    for stage in stages:
        if stages.count(stage) > 1:
            raise UserError(f"{stage} is listed twice", "run.stages", "name every stage once")
    # The sort is stable, so the two variants of PPO may come in either order.
    ordered = sorted(stages, key=lambda stage: STAGES[stage].level)
    if ordered != stages:
        raise UserError("a stage comes before another that it needs", "run.stages", f"run.stages=[{','.join(ordered)}]")


def _check_rank(recipe: Recipe) -> None:
    cfg = recipe.rank
    if cfg.labeler == "file":
        _need_data(recipe, "rankings", "rank.labeler is file")
        return
    _need_data(recipe, "prompts", "rank samples from it")
    if cfg.labeler == "judge":
        check_judge(recipe.judge)
    if cfg.labeler == "reward_model" and not cfg.reward_model:
        what = "rank.labeler is reward_model, and no model is given"
        raise UserError(what, "rank.reward_model", "give a folder or a Hub name")


def _check_ppo(recipe: Recipe, with_ptx: bool) -> None:
    cfg = recipe.ppo
    plan = plan_ppo(recipe)
    _need_data(recipe, "prompts", "PPO samples from it")
    if cfg.kl_control == "adaptive" and cfg.kl_coef == 0:
        what = "adaptive control multiplies ppo.kl_coef, and 0 stays 0"
        raise UserError(what, "ppo.kl_coef", "give an initial value, as 0.02")
    if not with_ptx:
        return
    if cfg.ptx_coef == 0:
        where = "ppo.ptx_coef and run.stages"
        raise UserError("ppo-ptx needs ppo.ptx_coef above 0", where, "set it, or run ppo instead")
    if plan.ptx_rows_per_minibatch == 0:
        where = "ppo.ptx_examples_per_episode"
        raise UserError(f"ppo-ptx needs {where} above 0", where, "set it (paper: 8)")
    _need_data(recipe, "pretraining", "ppo-ptx trains on it")


def _check_vllm(recipe: Recipe) -> None:
    url = recipe.launch.vllm_url
    if not url:
        fix = "start a server in an environment that has vllm and give its URL, or ppo.rollout=native"
        raise UserError("ppo.rollout is vllm, and no server is named", "launch.vllm_url", fix)
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no URL of a server", "launch.vllm_url", "give it as http://HOST:PORT")


def _need_data(recipe: Recipe, field: str, why: str) -> None:
    if not getattr(recipe.data, field):
        raise UserError(f"data.{field} is empty, and {why}", f"data.{field}", f"name a file: 'data.{field}=[FILE]'")
