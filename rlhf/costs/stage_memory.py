"""Memory that each stage needs on one process, by component, from the recipe and the shapes of its models.

A stage is a sequence of phases (sampling, scoring, training, the optimiser's step). Some components are there all the
time, others for a phase; the peak is that of the largest phase. What is kept whole and what is partitioned follows
rlhf/training/engine.py, rlhf/training/zero_engine.py and DeepSpeed 0.19; `held` is the one place that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhf.config import TRAINS_BASE_WEIGHTS, UNMERGEABLE, PeftSection, Recipe
from rlhf.costs.activation_memory import Footprint, decoding_pass, scoring_pass, training_pass
from rlhf.costs.cards import Card
from rlhf.costs.model_shapes import ModelSpec, Shapes, count
from rlhf.models.peft.shared_base import all_share_base, policies_share_base
from rlhf.models.zero import settings
from rlhf.plan import plan_ppo, recipe_processes

LIBRARIES = {"sft": 560e6, "rank": 385e6, "reward": 420e6, "ppo": 430e6, "evaluate": 385e6}  # measured, on Linux
# Share of what comes and goes that the allocator holds besides; on a CPU measured: TRL's tiles leave more holes.
UNUSED_CPU, UNUSED_CPU_SFT, UNUSED_GPU = 0.25, 0.5, 0.1
DEEPSPEED, HOOKS = 60e6, 90e6  # more, with several processes; under ZeRO-3 also TRL, which SFT has anyway; measured
BUCKET, LIVE = 5e8, 1e9  # DeepSpeed's defaults: numbers in a reduction buffer, and gathered ones that stay
TILE = (4096, 32768)  # tokens and vocabulary that TRL's loss treats at a time
REWARD = "weights: reward model"
TILES_ON_CPU = 8.25  # tiles alive in its backward, where no kernel fuses the operations; counted in its code


@dataclass(frozen=True)
class Component:
    """A component; `host`: on a GPU it lies in the memory of the machine; `mapped`: it is a file's, no allocator's."""

    name: str
    bytes: float
    host: bool = False
    mapped: bool = False


@dataclass(frozen=True)
class StageMemory:
    """A stage's components in bytes per process.

    Attributes:
        always: components that are there in every phase.
        phases: those of each phase besides.
    """

    stage: str
    on_gpu: bool
    always: tuple[Component, ...]
    phases: dict[str, tuple[Component, ...]]

    def bytes_in(self, phase: str) -> float:
        """Bytes of a phase, on the device where there is one."""
        return sum(part.bytes for part in (*self.always, *self.phases[phase]) if not (self.on_gpu and part.host))

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.bytes_in)

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return self.bytes_in(self.peak_phase)

    @property
    def host(self) -> float:
        """Bytes in the machine's memory on behalf of a GPU process, at the most."""
        kept, phases = ([p for p in parts if p.host] for parts in (self.always, sum(self.phases.values(), ())))
        return sum(p.bytes for p in kept) + max((p.bytes for p in phases), default=0.0) if self.on_gpu else 0.0

    def components(self) -> dict[str, float]:
        """Each component at its largest; those of different phases are not there at the same time."""
        sizes = {part.name: part.bytes for part in self.always}
        for parts in self.phases.values():
            for part in parts:
                sizes[part.name] = max(sizes.get(part.name, 0.0), part.bytes)
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed divides what is trained; stage 0 with one process, which runs without it."""

    stage: int
    processes: int
    bucket: float
    buckets: int  # reduction buffers
    offload: bool  # of the optimiser
    offload_weights: bool


@dataclass(frozen=True)
class TrainedState:
    """Bytes per process of a trained model."""

    weights: float
    gradients: float
    optimiser: float
    reduction: float  # buffers that gradients are summed over processes in
    gathered: float  # partitioned weights that are whole while they are used in training
    step: float  # temporary, in the optimiser's step


def sharding_of(recipe: Recipe) -> Sharding:
    """Of the recipe's DeepSpeed file and number of processes."""
    processes = recipe_processes(recipe)
    if processes == 1:
        return Sharding(0, 1, 0, 0, False, False)
    zero = settings(recipe).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    return Sharding(
        stage,
        processes,
        float(zero.get("reduce_bucket_size", BUCKET)),
        2 if stage == 2 and zero.get("overlap_comm") else 1,
        zero.get("offload_optimizer", {}).get("device", "none") != "none",
        zero.get("offload_param", {}).get("device", "none") != "none",
    )


def trained_state(spec: ModelSpec, sharding: Sharding, on_gpu: bool) -> TrainedState:
    """What a trained model takes, partitioned as ZeRO does.

    AdamW keeps two float32 moments, and float32 copies of weights that are bfloat16. ZeRO 1 and 2 step copies of the
    weights in any type.
    """
    c = count(spec)
    size = c.trained_bytes / max(1, c.trained)  # bytes of a trained weight
    copies = 4 if size < 4 or sharding.stage in (1, 2) else 0
    parts = sharding.processes if sharding.stage else 1
    optimiser = (8 + copies) * c.trained / parts
    # The buffers are allocated whole; on a CPU pages that are never written to take no memory.
    used = sharding.bucket * sharding.buckets if on_gpu else min(sharding.bucket, c.trained)
    reduction = 0.0 if sharding.processes == 1 else (used if sharding.stage else min(sharding.bucket, c.trained)) * size
    if sharding.stage:  # DeepSpeed reduces a flattened copy of the buffer; to parts, gloo makes another
        copies_of_it = 2 if sharding.stage == 3 and not on_gpu else 1
        reduction += copies_of_it * min(sharding.bucket, c.trained) * size
    gradients = c.trained_bytes / (parts if sharding.stage > 1 else 1)  # added up in the type of the weights
    # torch steps a GPU's tensors in groups that have temporary copies, a CPU's one after the other.
    step = 4 * c.trained / parts if on_gpu and not sharding.offload else 8 * c.largest / parts
    if copies and sharding.stage == 0 or sharding.stage in (1, 2):
        step += 4 * c.trained / parts  # gradients as float32, or flattened
    weights = c.bytes / parts if sharding.stage == 3 else float(c.trained_bytes if spec.shares_base else c.bytes)
    gathered = min(c.bytes, LIVE * c.bytes / c.total) if sharding.stage == 3 else 0.0
    return TrainedState(weights, gradients, optimiser, reduction, gathered, step)


def frozen_weights(spec: ModelSpec, recipe: Recipe, name: str) -> tuple[Component, float]:
    """A frozen model's weights where launch.frozen puts them, and the bytes that are added while it is used."""
    size, processes = float(count(spec).bytes), recipe_processes(recipe)
    if recipe.launch.frozen == "cpu":
        return Component(name, size, host=True), size
    if recipe.launch.frozen == "partitioned" and processes > 1:
        return Component(name, size / processes), gathered_bytes(spec, recipe)
    return Component(name, size), 0.0


def gathered_bytes(spec: ModelSpec, recipe: Recipe) -> float:
    """Bytes of partitioned weights that are gathered for sampling or scoring: all, or what is outside the layers and
    one layer."""
    c = count(spec)
    if recipe.launch.gather == "once":
        return float(c.bytes)
    return c.bytes * (c.total - (spec.layers - 1) * c.layer) / c.total


def stage_memory(recipe: Recipe, stage: str, shapes: Shapes, card: Card) -> StageMemory:
    """Memory of a stage on each of the recipe's processes.

    Args:
        stage: sft, rank, reward, ppo-ptx, ppo or evaluate.

    Raises:
        UserError: sizes that do not divide by the number of processes.
    """
    name = "ppo" if stage.startswith("ppo") else stage
    base = card.base or _libraries(name, sharding_of(recipe))
    label = "CUDA context and buffers" if card.is_gpu else "Python and libraries"
    make = {"sft": _sft, "rank": _rank, "reward": _reward, "ppo": _ppo, "evaluate": _evaluate}[name]
    always, phases = make(recipe, shapes, card.is_gpu, stage == "ppo-ptx")
    share = UNUSED_GPU if card.is_gpu else UNUSED_CPU_SFT if stage == "sft" else UNUSED_CPU

    def allocated(parts: Sequence[Component]) -> float:
        return sum(p.bytes for p in parts if not (card.is_gpu and p.host or p.mapped))

    phases = {
        name: (*parts, Component("allocator overhead", share * allocated(parts))) for name, parts in phases.items()
    }
    return StageMemory(stage, card.is_gpu, (Component(label, base), *always), phases)


def _libraries(stage: str, sharding: Sharding) -> float:
    more = DEEPSPEED if sharding.processes > 1 else 0.0
    return LIBRARIES[stage] + more + (HOOKS if sharding.stage == 3 and stage != "sft" else 0.0)


def policy_spec(recipe: Recipe, shapes: Shapes, trained: bool = True, sft: bool = False) -> ModelSpec:
    """The policy as PPO or SFT trains it, or as it samples: merged where its method can be."""
    peft = recipe.model.peft
    sharding = sharding_of(recipe)
    # SFT of all weights loads float32 weights, which DeepSpeed converts.
    whole = sft and peft.method in TRAINS_BASE_WEIGHTS and sharding.processes == 1
    dtype = "float32" if whole else recipe.model.dtype
    return ModelSpec(
        shapes.policy, dtype, recipe.model.attention, peft=_on(peft, trained), partitioned=sharding.stage == 3
    )


def reward_spec(recipe: Recipe, shapes: Shapes, trained: bool = True) -> ModelSpec:
    """The reward model, as it is trained or plain; the value model is built like the trained one."""
    cfg, peft = recipe.reward, _on(recipe.reward_peft, trained)
    spec = ModelSpec(shapes.reward, recipe.model.dtype, recipe.model.attention, scalar=True, peft=peft)
    return replace(spec, keep_layers=cfg.keep_layers, partitioned=sharding_of(recipe).stage == 3)


def _on(peft: PeftSection, trained: bool) -> PeftSection | None:
    """What stays on a model: all that is trained, and else what cannot be merged."""
    return peft if peft.on and (trained or peft.method in UNMERGEABLE) else None


def value_and_reward_weights(recipe: Recipe, shapes: Shapes) -> tuple[ModelSpec, Component, float]:
    """PPO's value model; the frozen reward model's weights; the bytes that are added while the latter is used."""
    value, reward = reward_spec(recipe, shapes), reward_spec(recipe, shapes, trained=False)
    if not all_share_base(recipe, sharding_of(recipe).stage):
        return value, *frozen_weights(reward, recipe, REWARD)
    return replace(value, shares_base=True), Component(REWARD, float(count(value).trained_bytes)), 0.0


# --- stages ----------------------------------------------------------------------------------------------------------

Composition = tuple[tuple[Component, ...], dict[str, tuple[Component, ...]]]


def _sft(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> Composition:
    cfg, data, spec = recipe.sft, recipe.data, policy_spec(recipe, shapes, sft=True)
    sharding = sharding_of(recipe)
    rows = min(cfg.micro_batch_size, max(1, cfg.batch_size // sharding.processes))
    if cfg.packing:
        rows, tokens = 1, rows * cfg.max_tokens  # packed rows are laid end to end
    else:
        tokens = min(cfg.max_tokens, data.max_prompt_tokens + data.max_response_tokens)
    passed = training_pass(spec, "backbone", rows, 1, tokens - 1, recipe.launch.gradient_checkpointing)
    c, vocabulary = count(spec), shapes.policy.vocab_size
    tile = min(rows * tokens, TILE[0]) * min(vocabulary, TILE[1])
    head = tile * (4 if not on_gpu else c.bytes / c.total) * (1 if on_gpu else TILES_ON_CPU)
    if spec.peft is None:
        head += 4 * vocabulary * shapes.policy.hidden_size  # the gradient of the head, before it is added to the other
    passed = replace(passed, working=max(passed.working, head))
    once = cfg.batch_size == rows * sharding.processes
    always, training, step = _trained([("policy", spec)], [passed], sharding, on_gpu, once)
    phases = {"training": training, "step": step}
    plain = policy_spec(recipe, shapes, trained=False, sft=True)
    scoring = _scoring(plain, recipe, sharding.processes, 2048, "policy")
    gathered = (Component("gathered weights", gathered_bytes(plain, recipe)),) if sharding.stage == 3 else ()
    return always, phases | {"validation": (scoring, *gathered)}


def _rank(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> Composition:
    cfg, spec, processes = recipe.rank, policy_spec(recipe, shapes, trained=False), recipe_processes(recipe)
    if cfg.labeler == "file":
        return (), {"reading files": ()}
    prompts = max(1, cfg.batch_size // cfg.outputs_per_prompt)
    prompts = min(prompts, cfg.prompts or prompts)
    rows = min(-(-prompts * cfg.outputs_per_prompt // processes), cfg.batch_size)
    policy, added = frozen_weights(spec, recipe, "weights: policy")
    return (policy,), {"sampling": _sampling(spec, recipe, rows, min(prompts, rows), added)}


def _reward(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> Composition:
    cfg, data, spec, sharding = recipe.reward, recipe.data, reward_spec(recipe, shapes), sharding_of(recipe)
    response, k = data.max_response_tokens, recipe.rank.outputs_per_prompt
    # Of rankings from a file the longest may have a prompt of a token: nothing is counted on to be shared.
    longest = cfg.max_tokens if recipe.rank.labeler == "file" else data.max_prompt_tokens + response
    prompt = 1 if recipe.rank.labeler == "file" else max(1, min(cfg.max_tokens, longest) - response)
    tokens = min(cfg.max_tokens, longest)
    whole = max(1, cfg.batch_size // sharding.processes) * k
    rows = min(max(1, cfg.micro_tokens // tokens), whole)
    outputs = k if recipe.model.attention == "sdpa" else 1
    recompute = recipe.launch.gradient_checkpointing
    passed = training_pass(spec, "reward", rows, prompt, tokens - prompt, recompute, outputs)
    once = rows == whole
    always, training, step = _trained([("reward", spec)], [passed], sharding, on_gpu, once)
    scoring = _scoring(spec, recipe, sharding.processes, 2048, "reward")
    gathered = (Component("gathered weights", gathered_bytes(spec, recipe)),) if sharding.stage == 3 else ()
    return always, {"training": training, "step": step, "measuring": (scoring, *gathered)}


def _ppo(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> Composition:
    cfg, data, sharding, plan = recipe.ppo, recipe.data, sharding_of(recipe), plan_ppo(recipe)
    recompute = recipe.launch.gradient_checkpointing
    policy, (value, reward_part, reward_gathered) = (
        policy_spec(recipe, shapes),
        value_and_reward_weights(recipe, shapes),
    )
    plain, reward = policy_spec(recipe, shapes, trained=False), reward_spec(recipe, shapes, trained=False)
    rows = min(cfg.micro_batch_size, plan.minibatch_per_process)
    size = (data.max_prompt_tokens, data.max_response_tokens, recompute)
    passes = [training_pass(policy, "policy", rows, *size), training_pass(value, "value", rows, *size)]
    once = plan.micro_batches == 1
    both, alone = [("policy", policy), ("value", value)], sharding.processes == 1
    if alone:  # it takes the networks in turn and steps each, so that activations and gradients of one are held
        phases = {}
        for (name, _), part in zip(both, passes, strict=True):
            always, phases[f"{name} pass"], phases[f"{name} step"] = _trained(
                both, [part], sharding, on_gpu, once, (name,)
            )
    else:
        always, training, step = _trained(both, passes, sharding, on_gpu, once)
        phases = {"PPO step": training, "optimiser step": step}
    if ptx:
        text_rows = min(cfg.micro_batch_size, plan.ptx_rows_per_process)
        text = training_pass(policy, "policy", text_rows, 1, cfg.ptx_tokens - 1, recompute)
        _, ptx_training, _ = _trained(both, [text], sharding, on_gpu, False, stepped=("policy",) if alone else ())
        # One process tells the two gradients apart by a copy.
        copies = (Component("copy of gradients", count(policy).trained_bytes),) if sharding.processes == 1 else ()
        phases["pretraining step"] = (*ptx_training, *copies)
    part, visiting = frozen_weights(plain, recipe, "weights: reference")
    if policies_share_base(recipe, sharding.stage):
        part, visiting = Component("weights: reference", float(count(policy).trained_bytes)), 0.0
    whole, valuing = (gathered_bytes(spec, recipe) if sharding.stage == 3 else 0.0 for spec in (plain, reward))
    phases["sampling"] = _sampling(plain, recipe, min(cfg.rollout_batch_size, plan.batch_per_process), 0, whole)
    scoring = max(
        (
            _scoring(plain, recipe, sharding.processes, cfg.score_tokens, "policy").bytes + max(visiting, whole),
            "reference",
        ),
        (
            _scoring(reward, recipe, sharding.processes, cfg.score_tokens, "reward").bytes
            + max(reward_gathered, valuing),
            "reward",
        ),
    )[0]
    phases["scoring"] = (Component("working buffers", scoring),)
    average = ()
    if cfg.ema_decay > 0:
        average = (Component("averaged policy", 4.0 * count(policy).trained, host=True),)
    frozen_parts = (part, reward_part)
    as_stored = policy_spec(recipe, shapes, sft=True).dtype == recipe.model.dtype
    if not on_gpu and recipe.launch.frozen == "whole" and as_stored and not policies_share_base(recipe, sharding.stage):
        # Views of their files, in memory only while they are used (rlhf/models/mapped_weights.py): one at a time.
        phases["scoring"] += (replace(max(frozen_parts, key=lambda part: part.bytes), mapped=True),)
        frozen_parts = ()
    return (*always, *frozen_parts, *average), phases


def _evaluate(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> Composition:
    cfg, processes = recipe.evaluate, recipe_processes(recipe)
    plain, reward = policy_spec(recipe, shapes, trained=False), reward_spec(recipe, shapes, trained=False)
    rows = recipe.ppo.rollout_batch_size
    if cfg.prompts:
        rows = min(rows, -(-cfg.prompts * cfg.samples_per_prompt // processes))
    policy, added = frozen_weights(plain, recipe, "weights: policy")
    reward_part, reward_gathered = frozen_weights(reward, recipe, REWARD)
    scored = _scoring(plain, recipe, processes, recipe.ppo.score_tokens, "policy")
    judged = _scoring(reward, recipe, processes, recipe.ppo.score_tokens, "reward")
    return (), {  # one model at a time
        "sampling": (policy, *_sampling(plain, recipe, rows, 0, added)),
        "scoring": (policy, Component("working buffers", scored.bytes + added)),
        "reward scores": (reward_part, Component("working buffers", judged.bytes + reward_gathered)),
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def _trained(
    models: list[tuple[str, ModelSpec]],
    passes: list[Footprint],
    sharding: Sharding,
    on_gpu: bool,
    once: bool,
    stepped: Sequence[str] = (),
) -> tuple[tuple[Component, ...], tuple[Component, ...], tuple[Component, ...]]:
    """Components of a training loop: always there, in the passes, in the optimiser's step.

    Args:
        once: a step is one forward and backward, so that no gradients are there before the activations.
        stepped: names of the models whose gradients are there, when not all of them are.
    """
    each = [(name, trained_state(spec, sharding, on_gpu)) for name, spec in models]
    fields = ("gradients", "optimiser", "gathered", "step")
    total = {field: sum(getattr(h, field) for _, h in each) for field in fields}
    for field in ("gradients", "step"):
        total[field] = sum(getattr(h, field) for name, h in each if not stepped or name in stepped)
    always = [Component(f"weights: {name}", h.weights, host=sharding.offload_weights) for name, h in each]
    always.append(Component("optimiser state", total["optimiser"], host=sharding.offload))
    if sharding.stage == 3:
        always.append(Component("gradients", total["gradients"], host=sharding.offload))
    activations, logits = sum(p.activations for p in passes), sum(p.head for p in passes)
    reduction = max(h.reduction for _, h in each)
    before = sum(p.head_gradients for p in passes) if once else total["gradients"]
    if sharding.stage == 2:  # sums of all passes stay in parts; this pass's own gradients fill the buffer
        before += total["gradients"] if once else 0.0
    training: list[Component] = []
    if sharding.stage < 3:
        training.append(Component("gradients", before, host=sharding.offload))
    training += [
        Component("activations", activations),
        Component("logits", logits),
        Component("working buffers", max(p.working for p in passes)),
        Component("gathered weights", total["gathered"]),
    ]
    if on_gpu or sharding.stage >= 2:
        training.append(Component("reduction buffers", reduction))
    step = [
        Component("working buffers", total["step"]),
        Component("reduction buffers", 0.0 if sharding.stage >= 2 else reduction),
    ]
    if sharding.stage < 3:
        step.append(Component("gradients", total["gradients"], host=sharding.offload))
    return tuple(always), tuple(training), tuple(step)


def _sampling(spec: ModelSpec, recipe: Recipe, rows: int, prompts: int, gathered: float) -> tuple[Component, ...]:
    """KV cache at full length and what a decode step works with; `prompts` distinct ones, 0 when all are."""
    prompt, response = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
    cache = rows * (prompt + response) * count(spec).kv_bytes
    working = decoding_pass(spec, rows, prompts or rows, prompt, response)
    return (
        Component("KV cache", float(cache)),
        Component("working buffers", working),
        Component("gathered weights", gathered),
    )


def _scoring(spec: ModelSpec, recipe: Recipe, processes: int, tokens: int, kind: str) -> Component:
    """A pass without gradients over as many rows of full length as the token budget takes."""
    prompt, response = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
    rows = max(1, tokens // (prompt + response))
    spec = replace(spec, peft=_on(spec.peft or PeftSection(), trained=False))
    return Component("working buffers", scoring_pass(spec, kind, rows, prompt, response))


def all_stages(recipe: Recipe, shapes: Shapes, card: Card) -> Iterator[StageMemory]:
    """Memory of each of run.stages."""
    for stage in recipe.run.stages:
        yield stage_memory(recipe, stage, shapes, card)
