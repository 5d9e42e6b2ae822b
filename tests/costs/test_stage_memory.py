"""Memory and time of a plan: counts, divisions and traffic by hand; what fits; the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rlhf.config import Recipe
from rlhf.costs import fit_to_card
from rlhf.costs.activation_memory import PassShape, scoring_pass, training_pass
from rlhf.costs.cards import find_card
from rlhf.costs.communication import exchange_seconds, gathering_traffic, training_traffic
from rlhf.costs.model_memory import Sharding, trained_state
from rlhf.costs.model_shapes import ModelSpec, Shapes, count, shapes_of
from rlhf.costs.stage_memory import stage_memory
from rlhf.costs.stage_time import decode_seconds, forward_flops, training_flops
from rlhf.errors import UserError
from rlhf.model_config import PeftSection
from rlhf.models import tiny
from rlhf.recipe import load_recipe
from support.command import rlhf
from tools import scaling_tables

TINY = ModelSpec(tiny.config(), "float32", "eager")
EMBEDDINGS, LAYER = 1024 * 64, 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176 + 2 * 64
ALL = EMBEDDINGS + 4 * LAYER + 64  # the LM head is the embeddings
H100 = find_card("h100-80g")


def large(*overrides: str) -> tuple[Recipe, Shapes]:
    """Return a recipe for eight cards, and a model of 6.7 billion weights."""
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    common = ("model.dtype=bfloat16", "model.attention=sdpa", "launch.processes=8")
    return load_recipe("instructgpt-1.3b", [*common, *overrides]), Shapes(shape, shape)


def test_weights_are_counted_as_by_hand() -> None:
    c = count(TINY)
    assert (c.total, c.bytes, c.trained, c.layer) == (ALL, 4 * ALL, ALL, LAYER)
    assert c.largest == EMBEDDINGS
    assert c.kv_bytes == 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads of them, their width, bytes
    assert count(replace(TINY, dtype="bfloat16")).bytes == 2 * ALL
    reward = count(replace(TINY, scalar=True, keep_layers=3))
    assert reward.total == EMBEDDINGS + 3 * LAYER + 64 + 64


def test_adapters_alone_are_trained_and_the_gradient_ends_at_the_first() -> None:
    lora = PeftSection(method="lora", rank=4, last_layers=2)
    c = count(replace(TINY, peft=lora))
    attention = (64 + 64) + 2 * (64 + 32) + (64 + 64)
    assert c.trained == 2 * 4 * (attention + 3 * (64 + 176))  # two layers, rank 4, in + out of seven matrices
    assert c.total == ALL + c.trained
    # The last two layers, but for the first matrix, whose adapter comes after it.
    assert c.through == 2 * LAYER + 64 + c.trained - 64 * 64


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "gradients", "optimiser"),
    [
        # bytes a weight: on one process, or divided by four
        (0, "float32", 4, 4, 8),
        (1, "float32", 4, 4, 12 / 4),
        (2, "float32", 4, 4 / 4, 12 / 4),
        (3, "float32", 4 / 4, 4 / 4, 8 / 4),
        (0, "bfloat16", 2, 2, 12),
        (2, "bfloat16", 2, 2 / 4, 12 / 4),
        (3, "bfloat16", 2 / 4, 2 / 4, 12 / 4),
    ],
)
def test_zero_divides_what_it_says(stage: int, dtype: str, weights: float, gradients: float, optimiser: float) -> None:
    sharding = Sharding(stage, 4, bucket=5e8, buckets=1, offload=False, offload_weights=False)
    found = trained_state(replace(TINY, dtype=dtype), sharding, on_gpu=True)
    assert (found.weights, found.gradients, found.optimiser) == pytest.approx(
        (weights * ALL, gradients * ALL, optimiser * ALL)
    )


def test_recomputed_layers_keep_their_inputs_and_nothing_else() -> None:
    rows, tokens = 3, 1 + 39
    shape = PassShape(rows, 1, 39)
    kept = training_pass(TINY, "policy", shape, recompute=True)
    assert kept.activations >= 4 * rows * tokens * 64 * 4  # the input of each of four layers
    assert kept.activations < 4 * rows * tokens * 64 * 4 * 2
    whole = training_pass(TINY, "policy", shape, recompute=False)
    assert whole.activations > 5 * kept.activations
    # By slices of the vocabulary no logits are kept; by calls those in float32, normalised, at 39 positions at least.
    calls = training_pass(replace(TINY, partitioned=True), "policy", shape, recompute=False)
    assert whole.head < rows * 39 * 1024 * 4 <= calls.head
    one = training_pass(replace(TINY, peft=PeftSection(method="lora", last_layers=1)), "policy", shape, False)
    assert one.activations < whole.activations / 2
    assert scoring_pass(TINY, "policy", shape) < whole.activations


def test_more_partitioning_takes_less() -> None:
    peaks = []
    for stage in (0, 1, 2, 3):
        recipe, shapes = large(f"launch.zero_stage={stage}", "launch.gradient_checkpointing=true")
        peaks.append(stage_memory(recipe, "ppo-ptx", shapes, H100).peak)
    recipe, shapes = large("launch.zero_stage=3", "launch.gradient_checkpointing=true", "launch.frozen=partitioned")
    peaks.append(stage_memory(recipe, "ppo-ptx", shapes, H100).peak)
    # ZeRO 2 divides the gradients, which are not there while it samples; and that takes most here.
    assert peaks[0] > peaks[1] >= peaks[2] > peaks[3] > peaks[4]
    # Policy, value and the two frozen models at 2 bytes, the trained ones with 12 and 2 more: nothing is divided.
    assert peaks[0] > 6.7e9 * (4 * 2 + 2 * 14)


def test_frozen_models_that_are_views_of_files_leave_memory_between_passes() -> None:
    """On a CPU: one of them in the phase that scores, none in the others; whatever is a copy stays throughout."""
    names = {"weights: reference", "weights: reward model"}

    def found(*overrides: str, card: str = "cpu") -> tuple[set[str], set[str]]:
        recipe = load_recipe("tiny", overrides)
        memory = stage_memory(recipe, "ppo", shapes_of(recipe), find_card(card))
        return {p.name for p in memory.always} & names, {p.name for p in memory.phases["scoring"]} & names

    always, scoring = found()
    assert not always and len(scoring) == 1
    for copied in ("model.dtype=bfloat16", "launch.frozen=cpu"):
        assert found(copied) == (names, set())
    assert found(card="h100-80g") == (names, set())


def test_four_networks_on_one_base_are_counted_once() -> None:
    lora = ["model.peft.method=lora", "model.peft.rank=4"]
    adapters = 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 176))  # of rank 1
    own = 4 * (4 * adapters + 64)  # bytes: value's or reward model's adapters, and the head
    recipe = load_recipe("tiny", lora)
    found = stage_memory(recipe, "ppo-ptx", shapes_of(recipe), H100).components()
    assert found["weights: policy"] == 4 * (ALL + 4 * adapters)
    assert (found["weights: value"], found["weights: reward model"]) == (own, own)
    assert found["weights: reference"] == 4 * 4 * adapters
    three = ["launch.processes=2", "launch.zero_stage=3", "ppo.micro_batch_size=4", "sft.micro_batch_size=8"]
    for apart in (three, ["reward.model=tiny"], ["reward.peft.method=none"]):
        recipe = load_recipe("tiny", [*lora, *apart])
        found = stage_memory(recipe, "ppo-ptx", shapes_of(recipe), H100).components()
        assert found["weights: value"] > 4 * ALL / 2 and found["weights: reward model"] == 4 * (ALL + 64)


def test_settings_that_fit_are_the_first_that_do() -> None:
    recipe, shapes = large("launch.zero_stage=0")
    assert not fit_to_card.fits_card(recipe, shapes, H100)
    found = fit_to_card.settings_that_fit(recipe, shapes, H100)
    assert found is not None and fit_to_card.fits_card(fit_to_card.with_settings(recipe, found), shapes, H100)
    base = {field: value for field, value in found.items() if field.startswith("launch.") or "peft" in field}
    tried = list(fit_to_card.settings_to_try(recipe))
    smallest = list(fit_to_card.micro_batches(recipe))[-1]
    for earlier in tried[: tried.index(base)]:
        assert not fit_to_card.fits_card(fit_to_card.with_settings(recipe, earlier | smallest), shapes, H100)
    assert fit_to_card.settings_that_fit(*large("launch.zero_stage=0"), replace(H100, memory=3e9)) is None


def test_arithmetic_by_hand() -> None:
    attention = 2 * 64 * 40  # per layer and token: 4 d for two products, over half of 40 positions
    assert forward_flops(TINY, 10, 40) == 10 * (2 * ALL + 4 * attention)
    assert training_flops(TINY, 10, 40, recompute=False) == 10 * (6 * ALL + 3 * 4 * attention)
    assert training_flops(TINY, 10, 40, recompute=True) == 10 * (8 * ALL + 4 * 4 * attention)
    # Half the bandwidth reads the weights and the cache of two rows, at their prompt and half their response.
    step = (4 * ALL + 2 * (30 + 5) * 1024) / (H100.bandwidth * 0.5)
    start = 60 * (2 * ALL + 4 * 2 * 64 * 30) / (H100.flops["float32"] * 0.4)
    assert decode_seconds(TINY, PassShape(2, 30, 10), H100) == pytest.approx(start + 10 * step)


def test_traffic_by_hand() -> None:
    size = 4 * ALL
    expected = {0: 2 * size, 1: 2 * size, 2: 5 * size + size, 3: 5 * 3 * size}
    for stage, traffic in expected.items():
        recipe = load_recipe("tiny", ["launch.processes=2", f"launch.zero_stage={stage}"])
        assert training_traffic(recipe, TINY, micro_batches=5) == traffic
    recipe = load_recipe("tiny", ["launch.processes=2", "launch.gather=by_layer"])
    assert gathering_traffic(recipe, TINY, 7, partitioned=True) == 7 * size
    assert gathering_traffic(load_recipe("tiny", ["launch.processes=2"]), TINY, 7, partitioned=True) == size
    assert gathering_traffic(recipe, TINY, 7, partitioned=False) == 0
    assert exchange_seconds(recipe, H100, 1e9) == pytest.approx(0.5 * 1e9 / (450e9 * 0.7))
    sixteen = fit_to_card.with_processes(recipe, 16)
    assert exchange_seconds(sixteen, H100, 1e9) == pytest.approx(15 / 16 * 1e9 / (50e9 * 0.7))
    assert exchange_seconds(load_recipe("tiny"), H100, 1e9) == 0


def test_what_cannot_be_planned_is_told() -> None:
    with pytest.raises(UserError, match="h100-80g"):
        find_card("h100")
    with pytest.raises(UserError, match="--count"):
        fit_to_card.with_processes(load_recipe("tiny"), 0)
    with pytest.raises(UserError, match="nowhere"):
        shapes_of(load_recipe("tiny", ["model.name=./nowhere"]))


def test_the_command_shows_components_fit_and_time_and_writes_nothing(tmp_path: Path) -> None:
    sizes = ("sft.micro_batch_size=8", "ppo.micro_batch_size=4")
    done = rlhf("plan", "demo", "--gpu", "h100-80g", "--count", "2", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("weights: policy", "optimiser state", "KV cache", "PEAK", "fits 80.00", "It fits.", "Assumed: 35%"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no card 'abacus'"):
        find_card("abacus")


@pytest.mark.slow
def test_the_tables_in_the_docs_are_what_the_code_gives() -> None:
    assert scaling_tables.in_docs().strip() == scaling_tables.tables().strip()
