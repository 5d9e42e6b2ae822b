"""Put a saved adapter on the base that it was trained on, or merge it into the base's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection, settings_of
from rlhf.models.peft.folder import AdapterFolder, load_adapter_weights
from rlhf.models.peft.merging import merge_into, why_not_mergeable
from rlhf.models.peft.methods import add_adapter
from rlhf.models.resolve import BUILT_IN


def base_name(name: str | Path) -> str:
    """Return the name of a base for an adapter's record; a folder's path is made absolute."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() and str(name) not in BUILT_IN else str(name)


def base_settings(adapter: AdapterFolder, model: ModelSection) -> ModelSection:
    """Return the settings to load an adapter's base with; its code is run only if the recipe names that very base."""
    trusted = model.trust_remote_code and adapter.base.name == base_name(model.name)
    return model.model_copy(update={"trust_remote_code": trusted})


def attach_or_merge(
    adapter: AdapterFolder, model: PreTrainedModel, merged: bool, round_to_model_dtype: bool = False
) -> PreTrainedModel:
    """Put an adapter on the base that it was trained on, or merge it if `merged` and its method allows that.

    Raises UserError if `model` is another base, or the file cannot be read.
    """
    adapter.check_base()
    if not merged or why_not_mergeable(adapter.peft):
        return attach_adapter(adapter, model, round_to_model_dtype)
    merge_adapter(adapter, model)
    return _normalised_as(adapter, model)


def attach_adapter(
    adapter: AdapterFolder, model: PreTrainedModel, round_to_model_dtype: bool = False
) -> PreTrainedModel:
    """Put an adapter on a plain model of its base, in place, trainable; the model also gets its normalisation.

    For `round_to_model_dtype` see `load_policy`. Raises UserError if the file holds other weights than the method
    trains.
    """
    # The weights that are drawn here are replaced, so the run's random stream must not advance.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        add_adapter(model, adapter.peft, round_to_model_dtype)
    load_adapter_weights(model, adapter)
    return _normalised_as(adapter, model).eval()


def merge_adapter(adapter: AdapterFolder, model: PreTrainedModel) -> None:
    """Merge an adapter into the weights of its base, in place; raise UserError if its method cannot be merged."""
    if reason := why_not_mergeable(adapter.peft):
        raise UserError(f"the adapter would have to be merged, and {reason}", str(adapter.folder), "train it as one")
    merge_into(model, adapter.tensors(), adapter.peft)


def check_method(adapter: AdapterFolder, peft: PeftSection) -> None:
    """Raise UserError unless the adapter is of this method and these settings."""
    if adapter.peft != peft:
        what = f"the model is an adapter of {settings_of(adapter.peft)}, and the recipe trains {settings_of(peft)}"
        fix = "run the SFT stage again with this recipe, or set model.peft as it was"
        raise UserError(what, str(adapter.folder), fix)


def _normalised_as(adapter: AdapterFolder, model: PreTrainedModel) -> PreTrainedModel:
    if adapter.scalar:
        model.config.reward_mean, model.config.reward_std = adapter.reward_mean, adapter.reward_std
    return model
