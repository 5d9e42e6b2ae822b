"""Layers that keep less for the backward: the numbers and gradients of transformers' own, and less that is kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rlhf.model_config import PeftSection
from rlhf.models.low_memory_layers import GatedDown, GatedDownLora, RmsNorm, use_low_memory_layers
from rlhf.models.peft.methods import add_adapter, trainable

FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


def model(kind: type[PreTrainedConfig] = LlamaConfig, **extra: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = kind(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes, **extra)
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
    changed = use_low_memory_layers(copy.deepcopy(net))
    assert any("forward" in vars(module) for module in changed.modules())
    close(run(changed, recompute), run(net), 2e-5)


def test_bfloat16_rounds_as_transformers_does() -> None:
    net = model().bfloat16()
    changed = use_low_memory_layers(copy.deepcopy(net))
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(changed(input_ids=ids).logits, net(input_ids=ids).logits)
    close(run(changed), run(net), 1e-3)


def adapted(method: str, **extra: object) -> nn.Module:
    """The small model with a method on it whose weights are not those it starts with."""
    net = add_adapter(model(**extra), PeftSection(method=method))  # type: ignore[arg-type]
    for parameter in trainable(net).values():
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora", "adapter", "ia3", "prefix"])
def test_frozen_mlps_compute_what_transformers_and_peft_do(kind: type[PreTrainedConfig], method: str) -> None:
    net = adapted(method, kind=kind)
    changed = use_low_memory_layers(copy.deepcopy(net))
    mlps = {type(module).__name__ for module in changed.modules() if "forward" in vars(module)}
    own = {type(net.model).__name__} if method == "prefix" else set()  # type: ignore[union-attr]
    plain = method in ("lora", "adapter", "prefix")  # the others have more than a weight in the last map
    assert mlps - own == ({f"{kind.__name__.removesuffix('Config')}MLP"} if plain else set())  # norms are frozen
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(changed(input_ids=ids).logits, net(input_ids=ids).logits)
    close(run(changed), run(net), 2e-5)


def test_lora_in_bfloat16_rounds_as_peft_does() -> None:
    net = add_adapter(model().bfloat16(), PeftSection(method="lora"))
    for parameter in trainable(net).values():
        nn.init.normal_(parameter, std=0.3)
    assert {parameter.dtype for parameter in trainable(net).values()} == {torch.float32}
    changed = use_low_memory_layers(copy.deepcopy(net))
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(changed(input_ids=ids).logits, net(input_ids=ids).logits)
    close(run(changed), run(net), 2e-2)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def with_lora(g: Tensor, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return GatedDownLora.apply(g, u, leaf(4, 5).detach() * 0 + 0.7, torch.ones(4).double(), a, b, 1.5)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return RmsNorm.apply(x, w, 1e-2)

    torch.autograd.gradcheck(with_lora, (leaf(2, 3, 5), leaf(2, 3, 5), leaf(2, 5), leaf(4, 2)))
    torch.autograd.gradcheck(GatedDown.apply, (leaf(2, 3, 5), leaf(2, 3, 5), leaf(4, 5), leaf(4)))
    # The norm itself takes float32, whose differences are coarse.
    torch.autograd.gradcheck(norm, (leaf(2, 3, 5), leaf(5)), eps=1e-2, atol=1e-2, rtol=1e-2)


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
    changed = use_low_memory_layers(copy.deepcopy(net))
    for module in changed.modules():
        if "norm" in type(module).__name__.lower():
            vars(module).pop("forward", None)
    assert kept(net) - kept(changed) == 2 * 24 * (2 * 48) * 4
    # Of five norms besides, the normalised input: 32 numbers a token. (The squares' operand is the input itself.)
    use_low_memory_layers(changed)
    assert kept(net) - kept(changed) == (2 * (2 * 48) + 5 * 32) * 24 * 4


@pytest.mark.parametrize(("method", "numbers"), [("lora", 2 * (2 * 48 + 16)), ("adapter", 48)])
def test_less_is_kept_under_a_method_by_hand(method: str, numbers: int) -> None:
    """24 tokens of four bytes. LoRA: SiLU of the gate, the product, and the 16 numbers between A and B, in both MLPs.
    With a bottleneck behind it, the frozen MLP of the first layer has nothing before it that is trained and keeps
    nothing; that of the second needs no product for the frozen last map, only the SiLU."""
    net = adapted(method)
    assert kept(net) - kept(use_low_memory_layers(copy.deepcopy(net))) == 24 * numbers * 4


def test_other_models_stay_as_they_are() -> None:
    net = model(hidden_act="gelu")
    use_low_memory_layers(net)
    changed = {type(module).__name__ for module in net.modules() if "forward" in vars(module)}
    assert changed == {"LlamaRMSNorm"}


def test_a_changed_model_can_be_copied_and_pickled() -> None:
    net = use_low_memory_layers(model())
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            copied.model.layers[0].mlp.down_proj.weight.zero_()
        one, two = (each(input_ids=torch.arange(12)[None]).logits for each in (net, copied))
        assert not torch.equal(one, two)  # the copy runs on weights of its own
