"""Fingerprints of what a stage's result depends on: recipe fields, data files and the results of other stages.

A finished stage is skipped if none of them has changed. run.dir, run.device, launch.* and tracking.* do not count.
Every field of a section that the stage reads does, micro-batch sizes included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlhf.config import Recipe
from rlhf.data.sources import EMBEDDED, local_path
from rlhf.errors import UserError
from rlhf.recipe import changed_keys, field_value, fields, load_recipe, recipe_to_yaml
from rlhf.run.folder import RunFolder
from rlhf.run.sealing import list_checkpoints
from rlhf.stage_table import STAGES
from rlhf.system.files import hash_path, size_of, write_atomic

ABSENT = "absent"  # recorded for an input that did not exist when the stage began
# Fields that runs begun before them do not know, with the values that change nothing for these.
ADDED = {"model.chat_template": "", "model.chat_template_kwargs": [], "model.template_date": "2024-07-26"}
ADDED |= {"sft.loss_on": "last", "reward.train": True}
SHARED = ("run.seed", "model", "data.max_prompt_tokens", "data.max_response_tokens", "data.validation_fraction")


def depends_on(stage: str, key: str) -> bool:
    """Return whether the stage's result depends on a recipe field, given by its dotted name."""
    reads = STAGES[stage].reads
    prefixes = (*SHARED, *reads.recipe, *(f"data.{name}" for name in reads.data))
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def counts(key: str, value: Any) -> bool:
    """Return whether a field's value is part of fingerprints: not one that changes nothing for runs begun before it."""
    return key not in ADDED or value != ADDED[key]


def fingerprint(recipe: Recipe, stage: str) -> str:
    """Return the SHA-256 (hex) of the recipe fields that the stage depends on."""
    values = {key: field_value(recipe, key) for key, _ in fields() if depends_on(stage, key)}
    values = {key: value for key, value in values.items() if counts(key, value)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def identity(recipe: Recipe, stage: str, inputs: dict[str, str]) -> str:
    """Return the hash that a stage's checkpoints carry: of its name, recipe fields and declared inputs at its start."""
    parts = [stage, fingerprint(recipe, stage), sorted(inputs.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def declared_inputs(recipe: Recipe, stage: str, run: RunFolder) -> dict[str, str]:
    """Return the hashes of the inputs known before the stage runs, "absent" for a result that does not exist yet.

    Data on the Hub is left out: its name is in the fingerprint. Embedded data is keyed by its name in the recipe, so
    that a checkout can be moved. Raises UserError for a data file that does not exist.
    """
    inputs = {}
    for name in STAGES[stage].reads.data:
        for entry in getattr(recipe.data, name):
            if path := local_path(entry):
                inputs[entry if entry.startswith(EMBEDDED) else run.key(path)] = hash_path(path)
    if template := recipe.model.chat_template:
        path = Path(template).expanduser()
        inputs[run.key(path)] = hash_path(path) if path.exists() else ABSENT
    for key in STAGES[stage].reads.upstream:
        path = run.from_key(key)
        inputs[key] = hash_path(path) if path.exists() else ABSENT
    return inputs


def changes(record: dict[str, Any], recipe: Recipe, stage: str, run: RunFolder, now: dict[str, str]) -> list[str]:
    """Return what has changed between the stage's `record` and the `declared_inputs` that are given as `now`.

    That is "the recipe" for its fields, and the keys of inputs with other or new content. An input that is gone does
    not count as changed: the stage's result is still valid without it.
    """
    found = [] if record.get("fingerprint") == fingerprint(recipe, stage) else ["the recipe"]
    before: dict[str, str] = record.get("inputs", {})
    for key, digest in before.items():
        path = run.from_key(key)
        current = now.get(key) or (hash_path(path) if path.exists() else ABSENT)
        if current not in (digest, ABSENT):
            found.append(key)
    # Older versions recorded embedded data by its path.
    known = {key for key in now if key in before or key.startswith(EMBEDDED) and now[key] in before.values()}
    return found + [key for key in now if key not in known and now[key] != ABSENT]


def lost_outputs(run: RunFolder, stage: str, record: dict[str, Any]) -> list[str]:
    """Return the names of a finished stage's outputs that are gone or have another size."""
    folder, outputs = run.stage_dir(stage), record.get("outputs", {})
    return [key for key, n in outputs.items() if not (folder / key).exists() or size_of(folder / key) != n]


def is_up_to_date(recipe: Recipe, run: RunFolder, stage: str) -> bool:
    """Return whether a run skips the stage: it is finished, recipe and inputs are unchanged, its outputs exist.

    Raises UserError if a data file that the recipe names does not exist.
    """
    record = run.read_stage(stage)
    if record is None or record.get("state") != "done":
        return False
    now = declared_inputs(recipe, stage, run)
    return not changes(record, recipe, stage, run, now) and not lost_outputs(run, stage, record)


def skip_message(run: RunFolder, stage: str) -> str:
    """Return the line that is shown for a stage that `is_up_to_date`."""
    return f"{stage}: finished, recipe and inputs unchanged; skipped ({run.stage_dir(stage)})"


def may_change(stage: str, key: str, done: bool) -> bool:
    """Return whether `--accept-change KEY` may keep the stage's work although the field has another value now.

    A finished stage may keep its result, whatever the change is, except for the fields of `data`: their files are
    compared by content, so the stage would have to be done again. An interrupted one may if no checkpoint needs them.
    """
    return not key.startswith("data.") if done else key in STAGES[stage].may_change


def check_accepted(keys: Sequence[str]) -> None:
    """Raise UserError for a key of --accept-change that is no field of a recipe."""
    known = [key for key, _ in fields()]
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1)
            fix = f"did you mean {near[0]}?" if near else "name a field as section.field"
            raise UserError(f"no recipe has a field {key}", "--accept-change", fix)


def check_recipe(recipe: Recipe, run: RunFolder, redo: str | None, accept: Sequence[str] = ()) -> None:
    """Refuse or record changes of the recipe: compare it with the run's recipe.yaml, and write it there.

    Raises UserError for a change that is not allowed. Fields may change if no stage depends on them that is finished or
    has checkpoints. With `redo`, a stage that is done from scratch, only the stages before it count. (The other variant
    of PPO is not before it: its own fingerprint has it done again.) Fields in `accept` may change nevertheless; stages
    that depend on them record it in stage.json.
    """
    check_accepted(accept)
    path = run.path / "recipe.yaml"
    if path.exists():
        before = load_recipe(str(path))
        changed = changed_keys(before, recipe)
        bound = [s for s in STAGES if (redo is None or STAGES[s].level < STAGES[redo].level) and is_started(run, s)]
        affected = [s for s in bound if any(depends_on(s, key) for key, _, _ in changed)]
        lines, refused, wanted = [], False, []
        for key, old, new in changed:
            stages = [stage for stage in affected if depends_on(stage, key)]
            fixed = [stage for stage in stages if not may_change(stage, key, run.is_done(stage))]
            if stages and (fixed or key not in accept):
                refused |= bool(fixed)
                wanted.append(key)
                lines.append(f"  {key}: {old} -> {new} ({_verdict(run, stages, fixed)})")
        if lines:
            redone = f"redo it with `rlhf run ... --from {affected[0]}`"
            fix = f"give the changed run another name (run.name=...), or {redone}"
            if not refused:
                fix += ", or keep what is done with " + " ".join(f"--accept-change {key}" for key in wanted)
            raise UserError(
                f"the recipe has changed since these stages of the run began: {', '.join(affected)}\n"
                + "\n".join(lines),
                str(path),
                fix,
            )
        for stage in affected:
            _note_accepted(run, before, recipe, stage, [entry for entry in changed if depends_on(stage, entry[0])])
    text = recipe_to_yaml(recipe)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _verdict(run: RunFolder, stages: Sequence[str], fixed: Sequence[str]) -> str:
    """Return what becomes of a change: `fixed` are the stages that do not take it."""
    if not fixed:
        return f"of {', '.join(stages)}; may be accepted"
    done = [stage for stage in fixed if run.is_done(stage)]
    partly = [stage for stage in fixed if stage not in done]
    reasons = [f"{', '.join(partly)} would be made partly with each value"] if partly else []
    reasons += [f"{', '.join(done)} would have to be done again"] if done else []
    return f"cannot be accepted: {', and '.join(reasons)}"


def _note_accepted(
    run: RunFolder, before: Recipe, recipe: Recipe, stage: str, changed: Sequence[tuple[str, Any, Any]]
) -> None:
    """Write the new fingerprint into stage.json, with the old and new values of the accepted fields.

    Does nothing if the stage was not made by the recipe `before`: it is to be done again, for a change not accepted.
    """
    record = run.read_stage(stage)
    # If stage.json is lost, the checkpoints carry their identity.
    if record is None or record.get("fingerprint") != fingerprint(before, stage):
        return
    entries = [{"key": key, "old": old, "new": new} for key, old, new in changed]
    known = record.get("accepted", [])
    record["accepted"] = known + [entry for entry in entries if entry not in known]
    run.write_stage(stage, record | {"fingerprint": fingerprint(recipe, stage)})


def is_started(run: RunFolder, stage: str) -> bool:
    """Return whether the stage is finished or has checkpoints to resume from."""
    return run.is_done(stage) or bool(list_checkpoints(run.stage_dir(stage) / "checkpoints"))


def check_data_files(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise UserError if a data file of these stages does not exist, before any of them runs."""
    for stage in stages:
        for name in STAGES[stage].reads.data:
            for entry in getattr(recipe.data, name):
                local_path(entry)
