"""Time that each stage takes, from its arithmetic and the bytes it reads: an order of magnitude, with its assumptions.

Training and scoring are bound by arithmetic: 2 FLOPs a weight and token forward, 2 where the gradient passes through, 2
where it trains (6 N D for all weights), 2 more where activations are computed again (8 N D), and attention's products.
A decode step is bound by what it reads: all weights and the KV cache of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlhf.config import Recipe
from rlhf.costs.activation_memory import PassShape
from rlhf.costs.cards import Card
from rlhf.costs.communication import SHARE, exchange_seconds, gathering_traffic, training_traffic
from rlhf.costs.model_memory import policy_spec, reward_spec, sharding_of
from rlhf.costs.model_shapes import ModelSpec, Shapes, count
from rlhf.data.records import Drops, read_demonstrations, read_prompts, read_rankings
from rlhf.data.sources import local_path
from rlhf.plan import plan_ppo, plan_reward, plan_sft, recipe_processes

TRAINING, FORWARD, READING = 0.35, 0.4, 0.5  # share of the card's FLOP/s in training and scoring, of its bandwidth
THOUSAND = 1000  # rows that a time is given for where their number is not known before the data is read
ASSUMPTIONS = (
    f"{TRAINING:.0%} of the card's FLOP/s in training and {FORWARD:.0%} in scoring, {READING:.0%} of its bandwidth in "
    f"decoding; every prompt and response at its full length; {SHARE:.0%} of the links between cards, while nothing "
    "else is done; loading and saving left out"
)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage."""

    stage: str
    parts: dict[str, float]  # seconds of each of its tasks
    rows: int = 0  # examples that these are for; 0: the whole stage

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def forward_flops(spec: ModelSpec, tokens: float, context: int) -> float:
    """Return the FLOPs of a forward pass: 2 a weight and token, and attention over half the context on average."""
    return tokens * (2.0 * count(spec).total + _attention(spec, context) * spec.layers)


def training_flops(spec: ModelSpec, tokens: float, context: int, recompute: bool) -> float:
    """Return the FLOPs of forward and backward; with `recompute` (gradient checkpointing) of one more forward."""
    c = count(spec)
    weights = 2.0 * ((2 if recompute else 1) * c.total + c.through + c.trained)
    layers = (2 if recompute else 1) * spec.layers + 2 * spec.backward_layers
    return tokens * (weights + _attention(spec, context) * layers)


def decode_seconds(spec: ModelSpec, shape: PassShape, card: Card) -> float:
    """Return the seconds to sample a batch of responses: prompts at once, then one token of each row a step."""
    c, speed = count(spec), card.flops[spec.dtype] * FORWARD
    read = c.bytes + shape.rows * (shape.prompt + shape.response / 2) * c.kv_bytes
    step = max(read / (card.bandwidth * READING), shape.rows * 2.0 * c.total / speed)
    return forward_flops(spec, shape.rows * shape.prompt, shape.prompt) / speed + shape.response * step


def stage_time(recipe: Recipe, stage: str, shapes: Shapes, card: Card) -> StageTime:
    """Return the time of a stage on all of the recipe's processes, each on a card of its own, or all on one CPU."""
    make = {"sft": _sft, "rank": _rank, "reward": _reward, "evaluate": _evaluate}.get(stage)
    time = make(recipe, shapes, card) if make else _ppo(recipe, shapes, card, stage)
    share = 1 if card.is_gpu else recipe_processes(recipe)
    return replace(time, parts={name: seconds * share for name, seconds in time.parts.items()})


def _attention(spec: ModelSpec, context: int) -> float:
    width = spec.config.get_text_config().hidden_size
    return 2.0 * width * context  # two products of 2 d per pair, over half the pairs


def _lengths(recipe: Recipe) -> tuple[int, int]:
    return recipe.data.max_prompt_tokens, recipe.data.max_response_tokens


def _sft(recipe: Recipe, shapes: Shapes, card: Card) -> StageTime:
    spec, length = policy_spec(recipe, shapes, sft=True), min(recipe.sft.max_tokens, sum(_lengths(recipe)))
    whole = _known_rows(recipe.data.demonstrations, read_demonstrations)
    known = round(whole * (1 - recipe.data.validation_fraction))
    rows = known or THOUSAND
    tokens = rows * recipe.sft.epochs * length / (1 - recipe.sft.pretraining_mix) / recipe_processes(recipe)
    flops = training_flops(spec, tokens, length, recipe.launch.gradient_checkpointing)
    dtype = recipe.model.dtype  # mixed precision where the weights are float32
    steps = rows * recipe.sft.epochs / (1 - recipe.sft.pretraining_mix) / recipe.sft.batch_size
    traffic = steps * training_traffic(recipe, spec, plan_sft(recipe).accumulation)
    parts = {"train": flops / (card.flops[dtype] * TRAINING), "exchange": exchange_seconds(recipe, card, traffic)}
    return StageTime("sft", parts, 0 if known else THOUSAND)


def _rank(recipe: Recipe, shapes: Shapes, card: Card) -> StageTime:
    cfg = recipe.rank
    if cfg.labeler == "file":
        return StageTime("rank", {"reading files": 0.0})
    known = cfg.prompts or _known_rows(recipe.data.prompts, read_prompts)
    spec = policy_spec(recipe, shapes, trained=False)
    rows = (known or THOUSAND) * cfg.outputs_per_prompt
    sampling = SamplingWork(rows, cfg.batch_size, recipe.launch.frozen == "partitioned", -(-rows // cfg.batch_size))
    return StageTime("rank", _sampling(spec, recipe, card, sampling), 0 if known else THOUSAND)


def _reward(recipe: Recipe, shapes: Shapes, card: Card) -> StageTime:
    cfg, spec = recipe.reward, reward_spec(recipe, shapes)
    if recipe.rank.labeler == "file":
        known, length = _known_rows(recipe.data.rankings, read_rankings), cfg.max_tokens
    else:
        known = recipe.rank.prompts or _known_rows(recipe.data.prompts, read_prompts)
        length = min(cfg.max_tokens, sum(_lengths(recipe)))
    prompts = (known or THOUSAND) * cfg.epochs
    tokens = prompts * recipe.rank.outputs_per_prompt * length / recipe_processes(recipe)
    flops = training_flops(spec, tokens, length, recipe.launch.gradient_checkpointing)
    outputs = plan_reward(recipe).batch_per_process * recipe.rank.outputs_per_prompt
    passes = -(-outputs // max(1, cfg.micro_tokens // length))
    traffic = prompts / cfg.batch_size * training_traffic(recipe, spec, passes)
    parts = {"train": flops / (card.flops[spec.dtype] * TRAINING), "exchange": exchange_seconds(recipe, card, traffic)}
    return StageTime("reward", parts, 0 if known else THOUSAND)


def _ppo(recipe: Recipe, shapes: Shapes, card: Card, stage: str) -> StageTime:
    cfg, plan = recipe.ppo, plan_ppo(recipe)
    prompt, response = _lengths(recipe)
    policy, value = policy_spec(recipe, shapes), reward_spec(recipe, shapes)
    plain, reward = policy_spec(recipe, shapes, trained=False), reward_spec(recipe, shapes, trained=False)
    recompute, speed = recipe.launch.gradient_checkpointing, card.flops[recipe.model.dtype]
    tokens, context = plan.batch_per_process * (prompt + response), prompt + response
    passes = [plain, reward, reward] + ([plain] if recipe.model.dtype != "float32" else [])
    trained = sum(training_flops(spec, tokens * cfg.epochs, context, recompute) for spec in (policy, value))
    partitioned = recipe.launch.frozen == "partitioned"
    sampling = SamplingWork(cfg.batch_size, cfg.rollout_batch_size, sharding_of(recipe).stage == 3)
    parts = _sampling(plain, recipe, card, sampling)
    parts["score"] = sum(forward_flops(spec, tokens, context) for spec in passes) / (speed * FORWARD)
    parts["PPO steps"] = trained / (speed * TRAINING)
    batches = tokens / cfg.score_tokens
    traffic = gathering_traffic(recipe, plain, batches, sharding_of(recipe).stage == 3)
    traffic += sum(gathering_traffic(recipe, spec, batches, partitioned) for spec in (plain, reward))
    micro_batches = plan.micro_batches + (plan.ptx_micro_batches if stage == "ppo-ptx" else 0)
    for spec, forwards in ((policy, micro_batches), (value, plan.micro_batches)):
        traffic += plan.steps_per_iteration * training_traffic(recipe, spec, forwards)
    parts["exchange"] = exchange_seconds(recipe, card, traffic)
    if stage == "ppo-ptx":
        text = plan.ptx_rows_per_process * cfg.ptx_tokens * plan.steps_per_iteration
        flops = training_flops(policy, text, cfg.ptx_tokens, recompute)
        parts["pretraining steps"] = flops / (speed * TRAINING)
    return StageTime(stage, {name: seconds * plan.iterations for name, seconds in parts.items()})


def _evaluate(recipe: Recipe, shapes: Shapes, card: Card) -> StageTime:
    cfg, plain = recipe.evaluate, policy_spec(recipe, shapes, trained=False)
    known = cfg.prompts or _known_rows(recipe.data.prompts_heldout, read_prompts)
    aligned = [stage for stage in recipe.run.stages if stage.startswith("ppo")]
    policies = 1 + len(aligned) * (2 if cfg.ema and recipe.ppo.ema_decay else 1)
    rows = (known or THOUSAND) * cfg.samples_per_prompt
    tokens = rows * sum(_lengths(recipe)) / recipe_processes(recipe)
    reward = reward_spec(recipe, shapes, trained=False)
    flops = forward_flops(plain, tokens, sum(_lengths(recipe))) + forward_flops(reward, tokens, sum(_lengths(recipe)))
    sampling = SamplingWork(rows, recipe.ppo.rollout_batch_size, recipe.launch.frozen == "partitioned")
    parts = _sampling(plain, recipe, card, sampling)
    parts["score"] = flops / (card.flops[recipe.model.dtype] * FORWARD)
    parts = {name: seconds * policies for name, seconds in parts.items()}
    return StageTime("evaluate", parts, 0 if known else THOUSAND)


class SamplingWork(NamedTuple):
    """Responses that a stage samples at a time, shared out over the processes."""

    rows: int  # responses
    batch_size: int  # responses that a process samples together
    partitioned: bool  # the policy's weights are divided over the processes
    gathers: int = 1  # how often sampling starts anew, and gathers a partitioned policy


def _sampling(spec: ModelSpec, recipe: Recipe, card: Card, work: SamplingWork) -> dict[str, float]:
    """Return the seconds of sampling, and of gathering a partitioned policy for it."""
    rows = -(-work.rows // recipe_processes(recipe))
    prompt, response = _lengths(recipe)
    shape = PassShape(min(work.batch_size, rows), prompt, response)
    batches = -(-rows // shape.rows)
    traffic = gathering_traffic(recipe, spec, batches * (1 + response), work.partitioned)
    traffic *= work.gathers if recipe.launch.gather == "once" else 1
    sampling = decode_seconds(spec, shape, card) * batches
    return {"sampling": sampling, "gathering": exchange_seconds(recipe, card, traffic)}


def _known_rows(sources: list[str], read: Callable[[list[str], Drops], list[Any]]) -> int:
    """Return the number of rows in some data files, 0 when one of them is not on this machine."""
    return 0 if any(local_path(source) is None for source in sources) else len(read(sources, Drops()))
