"""What the result of each stage depends on: recipe fields, data files and what other stages have written.

A finished stage is skipped while all of that is as it was. Fields that only say where or how fast (run.dir, run.device,
launch.*, tracking.*) are not among it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from rlhf.config import Recipe
from rlhf.data.sources import local_path
from rlhf.errors import UserError
from rlhf.recipe import changed_keys, fields, load_recipe, recipe_to_yaml
from rlhf.run.folder import RunFolder
from rlhf.run.sealing import list_checkpoints
from rlhf.stage_table import STAGES
from rlhf.system.files import hash_path, size_of, write_atomic

ABSENT = "absent"  # recorded for what a stage would have read, had it been there
SHARED = ("run.seed", "model", "data.max_prompt_tokens", "data.max_response_tokens", "data.validation_fraction")


def depends_on(stage: str, key: str) -> bool:
    """Whether the stage's result depends on a recipe field, given by its dotted name."""
    reads = STAGES[stage].reads
    prefixes = (*SHARED, *reads.recipe, *(f"data.{name}" for name in reads.data))
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def fingerprint(recipe: Recipe, stage: str) -> str:
    """SHA-256 (hex) of the recipe fields that the stage depends on."""
    values: dict[str, Any] = {}
    for key, _ in fields():
        if depends_on(stage, key):
            value: Any = recipe
            for part in key.split("."):
                value = getattr(value, part)
            values[key] = value
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def identity(recipe: Recipe, stage: str, inputs: dict[str, str]) -> str:
    """Hash that the checkpoints of a stage carry: of its name, recipe fields and declared inputs when it began."""
    parts = [stage, fingerprint(recipe, stage), sorted(inputs.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def declared_inputs(recipe: Recipe, stage: str, run: RunFolder) -> dict[str, str]:
    """Hashes of the inputs that can be known before the stage runs; "absent" for what is not there.

    Local and embedded data files are among them; Hub names are identified by the recipe alone.

    Raises:
        UserError: for a data file that is not there.
    """
    inputs = {}
    for name in STAGES[stage].reads.data:
        for entry in getattr(recipe.data, name):
            if path := local_path(entry):
                inputs[run.key(path)] = hash_path(path)
    for key in STAGES[stage].reads.upstream:
        path = run.from_key(key)
        inputs[key] = hash_path(path) if path.exists() else ABSENT
    return inputs


def changes(record: dict[str, Any], recipe: Recipe, stage: str, run: RunFolder, now: dict[str, str]) -> list[str]:
    """What differs, in words, from when the stage recorded its inputs.

    An input that is gone has not changed: the stage's result stands without it.

    Args:
        record: stage.json of the earlier run.
        now: what `declared_inputs` returns.
    """
    found = [] if record.get("fingerprint") == fingerprint(recipe, stage) else ["the recipe"]
    before: dict[str, str] = record.get("inputs", {})
    for key, digest in before.items():
        path = run.from_key(key)
        current = now.get(key) or (hash_path(path) if path.exists() else ABSENT)
        if current not in (digest, ABSENT):
            found.append(key)
    return found + [key for key in now if key not in before and now[key] != ABSENT]


def lost_outputs(run: RunFolder, stage: str, record: dict[str, Any]) -> list[str]:
    """Names of what a finished stage had left and is gone, or of another size."""
    folder = run.stage_dir(stage)
    return [
        key
        for key, size in record.get("outputs", {}).items()
        if not (folder / key).exists() or size_of(folder / key) != size
    ]


def is_up_to_date(recipe: Recipe, run: RunFolder, stage: str) -> bool:
    """Whether the stage program would skip itself: finished, with this recipe, these inputs, and its results there."""
    record = run.read_stage(stage)
    if record is None or record.get("state") != "done":
        return False
    now = declared_inputs(recipe, stage, run)
    return not changes(record, recipe, stage, run, now) and not lost_outputs(run, stage, record)


def may_change(stage: str, key: str, done: bool) -> bool:
    """Whether `--accept-change KEY` may keep what a stage has done under another value.

    A finished stage's result stands as it is. Files of data are compared by content and have the stage done again.
    """
    return not key.startswith("data.") if done else key in STAGES[stage].may_change


def check_accepted(keys: Sequence[str]) -> None:
    """Raise UserError for a key of --accept-change that no recipe has."""
    known = [key for key, _ in fields()]
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1)
            fix = f"did you mean {near[0]}?" if near else "name a field as section.field"
            raise UserError(f"no recipe has a field {key}", "--accept-change", fix)


def check_recipe(recipe: Recipe, run: RunFolder, redo: str | None, accept: Sequence[str] = ()) -> None:
    """Hold the recipe to the run's recipe.yaml, and write it there.

    Fields that only stages yet to come depend on may change.

    Args:
        redo: a stage that is done from scratch; the recipe is bound by the stages before it alone. (The other variant
            of PPO is not one of them: its own fingerprint has it done again.)
        accept: fields that may have changed nevertheless; the stages that depend on them note it in stage.json.

    Raises:
        UserError: when a stage that is finished, or has checkpoints, depends on a field that has changed.
    """
    check_accepted(accept)
    path = run.path / "recipe.yaml"
    if path.exists():
        changed = changed_keys(load_recipe(str(path)), recipe)
        bound = [s for s in STAGES if (redo is None or STAGES[s].level < STAGES[redo].level) and is_started(run, s)]
        affected = [s for s in bound if any(depends_on(s, key) for key, _, _ in changed)]
        lines, refused, wanted = [], False, []
        for key, old, new in changed:
            stages = [stage for stage in affected if depends_on(stage, key)]
            fixed = [stage for stage in stages if not may_change(stage, key, run.is_done(stage))]
            if stages and (fixed or key not in accept):
                refused |= bool(fixed)
                wanted.append(key)
                lines.append(f"  {key}: {old} -> {new} ({_verdict(stages, fixed)})")
        if lines:
            fix = (
                f"give the changed run another name (run.name=...), or redo it with `rlhf run ... --from {affected[0]}`"
            )
            if not refused:
                fix += ", or keep what is done with " + " ".join(f"--accept-change {key}" for key in wanted)
            raise UserError(
                f"the recipe has changed since these stages of the run began: {', '.join(affected)}\n"
                + "\n".join(lines),
                str(path),
                fix,
            )
        for stage in affected:
            _note_accepted(run, recipe, stage, [entry for entry in changed if depends_on(stage, entry[0])])
    text = recipe_to_yaml(recipe)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _verdict(stages: Sequence[str], fixed: Sequence[str]) -> str:
    if fixed:
        return f"cannot be accepted: {', '.join(fixed)} would be neither the one nor the other"
    return f"of {', '.join(stages)}; may be accepted"


def _note_accepted(run: RunFolder, recipe: Recipe, stage: str, changed: Sequence[tuple[str, Any, Any]]) -> None:
    """Have stage.json hold the stage to the new recipe, and say what it was made with."""
    record = run.read_stage(stage)
    if record is None:  # lost; its checkpoints tell whose they are
        return
    entries = [{"key": key, "old": old, "new": new} for key, old, new in changed]
    known = record.get("accepted", [])
    record["accepted"] = known + [entry for entry in entries if entry not in known]
    run.write_stage(stage, record | {"fingerprint": fingerprint(recipe, stage)})


def is_started(run: RunFolder, stage: str) -> bool:
    """Whether the stage is finished or holds checkpoints to go on from."""
    return run.is_done(stage) or bool(list_checkpoints(run.stage_dir(stage) / "checkpoints"))


def check_data_files(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise UserError for a data file of these stages that is not there, before any of them runs."""
    for stage in stages:
        for name in STAGES[stage].reads.data:
            for entry in getattr(recipe.data, name):
                local_path(entry)
