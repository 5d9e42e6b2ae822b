"""Read and write the weights in an adapter's folder without rlhf/, by the names that they have in the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

OWN, PEFT = "adapter.safetensors", "adapter_model.safetensors"
IN_PEFT = ("lora", "dora", "ia3", "prompt", "p_tuning_v2")  # whose weights peft stores one to one
BESIDE_PEFT = ("prefix", "p_tuning")  # whose folders have peft's file too, with what a network makes


def weights_file(folder: Path) -> Path:
    """Return the file with the trained weights."""
    return folder / (OWN if (folder / OWN).exists() else PEFT)


def peft_name(name: str) -> str:
    """Return peft's name of a trained weight: without the adapter's name, below the modules that peft wraps it in."""
    if "virtual_tokens" in name:
        return "prompt_embeddings"
    name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
    return f"base_model.model.{name.replace('.default', '')}"


def stored_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights in the file; `names` are of weights in the model, among which all of the file's must be."""
    file = weights_file(folder)
    stored = load_file(file)
    if file.name == OWN:
        return stored
    theirs = {peft_name(name): name for name in names}
    if "prompt_embeddings" in stored:  # peft wraps a model with virtual tokens once less
        theirs["base_model.score.weight"] = "score.weight"
    return {theirs[name]: tensor for name, tensor in stored.items()}


def as_old_layout(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Rewrite a folder as earlier versions wrote it: weights by their own names, and no file of peft."""
    for name in ("adapter_config.json", PEFT):
        (folder / name).unlink(missing_ok=True)
    save_file({name: tensor.detach().clone() for name, tensor in weights.items()}, folder / OWN)
    record = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(record | {"format": 1}))
    return folder
