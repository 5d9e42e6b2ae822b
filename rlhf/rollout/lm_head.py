"""Log-probabilities behind the LM head, one slice of the vocabulary at a time, forward and backward.

Neither the logits [N, V] nor their softmax ever exist whole: the forward pass keeps a running log-sum-exp (Milakov and
Gimelshein 2018, arXiv 1805.02867), and the backward pass computes each slice's logits again. It is one autograd
function, because autograd would keep every slice.

On two cores with V = 49152 and 384 positions, a forward without gradients takes half the time of log_softmax over whole
logits. With backward it takes the same time, although it has a fourth matrix product. It saves 300 MB.

A model that scales or caps its logits after the head gives its `LogitMap`, which is applied to every slice and chunk.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rlhf.models.logit_map import PLAIN, LogitMap

LOGITS = 1 << 21  # logits of a slice: 8 MB in float32, which fits in a processor's cache
LOGITS_ON_GPU = 1 << 26  # the same on a GPU, 256 MB: the number of calls costs most there
NARROWEST = 1024  # fewest columns of a slice; a narrower matrix product is slow
HEAD_CHUNK = 512  # most positions in one call of a head: 100 MB of logits at V = 49152 in float32


def _slices(vocabulary: int, hidden: Tensor) -> Iterator[slice]:
    size = max(NARROWEST, (LOGITS_ON_GPU if hidden.is_cuda else LOGITS) // max(1, len(hidden)))
    return (slice(start, start + size) for start in range(0, vocabulary, size))


def _within(part: slice, width: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column of each target in a slice [N, 1], clamped into it, and whether the target is in it [N]."""
    column = targets - part.start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


class VocabularyLogprobs(torch.autograd.Function):
    """Compute `vocabulary_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        logit_map: LogitMap,
    ) -> tuple[Tensor, Tensor]:
        wide = {"device": hidden.device, "dtype": torch.float32}
        # Over the slices so far, per position: the largest logit; the sums of p = exp(z - largest) and of
        # p (z - largest); and the logit z of the target.
        largest = torch.full((len(hidden),), torch.finfo(torch.float32).min, **wide)
        total, weighted, chosen = (torch.zeros(len(hidden), **wide) for _ in range(3))
        for part in _slices(len(weight), hidden):
            z = _logits(hidden, weight, bias, part, temperature, logit_map)
            column, inside = _within(part, z.shape[1], targets)
            chosen = torch.where(inside, z.gather(1, column)[:, 0], chosen)
            before, largest = largest, torch.maximum(largest, z.amax(1))
            lower = before - largest
            p = z.sub_(largest[:, None]).exp()
            weighted = (weighted + total * lower) * lower.exp() + z.mul_(p).sum(1)
            total = total * lower.exp() + p.sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, total)
        ctx.temperature, ctx.logit_map = temperature, logit_map
        entropies = total.log() - weighted / total
        ctx.mark_non_differentiable(entropies)
        return chosen - largest - total.log(), entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, largest, total = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad = grad / ctx.temperature
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if for_hidden else None
        d_weight = torch.empty_like(weight) if for_weight else None
        d_bias = torch.empty_like(bias) if for_bias else None
        for part in _slices(len(weight), hidden):
            # d log p(target) / dz = [z is the target's] - softmax(z)
            z = _logits(hidden, weight, bias, part, ctx.temperature, ctx.logit_map)
            slope = None if ctx.logit_map.plain else ctx.logit_map.slope(z * ctx.temperature)
            d = z.sub_(largest[:, None]).exp_()
            d.mul_((-grad / total)[:, None])
            column, inside = _within(part, d.shape[1], targets)
            d.scatter_add_(1, column, torch.where(inside, grad, 0.0)[:, None])
            if slope is not None:
                d.mul_(slope)
            if d_bias is not None:
                d_bias[part] = d.sum(0)
            d = d.to(weight.dtype)
            if d_hidden is not None:
                d_hidden += d @ weight[part]
            if d_weight is not None:
                torch.mm(d.t(), hidden, out=d_weight[part])
        return (None if d_hidden is None else d_hidden.to(hidden.dtype)), d_weight, d_bias, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice, temperature: float, logit_map: LogitMap
) -> Tensor:
    """Return new logits [N, slice] in float32, rounded as the head of a half-precision model rounds them."""
    z = logit_map(linear(hidden, weight[part], None if bias is None else bias[part])).float()
    return z if temperature == 1 else z.div_(temperature)


def vocabulary_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_map: LogitMap = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] of `targets` [N] under softmax(f(hidden W^T + b) / temperature), and entropies [N].

    f is `logit_map`. Both results are float32 and in nats; the entropies carry no gradient. `hidden` is [N, H];
    W [V, H] has its dtype; b is [V].
    """
    return VocabularyLogprobs.apply(hidden, weight, bias, targets, temperature, logit_map)


def _head_chunk(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, tokens: int | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logit_map(head(hidden)[:, :tokens]).float() / temperature, dim=-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def head_chunks(tokens: int) -> int:
    """Return in how many chunks the LM head takes that many positions."""
    return max(1, -(-tokens // HEAD_CHUNK))


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    chunks: int = 0,
    tokens: int | None = None,
    logit_map: LogitMap = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] of `targets` [N] given hidden states [N, H], and entropies [N], in nats.

    The entropies carry no gradient. A plain head that this process holds whole is taken by slices of the vocabulary. A
    head that is more than its weight, or whose weight is gathered when it is called, is called on chunks of the
    positions; with gradients each chunk is recomputed in the backward pass instead of kept. `chunks` is their number, 0
    for as many as the positions need (see `PolicyValue`). The temperature divides the logits after
    `logit_map`. Only the first `tokens` rows of the head are tokens; None: all.
    """
    if not chunks and type(head) is nn.Linear and head.weight.numel():
        bias = None if head.bias is None else head.bias[:tokens]
        return vocabulary_logprobs(hidden, head.weight[:tokens], bias, targets, temperature, logit_map)
    chunks = chunks or head_chunks(len(hidden))
    run = partial(_head_chunk, tokens=tokens, logit_map=logit_map)
    if torch.is_grad_enabled() and hidden.requires_grad and chunks > 1:
        run = partial(checkpoint, run, use_reentrant=False)
    parts = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    logps, entropies = zip(*(run(head, h, t, temperature) for h, t in parts), strict=True)
    return torch.cat(logps), torch.cat(entropies)
