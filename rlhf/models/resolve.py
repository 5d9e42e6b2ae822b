"""Find the model that a name in a recipe stands for: a built-in model, a local folder or a Hub name.

A Hub name may end in `@REVISION`, a branch, tag or commit, as owner/name@v1.0; it then stands for that state of the
repository wherever the name is written, in records of runs and adapters too.
"""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError
from rlhf.model_config import BUILT_IN
from rlhf.models import smollm2, tiny

__all__ = ["ADAPTER_RECORD", "BUILT_IN", "hub_revision", "not_loaded", "refuse_adapter_beside", "resolve_model"]

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft saves an adapter
PEFT_FILES = (PEFT_CONFIG, PEFT_WEIGHTS, "adapter_model.bin")
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
    if path.exists() or looks_like_path(name):
        raise UserError("no such model folder", where=name, fix="check the path, or run the stage that writes it")
    return name


def hub_revision(where: str) -> tuple[str, str | None]:
    """Return the repository and the revision (None: the newest) of a Hub name; a local folder is returned as it is."""
    name, _, revision = where.partition("@")
    return (where, None) if Path(where).exists() else (name, revision or None)


def looks_like_path(name: str) -> bool:
    """Return whether a name is that of a folder, there or not, and none of the Hub, whatever its revision."""
    repository = name.partition("@")[0]
    return repository.startswith((".", "/", "~")) or repository.count("/") > 1


def refuse_adapter_beside(where: str) -> None:
    """Raise UserError if a folder of whole weights holds peft's adapter too: transformers would load both as one."""
    folder = Path(where)
    found = [name for name in PEFT_FILES if (folder / name).is_file()]
    if found and (folder / "config.json").is_file():
        what = f"this folder holds whole weights and an adapter ({', '.join(found)}), and only one of them can be meant"
        fix = "merge the adapter into the weights and save the result alone (peft: merge_and_unload), or move "
        raise UserError(what, where, fix + "the adapter's files elsewhere")


def not_loaded(what: str, where: str, error: Exception) -> UserError:
    """Return the UserError for a folder or Hub name that transformers could not read."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(where).exists():
        fix = "write it again, or update transformers if a later version wrote it (`pip show transformers tokenizers`)"
        return UserError(f"the {what} could not be loaded: {first}", where, fix)
    fix = "name smollm2-135m, tiny, a local model folder, or a Hub name that can be reached or is in the Hub's cache"
    return UserError(f"the {what} could not be loaded: {first}", where, fix)
