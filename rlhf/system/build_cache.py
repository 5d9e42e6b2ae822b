"""Make folders once in the user's cache, where each appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from rlhf.system.files import publish


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
