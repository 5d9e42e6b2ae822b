"""The models of a recipe as shapes: configs and meta-device models, for numbers that need no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from rlhf.config import Recipe
from rlhf.model_config import VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models import smollm2, tiny
from rlhf.models.auto_classes import causal_class, scalar_class
from rlhf.models.layers import cut_layers, decoder_layers, freeze_other_modalities, kv_heads
from rlhf.models.peft.methods import add_adapter
from rlhf.models.resolve import hub_revision, not_loaded, resolve_model
from rlhf.system.quiet import quiet_transformers

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shapes:
    """Configs of the recipe's two models: the policy's, and what the reward model starts from."""

    policy: PretrainedConfig
    reward: PretrainedConfig


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model as a stage builds it."""

    config: PretrainedConfig
    dtype: str
    attention: str
    scalar: bool = False  # a reward or value model, with a scalar head in place of the LM head
    keep_layers: int = 0  # the first N transformer layers only; 0 keeps all
    peft: PeftSection | None = None  # the method that is trained, while all else is frozen; None: all is trained
    partitioned: bool = False  # adapters have the type of the weights, as ZeRO-3 needs
    shares_base: bool = False  # its frozen weights are another model's (rlhf/models/peft/shared_base.py)

    @property
    def key(self) -> tuple:
        peft = self.peft.model_dump_json() if self.peft else ""
        rest = (self.dtype, self.attention, self.scalar, self.keep_layers, peft, self.partitioned, self.shares_base)
        return (self.config.to_json_string(), *rest)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelSpec) and self.key == other.key

    @property
    def layers(self) -> int:
        return self.keep_layers or self.config.get_text_config().num_hidden_layers

    @property
    def backward_layers(self) -> int:
        """Layers that the gradient passes through."""
        return min(self.peft.last_layers or self.layers, self.layers) if self.peft else self.layers


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, tied ones once."""

    total: int
    bytes: int  # size of all of them
    trained: int  # with gradients and an optimiser state
    trained_bytes: int  # their size as weights
    through: int  # in layers that the gradient passes through, frozen ones included
    largest: int  # of the largest single tensor that is trained
    layer: int  # of the largest transformer layer
    kv_bytes: int  # keys and values of one token in all layers


def model_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's config from code, a local folder or the Hub; raise UserError if there is none."""
    if name == tiny.NAME:
        return tiny.config()
    if name == smollm2.NAME:
        return smollm2.model_config()
    where = resolve_model(name)
    repository, revision = hub_revision(where)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(repository, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_loaded("model's config", where, error) from error


def shapes_of(recipe: Recipe) -> Shapes:
    """Return the configs of the recipe's models; raise UserError if one is not on this machine or a Hub it reaches."""
    policy = model_config(recipe.model.name, recipe.model.trust_remote_code)
    if recipe.reward.model == "sft":
        return Shapes(policy, policy)
    return Shapes(policy, model_config(recipe.reward.model, recipe.model.trust_remote_code))


def build(spec: ModelSpec) -> nn.Module:
    """Return the model on the meta device, where weights have a shape and no storage."""
    config = type(spec.config).from_dict(spec.config.to_dict())
    if spec.scalar:
        config.num_labels = 1
    kind = scalar_class(config, config.model_type) if spec.scalar else causal_class(config)
    with torch.device("meta"), quiet_transformers():
        model = kind.from_config(config, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attention)
        freeze_other_modalities(model)
        if spec.scalar:
            model.config.reward_mean, model.config.reward_std = 0.0, 1.0
        if spec.keep_layers:
            cut_layers(model, spec.keep_layers)
        if spec.peft:
            add_adapter(model, spec.peft, spec.partitioned)
    return model.eval()


@lru_cache(maxsize=64)
def count(spec: ModelSpec) -> ParameterCounts:
    """Return the parameters of the model, counted on the meta device."""
    model = build(spec)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # Virtual tokens come before the first layer, though not in the order of the modules.
    through, reached = 0, spec.peft is not None and spec.peft.method in VIRTUAL_TOKEN_METHODS
    for parameter in parameters:
        reached = reached or parameter.requires_grad
        through += parameter.numel() if reached else 0
    heads, width = kv_heads(model.config)
    return ParameterCounts(
        total=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        through=through,
        largest=max((p.numel() for p in trained), default=0),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        kv_bytes=2 * spec.layers * heads * width * BYTES[spec.dtype],
    )
