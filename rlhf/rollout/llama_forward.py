"""Forward passes of Llama-like models without gradients, for sampling and scoring. They read the model's own weights.

Training uses transformers' own forward, and so does every model and adapter that is not covered here
(`llama_forward_for` says which); tests compare the two. These passes make a third of its calls into torch and write
less to memory.

There are two layouts, because on a CPU the time of a matrix product depends on the layout. A pass over many tokens has
them in rows, [tokens, features]. A pass over one token per sequence has them in columns, [features, columns], because
W x with few columns takes a half to three quarters of the time of x W^T. The number of columns is rounded up
(`columns_for`), because a product with 31 columns takes twice the time of one with 32.

Shapes: B sequences, L tokens, H hidden size, D head size, N key-value heads with G query heads each, T cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu

from rlhf.models.peft.methods import is_plain_lora, peft_of
from rlhf.models.placement import is_partitioned

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
COVERED = {f"{family}For{task}" for family in FAMILIES for task in ("CausalLM", "SequenceClassification")}
PEFT = ("lora", "bitfit")  # the other methods compute something between the weights
ROTARY = ("default", "linear", "llama3", "yarn")  # the other kinds change with the length of the sequence


class KeysValues(NamedTuple):
    """Hold keys and values of one layer, both [B, N, T, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Linear:
    """Apply a linear map of the model with its adapters; all tensors are the model's own."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()  # A [r, in], B [out, r] and the scale of B A

    def rows(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y = linear(x, self.weight, self.bias)
        for a, b, scale in self.adapters:
            y += linear(linear(x.to(a.dtype), a), b).mul_(scale)
        return y

    def columns(self, x: Tensor) -> Tensor:
        """Map [in, B] to [out, B]."""
        y = self.weight @ x
        if self.bias is not None:
            y += self.bias[:, None]
        for a, b, scale in self.adapters:
            y += (b @ (a @ x.to(a.dtype))).mul_(scale)
        return y


@dataclass(frozen=True)
class LlamaLayer:
    """Hold the weights of one transformer layer; `q_norm` and `k_norm` are None in models without them."""

    before_attention: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    before_mlp: Tensor
    gate: Linear
    up: Linear
    down: Linear


class LlamaForward:
    """Run a model's layers. Make a new one for every pass: it refers to the weights as they are when it is made."""

    def __init__(self, model: nn.Module) -> None:
        self.body: Any = model.model
        self.layers = [_layer(module) for module in self.body.layers]
        self.groups = int(model.config.num_key_value_heads)
        self.heads = int(model.config.num_attention_heads)
        self.eps = float(model.config.rms_norm_eps)
        self.head = _linear(model.lm_head) if hasattr(model, "lm_head") else None
        self.size = self.layers[0].k.weight.shape[0] // self.groups  # D

    def hidden(self, ids: Tensor, layer_caches: list[KeysValues] | None = None) -> Tensor:
        """Return the last hidden states [B, L, H] of tokens [B, L] at positions 0 to L - 1, padded on the right.

        Every layer's keys and values are appended to `layer_caches`.
        """
        batch, length = ids.shape
        x = self.body.embed_tokens.weight[ids]
        angles = self._angles(x, torch.arange(length, device=ids.device))
        cos, sin = (t[:, None] for t in angles)  # [L, 1, D / 2]
        # According to its documentation, torch has CUDA kernels for grouped heads in half precision only.
        repeated = self.heads // self.groups if slow_groups(x) else 0
        for layer in self.layers:
            y = rms_norm(x, x.shape[-1:], layer.before_attention, self.eps)
            q, k, v = (m.rows(y).view(batch, length, -1, self.size) for m in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rms_norm(q, (self.size,), layer.q_norm, self.eps)
                k = rms_norm(k, (self.size,), layer.k_norm, self.eps)
            q, k, v = (t.transpose(1, 2) for t in (_rotated(q, cos, sin, -1), _rotated(k, cos, sin, -1), v))
            kept = KeysValues(k, v)
            if repeated:
                k, v = (t.repeat_interleave(repeated, 1) for t in (k, v))
            # Causal attention alone keeps padding on the right from every real token.
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeated)
            x = x + layer.o.rows(out.transpose(1, 2).reshape(batch, length, -1))
            y = rms_norm(x, x.shape[-1:], layer.before_mlp, self.eps)
            x = x + layer.down.rows(silu(layer.gate.rows(y), inplace=True).mul_(layer.up.rows(y)))
            if layer_caches is not None:
                layer_caches.append(kept)
        return rms_norm(x, x.shape[-1:], self.body.norm.weight, self.eps)

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: list[KeysValues], end: int, mask: Tensor | None
    ) -> Tensor:
        """Return the last hidden states [H, columns_for(B)] of one new token [B] per sequence, at `positions` [B].

        The columns past B are filling, which the caller drops; no product mixes columns. New keys and values are
        written at column `end` of every layer's cache, `buffers`. `mask` [B, 1, 1, end + 1] is added to the attention
        scores; None if every cached token is attended to.
        """
        rows, columns = len(tokens), columns_for(len(tokens))
        spare = (0, columns - rows)
        x = self.body.embed_tokens.weight[pad(tokens, spare)].t().contiguous()
        cos, sin = (t.t() for t in self._angles(x, pad(positions, spare)))  # [D / 2, columns]
        answers = x.new_zeros(self.groups, self.heads // self.groups, self.size, columns)
        for layer, (keys, values) in zip(self.layers, buffers, strict=True):
            y = self._normed(x, layer.before_attention)
            q, k, v = (m.columns(y).view(-1, self.size, columns) for m in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)
            k, v = (t[..., :rows].permute(2, 0, 1) for t in (_rotated(k, cos, sin, -2), v))
            keys[:, :, end], values[:, :, end] = k, v
            keys, values = keys[:, :, : end + 1], values[:, :, : end + 1]
            q = _rotated(q, cos, sin, -2)[..., :rows].unflatten(0, (self.groups, -1)).permute(3, 0, 1, 2)
            # One product takes all query heads of a group, [B, N, G, D] with [B, N, D, T]: keys are not repeated.
            scores = (q * self.size**-0.5) @ keys.transpose(2, 3)
            if mask is not None:
                scores += mask
            out = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values
            answers[..., :rows] = out.permute(1, 2, 3, 0)
            x = x + layer.o.columns(answers.flatten(0, 2))
            y = self._normed(x, layer.before_mlp)
            x = x + layer.down.columns(silu(layer.gate.columns(y), inplace=True).mul_(layer.up.columns(y)))
        return self._normed(x, self.body.norm.weight)

    def _angles(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """Return cosines and sines [positions, D / 2] of the rotary embedding, whose second half repeats the first."""
        return [t[0, :, : self.size // 2] for t in self.body.rotary_emb(x, positions[None])]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [.., features, columns] with its features normalised by their root mean square, in float32."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-2, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * weight[:, None]


def columns_for(rows: int) -> int:
    """Return the number of columns for so many rows: 1, or a multiple of 8 from 16 on; other widths are slow."""
    return 1 if rows == 1 else max(16, -(-rows // 8) * 8)


def slow_groups(x: Tensor) -> bool:
    """Return whether torch would compute grouped-head attention by its slow kernel, which keeps every score."""
    return x.device.type == "cuda" and x.dtype == torch.float32


def llama_forward_for(model: nn.Module) -> LlamaForward | None:
    """Return these passes for a model, or None for a model that they do not cover and that needs its own forward."""
    config, peft = model.config, peft_of(model)
    covered = (
        type(model).__name__ in COVERED
        and type(model) is getattr(transformers, type(model).__name__)  # not a namesake from a model's own code
        and getattr(config, "is_causal", True)
        and config.hidden_act == "silu"
        and not _slides(config)
        and config.rope_parameters["rope_type"] in ROTARY
        and config._attn_implementation == "sdpa"
        and not any(is_partitioned(p) and p.numel() == 0 for p in model.parameters())  # layers are gathered one by one
        and (peft is None or peft.method in PEFT)
        and all(_known(module) for module in model.modules())
    )
    return LlamaForward(model) if covered else None


def _slides(config: Any) -> bool:
    """Return whether some layer attends to the last tokens only."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) or any(kind != "full_attention" for kind in kinds)


def _known(module: nn.Module) -> bool:
    """Return whether a module computes what its class says: it has no hooks, no adapter but a plain LoRA one, and no
    linear map that is more than its weight, as in quantised models.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    inner = getattr(module, "base_layer", None)
    if inner is None:
        return type(module) is nn.Linear or not isinstance(getattr(module, "in_features", None), int)
    return is_plain_lora(module)


def _layer(module: Any) -> LlamaLayer:
    attention, mlp = module.self_attn, module.mlp
    q_norm, k_norm = (getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm"))
    return LlamaLayer(
        before_attention=module.input_layernorm.weight,
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        q_norm=q_norm,
        k_norm=k_norm,
        before_mlp=module.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _linear(module: Any) -> Linear:
    inner = getattr(module, "base_layer", module)
    if inner is module or module.disable_adapters:
        return Linear(inner.weight, inner.bias)
    active = [name for name in module.active_adapters if name in module.lora_A]
    adapters = tuple((module.lora_A[n].weight, module.lora_B[n].weight, module.scaling[n]) for n in active)
    return Linear(inner.weight, inner.bias, adapters)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """Return heads rotated by their positions; `dim` is the dimension of size D."""
    first, second = heads.chunk(2, dim)
    out = torch.empty_like(heads)
    one, two = out.chunk(2, dim)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=two).addcmul_(first, sin)
    return out
