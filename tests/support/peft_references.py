"""Make small models with every parameter-efficient method, and compute what each should compute, without rlhf/.

The references do not use the functions under test: peft's own wrapper merges lora, dora and ia3 into a plain model;
virtual tokens are put before a plain model by hand, as embeddings or in a cache; a bottleneck is a hook. Every weight
gets a value of its own, also biases and norms, which a new model has at zero and one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlhf.model_config import PeftSection
from rlhf.models.peft.methods import add_adapter, trainable
from support.small_models import EOS, gpt2, llama

VIRTUAL, WIDTH, RANK, ALPHA, BOTTLENECK = 3, 7, 3, 6.0, 5
METHODS = {
    "lora": PeftSection(method="lora", rank=RANK, alpha=ALPHA),
    "dora": PeftSection(method="dora", rank=RANK, alpha=ALPHA),
    "ia3": PeftSection(method="ia3"),
    "bitfit": PeftSection(method="bitfit"),
    "adapter": PeftSection(method="adapter", bottleneck=BOTTLENECK),
    "prompt": PeftSection(method="prompt", virtual_tokens=VIRTUAL),
    "p_tuning": PeftSection(method="p_tuning", virtual_tokens=VIRTUAL, hidden=WIDTH),
    "prefix": PeftSection(method="prefix", virtual_tokens=VIRTUAL, hidden=WIDTH),
    "p_tuning_v2": PeftSection(method="p_tuning_v2", virtual_tokens=VIRTUAL),
}
MERGED = ("lora", "dora", "ia3", "bitfit")
EMBEDDED = ("prompt", "p_tuning")
CACHED = ("prefix", "p_tuning_v2")
# Llama has grouped query attention and no biases, GPT-2 Conv1D maps, biases and learned positions, Qwen2 biases on
# linear maps, and OPT a language model that goes past its body to the decoder in it.
CASES = [(kind, method) for method in METHODS for kind in ("llama", "gpt2") if (kind, method) != ("llama", "bitfit")]
CASES += [("qwen2", method) for method in MERGED] + [("opt", method) for method in (*EMBEDDED, *CACHED)]
LINEAR = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
LINEAR |= dict.fromkeys(("llama", "qwen2"), [f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")])
# Maps whose outputs IA3 scales, and maps whose inputs it scales.
IA3 = {"llama": (r"[kv]_proj", "down_proj"), "qwen2": (r"[kv]_proj", "down_proj"), "gpt2": ("c_attn", r"mlp\.c_proj")}
SCALAR = {"llama": transformers.LlamaForSequenceClassification, "gpt2": transformers.GPT2ForSequenceClassification}
SCALAR |= {"qwen2": transformers.Qwen2ForSequenceClassification, "opt": transformers.OPTForSequenceClassification}
ByHand = Callable[[list[int]], Tensor]


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=50, num_key_value_heads=2, initializer_range=0.3, eos_token_id=EOS, **shape)
    return Qwen2ForCausalLM(config).eval()


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
    config = OPTConfig(vocab_size=50, hidden_size=32, word_embed_proj_dim=32, init_std=0.3, dropout=0.0, **shape)
    return OPTForCausalLM(config).eval()


def plain(kind: str, scalar: bool = False, attention: str = "sdpa") -> PreTrainedModel:
    """Return a new model without a method, with the same weights at every call."""
    model = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2, "opt": opt}[kind]()
    model.config.pad_token_id = 0
    model.set_attn_implementation(attention)
    if scalar:
        model.config.num_labels = 1
        model = SCALAR[kind](copy.deepcopy(model.config)).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    move(dict(model.named_parameters()), 0.05)
    return model


def adapted(kind: str, method: str, scalar: bool = False, attention: str = "sdpa", **settings: int) -> PreTrainedModel:
    """Return a plain model with the method on it, its trained weights moved away from where they start."""
    peft = PeftSection(**(METHODS[method].model_dump() | settings))
    model = add_adapter(plain(kind, scalar, attention), peft)
    stir(model)
    return model.eval()


def stir(model: nn.Module) -> None:
    """Move the trained weights away from where they start, so that every part of a method has an effect."""
    move(trainable(model), 0.2)


@torch.no_grad()
def move(weights: dict[str, Tensor], size: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for _, weight in sorted(weights.items()):
        weight += size * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in float64 throughout; Llama's own norms go through float32."""
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def hidden_by_hand(kind: str, model: PreTrainedModel) -> ByHand:
    """Return the function that computes the last hidden states [L, H] that `model` should give one row, in float64."""
    peft = model.peft_method
    base = in_double(plain(kind, hasattr(model, "score")))
    values = {name: tensor.detach().double() for name, tensor in trainable(model).items()}
    if peft.method in (*EMBEDDED, *CACHED):
        return partial(_on_virtual_tokens, base, peft, values)
    with torch.no_grad():
        base = REFERENCES[peft.method](kind, base, peft, values)
    return partial(_alone, base)


@torch.no_grad()
def _alone(base: PreTrainedModel, ids: list[int]) -> Tensor:
    return _body(base)(torch.tensor([ids])).last_hidden_state[0]


class Case(NamedTuple):
    """A model with a method on it, which tests must not change, and what is expected of it."""

    kind: str
    model: PreTrainedModel
    hidden: ByHand

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits [L, V] of one row without padding, in float64; all models here have the head of `plain`."""
        return self.hidden(ids) @ plain(self.kind).get_output_embeddings().weight.double().t()

    def logprobs(self, prompt: list[int], response: list[int]) -> list[float]:
        """Return the log-probabilities of the response's tokens, in nats."""
        logp = self.logits(prompt + response).log_softmax(-1)
        return [float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]


@cache
def case(kind: str, method: str, attention: str = "sdpa") -> Case:
    """Return the case of a model and a method, the same one for all tests."""
    model = adapted(kind, method, attention=attention)
    return Case(kind, model, hidden_by_hand(kind, model))


# --- virtual tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _on_virtual_tokens(base: PreTrainedModel, peft: PeftSection, values: dict[str, Tensor], ids: list[int]) -> Tensor:
    body = _body(base)
    positions = torch.arange(VIRTUAL + len(ids))[None]
    made = virtual_tokens(peft.method, values)
    if peft.method in EMBEDDED:
        words = base.get_input_embeddings()(torch.tensor([ids]))
        out = body(inputs_embeds=torch.cat([made[None], words], 1), position_ids=positions)
        return out.last_hidden_state[0, VIRTUAL:]
    heads = getattr(base.config, "num_key_value_heads", base.config.num_attention_heads)
    size = base.config.hidden_size // base.config.num_attention_heads
    held = DynamicCache(config=base.config)
    # A row of `made` holds the keys of layer 0, its values, the keys of layer 1, ...; each of them head by head.
    parts = made.split(heads * size, 1)
    for layer in range(base.config.num_hidden_layers):
        keys_and_values = parts[2 * layer : 2 * layer + 2]
        held.update(*(torch.stack(part.split(size, 1))[None] for part in keys_and_values), layer)
    out = body(torch.tensor([ids]), past_key_values=held, position_ids=positions[:, VIRTUAL:])
    return out.last_hidden_state[0]


def _body(model: PreTrainedModel) -> Any:
    return getattr(model, model.base_model_prefix)


def virtual_tokens(method: str, values: dict[str, Tensor]) -> Tensor:
    """Return embeddings [V, H], or keys and values of all layers [V, 2 layers N D]; the networks are written out."""
    w = {name.split(".encoder.")[1]: tensor for name, tensor in values.items() if ".encoder." in name}
    x = w["embedding.weight"]
    if method == "p_tuning":
        x = (x @ w["mlp_head.0.weight"].t() + w["mlp_head.0.bias"]).clamp(min=0)
        x = (x @ w["mlp_head.2.weight"].t() + w["mlp_head.2.bias"]).clamp(min=0)
        return x @ w["mlp_head.4.weight"].t() + w["mlp_head.4.bias"]
    if method == "prefix":
        x = (x @ w["transform.0.weight"].t() + w["transform.0.bias"]).tanh()
        return x @ w["transform.2.weight"].t() + w["transform.2.bias"]
    return x


# --- the other methods ------------------------------------------------------------------------------------------------


def by_peft(kind: str, base: PreTrainedModel, peft: PeftSection, values: dict[str, Tensor]) -> PreTrainedModel:
    """Return the base with lora, dora or ia3 put on and merged by peft's own wrapper."""
    from peft import IA3Config, LoraConfig, get_peft_model

    if peft.method == "ia3":
        layers = "|".join(str(layer) for layer in chosen_layers(base, peft))
        scaled, inner = IA3[kind]
        maps = {"target_modules": rf".*\.({layers})\..*({scaled}|{inner})"}
        maps["feedforward_modules"] = rf".*\.({layers})\..*{inner}"
        config = IA3Config(fan_in_fan_out=kind == "gpt2", **maps)
    else:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, use_dora=peft.method == "dora", fan_in_fan_out=kind == "gpt2",
            target_modules=LINEAR[kind], layers_to_transform=chosen_layers(base, peft),
        )  # fmt: skip
    wrapped = get_peft_model(base, config).double()
    own = {name: p for name, p in wrapped.named_parameters() if "lora_" in name or "ia3_" in name}
    assert own.keys() == {f"base_model.model.{name}" for name in values if name != "score.weight"}
    for name, parameter in own.items():
        parameter.copy_(values[name.removeprefix("base_model.model.")])
    return wrapped.merge_and_unload()


def chosen_layers(base: PreTrainedModel, peft: PeftSection) -> list[int]:
    layers = list(range(base.config.num_hidden_layers))
    return layers[-peft.last_layers :] if peft.last_layers else layers


def with_biases(kind: str, base: PreTrainedModel, peft: PeftSection, values: dict[str, Tensor]) -> PreTrainedModel:
    base.load_state_dict(base.state_dict() | values)
    return base


def with_bottlenecks(kind: str, base: PreTrainedModel, peft: PeftSection, values: dict[str, Tensor]) -> PreTrainedModel:
    """Add W_up gelu(W_down x + b_down) + b_up to the output x of every feed-forward layer, by a hook."""
    for name, module in base.named_modules():
        w = {part: values.get(f"{name}.{part}") for part in ("down.weight", "down.bias", "up.weight", "up.bias")}
        if not name.endswith("mlp") or w["up.bias"] is None:
            continue

        def behind(module: nn.Module, inputs: object, x: Tensor, w: dict[str, Tensor] = w) -> Tensor:
            inner = x @ w["down.weight"].t() + w["down.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            return x + inner @ w["up.weight"].t() + w["up.bias"]

        module.register_forward_hook(behind)
    return base


REFERENCES = {"lora": by_peft, "dora": by_peft, "ia3": by_peft, "bitfit": with_biases, "adapter": with_bottlenecks}
