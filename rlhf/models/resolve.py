"""Find the model that a name in a recipe stands for: a built-in model, a local folder or a Hub name."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError
from rlhf.models import smollm2, tiny

BUILT_IN = (smollm2.NAME, tiny.NAME)  # even if folders of these names exist
ADAPTER_RECORD = "adapter.json"  # marks a folder that a parameter-efficient method left (rlhf/models/peft/folder.py)


def resolve_model(name: str | Path) -> str:
    """Return the local folder or Hub name that `model.name` stands for; built-in models are built on first use.

    Raises UserError if `name` is a folder without a model, or looks like a path and does not exist.
    """
    name = str(name)
    if name == smollm2.NAME:
        return str(smollm2.embedded_dir())
    if name == tiny.NAME:
        return str(tiny.tiny_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_RECORD)):
            what = f"this folder holds no model (no config.json, no {ADAPTER_RECORD})"
            raise UserError(what, where=name, fix="name a model folder")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError("no such model folder", where=name, fix="check the path, or run the stage that writes it")
    return name


def not_loaded(what: str, where: str, error: Exception) -> UserError:
    """Return the UserError for a folder or Hub name that transformers could not read."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fix = "name smollm2-135m, tiny, a local model folder, or a Hub name that can be reached or is in the Hub's cache"
    return UserError(f"the {what} could not be loaded: {first}", where, fix)
