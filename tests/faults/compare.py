"""Whether two folders of a stage hold the same result, bit for bit, but for what depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

CLOCK = ("time", "perf/", "memory/")  # beginnings of the names of such values in metrics.jsonl
# Records of attempts, their logs, and wandb's id, which is drawn.
LEFT_OUT = ("stage.json", "logs", "wandb_id.txt", "trainer", "manifest.json", "training_args.bin")


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs, in words; empty for equal folders. Of the checkpoints the newest is compared."""
    found = []
    names = [_names(folder) for folder in (ours, theirs)]
    found += [f"{name} is in one of them only" for name in sorted(names[0] ^ names[1])]
    found += [name for name in sorted(names[0] & names[1]) if not _same(ours / name, theirs / name)]
    metrics = [json.loads((folder / "stage.json").read_text())["metrics"] for folder in (ours, theirs)]
    return found + (["stage.json: metrics"] if metrics[0] != metrics[1] else [])


def rows(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl or a table without what depends on the clock."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in found]


def _names(folder: Path) -> set[str]:
    """Files to compare; of checkpoints, those of the newest."""
    newest = max((p.name for p in (folder / "checkpoints").glob("step-*")), default="")
    found = set()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not set(parts) & set(LEFT_OUT) and (parts[0] != "checkpoints" or parts[1] == newest):
            found.add("/".join(parts))
    return found


def _same(ours: Path, theirs: Path) -> bool:
    if ours.suffix == ".jsonl":
        return rows(ours) == rows(theirs)
    if ours.name == "state.json" or ours.name == "trainer_state.json":
        return _without_clock(json.loads(ours.read_text())) == _without_clock(json.loads(theirs.read_text()))
    if ours.suffix == ".safetensors":
        return _equal(load_file(ours), load_file(theirs))
    if ours.suffix in (".pt", ".pth"):
        return _equal(*(torch.load(path, weights_only=False, map_location="cpu") for path in (ours, theirs)))
    return ours.read_bytes() == theirs.read_bytes()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_clock(v) for k, v in value.items() if not k.startswith((*CLOCK, "train_runtime"))}
    return [_without_clock(v) for v in value] if isinstance(value, list) else value


def _equal(a: Any, b: Any) -> bool:
    """Equality through containers; tensors and arrays must have the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
