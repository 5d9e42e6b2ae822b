"""Layers that keep less for the backward: the numbers and gradients of transformers' own, and less that is kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rlhf.lean import GatedDown, RmsNorm, keep_less

FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


def model(kind: type[PreTrainedConfig] = LlamaConfig, **extra: object) -> nn.Module:
    torch.manual_seed(0)
    config = kind(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        **extra,
    )
    made = AutoModelForCausalLM.from_config(config)
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, 1.0, 0.3)  # ones and zeros would hide a wrong factor or term
    return made


def run(net: nn.Module, recompute: bool = False) -> list[Tensor]:
    """Logits and all gradients."""
    if recompute:
        net.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        net.train()
    ids = torch.arange(24).reshape(2, 12).remainder(50)
    logits = net(input_ids=ids).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return [logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def close(one: list[Tensor], two: list[Tensor], tolerance: float) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert float((a - b).float().norm()) <= tolerance * float(b.float().norm())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_and_gradients_are_those_of_transformers(kind: type[PreTrainedConfig], recompute: bool) -> None:
    extra = {"mlp_bias": True} if kind is LlamaConfig else {}
    net = model(kind, **extra)
    changed = keep_less(copy.deepcopy(net))
    assert any("forward" in vars(module) for module in changed.modules())
    close(run(changed, recompute), run(net), 2e-5)


def test_bfloat16_rounds_as_transformers_does() -> None:
    net = model().bfloat16()
    changed = keep_less(copy.deepcopy(net))
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(changed(input_ids=ids).logits, net(input_ids=ids).logits)
    close(run(changed), run(net), 1e-3)


def test_frozen_layers_stay_as_they_are() -> None:
    """Under LoRA all norms are frozen, and every linear map is more than its weight."""
    net = get_peft_model(model(), LoraConfig(target_modules="all-linear"))  # type: ignore[arg-type]
    assert not any("forward" in vars(module) for module in keep_less(net).modules())


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.autograd.gradcheck(
        lambda g, u, w, b: GatedDown.apply(g, u, w, b), (leaf(2, 3, 5), leaf(2, 3, 5), leaf(4, 5), leaf(4))
    )
    # The norm itself takes float32, whose differences are coarse.
    torch.autograd.gradcheck(
        lambda x, w: RmsNorm.apply(x, w, 1e-2), (leaf(2, 3, 5), leaf(5)), eps=1e-2, atol=1e-2, rtol=1e-2
    )


def kept(net: nn.Module) -> int:
    """Bytes that one forward keeps, each storage once, the model's own left out."""
    own = {p.data_ptr() for p in net.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net.model(input_ids=torch.arange(24).reshape(2, 12)).last_hidden_state  # type: ignore[operator,union-attr]
    del logits
    return sum(found.values())


def test_less_is_kept_by_hand() -> None:
    """Of two MLPs, with 24 tokens of four bytes: SiLU of the gate and the product, 2 x 48 numbers a token."""
    net = model()
    changed = keep_less(copy.deepcopy(net))
    for module in changed.modules():
        if "norm" in type(module).__name__.lower():
            vars(module).pop("forward", None)
    assert kept(net) - kept(changed) == 2 * 24 * (2 * 48) * 4
    # Of five norms besides, the normalised input: 32 numbers a token. (The squares' operand is the input itself.)
    keep_less(changed)
    assert kept(net) - kept(changed) == (2 * (2 * 48) + 5 * 32) * 24 * 4


def test_other_models_stay_as_they_are() -> None:
    net = model(hidden_act="gelu")
    keep_less(net)
    changed = {type(module).__name__ for module in net.modules() if "forward" in vars(module)}
    assert changed == {"LlamaRMSNorm"}


def test_a_changed_model_can_be_copied_and_pickled() -> None:
    net = keep_less(model())
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            copied.model.layers[0].mlp.down_proj.weight.zero_()
        one, two = (each(input_ids=torch.arange(12)[None]).logits for each in (net, copied))
        assert not torch.equal(one, two)  # the copy runs on weights of its own
