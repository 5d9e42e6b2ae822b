"""Llama-like models without gradients, on the weights as they are: the passes of sampling and scoring.

transformers' own forward remains what is trained, and what is used for every model and adapter that is not covered here
(`llama_forward_for` says which); tests hold these passes to it. They make a third of its calls into torch and write
less to memory. Two layouts, for on a CPU a matrix product's time depends on them: many tokens lie in rows, [tokens,
features]; one token of each sequence lies in a column, [features, columns], for with few columns W x takes a half to
three quarters of the time of x W^T. Their number is rounded up (`columns_for`): with 31 columns a product takes twice
the time of one with 32.

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
PEFT = ("lora", "bitfit")  # the others put something between the weights
ROTARY = ("default", "linear", "llama3", "yarn")  # the others change with the length of what is there


class KeysValues(NamedTuple):
    """Of one layer; both [B, N, T, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Linear:
    """A linear map of the model with the adapters on it; all are the model's own tensors."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()  # A [r, in], B [out, r] and the scale of B A

    def rows(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = linear(x, self.weight, self.bias)
        for a, b, scale in self.adapters:
            y += linear(linear(x.to(a.dtype), a), b).mul_(scale)
        return y

    def columns(self, x: Tensor) -> Tensor:
        """[in, B] to [out, B]."""
        y = self.weight @ x
        if self.bias is not None:
            y += self.bias[:, None]
        for a, b, scale in self.adapters:
            y += (b @ (a @ x.to(a.dtype))).mul_(scale)
        return y


@dataclass(frozen=True)
class LlamaLayer:
    """The parts of a transformer layer; norms are vectors, and None where there is none."""

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
    """A model's layers, made anew for every pass: it refers to the weights of that moment."""

    def __init__(self, model: nn.Module) -> None:
        self.body: Any = model.model
        self.layers = [_layer(module) for module in self.body.layers]
        self.groups = int(model.config.num_key_value_heads)
        self.heads = int(model.config.num_attention_heads)
        self.eps = float(model.config.rms_norm_eps)
        self.head = _linear(model.lm_head) if hasattr(model, "lm_head") else None
        self.size = self.layers[0].k.weight.shape[0] // self.groups  # D

    def hidden(self, ids: Tensor, layer_caches: list[KeysValues] | None = None) -> Tensor:
        """Last hidden states [B, L, H] of tokens [B, L] that stand at positions 0 to L - 1, padded on the right.

        keep: gets every layer's keys and values.
        """
        batch, length = ids.shape
        x = self.body.embed_tokens.weight[ids]
        angles = self._angles(x, torch.arange(length, device=ids.device))
        cos, sin = (t[:, None] for t in angles)  # [L, 1, D / 2]
        # On CUDA torch has kernels for grouped heads in half precision only, by its documentation.
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
        self, tokens: Tensor, positions: Tensor, buffers: list[KeysValues], end: int | Tensor, mask: Tensor | None
    ) -> Tensor:
        """Last hidden states [H, columns_for(B)] of one token [B] more for each sequence, at `positions` [B].

        The columns past B mean nothing, and no product mixes columns: the caller drops them.

        Args:
            room: of every layer; the new keys and values are written at `end`.
            end: a tensor [1] where no shape may depend on it; then attention is over the whole room.
            mask: [B, 1, 1, end + 1], or as long as the whole room, added to the attention scores; None where all that
                is cached counts.
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
            if isinstance(end, Tensor):
                keys.index_copy_(2, end, k[:, :, None])
                values.index_copy_(2, end, v[:, :, None])
            else:
                keys[:, :, end], values[:, :, end] = k, v
                keys, values = keys[:, :, : end + 1], values[:, :, : end + 1]
            q = _rotated(q, cos, sin, -2)[..., :rows].unflatten(0, (self.groups, -1)).permute(3, 0, 1, 2)
            # All query heads of a group in one product, [B, N, G, D] with [B, N, D, T]: keys are not repeated.
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
        """Cosines and sines [positions, D / 2] of the rotary embedding; its second half repeats the first."""
        return [t[0, :, : self.size // 2] for t in self.body.rotary_emb(x, positions[None])]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm over the last dimension but one, in float32 as transformers takes it."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-2, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * weight[:, None]


def columns_for(rows: int) -> int:
    """Columns for so many rows: products are slow at widths that are no multiple of 8, and below 16 except for 1."""
    return 1 if rows == 1 else max(16, -(-rows // 8) * 8)


def slow_groups(x: Tensor) -> bool:
    """Whether attention by groups of heads would fall to torch's slow kernel, which holds every score."""
    return x.device.type == "cuda" and x.dtype == torch.float32


def llama_forward_for(model: nn.Module) -> LlamaForward | None:
    """The passes for a model, or None for one that they do not cover: its own forward serves then."""
    config, peft = model.config, peft_of(model)
    covered = (
        type(model).__name__ in COVERED
        and type(model) is getattr(transformers, type(model).__name__)  # not a namesake from a model's own code
        and getattr(config, "is_causal", True)
        and config.hidden_act == "silu"
        and not _slides(config)
        and config.rope_parameters["rope_type"] in ROTARY
        and config._attn_implementation == "sdpa"
        and not any(is_partitioned(p) and p.numel() == 0 for p in model.parameters())  # layers gathered one by one
        and (peft is None or peft.method in PEFT)
        and all(_known(module) for module in model.modules())
    )
    return LlamaForward(model) if covered else None


def _slides(config: Any) -> bool:
    """Whether some layer attends to the last tokens only."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) or any(kind != "full_attention" for kind in kinds)


def _known(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hooks on it, no adapter but a plain LoRA one, and no linear map
    that is more than its weight, as those of quantised models are."""
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
    """Rotary positions on heads whose D numbers lie along `dim`."""
    first, second = heads.chunk(2, dim)
    out = torch.empty_like(heads)
    one, two = out.chunk(2, dim)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=two).addcmul_(first, sin)
    return out
