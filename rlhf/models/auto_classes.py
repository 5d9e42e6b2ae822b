"""Which of transformers' classes loads a policy or a reward model, whatever the architecture.

A policy of text and images, such as Mistral 3, may be no causal language model by transformers' tables; it is used for
text alone. A reward model is a scalar head on a body, and this makes the class where transformers has none.

Granite, Cohere, OLMoE, Gemma 3n and others have a body and a language model alone. The class that is made here for them
is transformers' own generic classifier on that body: its weights and folder look like those of a Llama classifier, with
`score.weight` and the architecture `GraniteForSequenceClassification`. A program that loads such a folder with
transformers alone has to call `scalar_class` first.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.errors import UserError

CLASSIFIER = "ForSequenceClassification"


def causal_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class whose `from_pretrained` and `from_config` make a policy for this config."""
    kind: Any = type(config)
    other = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.get_text_config().is_encoder_decoder
    own_code = AutoModelForCausalLM.__name__ in (getattr(config, "auto_map", None) or {})
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or own_code
    return AutoModelForImageTextToText if other and not causal else AutoModelForCausalLM


def scalar_class(config: PretrainedConfig, where: str) -> type[AutoModelForSequenceClassification]:
    """Return the class whose `from_pretrained` and `from_config` make a model with a scalar head for this config.

    An architecture without a sequence classifier gets one, which stays known to transformers in this process. Raises
    UserError if that cannot be made.
    """
    kind: Any = type(config)
    own_code = AutoModelForSequenceClassification.__name__ in (getattr(config, "auto_map", None) or {})
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or own_code:
        return AutoModelForSequenceClassification
    policies = causal_class(config)._model_mapping
    if kind not in policies or kind not in MODEL_MAPPING:
        what = f"there is neither a sequence classifier nor a body for {config.model_type} in transformers"
        raise UserError(what, where, "use an architecture of transformers (Llama, Qwen, Granite, GPT-2, ...)")
    # Without `exist_ok` transformers silently registers nothing for a config of its own.
    AutoModelForSequenceClassification.register(kind, _on_body(kind, policies[kind].base_model_prefix), exist_ok=True)
    return AutoModelForSequenceClassification


def _on_body(kind: type[PretrainedConfig], prefix: str) -> type[PreTrainedModel]:
    """Return a classifier on the architecture's body, whose weights are named as in its language model."""
    body = MODEL_MAPPING[kind]
    # GraniteModel is a GranitePreTrainedModel, which has the initialisation and what the kernels need to know.
    base = next(cls for cls in body.__mro__[1:] if issubclass(cls, PreTrainedModel))
    fields = {"config_class": kind, "base_model_prefix": prefix, "__module__": __name__}
    return type(body.__name__.removesuffix("Model") + CLASSIFIER, (GenericForSequenceClassification, base), fields)
