"""Memory that a pass of the program holds, found by running the program's own code on the meta device.

Meta tensors have shapes and no storage: no weight is loaded and nothing is computed, but every operation says what it
would allocate, and autograd keeps and frees as it would. So LoRA that stops the backward early, recomputed layers and
chunks of the LM head need no formula of their own. All layers are alike, so models of one and two layers are run, and
memory grows in a straight line from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from rlhf.costs.model_shapes import ModelSpec, build
from rlhf.models.layers import decoder_layers, kv_heads
from rlhf.models.low_memory_layers import use_low_memory_layers
from rlhf.rollout.batches import build_batch
from rlhf.rollout.lm_head import head_chunks
from rlhf.rollout.sampling import sample_token
from rlhf.rollout.scoring import hidden_states, raw_scores, response_logprobs, response_values
from rlhf.rollout.shared_prompts import build_shared, share_prompts, shared_scores

PassKind = Literal["backbone", "policy", "value", "reward"]
SAMPLE = (1, 2)  # layers of the models that are run


@dataclass(frozen=True)
class PassShape:
    """Size of a batch: `rows` rows of `prompt` + `response` tokens, of which `outputs` at a time share a prompt."""

    rows: int
    prompt: int
    response: int
    outputs: int = 1

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Footprint:
    """Bytes of one pass, weights and complete gradients left out."""

    activations: float = 0.0  # kept for the backward by the transformer layers
    head: float = 0.0  # kept for the backward by what comes after them: logits, normalised logits
    working: float = 0.0  # the largest temporary memory of an operation
    head_gradients: float = 0.0  # of LM head and embeddings, which are there before the first activations are freed


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the context, but for the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.gradients: dict[int, int] = {}
        self.live = self.peak = self.gradients_at_peak = 0  # bytes now; most until `frozen`; complete gradients then
        self.frozen = False

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # the code asks whether a mask is all ones: it is not, because rows differ in length
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def __enter__(self) -> LiveBytes:
        # A function mode would not do: recomputed layers run in a thread of the backward, which it does not reach.
        self.attention = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = _fused_attention
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        functional.scaled_dot_product_attention = self.attention

    def mark_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as complete."""
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata
            self.gradients[key] = self.sizes.get(key, 0)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        if not self.frozen and self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, sum(self.gradients.values())

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.gradients.pop(key, None)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any
) -> Tensor:
    """Run the kernel that keeps no attention weights; by itself the meta device takes the plain one, which does."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]


@lru_cache(maxsize=256)
def training_pass(spec: ModelSpec, kind: PassKind, shape: PassShape, recompute: bool) -> Footprint:
    """Return the footprint of a forward and backward without earlier gradients; `recompute` is gradient checkpointing.

    A backbone ends before the LM head, a policy goes through it at the response's positions; value and reward have the
    scalar head. Only reward has prompts that several rows share, which go through the layers once.
    """
    return _line(spec, lambda spec: _run_training(spec, kind, shape, recompute))


@lru_cache(maxsize=256)
def scoring_pass(spec: ModelSpec, kind: PassKind, shape: PassShape) -> float:
    """Return the peak bytes besides the weights in a pass without gradients, whatever the number of layers."""
    model = build(_cut(spec, SAMPLE[0]))
    with torch.no_grad(), LiveBytes(model) as memory:
        _forward(model, kind, shape)
    return float(memory.peak)


@lru_cache(maxsize=256)
def decoding_pass(spec: ModelSpec, shape: PassShape, prompts: int) -> float:
    """Return the peak bytes besides weights and KV cache while responses to `prompts` distinct prompts are sampled."""
    model = build(_cut(spec, SAMPLE[0]))
    with torch.no_grad(), LiveBytes(model) as memory:
        prefill = _decode_step(model, memory, prompts, 0, shape.prompt)
        last = _decode_step(model, memory, shape.rows, shape.tokens, 1)
    return float(max(prefill, last))


def _decode_step(model: PreTrainedModel, memory: LiveBytes, rows: int, cached: int, tokens: int) -> int:
    """Return the peak bytes besides the KV cache in a step of the decode loop, as rlhf/rollout/sampling.py does it.

    `tokens` tokens of each row go through the model; the cache has `cached` after the step, 0 for the prefill.
    """
    config, device = model.config, model.device
    cache = DynamicCache(config=config)
    if cached:
        heads, width = kv_heads(config)
        for layer in range(SAMPLE[0]):
            keys, values = torch.zeros(2, rows, heads, cached - 1, width, dtype=model.dtype, device=device)
            cache.update(keys, values, layer)
    before = memory.live
    memory.peak = before
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, max(cached, tokens), dtype=torch.long, device=device)
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    logits = model(**given, position_ids=(mask.cumsum(1) - 1)[:, -tokens:], logits_to_keep=1).logits[:, -1]
    sample_token(logits, torch.zeros(rows, dtype=torch.float64, device=device))
    kept = 0 if cached else sum(t.numel() * t.element_size() for each in cache.layers for t in (each.keys, each.values))
    return memory.peak - before - kept


def _line(spec: ModelSpec, run: Callable[[ModelSpec], Footprint]) -> Footprint:
    """Return the footprint of `spec` from those of two smaller models; layers without gradients keep nothing."""
    deep = spec.backward_layers
    if deep <= SAMPLE[0]:
        return run(_cut(spec, deep))
    low, high = (run(_cut(spec, layers)) for layers in SAMPLE)
    per_layer = (high.activations - low.activations) / (SAMPLE[1] - SAMPLE[0])
    values = {f.name: getattr(high, f.name) for f in fields(Footprint)}
    return Footprint(**values | {"activations": low.activations + per_layer * (deep - SAMPLE[0])})


def _cut(spec: ModelSpec, layers: int) -> ModelSpec:
    """Return the same model with so many layers, all of them with adapters where it has any."""
    peft = spec.peft and spec.peft.model_copy(update={"last_layers": 0})
    return replace(spec, keep_layers=layers, peft=peft)


def _run_training(spec: ModelSpec, kind: PassKind, shape: PassShape, recompute: bool) -> Footprint:
    model = build(spec)
    if kind != "backbone" and not spec.partitioned:
        use_low_memory_layers(model)  # as the engines do; SFT is TRL's
    if recompute:
        # The generator's state, which checkpointing keeps for dropout, does not exist for meta tensors.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.train()
    layers = decoder_layers(model)
    inside = {id(p) for p in layers.parameters()}
    kept: list[int] = []
    with LiveBytes(model) as memory, share_prompts(model) if shape.outputs > 1 else nullcontext():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(_on_gradient(memory, id(parameter) in inside))
        layers[-1].register_forward_hook(lambda *_: kept.append(memory.live))
        loss = _forward(model, kind, shape, calls_head=spec.partitioned)
        after = memory.live
        loss.backward()
    peak = memory.peak - memory.gradients_at_peak
    return Footprint(kept[0], max(0, after - kept[0]), max(0, peak - after), memory.gradients_at_peak)


def _on_gradient(memory: LiveBytes, in_layers: bool) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        memory.mark_gradient(parameter)
        memory.frozen = memory.frozen or in_layers  # after this activations are freed and gradients added

    return hook


def _forward(model: nn.Module, kind: PassKind, shape: PassShape, calls_head: bool = False) -> Tensor:
    """Run the pass as the stages make it; return a scalar. `calls_head`: LM head in chunks, as under ZeRO-3."""
    device, prompt, response = next(model.parameters()).device, [0] * shape.prompt, [0] * shape.response
    if shape.outputs > 1:
        # Neighbours of different groups have different prompts.
        pairs = [([row // shape.outputs % 2] * shape.prompt, response) for row in range(shape.rows)]
        return shared_scores(model, build_shared(pairs).to(device)).sum()
    batch = build_batch([(prompt, response)] * shape.rows, 0).to(device)
    if kind == "backbone":
        return hidden_states(model, batch).sum()
    if kind == "policy":
        chunks = head_chunks(shape.rows * shape.response) if calls_head else 0
        logprobs, entropies = response_logprobs(model, batch, 1.0, chunks)
        return logprobs.sum() + entropies.sum().detach()
    return (response_values(model, batch) if kind == "value" else raw_scores(model, batch)).sum()
