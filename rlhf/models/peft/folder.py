"""Write and read the folder of a stage with a parameter-efficient method: the trained weights, and their base's name.

    adapter.json                 our record: the method and its settings, and the base's name and hash; for a reward
                                 model also the number of layers kept and the normalisation of the scores
    adapter_config.json,         format 2: the adapter in peft's own layout (rlhf/models/peft/peft_layout.py)
    adapter_model.safetensors
    adapter.safetensors          format 1: the trained weights by their names in the model, with a reward model's head

Format 2 is written for the methods whose weights peft stores one to one. Format 1 is written for the others: peft has
no bottleneck adapter and no bitfit. prefix and p_tuning train a network that peft does not store; their folders have
peft's two files as well, with what the network makes, and these are not read here. Format 1 is read for every method,
since earlier versions wrote no other. The tokenizer is saved beside these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from rlhf.errors import UserError
from rlhf.model_config import PeftSection
from rlhf.models.peft.methods import peft_of, trainable
from rlhf.models.peft.peft_layout import DERIVED, ONE_TO_ONE, TOKENS, own_names, write_peft_layout
from rlhf.models.placement import full_shape, writable
from rlhf.models.resolve import ADAPTER_RECORD, BUILT_IN, PEFT_WEIGHTS, hub_revision, resolve_model
from rlhf.system.files import hash_path

WEIGHTS = {1: "adapter.safetensors", 2: PEFT_WEIGHTS}  # by format
HEAD = "score."
KEYS_IGNORED_IN_HASH = ("transformers_version", "_name_or_path")  # keys of config.json that do not describe the model


@dataclass(frozen=True)
class Origin:
    """The base that an adapter was trained on."""

    name: str  # as in model.name
    hash: str  # of its config and weights


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter read from its folder."""

    folder: Path
    peft: PeftSection
    base: Origin
    scalar: bool  # whether it is a reward model's
    keep_layers: int  # layers kept of the base; 0: all
    reward_mean: float
    reward_std: float
    format: int = 1

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS[self.format]

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained weights by their names in the model, or TOKENS; raise UserError if they cannot be read."""
        try:
            stored = load_file(self.path)
            return stored if self.format == 1 else own_names(stored, self.peft)
        except (OSError, SafetensorError) as error:
            raise _broken(self.path, str(error)) from error

    def check_base(self) -> None:
        """Raise UserError unless the base is the one that the adapter was trained on."""
        if (now := base_hash(self.base.name)) != self.base.hash:
            trained_on = f"the adapter was trained on {self.base.name} with hash {self.base.hash[:12]}"
            what = f"{trained_on}, and the model of that name has {now[:12]}"
            raise UserError(what, str(self.folder), "bring the base back as it was, or run the stage again")


def has_adapter(folder: str | Path) -> bool:
    """Return whether `save_adapter` wrote the folder."""
    return str(folder) not in BUILT_IN and (Path(folder).expanduser() / ADAPTER_RECORD).is_file()


def find_adapter(folder: str | Path) -> AdapterFolder | None:
    """Return the adapter in a folder, or None if it holds none.

    Raises UserError if the record is not one that `save_adapter` writes, or its base is an adapter itself.
    """
    if not has_adapter(folder):
        return None
    path = Path(folder).expanduser() / ADAPTER_RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] not in WEIGHTS:
            what = f"format {record['format']} of adapters is not known here, {' and '.join(map(str, WEIGHTS))} are"
            raise UserError(what, str(path), "update rlhf")
        found = AdapterFolder(
            folder=path.parent,
            peft=PeftSection(**record["peft"]),
            base=Origin(**record["base"]),
            scalar=bool(record["scalar"]),
            keep_layers=int(record["keep_layers"]),
            reward_mean=float(record["reward_mean"]),
            reward_std=float(record["reward_std"]),
            format=record["format"],
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise _broken(path, f"{'.'.join(map(str, ('peft', *first['loc'])))}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if has_adapter(found.base.name):
        what = f"the base {found.base.name} is an adapter itself, and an adapter needs plain weights"
        raise UserError(what, str(path), "merge that one (rlhf export), and train on what it writes")
    return found


def save_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter on a model that rlhf/models/loading.py loaded into an existing folder; call it on one process.

    `weights` are the model's whole weights by name; frozen ones may be missing.
    """
    peft, config = peft_of(model), model.config
    assert peft is not None
    base = Origin(model.base_name, base_hash(model.base_name))
    record = {
        "format": 2 if peft.method in ONE_TO_ONE else 1,
        "peft": peft.model_dump(),
        "base": asdict(base),
        "scalar": hasattr(model, "score"),
        "keep_layers": model.kept_layers,
        "reward_mean": getattr(config, "reward_mean", 0.0),
        "reward_std": getattr(config, "reward_std", 1.0),
    }
    trained = {name: weights[name].detach().cpu().contiguous() for name in trainable(model)}
    if peft.method in (*ONE_TO_ONE, *DERIVED):
        write_peft_layout(model, trained, resolve_model(model.base_name), folder)
    if peft.method not in ONE_TO_ONE:
        save_file(trained, folder / WEIGHTS[1])
    (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter_weights(model: PreTrainedModel, adapter: AdapterFolder, partly: bool = False) -> None:
    """Copy the weights of a folder into the adapter on a model; raise UserError if they do not hold the same weights.

    `partly` is for a reward model that starts from a policy: it has a head of its own, and may have fewer layers.
    """
    stored, ours = adapter.tensors(), trainable(model)
    if TOKENS in stored and (name := next((name for name in ours if name.endswith(f".{TOKENS}")), "")):
        stored[name] = stored.pop(TOKENS)
    if not partly and (other := sorted(stored.keys() ^ ours.keys())):
        raise _broken(adapter.path, f"the file and the model do not hold the same weights: {other[0]} is in one alone")
    for name in sorted(stored.keys() & ours.keys()):
        shape, tensor = full_shape(ours[name]), stored[name]
        if partly and tensor.dim() == len(shape) and tensor.shape != shape:
            # Keys and values are stored layer after layer: those of the layers that are kept come first.
            tensor = tensor[tuple(slice(size) for size in shape)]
        if tensor.shape != shape:
            raise _broken(adapter.path, f"{name} is {tuple(tensor.shape)} in the file and {tuple(shape)} in the model")
        with writable([ours[name]]):
            ours[name].copy_(tensor)


def base_hash(name: str) -> str:
    """Return the SHA-256 (hex) of a model's config and weights; raise UserError if it is not on this machine."""
    where = resolve_model(name)
    folder = Path(where)
    if not folder.is_dir():
        repository, revision = hub_revision(where)
        found = cached_file(repository, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise UserError("the base model is not here", name, "load it once, or name a local folder")
        folder = Path(found).parent
    files = [folder / "config.json", *_weight_files(folder)]
    return _hash_of(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that transformers reads weights from."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        if found := sorted([*folder.glob(f"{stem}.{kind}"), *folder.glob(f"{stem}-*-of-*.{kind}")]):
            return found
    return []


@lru_cache(maxsize=8)
def _hash_of(files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the hash of (path, size, mtime) entries: config and weights; an unchanged entry is not read again."""
    (config, _, _), *weights = files
    settings: dict[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
    for key in KEYS_IGNORED_IN_HASH:
        settings.pop(key, None)
    lines = [json.dumps(settings, sort_keys=True), *(f"{Path(path).name} {hash_path(path)}" for path, _, _ in weights)]
    return sha256("\n".join(lines).encode()).hexdigest()


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"the adapter cannot be read: {what}", str(path), "run the stage that wrote it again")
