"""The recipe's rules about parameter-efficient methods, and how a breach of them reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.model_config import UNMERGEABLE, VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.recipe import changed_keys, load_recipe, recipe_hash, recipe_to_yaml
from support.peft_references import CACHED, EMBEDDED, METHODS

# What each method reads, and a value of it that is not its default.
OWN = {
    "lora": ("rank", "alpha", "last_layers"),
    "dora": ("rank", "alpha", "last_layers"),
    "ia3": ("last_layers",),
    "bitfit": ("last_layers",),
    "adapter": ("last_layers", "bottleneck"),
    "prompt": ("virtual_tokens",),
    "p_tuning": ("virtual_tokens", "hidden"),
    "prefix": ("virtual_tokens", "hidden"),
    "p_tuning_v2": ("virtual_tokens",),
}
OTHER = {"rank": 4, "alpha": 8.5, "last_layers": 1, "virtual_tokens": 5, "hidden": 32, "bottleneck": 8}
DEFAULT = {"rank": 16, "alpha": 32.0, "last_layers": 0, "virtual_tokens": 20, "hidden": 128, "bottleneck": 64}


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "own.yaml"
    path.write_text("run: {name: own}\nsft: {packing: false}\n", encoding="utf-8")
    return str(path)


def refusal(path: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert caught.value.where and caught.value.fix
    return caught.value


def test_the_groups_of_methods() -> None:
    assert set(VIRTUAL_TOKEN_METHODS) == {*EMBEDDED, *CACHED}
    assert set(UNMERGEABLE) == {*VIRTUAL_TOKEN_METHODS, "adapter"}
    assert set(OWN) == set(METHODS)


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("name", OTHER)
def test_a_setting_that_the_method_does_not_read_is_refused(method: str, name: str, recipe_file: str) -> None:
    setting = f"model.peft.{name}={OTHER[name]}"
    if name in OWN[method]:
        peft = load_recipe(recipe_file, [f"model.peft.method={method}", setting]).model.peft
        assert getattr(peft, name) == OTHER[name]
        return
    error = refusal(recipe_file, f"model.peft.method={method}", setting)
    assert error.what == f"{method} has no {name}"
    assert error.where == f"model.peft in {recipe_file}"
    readers = [m for m in OWN if name in OWN[m]]
    assert error.fix.startswith(f"set {name}={DEFAULT[name]}, or leave it out") and all(m in error.fix for m in readers)
    # A resolved recipe names every field: its default is no setting.
    load_recipe(recipe_file, [f"model.peft.method={method}", f"model.peft.{name}={DEFAULT[name]}"])


def test_without_a_method_settings_wait(recipe_file: str) -> None:
    settings = [f"model.peft.{name}={value}" for name, value in OTHER.items()]
    peft = load_recipe(recipe_file, settings).model.peft
    assert not peft.on and peft.rank == 4
    assert PeftSection(method="lora").on and not PeftSection().on


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_and_virtual_tokens(method: str, recipe_file: str) -> None:
    packed = [f"model.peft.method={method}", "sft.packing=true"]
    if method not in (*EMBEDDED, *CACHED):
        assert load_recipe(recipe_file, packed).sft.packing
        return
    error = refusal(recipe_file, *packed)
    assert error.what.startswith("sft.packing is true") and method in error.what
    assert (error.where, error.fix) == (recipe_file, "set sft.packing=false")


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_and_keys_and_values(method: str, recipe_file: str) -> None:
    recomputed = [f"model.peft.method={method}", "launch.gradient_checkpointing=true"]
    if method not in CACHED:
        assert load_recipe(recipe_file, recomputed).launch.gradient_checkpointing
        return
    error = refusal(recipe_file, *recomputed)
    assert error.what.startswith("launch.gradient_checkpointing is true") and method in error.what
    assert error.where == recipe_file and "p_tuning or prompt" in error.fix


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_of_all_weights_needs_a_policy_that_can_be_merged(method: str, recipe_file: str) -> None:
    whole = [f"model.peft.method={method}", "reward.peft.method=none"]
    if method in ("lora", "dora", "ia3", "bitfit"):
        recipe = load_recipe(recipe_file, whole)
        assert recipe.reward_peft == PeftSection() and recipe.model.peft.method == method
        return
    error = refusal(recipe_file, *whole)
    assert error.what.startswith("reward.peft.method is none") and method in error.what
    assert error.where == recipe_file and "reward.peft.method=model" in error.fix
    assert not load_recipe(recipe_file, [*whole, "reward.model=tiny"]).reward_peft.on


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_recipe_loads_again(method: str, recipe_file: str, tmp_path: Path) -> None:
    settings = [f"model.peft.{name}={OTHER[name]}" for name in OWN[method]]
    for more in ([], settings):
        recipe = load_recipe(recipe_file, [f"model.peft.method={method}", *more])
        assert recipe.reward_peft == recipe.model.peft
        saved = tmp_path / "saved.yaml"
        saved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        again = load_recipe(str(saved))
        assert again == recipe and recipe_hash(again) == recipe_hash(recipe)
    plain = load_recipe(recipe_file)
    assert ("model.peft.method", "none", method) in changed_keys(plain, recipe)
    # Back to all weights by one override.
    assert not load_recipe(str(saved), ["model.peft.method=none"]).model.peft.on


@pytest.mark.parametrize(
    ("override", "what", "where", "fix"),
    [
        ("model.peft.method=magic", "model.peft.method is 'magic'", "model.peft.method in", "one of: none, lora, dora"),
        ("reward.peft.method=lora", "reward.peft.method is 'lora'", "reward.peft.method in", "one of: model, none"),
        ("model.peft.rnk=1", "unknown field model.peft.rnk", "the command line", "did you mean model.peft.rank?"),
        ("model.peft=lora", "model.peft is a section", "the command line", "method, rank, alpha"),
        (
            "model.peft.rank=0",
            "model.peft.rank is 0",
            "model.peft.rank in",
            "a whole number, at least 1 and at most 1024",
        ),
        ("model.peft.alpha=0", "model.peft.alpha is 0", "model.peft.alpha in", "a number, above 0"),
        ("model.peft.last_layers=-1", "model.peft.last_layers is -1", "model.peft.last_layers in", "at least 0"),
        ("model.peft.virtual_tokens=0", "is 0", "model.peft.virtual_tokens in", "at least 1 and at most 1024"),
        ("model.peft.hidden=0", "is 0", "model.peft.hidden in", "at least 1"),
        ("model.peft.bottleneck=1.5", "is 1.5", "model.peft.bottleneck in", "a whole number, at least 1"),
        ("model.lora.rank=4", "unknown field model.lora.rank", "the command line", "did you mean model.peft.rank?"),
    ],
)
def test_refusals_name_the_place(override: str, what: str, where: str, fix: str, recipe_file: str) -> None:
    error = refusal(recipe_file, override)
    assert what in error.what and where in error.where and fix in error.fix


def test_in_a_file_too_they_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  peft: {method: ia3, rank: 4}\n", encoding="utf-8")
    error = refusal(str(path))
    assert (error.what, error.where) == ("ia3 has no rank", f"model.peft in {path}")


def test_the_schema_alone_keeps_the_rules() -> None:
    """As a stage's own code makes a recipe."""
    with pytest.raises(ValueError, match="packing"):
        Recipe.model_validate({"model": {"peft": {"method": "prompt"}}})
    with pytest.raises(ValueError, match="ia3 has no rank"):
        PeftSection(method="ia3", rank=3)


def test_a_reward_model_of_fewer_layers_than_are_to_be_trained_is_refused(recipe_file: str) -> None:
    both = ["model.peft.method=lora", "reward.peft.method=model", "reward.keep_layers=2"]
    what = refusal(recipe_file, *both, "model.peft.last_layers=3").what
    assert what.startswith("reward.keep_layers is 2, and model.peft.last_layers is 3")
    for fine in (["model.peft.last_layers=2"], ["model.peft.last_layers=0"]):
        load_recipe(recipe_file, [*both, *fine])
    load_recipe(recipe_file, [*both, "model.peft.last_layers=3", "reward.peft.method=none"])
