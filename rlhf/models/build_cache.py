"""The user's cache folder: models that are converted or built once, and appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from rlhf.system.files import publish


def cache_root() -> Path:
    """RLHF_CACHE, else XDG_CACHE_HOME/rlhf, else ~/.cache/rlhf."""
    if own := os.environ.get("RLHF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build(folder)` fills it when it is not there yet.

    Safe when several processes ask at once: one builds, the others wait. The folder is filled under another name,
    flushed to disk and renamed, so that a build that was killed leaves nothing that looks finished.
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
