"""Add bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751), placed as in Pfeiffer et al. 2021 (2005.00247).

After the feed-forward layer of a transformer layer, and before the residual is added, x becomes x + up(gelu(down(x))).
`up` starts at zero, so a new adapter changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from rlhf.errors import UserError

FEED_FORWARD = ("mlp", "feed_forward", "ffn")  # names of the layer in various architectures


class Bottleneck(nn.Module):
    """A feed-forward layer with an adapter after it; the layer is called `base_layer`, as in peft's modules.

    It takes and returns [..., hidden]. The adapter's maps, hidden to width and back, are on the device of `like`.
    """

    def __init__(self, base_layer: nn.Module, hidden: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(hidden, width, device=like.device, dtype=torch.float32)
        self.up = nn.Linear(width, hidden, device=like.device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(*args, **kwargs)
        x, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)  # experts return router scores too
        x = x + self.up(gelu(self.down(x.to(self.down.weight.dtype)))).to(x.dtype)
        return x if rest is None else (x, *rest)


def add_bottlenecks(layers: Sequence[nn.Module], hidden: int, width: int) -> None:
    """Put an adapter of `width` into each of the transformer layers, in place.

    Raises UserError if a layer has no feed-forward layer of its own, or one that adds the residual itself.
    """
    for layer in layers:
        name = next((name for name in FEED_FORWARD if isinstance(getattr(layer, name, None), nn.Module)), None)
        if name is None:
            names = f"{', '.join(FEED_FORWARD[:-1])} or {FEED_FORWARD[-1]}"
            what = f"{type(layer).__name__} has no feed-forward layer called {names} to put an adapter behind"
            fix = "take lora, or an architecture that has one (Llama, Mistral, Qwen, GPT-2, GPT-NeoX, Phi, ...)"
            raise UserError(what, "model.peft.method=adapter", fix)
        inner = getattr(layer, name)
        if "residual" in inspect.signature(inner.forward).parameters:
            what = f"{type(inner).__name__} adds the residual itself, and an adapter goes before that"
            fix = "take lora, or an architecture whose layers add it themselves (Llama, Mistral, Qwen, GPT-2, ...)"
            raise UserError(what, "model.peft.method=adapter", fix)
        setattr(layer, name, Bottleneck(inner, hidden, width, next(inner.parameters())))
