"""Recipes: YAML plus `section.field=value` overrides, checked against the typed schema in `rlhf/config.py`.

A recipe is given by the name of a file in `launch/recipes` or by the path of a YAML file. A mistake in it becomes a
UserError that names the dotted field, its value and the values that it may have.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhf.config import Recipe
from rlhf.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "launch"  # the same place in a checkout and in an installed wheel
RECIPES, COMPARISONS, DEEPSPEED_FILES = SHIPPED / "recipes", SHIPPED / "comparisons", SHIPPED / "deepspeed"
# Results do not depend on these fields: they may change between two starts of one run.
NOT_IDENTITY = ("run.dir", "run.name", "run.stages", "tracking.")
# Fields that no longer exist, with the default that runs begun in their time have in recipe.yaml: it changes nothing.
RETIRED = {"launch.cuda_graphs": False}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a name from `recipe_names` or a YAML file), apply the overrides in order and validate the result.

    Overrides are `section.field=value`; the value is YAML, but for text fields it is taken literally. Raises UserError
    for an unknown recipe or field, bad YAML, and a value of the wrong type or out of range.
    """
    path = find_file(name_or_path, RECIPES, "recipe")
    values = read_yaml(path, "recipe", list(Recipe.model_fields))
    _drop_retired(values)
    _check_keys(values, Recipe, "", str(path))
    for override in overrides:
        _apply(values, override)
    _check_booleans(values, str(path))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, str(path)) from None


def recipe_names() -> dict[str, str]:
    """Return the names of the shipped recipes with the first comment line of each."""
    return described(RECIPES)


def described(folder: Path) -> dict[str, str]:
    """Return the names of the YAML files in a folder with the first comment line of each."""
    firsts = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in sorted(folder.glob("*.yaml"))}
    return {name: first.lstrip("# ").rstrip() for name, first in firsts.items()}


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the full resolved recipe as YAML, from which `load_recipe` makes an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 (hex) of every field that results may depend on, independent of the order in the file."""
    return hashlib.sha256(json.dumps(_identity(recipe), sort_keys=True).encode()).hexdigest()


def changed_keys(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, old value, new value) of each field that makes `recipe_hash` differ."""
    before, after = _identity(old), _identity(new)
    return [(key, before[key], after[key]) for key in before if before[key] != after[key]]


def field_value(recipe: Recipe, key: str) -> Any:
    """Return the value of a field, given by its dotted name."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every leaf field of the schema with its dotted name, in the order of the schema."""
    for name, info in section.model_fields.items():
        inner = _section(info)
        if inner is None:
            yield prefix + name, info
        else:
            yield from fields(inner, f"{prefix}{name}.")


def allowed(info: FieldInfo) -> str:
    """Return the allowed values of a field in words: `a whole number, at least 1`, `one of: drop, half`."""
    kind = info.annotation
    if get_origin(kind) is Literal:
        return "one of: " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        choices = f" of: {', '.join(get_args(item))}" if get_origin(item) is Literal else " of texts"
        return f"a list{choices}, such as [a, b]" + (", not empty" if _bound(info, "min_length") else "")
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    limits = []
    for attribute, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        bound = _bound(info, attribute)
        if bound is not None:
            limits.append(f"{text} {bound:g}" if isinstance(bound, float) else f"{text} {bound}")
    if kind is str and _bound(info, "min_length"):
        limits.append("not empty")
    if kind is str and _bound(info, "pattern"):
        limits.append(f"matching {_bound(info, 'pattern')}")
    return words + (", " + " and ".join(limits) if limits else "")


# --- finding and reading ---------------------------------------------------------------------------------------------


def find_file(name_or_path: str, shipped: Path, kind: str) -> Path:
    """Return the file that a name means in the folder `shipped`, or the path itself.

    `kind` is what the file contains, as in "recipe". Raises UserError if there is no such file.
    """
    names = [path.stem for path in sorted(shipped.glob("*.yaml"))]
    if name_or_path in names:
        return shipped / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    fix = f"{guess}{kind}s: {', '.join(names)}; or the path of a YAML file"
    raise UserError(f"there is no {kind} {name_or_path!r}", kind.upper(), fix)


def read_yaml(path: Path, kind: str, sections: Sequence[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file of a `kind`, as in "recipe"; a message names the `sections` that it may have.

    Raises UserError for a file that cannot be read, with the line that is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {kind}: {error}", str(path), "give a readable YAML file") from None
    try:
        # OmegaConf's loader is safe, refuses duplicate keys and reads 1e-5 as a number.
        config = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or "not readable"
        raise UserError(f"the {kind} is not valid YAML: {what}", where, "correct the line") from None
    except OmegaConfBaseException as error:
        what = f"the {kind} is not valid: {str(error).splitlines()[0]}"
        raise UserError(what, str(path), "correct the value") from None
    values = OmegaConf.to_container(config, resolve=False)
    lone_word = values == {text.strip(): None}  # OmegaConf reads a single word as a key
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values) or lone_word:
        raise UserError(f"a {kind} is a mapping of sections", str(path), f"sections: {', '.join(sections)}")
    return values


def _drop_retired(values: dict[str, Any]) -> None:
    """Remove the retired fields that hold their default; with another value they are unknown fields like any other."""
    for key, default in RETIRED.items():
        section, _, name = key.partition(".")
        held = values.get(section)
        if isinstance(held, dict) and held.get(name) == default:
            del held[name]


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in `values`."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        fix = "write section.field=value, as sft.lr=1e-5"
        raise UserError(f"{override!r} is not an override", "the command line", fix)
    known = dict(fields())
    sections = {name.rpartition(".")[0] for name in known}
    if key in sections:
        fix = f"set one of its fields: {', '.join(_members(key))}"
        raise UserError(f"{key} is a section, not a field", "the command line", fix)
    if key not in known:
        raise _unknown(key, "the command line")
    value: Any = text
    if known[key].annotation is not str:  # `run.name=7` is the text "7"
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(f"{key}={text} cannot be read", key, f"give {allowed(known[key])}") from None
    node = values
    *path, last = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value


# --- checking --------------------------------------------------------------------------------------------------------


def _check_keys(values: Mapping[str, Any], section: type[BaseModel], prefix: str, where: str) -> None:
    """Raise UserError for unknown names and for sections that are not mappings, at any depth."""
    for key, value in values.items():
        info = section.model_fields.get(str(key))
        if info is None:
            raise _unknown(f"{prefix}{key}", where)
        inner = _section(info)
        if inner is None:
            continue
        if not isinstance(value, Mapping):
            held = "is empty" if value is None else f"is {value!r}"
            fix = f"give it fields ({', '.join(inner.model_fields)}) or remove the line"
            raise UserError(f"the section {prefix}{key} {held}", where, fix)
        _check_keys(value, inner, f"{prefix}{key}.", where)


def _check_booleans(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for true or false in place of a number: pydantic would read them as 1 and 0."""
    for key, info in fields():
        value: Any = values
        for part in key.split("."):
            value = value.get(part, {})
        numeric = info.annotation in (int, float) or all(isinstance(c, int) for c in get_args(info.annotation) or [""])
        if isinstance(value, bool) and numeric:
            raise _wrong_value(key, "", value, where)


def _unknown(key: str, where: str) -> UserError:
    known = [name for name, _ in fields()]
    section, _, last = key.rpartition(".")
    siblings = _members(section)
    is_section = not section or any(name.startswith(f"{section}.") for name in known)
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6) if is_section else []
    if near:
        guess = [f"{section}.{near[0]}" if section else near[0]]
    else:
        guess = [name for name in known if name.rpartition(".")[2] == last]
        guess = guess or difflib.get_close_matches(key, known, n=1)
    fix = f"did you mean {' or '.join(guess)}?" if guess else f"known here: {', '.join(siblings)}"
    return UserError(f"unknown field {key}", where, fix)


def _members(section: str) -> list[str]:
    """Return the names directly below a dotted section; for an unknown one those of the recipe itself."""
    model: type[BaseModel] = Recipe
    for part in section.split("."):
        inner = _section(model.model_fields[part]) if part in model.model_fields else None
        if inner is None:
            return list(Recipe.model_fields)
        model = inner
    return list(model.model_fields)


def _invalid(error: ValidationError, path: str) -> UserError:
    first = error.errors()[0]
    rule = first.get("ctx", {}).get("error")
    # (what, fix) comes from a rule of a section about several fields.
    if isinstance(rule, ValueError) and len(rule.args) == 2:
        where = ".".join(map(str, first["loc"]))
        return UserError(rule.args[0], f"{where} in {path}" if where else path, rule.args[1])
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    index = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    return _wrong_value(key, index, first["input"], path)


def _wrong_value(key: str, index: str, value: Any, where: str) -> UserError:
    fix = f"give {allowed(dict(fields())[key])}"
    return UserError(f"{key}{index} is {value!r}", f"{key} in {where} or the command line", fix)


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {key: field_value(recipe, key) for key, _ in fields() if not key.startswith(NOT_IDENTITY)}


def _section(info: FieldInfo) -> type[BaseModel] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _bound(info: FieldInfo, name: str) -> Any:
    return next((getattr(m, name) for m in info.metadata if getattr(m, name, None) is not None), None)
