"""A scalar head on the body of any causal model, where transformers has no sequence classifier for the architecture.

Granite, Cohere, OLMoE, Gemma 3n and others have a body and a language model alone. The class that is made here for them
is transformers' own generic classifier on that body: its weights and folder look like those of a Llama classifier, with
`score.weight` and the architecture `GraniteForSequenceClassification`. A program that loads such a folder with
transformers alone has to call `scalar_class` first.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.errors import UserError

CLASSIFIER = "ForSequenceClassification"


def scalar_class(config: PretrainedConfig, where: str) -> type[AutoModelForSequenceClassification]:
    """Return the class whose `from_pretrained` and `from_config` make a model with a scalar head for this config.

    An architecture without a sequence classifier gets one, which stays known to transformers in this process. Raises
    UserError if that cannot be made.
    """
    kind: Any = type(config)
    own_code = AutoModelForSequenceClassification.__name__ in (getattr(config, "auto_map", None) or {})
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or own_code:
        return AutoModelForSequenceClassification
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_MAPPING:
        what = f"there is neither a sequence classifier nor a body for {config.model_type} in transformers"
        raise UserError(what, where, "use an architecture of transformers (Llama, Qwen, Granite, GPT-2, ...)")
    # Without `exist_ok` transformers silently registers nothing for a config of its own.
    AutoModelForSequenceClassification.register(kind, _on_body(kind), exist_ok=True)
    return AutoModelForSequenceClassification


def _on_body(kind: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return a classifier on the architecture's body; both have the same names of weights as its language model."""
    body, policy = MODEL_MAPPING[kind], MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    # GraniteModel is a GranitePreTrainedModel, which has the initialisation and what the kernels need to know.
    base = next(cls for cls in body.__mro__[1:] if issubclass(cls, PreTrainedModel))
    fields = {"config_class": kind, "base_model_prefix": policy.base_model_prefix, "__module__": __name__}
    return type(body.__name__.removesuffix("Model") + CLASSIFIER, (GenericForSequenceClassification, base), fields)
