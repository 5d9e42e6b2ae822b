"""Norms and gated MLPs of Llama-like layers that keep fewer activations for the backward pass.

Autograd keeps every operand of every product: a root-mean-square norm keeps its input and the normalised input, a gated
MLP keeps the gate, its SiLU, the up projection and their product. Here the norm keeps only its input, the MLP only the
gate and the up projection, and the backward pass computes the rest again. Unlike gradient checkpointing, this repeats
no matrix product. It saves a third of SmolLM2-135M's activations.

Shapes: any leading dimensions, H hidden size, F size of the MLP.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from rlhf.models.peft.methods import ADAPTER, is_plain_lora
from rlhf.models.placement import is_partitioned

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)


class RmsNorm(torch.autograd.Function):
    """y = w * x r with r = 1 / sqrt(mean(x^2) + eps), computed in float32 as in transformers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        r = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        d_x = d_weight = None
        normal = x.float() * r
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normal.to(x.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            g = (grad * weight).float()
            along = torch.linalg.vecdot(g, normal)[..., None].div_(x.shape[-1])
            d_x = g.sub_(normal.mul_(along)).mul_(r).to(x.dtype)  # a change of x along itself leaves y as it is
        return d_x, d_weight, None


class GatedDown(torch.autograd.Function):
    """y = (silu(gate) * up) W^T + b, for gate and up [..., F] and W [H, F]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        act = silu(gate)
        d_weight = rows.t() @ (act * up).flatten(0, -2) if ctx.needs_input_grad[2] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        through = grad @ weight
        d_up = act.mul_(through)
        d_gate = torch.ops.aten.silu_backward(through.mul_(up), gate)
        return d_gate, d_up, d_weight, d_bias


class GatedDownLora(torch.autograd.Function):
    """y = h W^T + b + s (h A^T) B^T with h = silu(gate) * up, for frozen W and b and trained A [r, F] and B [H, r]."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight, a, b)
        ctx.scale = scale
        h = silu(gate).mul_(up)
        y = linear(h, weight, bias)
        return (y + linear(linear(h.to(a.dtype), a), b) * scale).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, a, b = ctx.saved_tensors
        act = silu(gate)
        h = (act * up).flatten(0, -2).to(a.dtype)
        rows = grad.flatten(0, -2).to(b.dtype) * ctx.scale
        d_b = rows.t() @ (h @ a.t())
        low = rows @ b  # gradient of the r numbers between A and B
        d_a = low.t() @ h
        through = grad @ weight + (low @ a).to(grad.dtype).view_as(up)
        d_up = act.mul_(through)
        d_gate = torch.ops.aten.silu_backward(through.mul_(up), gate)
        return d_gate, d_up, None, None, d_a, d_b, None


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    return GatedDown.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight, mlp.down_proj.bias)


def _lora_mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    down = mlp.down_proj
    a, b, scale = down.lora_A[ADAPTER].weight, down.lora_B[ADAPTER].weight, down.scaling[ADAPTER]
    inner = down.base_layer
    return GatedDownLora.apply(mlp.gate_proj(x), mlp.up_proj(x), inner.weight, inner.bias, a, b, scale)


def use_low_memory_layers(model: nn.Module) -> nn.Module:
    """Give the norms and MLPs of known classes a forward that keeps less, in place; numbers change by rounding only.

    Frozen norms are left as they are, since autograd keeps no normalised input for them. So are modules that ZeRO-3
    partitions, since their weights are gathered around calls of modules.
    """
    for module in model.modules():
        if type(module) in NORMS and module.weight.requires_grad and not is_partitioned(module.weight):
            module.forward = partial(_norm_forward, module)
        elif type(module) in MLPS and module.config.hidden_act == "silu":
            if _plain(module.down_proj):
                module.forward = partial(_mlp_forward, module)
            elif _plain_lora(module.down_proj):
                module.forward = partial(_lora_mlp_forward, module)
    return model


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not is_partitioned(module.weight)


def _plain_lora(module: nn.Module) -> bool:
    """Return whether the module is a linear map with one trained low-rank update and nothing else."""
    if list(getattr(module, "lora_A", ())) != [ADAPTER]:
        return False
    inner = module.base_layer
    return is_plain_lora(module) and _plain(inner) and not any(p.requires_grad for p in inner.parameters())
