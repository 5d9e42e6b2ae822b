"""Memory that each stage needs on one process, by component, from the recipe and the shapes of its models.

A stage is a sequence of phases (sampling, scoring, training, the optimiser's step). Some components are there all the
time, others for a phase; the peak is that of the largest phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhf.config import Recipe
from rlhf.costs.activation_memory import Footprint, PassKind, PassShape, decoding_pass, scoring_pass, training_pass
from rlhf.costs.cards import Card
from rlhf.costs.model_memory import (
    REWARD,
    Component,
    Sharding,
    TrainedState,
    frozen_weights,
    gathered_bytes,
    kept_adapter,
    policy_spec,
    reward_spec,
    sharding_of,
    trained_state,
    value_and_reward_weights,
)
from rlhf.costs.model_shapes import ModelSpec, Shapes, count
from rlhf.model_config import PeftSection
from rlhf.models.peft.shared_base import policies_share_base
from rlhf.plan import PpoPlan, plan_ppo, recipe_processes
from rlhf.stage_table import is_ppo

LIBRARIES = {"sft": 560e6, "rank": 385e6, "reward": 420e6, "ppo": 430e6, "evaluate": 385e6}  # measured, on Linux
DEEPSPEED, HOOKS = 60e6, 90e6  # more, with several processes; under ZeRO-3 also TRL, which SFT has anyway; measured
# Share of the temporary components that the allocator holds besides; on a CPU measured: TRL's tiles leave more holes.
UNUSED_CPU, UNUSED_CPU_SFT, UNUSED_GPU = 0.25, 0.5, 0.1
TILE = (4096, 32768)  # tokens and vocabulary that TRL's loss treats at a time
TILES_ON_CPU = 8.25  # tiles alive in its backward, where no kernel fuses the operations; counted in its code
VALIDATION_TOKENS = 2048  # of a pass without gradients in SFT and reward training

Components = tuple[Component, ...]
Phases = dict[str, Components]


@dataclass(frozen=True)
class StageMemory:
    """A stage's components in bytes per process."""

    stage: str
    on_gpu: bool
    always: Components  # in every phase
    phases: Phases  # those of each phase besides

    def bytes_in(self, phase: str) -> float:
        """Return the bytes of a phase, on the device where there is one."""
        return sum(part.bytes for part in (*self.always, *self.phases[phase]) if not (self.on_gpu and part.host))

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.bytes_in)

    @property
    def peak(self) -> float:
        return self.bytes_in(self.peak_phase)

    @property
    def host(self) -> float:
        """Largest number of bytes in the machine's memory on behalf of a GPU process."""
        if not self.on_gpu:
            return 0.0
        temporary = (part.bytes for parts in self.phases.values() for part in parts if part.host)
        return sum(part.bytes for part in self.always if part.host) + max(temporary, default=0.0)

    def components(self) -> dict[str, float]:
        """Return the largest size of each component; those of different phases are not there at the same time."""
        sizes = {part.name: part.bytes for part in self.always}
        for parts in self.phases.values():
            for part in parts:
                sizes[part.name] = max(sizes.get(part.name, 0.0), part.bytes)
        return {name: size for name, size in sizes.items() if size}


def all_stages(recipe: Recipe, shapes: Shapes, card: Card) -> Iterator[StageMemory]:
    """Yield the memory of each of run.stages."""
    for stage in recipe.run.stages:
        yield stage_memory(recipe, stage, shapes, card)


def stage_memory(recipe: Recipe, stage: str, shapes: Shapes, card: Card) -> StageMemory:
    """Return a stage's memory on each process; raise UserError if sizes do not divide by the number of processes."""
    if is_ppo(stage):
        always, phases = _ppo(recipe, shapes, card.is_gpu, ptx=stage == "ppo-ptx")
    else:
        make = {"sft": _sft, "rank": _rank, "reward": _reward, "evaluate": _evaluate}[stage]
        always, phases = make(recipe, shapes, card.is_gpu)
    label = "CUDA context and buffers" if card.is_gpu else "Python and libraries"
    libraries = Component(label, card.base or _libraries(stage, sharding_of(recipe)))
    share = UNUSED_GPU if card.is_gpu else UNUSED_CPU_SFT if stage == "sft" else UNUSED_CPU
    for name, parts in phases.items():
        allocated = sum(part.bytes for part in parts if not (card.is_gpu and part.host or part.mapped))
        phases[name] = (*parts, Component("allocator overhead", share * allocated))
    return StageMemory(stage, card.is_gpu, (libraries, *always), phases)


def _libraries(stage: str, sharding: Sharding) -> float:
    size = LIBRARIES["ppo" if is_ppo(stage) else stage]
    size += DEEPSPEED if sharding.processes > 1 else 0.0
    return size + (HOOKS if sharding.stage == 3 and stage != "sft" else 0.0)


# --- stages: the components of all phases, and those of each phase ----------------------------------------------------


def _sft(recipe: Recipe, shapes: Shapes, on_gpu: bool) -> tuple[Components, Phases]:
    cfg, data, spec = recipe.sft, recipe.data, policy_spec(recipe, shapes, sft=True)
    sharding = sharding_of(recipe)
    rows = min(cfg.micro_batch_size, max(1, cfg.batch_size // sharding.processes))
    if cfg.packing:
        rows, tokens = 1, rows * cfg.max_tokens  # packed rows are laid end to end
    else:
        tokens = min(cfg.max_tokens, data.max_prompt_tokens + data.max_response_tokens)
    footprint = training_pass(spec, "backbone", PassShape(rows, 1, tokens - 1), recipe.launch.gradient_checkpointing)
    c, text = count(spec), shapes.policy.get_text_config()
    tile = min(rows * tokens, TILE[0]) * min(text.vocab_size, TILE[1])
    head = tile * (c.bytes / c.total if on_gpu else 4 * TILES_ON_CPU)
    if spec.peft is None:
        head += 4 * text.vocab_size * text.hidden_size  # the gradient of the head, before it is added to the other
    footprint = replace(footprint, working=max(footprint.working, head))
    loop = TrainingLoop({"policy": spec}, sharding, on_gpu, one_pass=cfg.batch_size == rows * sharding.processes)
    plain = policy_spec(recipe, shapes, trained=False, sft=True)
    validation = _validation(plain, recipe, "policy")
    return loop.always(), {"training": loop.passes([footprint]), "step": loop.step(), "validation": validation}


def _rank(recipe: Recipe, shapes: Shapes, on_gpu: bool) -> tuple[Components, Phases]:
    cfg, spec, processes = recipe.rank, policy_spec(recipe, shapes, trained=False), recipe_processes(recipe)
    if cfg.labeler == "file":
        return (), {"reading files": ()}
    prompts = max(1, cfg.batch_size // cfg.outputs_per_prompt)
    prompts = min(prompts, cfg.prompts or prompts)
    rows = min(-(-prompts * cfg.outputs_per_prompt // processes), cfg.batch_size)
    policy, added = frozen_weights(spec, recipe, "weights: policy")
    return (policy,), {"sampling": _sampling(spec, recipe, rows, min(prompts, rows), added)}


def _reward(recipe: Recipe, shapes: Shapes, on_gpu: bool) -> tuple[Components, Phases]:
    cfg, data, spec, sharding = recipe.reward, recipe.data, reward_spec(recipe, shapes), sharding_of(recipe)
    response, k = data.max_response_tokens, recipe.rank.outputs_per_prompt
    if recipe.rank.labeler == "file":
        # The longest ranking may have a prompt of one token, so that outputs share nothing.
        tokens, prompt = cfg.max_tokens, 1
    else:
        tokens = min(cfg.max_tokens, data.max_prompt_tokens + response)
        prompt = max(1, tokens - response)
    batch = max(1, cfg.batch_size // sharding.processes) * k
    rows = min(max(1, cfg.micro_tokens // tokens), batch)
    outputs = k if recipe.model.attention == "sdpa" else 1
    shape = PassShape(rows, prompt, tokens - prompt, outputs)
    footprint = training_pass(spec, "reward", shape, recipe.launch.gradient_checkpointing)
    loop = TrainingLoop({"reward": spec}, sharding, on_gpu, one_pass=rows == batch)
    measuring = _validation(spec, recipe, "reward")
    return loop.always(), {"training": loop.passes([footprint]), "step": loop.step(), "measuring": measuring}


def _ppo(recipe: Recipe, shapes: Shapes, on_gpu: bool, ptx: bool) -> tuple[Components, Phases]:
    cfg, sharding, plan = recipe.ppo, sharding_of(recipe), plan_ppo(recipe)
    policy = policy_spec(recipe, shapes)
    value, reward_part, reward_added = value_and_reward_weights(recipe, shapes)
    loop = TrainingLoop({"policy": policy, "value": value}, sharding, on_gpu, one_pass=plan.micro_batches == 1)
    phases = _ppo_training(recipe, loop, plan)
    if ptx:
        phases["pretraining step"] = _ptx_training(recipe, loop, plan)
    plain, reward = policy_spec(recipe, shapes, trained=False), reward_spec(recipe, shapes, trained=False)
    reference_part, reference_added = frozen_weights(plain, recipe, "weights: reference")
    shared = policies_share_base(recipe, sharding.stage)
    if shared:
        reference_part, reference_added = Component(reference_part.name, float(count(policy).trained_bytes)), 0.0
    # Under ZeRO-3 the trained policy and value model are gathered too.
    gathered = sharding.stage == 3
    policy_added, value_added = (gathered_bytes(spec, recipe) if gathered else 0.0 for spec in (plain, reward))
    rows = min(cfg.rollout_batch_size, plan.batch_per_process)
    phases["sampling"] = _sampling(plain, recipe, rows, rows, policy_added)
    scoring = max(
        _scoring(plain, recipe, cfg.score_tokens, "policy") + max(reference_added, policy_added),
        _scoring(reward, recipe, cfg.score_tokens, "reward") + max(reward_added, value_added),
    )
    phases["scoring"] = (Component("working buffers", scoring),)
    frozen: Components = (reference_part, reward_part)
    as_stored = policy_spec(recipe, shapes, sft=True).dtype == recipe.model.dtype
    if not on_gpu and recipe.launch.frozen == "whole" and as_stored and not shared:
        # Views of their files, in memory only while they are used (rlhf/models/mapped_weights.py): one at a time.
        phases["scoring"] += (replace(max(frozen, key=lambda part: part.bytes), mapped=True),)
        frozen = ()
    if cfg.ema_decay > 0:
        frozen += (Component("averaged policy", 4.0 * count(policy).trained, host=True),)
    return (*loop.always(), *frozen), phases


def _ppo_training(recipe: Recipe, loop: TrainingLoop, plan: PpoPlan) -> Phases:
    """Return the phases of a PPO step; a single process holds activations and gradients of one network at a time."""
    rows = min(recipe.ppo.micro_batch_size, plan.minibatch_per_process)
    shape = PassShape(rows, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    recompute = recipe.launch.gradient_checkpointing
    footprints = {
        "policy": training_pass(loop.models["policy"], "policy", shape, recompute),
        "value": training_pass(loop.models["value"], "value", shape, recompute),
    }
    if loop.sharding.processes > 1:
        return {"PPO step": loop.passes(list(footprints.values())), "optimiser step": loop.step()}
    phases = {}
    for name, footprint in footprints.items():
        phases[f"{name} pass"] = loop.passes([footprint], (name,))
        phases[f"{name} step"] = loop.step((name,))
    return phases


def _ptx_training(recipe: Recipe, loop: TrainingLoop, plan: PpoPlan) -> Components:
    """Return the components of the passes over pretraining text."""
    policy, alone = loop.models["policy"], loop.sharding.processes == 1
    shape = PassShape(min(recipe.ppo.micro_batch_size, plan.ptx_rows_per_process), 1, recipe.ppo.ptx_tokens - 1)
    footprint = training_pass(policy, "policy", shape, recipe.launch.gradient_checkpointing)
    parts = replace(loop, one_pass=False).passes([footprint], ("policy",) if alone else ())
    # One process keeps a copy, to tell the two gradients apart.
    return (*parts, Component("copy of gradients", count(policy).trained_bytes)) if alone else parts


def _evaluate(recipe: Recipe, shapes: Shapes, on_gpu: bool) -> tuple[Components, Phases]:
    cfg, tokens = recipe.evaluate, recipe.ppo.score_tokens
    plain, reward = policy_spec(recipe, shapes, trained=False), reward_spec(recipe, shapes, trained=False)
    rows = recipe.ppo.rollout_batch_size
    if cfg.prompts:
        rows = min(rows, -(-cfg.prompts * cfg.samples_per_prompt // recipe_processes(recipe)))
    policy, added = frozen_weights(plain, recipe, "weights: policy")
    reward_part, reward_added = frozen_weights(reward, recipe, REWARD)
    scoring = Component("working buffers", _scoring(plain, recipe, tokens, "policy") + added)
    judging = Component("working buffers", _scoring(reward, recipe, tokens, "reward") + reward_added)
    return (), {  # one model at a time
        "sampling": (policy, *_sampling(plain, recipe, rows, rows, added)),
        "scoring": (policy, scoring),
        "reward scores": (reward_part, judging),
    }


@dataclass(frozen=True)
class TrainingLoop:
    """Models that are trained together."""

    models: dict[str, ModelSpec]
    sharding: Sharding
    on_gpu: bool
    one_pass: bool  # a step is one forward and backward, so that no gradients are there before the activations

    @property
    def _states(self) -> dict[str, TrainedState]:
        return {name: trained_state(spec, self.sharding, self.on_gpu) for name, spec in self.models.items()}

    def _total(self, field: str, names: Sequence[str] = ()) -> float:
        """Return the sum of a field over the named models, all by default."""
        states = self._states
        return sum(getattr(states[name], field) for name in names or states)

    @property
    def _reduction(self) -> Component:
        return Component("reduction buffers", max(state.reduction for state in self._states.values()))

    def always(self) -> Components:
        sharding, states = self.sharding, self._states.items()
        parts = [Component(f"weights: {name}", state.weights, host=sharding.offload_weights) for name, state in states]
        parts.append(Component("optimiser state", self._total("optimiser"), host=sharding.offload))
        if sharding.stage == 3:
            parts.append(Component("gradients", self._total("gradients"), host=sharding.offload))
        return tuple(parts)

    def passes(self, footprints: Sequence[Footprint], stepped: Sequence[str] = ()) -> Components:
        """Return the components of forward and backward; `stepped` names the models with gradients, all by default."""
        sharding, gradients = self.sharding, self._total("gradients", stepped)
        before = sum(each.head_gradients for each in footprints) if self.one_pass else gradients
        if sharding.stage == 2:  # sums of all passes stay in parts; this pass's own gradients fill the buffer
            before += gradients if self.one_pass else 0.0
        parts = [Component("gradients", before, host=sharding.offload)] if sharding.stage < 3 else []
        parts += [
            Component("activations", sum(each.activations for each in footprints)),
            Component("logits", sum(each.head for each in footprints)),
            Component("working buffers", max(each.working for each in footprints)),
            Component("gathered weights", self._total("gathered")),
        ]
        if self.on_gpu or sharding.stage >= 2:
            parts.append(self._reduction)
        return tuple(parts)

    def step(self, stepped: Sequence[str] = ()) -> Components:
        """Return the components of the optimiser's step on the named models, all by default."""
        sharding, parts = self.sharding, [Component("working buffers", self._total("step", stepped))]
        if sharding.stage < 2:
            parts.append(self._reduction)
        if sharding.stage < 3:
            parts.append(Component("gradients", self._total("gradients", stepped), host=sharding.offload))
        return tuple(parts)


def _sampling(spec: ModelSpec, recipe: Recipe, rows: int, prompts: int, gathered: float) -> Components:
    """Return the KV cache at full length and the rest of a decode step; `rows` responses to `prompts` prompts."""
    shape = PassShape(rows, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    return (
        Component("KV cache", float(rows * shape.tokens * count(spec).kv_bytes)),
        Component("working buffers", decoding_pass(spec, shape, prompts)),
        Component("gathered weights", gathered),
    )


def _scoring(spec: ModelSpec, recipe: Recipe, tokens: int, kind: PassKind) -> float:
    """Return the bytes of a pass without gradients over as many rows of full length as the token budget takes."""
    prompt, response = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
    shape = PassShape(max(1, tokens // (prompt + response)), prompt, response)
    return scoring_pass(replace(spec, peft=kept_adapter(spec.peft or PeftSection(), trained=False)), kind, shape)


def _validation(spec: ModelSpec, recipe: Recipe, kind: PassKind) -> Components:
    """Return the components of measuring a model between training steps."""
    working = Component("working buffers", _scoring(spec, recipe, VALIDATION_TOKENS, kind))
    if sharding_of(recipe).stage < 3:
        return (working,)
    return working, Component("gathered weights", gathered_bytes(spec, recipe))
