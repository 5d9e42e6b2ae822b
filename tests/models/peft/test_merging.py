"""Merging: the plain weights compute what the model with its method does; numbers by hand, then against peft's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.model_config import PeftSection
from rlhf.models.layers import cut_layers
from rlhf.models.peft import merging
from rlhf.models.peft.merging import LORA_A, LORA_B, MAGNITUDE, SCALE, LinearWeights, merged_linear, merged_state_dict
from rlhf.models.peft.methods import peft_of, trainable
from support.peft_references import CACHED, CASES, EMBEDDED, MERGED, METHODS, REFERENCES, adapted, case, plain

MERGEABLE = [(kind, method) for kind, method in CASES if method in MERGED]
ROW = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
# Two outputs, three inputs.
WEIGHT = Tensor([[1, 2, 0], [0, -1, 3]])
BIAS = Tensor([10, 20])
LORA = PeftSection(method="lora", rank=1, alpha=2.0)  # the update counts twice
UPDATE = {LORA_A: Tensor([[1, 0, -1]]), LORA_B: Tensor([[3], [0.5]])}


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_low_rank_update_by_hand() -> None:
    merged = merged_linear(LinearWeights(WEIGHT, BIAS), UPDATE, LORA)
    # 2 B A = [[6, 0, -6], [1, 0, -1]]
    assert merged.weight.tolist() == [[7, 2, -6], [1, -1, 2]]
    assert merged.bias.tolist() == [10, 20]
    assert WEIGHT.tolist() == [[1, 2, 0], [0, -1, 3]], "what was given is left as it is"
    assert merged_linear(LinearWeights(WEIGHT, None), UPDATE, LORA).bias is None


def test_magnitudes_by_hand() -> None:
    dora = PeftSection(method="dora", rank=1, alpha=2.0)
    update = {LORA_A: Tensor([[2, 0, -3]]), LORA_B: Tensor([[0], [0.5]]), MAGNITUDE: Tensor([10, 4])}
    # W + 2 B A = [[1, 2, 0], [2, -1, 0]], of norm sqrt 5 each
    root = math.sqrt(5)
    expected = [[10 / root, 20 / root, 0], [8 / root, -4 / root, 0]]
    merged = merged_linear(LinearWeights(WEIGHT, BIAS), update, dora)
    torch.testing.assert_close(merged.weight, Tensor(expected))
    assert merged.bias.tolist() == [10, 20]


def test_scales_by_hand() -> None:
    ia3 = PeftSection(method="ia3")
    of_outputs = merged_linear(LinearWeights(WEIGHT, BIAS), {SCALE: Tensor([[2], [-3]])}, ia3)
    assert of_outputs.weight.tolist() == [[2, 4, 0], [0, 3, -9]]
    assert of_outputs.bias.tolist() == [20, -60]
    of_inputs = merged_linear(LinearWeights(WEIGHT, BIAS), {SCALE: Tensor([[2, 3, 5]])}, ia3)
    assert of_inputs.weight.tolist() == [[2, 6, 0], [0, -3, 15]]
    assert of_inputs.bias.tolist() == [10, 20]


def test_a_bfloat16_weight_is_rounded_once() -> None:
    """In bfloat16 all the way, most of the numbers would come out another."""
    torch.manual_seed(0)
    dora = PeftSection(method="dora", rank=2, alpha=3.0)
    weight, bias = torch.randn(8, 8).bfloat16(), torch.randn(8).bfloat16()
    parts = {LORA_A: torch.randn(2, 8), LORA_B: torch.randn(8, 2), MAGNITUDE: torch.rand(8)}
    exact = weight.double() + 1.5 * parts[LORA_B].double() @ parts[LORA_A].double()
    exact = parts[MAGNITUDE].double()[:, None] * exact / exact.square().sum(1, keepdim=True).sqrt()
    merged = merged_linear(LinearWeights(weight, bias), parts, dora)
    assert merged.weight.dtype == merged.bias.dtype == torch.bfloat16
    assert torch.equal(merged.weight, exact.bfloat16())
    scale = torch.rand(8, 1)
    merged = merged_linear(LinearWeights(weight, bias), {SCALE: scale}, PeftSection(method="ia3"))
    assert torch.equal(merged.weight, (weight.double() * scale.double()).bfloat16())
    assert torch.equal(merged.bias, (bias.double() * scale[:, 0].double()).bfloat16())


def test_names_of_the_plain_model() -> None:
    query = "model.layers.0.self_attn.q_proj"
    assert merging.plain_name(f"{query}.base_layer.weight") == f"{query}.weight"
    assert merging.plain_name("transformer.ln_f.bias") == "transformer.ln_f.bias"


# --- whole models -----------------------------------------------------------------------------------------------------


def by_peft(kind: str, method: str) -> dict[str, Tensor]:
    """The plain weights as peft merges them, in float64; bitfit's are put in place by name."""
    model = case(kind, method).model
    values = {name: tensor.detach().double() for name, tensor in trainable(model).items()}
    with torch.no_grad():
        return REFERENCES[method](kind, plain(kind).double(), METHODS[method], values).state_dict()


@pytest.mark.parametrize(("kind", "method"), MERGEABLE)
def test_merged_weights_are_those_of_peft(kind: str, method: str) -> None:
    model, expected = adapted(kind, method), by_peft(kind, method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_state_dict(model, model.state_dict())
    assert merged.keys() == plain(kind).state_dict().keys()
    written = plain(kind)
    merging.merge_into(written, trainable(model), METHODS[method])
    assert peft_of(written) is None and all(p.requires_grad for p in written.parameters())
    for name, tensor in written.state_dict().items():
        torch.testing.assert_close(merged[name].double(), expected[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in plain(kind).state_dict().items() if not torch.equal(tensor, merged[name])}
    assert changed and all(("bias" in name) >= (method == "bitfit") for name in changed)


@pytest.mark.parametrize(("kind", "method"), MERGEABLE)
def test_merged_models_answer_as_before(kind: str, method: str) -> None:
    model, merged = case(kind, method).model, plain(kind)
    merged.load_state_dict(merged_state_dict(model, model.state_dict()))
    with torch.no_grad():
        assert torch.allclose(merged(ROW).logits, model(ROW).logits, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), MERGEABLE)
def test_parts_of_layers_that_were_cut_off_are_left_out(kind: str, method: str) -> None:
    model, expected = plain(kind), by_peft(kind, method)
    cut_layers(model, 1)
    merging.merge_into(model, trainable(case(kind, method).model), METHODS[method])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0)


def test_a_merged_reward_model_keeps_its_head() -> None:
    model, merged = adapted("llama", "lora", scalar=True), plain("llama", scalar=True)
    merging.merge_into(merged, trainable(model), METHODS["lora"])
    assert torch.equal(merged.score.weight, model.score.weight)
    assert not torch.equal(plain("llama", scalar=True).score.weight, model.score.weight)
    assert torch.equal(merged_state_dict(model, model.state_dict())["score.weight"], model.score.weight)


def test_a_plain_model_is_merged_already() -> None:
    model = plain("llama")
    state = model.state_dict()
    merged = merged_state_dict(model, state)
    assert merged is not state and merged.keys() == state.keys()
    assert all(merged[name] is state[name] for name in state)


# --- what cannot be merged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_merged_says_why(method: str) -> None:
    reason = merging.why_not_mergeable(METHODS[method])
    if method in MERGED:
        assert reason == ""
        return
    assert method in reason
    assert ("tokens that stand before every row" in reason) == (method in (*EMBEDDED, *CACHED))
    model = case("llama", method).model
    with pytest.raises(ValueError, match=method):
        merged_state_dict(model, model.state_dict())
    target = plain("llama")
    with pytest.raises(ValueError, match=method):
        merging.merge_into(target, trainable(model), METHODS[method])
    untouched = plain("llama").state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in target.state_dict().items())
