"""Build models once into the user's cache folder, where each appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from rlhf.system.files import publish
from rlhf.system.quiet import quiet_transformers


def cache_root() -> Path:
    """Return the cache folder: RLHF_CACHE, else XDG_CACHE_HOME/rlhf, else ~/.cache/rlhf."""
    if own := os.environ.get("RLHF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, filled by `build(folder)` if it does not exist yet.

    Any number of processes may call this at once: one of them builds, whatever its rank, and the others wait. The
    folder is filled under another name, flushed to disk and renamed, so a killed build leaves nothing that looks
    finished.
    """
    final = cache_root() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{final}.lock"):
        if not final.is_dir():
            partial = final.with_name(f"{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            publish(partial, final)
    return final


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain float32 model folder, on a process of any rank.

    transformers' own save_pretrained writes nothing on any rank but the first of a process group, and the first rank
    may be waiting for this one to build.
    """
    # Each tied weight once. The architectures that are built here have no buffers to save.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    with quiet_transformers():
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
