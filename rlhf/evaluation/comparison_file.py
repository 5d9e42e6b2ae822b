"""Comparison files: one recipe, run in several arms that differ in a few fields.

    recipe: peft                    name of the recipe that all arms share, or its path from this file
    reference: full                 the arm that ranks outputs and trains the reward model for all arms
    common: {run.seed: 2}           fields of every arm; may be left out
    arms:
      full: {sft.lr: 1.0e-5}
      lora: {model.peft.method: lora, sft.lr: 5.0e-4}

Fields are written as on the command line. The reference is an ordinary run of all stages of the recipe. The other arms
run SFT, PPO and evaluate, with the reference's rankings and its reward model, so that the scores of all arms come from
one model and can be compared. All weights of the reward model are trained (reward.peft.method=none), and so are all
weights of every arm's value model, which starts from it: the arms differ in the policy alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.recipe import COMPARISONS, RECIPES, described, field_value, fields, find_file, load_recipe, read_yaml
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.files import write_atomic

FILE = "comparison.yaml"  # in the comparison's folder: the file with the command line's overrides
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # of an arm, which is also its run folder's name
SECTIONS = ("recipe", "reference", "common", "arms")
SHARED_STAGES = ("rank", "reward")  # run by the reference for all arms
# Fields that the comparison sets itself, or that must be equal in all arms for their numbers to be comparable.
FIXED_FIELDS = ("run.dir", "run.name", "run.stages", "rank.", "reward.", "evaluate.", "data.prompts_heldout")


@dataclass(frozen=True)
class Comparison:
    """A comparison file with the command line's overrides; every field is checked."""

    recipe: str  # name or path
    reference: str
    common: dict[str, Any]  # dotted field: value
    arms: dict[str, dict[str, Any]]

    @property
    def base(self) -> Recipe:
        """Return the recipe with the fields common to all arms."""
        return load_recipe(self.recipe, _as_overrides(self.common))

    @property
    def folder(self) -> Path:
        """Return runs/<name>, which holds the run folders of the arms."""
        run = self.base.run
        return Path(run.dir) / run.name

    @property
    def variant(self) -> str:
        """Return the name of the PPO stage whose policies are compared."""
        return next((variant for variant in PPO_VARIANTS if variant in self.base.run.stages), "ppo")

    def overrides(self, arm: str) -> list[str]:
        """Return the overrides that follow the recipe's name on the command line of an arm's stages."""
        base, folder = self.base, self.folder
        placed: dict[str, Any] = {"run.dir": str(folder), "run.name": arm}
        if arm != self.reference:
            placed["run.stages"] = [stage for stage in base.run.stages if stage not in SHARED_STAGES]
            if base.reward.model == "sft":  # which means the reference's SFT model
                placed["reward.model"] = str(folder / self.reference / "sft" / "model")
        return _as_overrides(self.common | self.arms[arm] | placed)

    def load(self, arm: str) -> Recipe:
        """Return the whole recipe of an arm."""
        return load_recipe(self.recipe, self.overrides(arm))


def comparison_names() -> dict[str, str]:
    """Return the names of the shipped comparisons, each with the first comment line of its file."""
    return described(COMPARISONS)


def read_comparison(name_or_path: str, overrides: Sequence[str] = ()) -> Comparison:
    """Read a shipped or own comparison file, with `section.field=value` overrides for every arm, and check every arm.

    Raises UserError with file, line and field if any arm cannot be run.
    """
    path = find_file(name_or_path, COMPARISONS, "comparison")
    values, lines = read_yaml(path, "comparison", SECTIONS), _Lines(path)
    for key in values:
        if key not in SECTIONS:
            fix = "rename it to arms" if key == "ways" else f"known here: {', '.join(SECTIONS)}"  # its former name
            raise UserError(f"unknown section {key}", lines.where(key), fix)
    for key in ("recipe", "reference"):
        if not isinstance(values.get(key), str):
            raise UserError(f"{key} is {values.get(key)!r}", lines.where(key), f"give the name of a {key}")
    common = _mapping(values.get("common", {}), lines, "common")
    sections = _mapping(values.get("arms"), lines, "arms")
    arms = {arm: _mapping(given, lines, "arms", arm) for arm, given in sections.items()}
    if values["reference"] not in arms:
        what = f"the reference {values['reference']} is not an arm of this comparison"
        raise UserError(what, lines.where("reference"), f"take one of {', '.join(arms)}")
    recipe = _find_recipe(values["recipe"], lines)
    _load(recipe, _as_overrides(common), lines, "common", common)
    _check_overrides(overrides, arms, path)
    base = load_recipe(recipe, [*_as_overrides(common), *overrides])
    resolved = {key: field_value(base, key) for key in [*common, *(text.partition("=")[0] for text in overrides)]}
    comparison = Comparison(recipe, values["reference"], resolved, arms)
    for stages in (("sft",), ("reward",), PPO_VARIANTS, ("evaluate",)):
        if not set(stages) & set(base.run.stages):
            raise UserError(f"run.stages lacks {stages[0]}", lines.where("recipe"), "a comparison needs it")
    for arm in arms:
        _check_arm(comparison, arm, lines)
    return comparison


def write_comparison(comparison: Comparison) -> Path:
    """Write the comparison with its overrides into its folder, to be read again from there; return the file's path."""
    content = {section: getattr(comparison, section) for section in SECTIONS}
    path = comparison.folder / FILE
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, width=120))
    return path


# --- parts -----------------------------------------------------------------------------------------------------------


class _Lines:
    """The line numbers of the keys of a YAML file, for error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        self._lines = dict(self._walk(root, ()))

    def _walk(self, node: yaml.Node | None, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*at, str(key.value))
                yield inner, key.start_mark.line + 1
                yield from self._walk(value, inner)

    def where(self, *keys: str) -> str:
        """Return `FILE, line N, a: b` for the key b in the section a; without the line if the file lacks the key."""
        line = f", line {self._lines[keys]}" if keys in self._lines else ""
        return f"{self.path}{line}, {': '.join(keys)}"


def _mapping(value: Any, lines: _Lines, *at: str) -> dict[str, Any]:
    """Return a section as a dict, else raise UserError; only an arm without fields of its own may be empty."""
    if value is None and len(at) == 2:
        return {}
    if not isinstance(value, Mapping) or (not value and at == ("arms",)):
        state = "is missing or empty" if value in (None, {}) else f"is {value!r}"
        fix = "write `name: {section.field: value}` on the lines below it"
        raise UserError(f"{at[-1]} {state}", lines.where(*at), fix)
    return {str(key): inner for key, inner in value.items()}


def _find_recipe(recipe: str, lines: _Lines) -> str:
    """Return the recipe's name, or its path if there is such a file beside the comparison file or elsewhere."""
    if (lines.path.parent / recipe).is_file():
        recipe = str((lines.path.parent / recipe).resolve())
    try:
        find_file(recipe, RECIPES, "recipe")
    except UserError as error:
        raise UserError(error.what, lines.where("recipe"), error.fix) from None
    return recipe


def _check_overrides(overrides: Sequence[str], arms: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raise UserError if an override sets a field for all arms that some arm sets itself."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        setting = [arm for arm, given in arms.items() if key in given]
        if setting:
            what = f"{key} is what the arms differ in: {', '.join(setting)}"
            raise UserError(what, "the command line", f"change it in a copy of {path}")


def _check_arm(comparison: Comparison, arm: str, lines: _Lines) -> None:
    """Raise UserError if an arm cannot be a run of this comparison."""
    given = comparison.arms[arm]
    if not NAME.fullmatch(arm):
        fix = "name it in letters, digits, dots, dashes and underscores"
        raise UserError(f"the arm {arm!r} cannot be the name of a folder", lines.where("arms", arm), fix)
    for key in given:
        if key.startswith(FIXED_FIELDS):
            fix = "set it under common, or in the recipe" if not key.startswith("run.") else "leave it out"
            raise UserError(f"{key} is the same for all arms, or follows from them", lines.where("arms", arm, key), fix)
    recipe = _load(comparison.recipe, comparison.overrides(arm), lines, "arms", arm, given)
    if recipe.reward.peft.method != "none":
        what = f"reward.peft.method is {recipe.reward.peft.method}: all arms share one reward model, trained whole"
        fix = "set reward.peft.method=none in the recipe or under common"
        raise UserError(what, lines.where("arms", arm), fix)


def _load(recipe: str, overrides: Sequence[str], lines: _Lines, *at: Any) -> Recipe:
    """Load a recipe; an error about a field that this file sets (in the mapping `at[-1]`) names file and line."""
    *keys, given = at
    try:
        return load_recipe(recipe, overrides)
    except UserError as error:
        named = [key for key in given if key in error.what.replace(",", " ").split() or error.what.startswith(key)]
        where = lines.where(*keys, named[0]) if named else f"{lines.where(*keys)}: {error.where}"
        raise UserError(error.what, where, error.fix) from None


def _as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `section.field=value` strings, which `load_recipe` reads back to these values."""
    texts = {key for key, info in fields() if info.annotation is str}
    return [f"{key}={value if key in texts else json.dumps(value)}" for key, value in values.items()]
