"""What a model does to its logits after the LM head: scales and soft caps, declared in its config and verified.

Gemma 2 caps its logits, Cohere multiplies and Granite divides them. Sampling through the model's own forward sees that.
Passes that take hidden states through the head themselves (rlhf/rollout/lm_head.py) apply the same map, and so does
TRL's loss, which reads the same fields of the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.placement import Placement, is_partitioned, materialized

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
PROBE_TOKENS = 4
PROBE_LOGITS = 100.0  # a probe has logits from -100 to 100: a cap is seen however small the model's own logits are


@dataclass(frozen=True)
class LogitMap:
    """Map each logit z to z' = cap tanh(u / cap) with u = z multiplier / divisor; without a cap to u."""

    multiplier: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Return whether the logits are left as they are."""
        return self == PLAIN

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the mapped logits in the type of the given ones, rounded as the model rounds them."""
        if self.multiplier != 1:
            logits = logits * self.multiplier
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, mapped: Tensor) -> Tensor | float:
        """Return the derivative dz'/dz where the map gave z' (`mapped`)."""
        scale = self.multiplier / self.divisor
        # d tanh(u) = 1 - tanh(u)^2, and tanh(u / cap) is z' / cap
        return scale if self.cap is None else (mapped / self.cap).square_().neg_().add_(1).mul_(scale)


PLAIN = LogitMap()
_verified: set[tuple[type, str, bool]] = set()  # class, config and whether the weights were partitioned


def declared_map(config: PretrainedConfig) -> LogitMap:
    """Return the map that the known fields of a config describe; fields that are missing or None change nothing."""
    text = config.get_text_config()
    multiplier: float = next((m for name in MULTIPLIERS if (m := getattr(text, name, None)) is not None), 1.0)
    scaling, divisor = getattr(text, "logits_scaling", None), 1.0
    if scaling is not None and text.model_type.startswith("hyperclovax"):
        multiplier = scaling  # where Granite divides
    elif scaling is not None:
        divisor = scaling
    return LogitMap(float(multiplier), float(divisor), getattr(text, "final_logit_softcapping", None))


def logit_map(policy: nn.Module) -> LogitMap:
    """Return the map of a policy: the one that was verified when it was loaded, else the declared one."""
    found = getattr(policy, "logit_map", None)
    return declared_map(policy.config) if found is None else found


def verified_map(policy: PreTrainedModel) -> LogitMap:
    """Return the declared map of a policy after one comparison with the model's own forward. All processes must call.

    The head's output is replaced by known logits in that forward, so that the model shows what it makes of them. The
    same architecture and config are not compared twice in a process. Raises UserError if the model does something else
    to its logits, or if something lies between its body and its head.
    """
    found = declared_map(policy.config)
    partitioned = any(is_partitioned(parameter) for parameter in policy.parameters())
    key = (type(policy), policy.config.to_json_string(), partitioned)
    if key not in _verified:
        _verify(policy, found, partitioned)
        _verified.add(key)
    return found


def _verify(policy: PreTrainedModel, found: LogitMap, partitioned: bool) -> None:
    head, name = policy.get_output_embeddings(), type(policy).__name__
    if head is None:
        raise _refused(f"{name} has no LM head that hidden states could be put through")
    tokens = policy.config.get_text_config().vocab_size
    ids = (torch.arange(PROBE_TOKENS, device=policy.device) * 7 + 3).remainder(tokens)[None]
    given: list[Tensor] = []
    probe: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        row = torch.linspace(-PROBE_LOGITS, PROBE_LOGITS, output.shape[-1], device=output.device)
        given.append(inputs[0])
        probe.append(row.to(output.dtype).expand_as(output))
        return probe[0]

    with torch.no_grad(), _ready(policy, partitioned):
        hidden = getattr(policy, policy.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        hook = head.register_forward_hook(replace)
        try:
            logits = policy(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
    if not given:
        raise _refused(f"{name} does not call its LM head as a module")
    exact = policy.dtype == torch.float32
    near = {"rtol": 1e-3, "atol": 1e-3, "equal_nan": True} if exact else {"rtol": 0.05, "atol": 0.05, "equal_nan": True}
    if given[0].shape != hidden.shape or not torch.allclose(given[0].float(), hidden.float(), **near):
        raise _refused(f"{name} changes its hidden states before the LM head")
    tokens = getattr(policy, "token_count", tokens)
    expected = found(probe[0]).float()[..., : logits.shape[-1]]
    if logits.shape[-1] < min(tokens, probe[0].shape[-1]):
        raise _refused(f"{name} has logits of {logits.shape[-1]} tokens, and its tokenizer has {tokens}")
    if not torch.allclose(logits.float(), expected, **near):
        gap = (logits.float() - expected).abs().max()
        raise _refused(f"{name} changes its logits after the LM head in a way that is not known ({_known(found, gap)})")


@contextmanager
def _ready(policy: PreTrainedModel, partitioned: bool) -> Iterator[None]:
    """Gather partitioned weights layer by layer, and replace a kernel that a CPU does not have, inside the block."""
    settings: Any = policy.config
    kernel = settings._attn_implementation
    if partitioned:
        policy.placement = Placement(by_layer=True)
    try:
        if kernel.startswith("flash") and policy.device.type == "cpu":
            policy.set_attn_implementation("eager")
        with materialized(policy):
            yield
    finally:
        if partitioned:
            del policy.placement
        if settings._attn_implementation != kernel:
            policy.set_attn_implementation(kernel)


def _known(found: LogitMap, gap: Tensor) -> str:
    fields = f"multiplier {found.multiplier:g}, divisor {found.divisor:g}, soft cap {found.cap}"
    return f"its config declares {fields}; on logits up to {PROBE_LOGITS:g} the largest difference is {float(gap):.3g}"


def _refused(what: str) -> UserError:
    fix = "use an architecture whose logits are those of the LM head (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...), scaled "
    fix += (
        f"by {', '.join(MULTIPLIERS)} or logits_scaling, or capped by final_logit_softcapping (Gemma, Cohere, Granite)"
    )
    return UserError(what, "model.name", fix)
