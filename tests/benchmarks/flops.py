"""Floating-point operations that a model's arithmetic needs, counted from its shape; pure functions.

Counted are the products of tokens with weights that they pass through (2 operations a weight) and attention's own two
products over the keys a token may see. A backward pass costs twice its forward. Padding, recomputation, norms, softmax
and the optimiser count nothing: they are time that the arithmetic does not need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Lengths = Iterable[tuple[int, int]]  # (prompt tokens, response tokens) of each row


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP (Llama and its like)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate


def body_flops(shape: Shape, tokens: int) -> int:
    """Forward of a row of `tokens` through all layers, without any head; each token sees itself and those before."""
    attended = tokens * (tokens + 1) // 2
    return shape.layers * (2 * shape.layer_weights * tokens + 4 * shape.heads * shape.head_dim * attended)


def policy_flops(shape: Shape, lengths: Lengths) -> int:
    """Forward of a policy: the probabilities of all response tokens. The last token predicts nothing.

    The same for sampling (every token is passed through once, as the cache keeps what was computed) and for scoring.
    """
    return sum(body_flops(shape, p + r - 1) + 2 * shape.hidden * shape.vocabulary * r for p, r in lengths)


def value_flops(shape: Shape, lengths: Lengths) -> int:
    """Forward of a value model: one number before each response token."""
    return sum(body_flops(shape, p + r - 1) + 2 * shape.hidden * r for p, r in lengths)


def update_flops(shape: Shape, lengths: Lengths) -> int:
    """Forward and backward of policy and value model over the episodes, once."""
    rows = list(lengths)
    return 3 * (policy_flops(shape, rows) + value_flops(shape, rows))
