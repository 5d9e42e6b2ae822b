"""Every field of the recipe is read somewhere as an attribute of its section: no option without a reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from rlhf.config import Recipe
from rlhf.model_config import METHODS_OF_SETTING, PeftSection
from rlhf.recipe import fields
from support.paths import ROOT

FILES = (path for folder in ("rlhf", "stages", "launch") for path in sorted((ROOT / folder).rglob("*.py")))
SOURCES = [path for path in FILES if path.name not in ("config.py", "model_config.py")]
# Functions that only show fields, which does not count as reading them.
DISPLAY = {"plan_rows", "_ppo_rows", "_judge"}


def attribute_reads(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (owner, name) of every `owner.name` that is read; in `a.b.c` the owner of c is b.

    Within a function, a name of a section, as in `cfg = recipe.ppo` or `peft: PeftSection`, counts as the section.
    """
    for part in tree.body:
        functions = part.body if isinstance(part, ast.ClassDef) else [part]
        for function in functions:
            if getattr(function, "name", "") not in DISPLAY:
                yield from _reads(function)


def _reads(function: ast.stmt) -> Iterator[tuple[str, str]]:
    aliases: dict[str, set[str]] = {}
    others: set[str] = set()  # names of sections that mean something else here, as in `ppo: Ppo`
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if isinstance(value, ast.Attribute):
                    aliases.setdefault(target, set()).add(value.attr)
                else:
                    others.add(target)
        if isinstance(node, ast.arg) and node.annotation is not None:
            kind = ast.unparse(node.annotation)
            if kind.endswith("Section"):
                aliases.setdefault(node.arg, set()).add(kind.removesuffix("Section").lower())
            else:
                others.add(node.arg)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute):
                yield owner.attr, node.attr
            elif isinstance(owner, ast.Name):
                for section in aliases.get(owner.id, set()) | ({owner.id} - others):
                    yield section, node.attr


def _pairs(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """Yield the assigned names with their values, also of `a, b = x, y`."""
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for name, value in zip(target.elts, node.value.elts, strict=True):
                if isinstance(name, ast.Name):
                    yield name.id, value


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
READS = {read for tree in TREES for read in attribute_reads(tree)}


def test_the_walk_sees_reads_through_aliases_and_arguments_and_no_writes() -> None:
    code = """
def one(recipe, peft: PeftSection):
    cfg, seed = recipe.ppo, recipe.run.seed
    recipe.sft.lr = 1
    return cfg.lam + peft.rank
def two(recipe):
    cfg = recipe.rank
    return cfg.temperature
def plan_rows(recipe):
    return recipe.reward.lr
"""
    reads = set(attribute_reads(ast.parse(code)))
    assert {("ppo", "lam"), ("run", "seed"), ("peft", "rank"), ("rank", "temperature")} <= reads
    assert not {("sft", "lr"), ("ppo", "temperature"), ("reward", "lr")} & reads


def test_the_functions_that_only_show_fields_exist() -> None:
    assert {node.name for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} >= DISPLAY


@pytest.mark.parametrize("field", [name for name, _ in fields(Recipe)])
def test_field_is_read(field: str) -> None:
    section, name = field.split(".")[-2:]
    assert (section, name) in READS, f"no code reads recipe.{field}"


def test_every_setting_of_a_method_says_which_methods_read_it() -> None:
    names = {name for name, _ in fields(Recipe)}
    assert {f"model.peft.{name}" for name in PeftSection.model_fields} <= names
    assert METHODS_OF_SETTING.keys() == PeftSection.model_fields.keys() - {"method"}


def test_the_reward_models_method_is_read_through_the_recipe() -> None:
    """Its field has the name of `model.peft.method`, whose reads would stand for its own above."""
    nodes = (node for tree in TREES for node in ast.walk(tree))
    assert any(isinstance(node, ast.Attribute) and node.attr == "reward_peft" for node in nodes)
    recipe = Recipe.model_validate({"model": {"peft": {"method": "lora"}}})
    assert recipe.reward_peft == recipe.model.peft
    apart = Recipe.model_validate({"model": {"peft": {"method": "lora"}}, "reward": {"peft": {"method": "none"}}})
    assert not apart.reward_peft.on
