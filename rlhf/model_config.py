"""The sections of the recipe about the model and its parameter-efficient method, and what all sections share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PeftMethod = Literal["none", "lora", "dora", "prefix", "p_tuning", "p_tuning_v2", "prompt", "adapter", "ia3", "bitfit"]
VIRTUAL_TOKEN_METHODS = ("prefix", "p_tuning", "p_tuning_v2", "prompt")  # they put trained vectors before every row
KV_PREFIX_METHODS = ("prefix", "p_tuning_v2")  # of these, the methods that put keys and values into every layer
UNMERGEABLE = (*VIRTUAL_TOKEN_METHODS, "adapter")  # they change none of the base model's weights
TRAINS_BASE_WEIGHTS = ("none", "bitfit")  # they train weights of the base model, in the type that these have
BUILT_IN = ("smollm2-135m", "tiny")  # models of the project, even if folders of these names exist
METHODS_OF_SETTING = {  # of model.peft: which methods read a setting
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
    "last_layers": ("lora", "dora", "ia3", "adapter", "bitfit"),
    "virtual_tokens": VIRTUAL_TOKEN_METHODS,
    "hidden": ("prefix", "p_tuning"),
    "bottleneck": ("adapter",),
}


class Section(BaseModel):
    """A section of the recipe: unknown keys are errors, and values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PeftSection(Section):
    """A parameter-efficient method: the base model stays frozen, and a stage writes the trained weights alone."""

    method: PeftMethod = Field("none", description="method that chooses the trained weights; none trains all")
    rank: int = Field(16, ge=1, le=1024, description="rank of the update matrices; lora and dora")
    alpha: float = Field(32.0, gt=0, description="the update is multiplied by alpha / rank; lora and dora")
    last_layers: int = Field(0, ge=0, description="adapt the last N layers; 0: all; lora, dora, ia3, adapter, bitfit")
    virtual_tokens: int = Field(20, ge=1, le=1024, description="trained tokens; prefix, p_tuning, p_tuning_v2, prompt")
    hidden: int = Field(128, ge=1, description="width of the network that makes the tokens; prefix and p_tuning")
    bottleneck: int = Field(64, ge=1, description="width of the hidden layer of an adapter; adapter")

    @property
    def on(self) -> bool:
        """Return whether a method is in use."""
        return self.method != "none"

    @model_validator(mode="after")
    def _no_idle_setting(self) -> PeftSection:
        if not self.on:  # `model.peft.method=none` alone must be enough to train all weights of a recipe with adapters
            return self
        for name in sorted(self.model_fields_set - {"method"}):
            methods, usual = METHODS_OF_SETTING[name], PeftSection.model_fields[name].default
            # A resolved recipe names every field, so only values other than the default are refused.
            if self.method not in methods and getattr(self, name) != usual:
                fix = f"set {name}={usual}, or leave it out: it belongs to {', '.join(methods)}"
                raise ValueError(f"{self.method} has no {name}", fix)
        return self


def settings_of(peft: PeftSection) -> str:
    """Return a method and its settings in words, as `lora (rank 16, alpha 32, all layers)`."""
    return f"{peft.method} ({read})" if (read := read_settings(peft)) else peft.method


def read_settings(peft: PeftSection) -> str:
    """Return the settings that a method reads, in words; empty without a method."""
    words = []
    for name in (name for name, methods in METHODS_OF_SETTING.items() if peft.method in methods):
        value = getattr(peft, name)
        if name == "last_layers":
            words.append(f"the last {value} layers" if value > 1 else "the last layer" if value else "all layers")
        else:
            words.append(f"{name} {value:g}")
    return ", ".join(words)


class ModelSection(Section):
    """The language model that the run starts from."""

    name: str = Field(
        "smollm2-135m",
        min_length=1,
        description="smollm2-135m, tiny, a local folder or a Hub name, as owner/name or owner/name@revision",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the weights in memory")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel")
    trust_remote_code: bool = Field(False, description="run Python code of the Hub repository")
    prompt_format: Literal["auto", "plain", "verbatim"] = Field(
        "auto", description="auto: the tokenizer's chat template, else plain; plain: Human:/Assistant:; verbatim: as is"
    )
    chat_template: str = Field("", description="file with a chat template (Jinja) in place of the tokenizer's")
    chat_template_kwargs: list[str] = Field([], description="settings of the template, such as enable_thinking=false")
    template_date: str = Field(
        "2024-07-26", pattern=r"\d{4}-\d\d-\d\d", description="the day that it is for templates which ask for it"
    )
    peft: PeftSection = PeftSection()

    def in_its_own_format(self) -> ModelSection:
        """Return the settings for a model that is not the recipe's: it is asked in the format of its own tokenizer."""
        return self.model_copy(update={"prompt_format": "auto", "chat_template": "", "chat_template_kwargs": []})
