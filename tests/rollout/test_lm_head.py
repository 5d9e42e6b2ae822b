"""Log-probabilities by slices of the vocabulary: against whole logits in float64, slice bounds and all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.models.logit_map import LogitMap
from rlhf.rollout import lm_head
from rlhf.rollout.lm_head import head_logprobs, vocabulary_logprobs

POSITIONS, HIDDEN, VOCABULARY = 7, 5, 23


def inputs(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(POSITIONS, HIDDEN) * 3, torch.randn(VOCABULARY, HIDDEN)
    bound = torch.tensor([0, 22, 7, 8, 15, 16, 7])  # the first and last of the vocabulary and of slices of 8
    each = [t.to(dtype).requires_grad_() for t in (hidden, weight, torch.randn(VOCABULARY))]
    return each[0], each[1], each[2] if bias else None, bound


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    p = torch.softmax(logits / temperature, 1)
    return p[torch.arange(len(p)), targets].log(), -(p * p.log()).sum(1)


@pytest.mark.parametrize("width", [1, 8, 23, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, width: int, bias: bool, temperature: float
) -> None:
    monkeypatch.setattr(lm_head, "LOGITS", 0)
    monkeypatch.setattr(lm_head, "NARROWEST", width)
    h, w, b, targets = inputs(bias=bias)
    upstream = torch.linspace(-1, 2, POSITIONS)
    found, entropies = vocabulary_logprobs(h, w, b, targets, temperature)
    found.backward(upstream)
    parts = [t for t in (h, w, b) if t is not None]
    gradients = [t.grad.clone() for t in parts]  # type: ignore[union-attr]
    for t in parts:
        t.grad = None
    expected, expected_entropies = whole(h, w, b, targets, temperature)
    expected.backward(upstream.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(entropies.double(), expected_entropies, atol=1e-5)
    assert not entropies.requires_grad
    for t, gradient in zip(parts, gradients, strict=True):
        assert torch.allclose(gradient, t.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("logit_map", [LogitMap(cap=2.0), LogitMap(0.5), LogitMap(divisor=3.0), LogitMap(2.0, 0.5, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunks", [0, 3])
def test_gradients_pass_through_caps_and_scales(
    monkeypatch: pytest.MonkeyPatch, logit_map: LogitMap, temperature: float, chunks: int
) -> None:
    """Against autograd in float64, by slices of the vocabulary and by chunks of the positions."""
    monkeypatch.setattr(lm_head, "LOGITS", 0)
    monkeypatch.setattr(lm_head, "NARROWEST", 8)
    h, w, b, targets = inputs(bias=True)
    assert b is not None
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    head.weight, head.bias = torch.nn.Parameter(w.detach()), torch.nn.Parameter(b.detach())
    found, entropies = head_logprobs(head, h, targets, temperature, chunks, logit_map=logit_map)
    upstream = torch.linspace(-1, 2, POSITIONS)
    found.backward(upstream)
    z = (h.double() @ w.double().t() + b.double()) * logit_map.multiplier / logit_map.divisor
    z = z if logit_map.cap is None else logit_map.cap * torch.tanh(z / logit_map.cap)
    p = torch.softmax(z / temperature, 1)
    expected = p[torch.arange(POSITIONS), targets].log()
    wanted = torch.autograd.grad(expected, (h, w, b), upstream.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(entropies.double(), -(p * p.log()).sum(1), atol=1e-5)
    for got, want in zip((h.grad, head.weight.grad, head.bias.grad), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-5)  # type: ignore[arg-type]


def test_what_is_frozen_gets_no_gradient() -> None:
    h, w, _, targets = inputs()
    w.requires_grad_(False)
    vocabulary_logprobs(h, w, None, targets, 1.0)[0].sum().backward()
    assert w.grad is None and h.grad is not None


def test_large_logits_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logit comes in the last slice, hundreds above all before it."""
    monkeypatch.setattr(lm_head, "LOGITS", 0)
    monkeypatch.setattr(lm_head, "NARROWEST", 2)
    weight = torch.tensor([[-400.0], [0.0], [0.0], [300.0], [600.0]], requires_grad=True)
    found, entropies = vocabulary_logprobs(torch.ones(2, 1), weight, None, torch.tensor([4, 1]), 1.0)
    assert found.tolist() == [0.0, -600.0]
    assert entropies.tolist() == [0.0, 0.0]
    found.sum().backward()
    # (1 - 1) + (0 - 1) for the largest, 1 - 0 for the other target, 0 for the rest
    assert weight.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0, -1.0]  # type: ignore[union-attr]


def test_bfloat16_weights_give_float32_numbers_of_the_rounded_logits() -> None:
    h, w, _, targets = inputs(torch.bfloat16)
    found, _ = vocabulary_logprobs(h, w, None, targets, 1.0)
    logits = torch.nn.functional.linear(h, w).double()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), logits.log_softmax(1)[torch.arange(POSITIONS), targets], atol=1e-5)
    found.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.bfloat16
    expected = [t.detach().double().requires_grad_() for t in (h, w)]
    whole(expected[0], expected[1], None, targets, 1.0)[0].sum().backward()
    for got, want in zip((h.grad, w.grad), expected, strict=True):
        assert torch.allclose(got.double(), want.grad, atol=0.05, rtol=0.05)  # type: ignore[arg-type,union-attr]


def test_no_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 x 4096 logits no tensor is larger than a slice, in either direction."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(lm_head, "LOGITS", 64 * 256)
    monkeypatch.setattr(lm_head, "NARROWEST", 256)
    h, w = torch.randn(64, 2, requires_grad=True), torch.randn(4096, 2, requires_grad=True)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(t.numel() for t in (out,) if isinstance(t, Tensor))])
            return out

    with Largest() as largest:
        vocabulary_logprobs(h, w, None, torch.zeros(64, dtype=torch.long), 1.0)[0].sum().backward()
    assert largest.numbers == 64 * 256  # and the gradient of W, of half as many


def test_words_that_a_bias_rules_out_do_not_spoil_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole slice of -inf comes first."""
    monkeypatch.setattr(lm_head, "LOGITS", 0)
    monkeypatch.setattr(lm_head, "NARROWEST", 2)
    weight = torch.zeros(4, 1, requires_grad=True)
    bias = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0])
    found, _ = vocabulary_logprobs(torch.ones(1, 1), weight, bias, torch.tensor([3]), 1.0)
    assert found.tolist() == pytest.approx([-math.log(2)])
    found.backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.0, 0.0, -0.5, 0.5])  # type: ignore[union-attr]
