"""Recipes: what loads, what is refused and how the refusal reads."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from rlhf.config import Recipe, RunSection
from rlhf.errors import UserError
from rlhf.recipe import RECIPES, allowed, changed_keys, fields, load_recipe, recipe_hash, recipe_names, recipe_to_yaml
from rlhf.stage_table import STAGES


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text("# mine\nrun: {name: own}\nsft:\n  lr: 1e-5\nmodel:\n  peft: {rank: 4}\n", encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides)
    return caught.value


def test_file_then_overrides_then_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["sft.lr=2e-6", "model.peft.method=lora", "sft.lr=3e-6"])
    assert recipe.sft.lr == 3e-6  # the last override wins
    assert (recipe.model.peft.rank, recipe.model.peft.method) == (4, "lora")
    assert recipe.ppo.kl_coef == 0.02  # the schema's default


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("ppo.episodes=1e3", lambda r: r.ppo.episodes, 1000),
        ("run.stages=[sft,rank]", lambda r: r.run.stages, ["sft", "rank"]),
        ("data.rankings=['a b.jsonl','c=d.jsonl']", lambda r: r.data.rankings, ["a b.jsonl", "c=d.jsonl"]),
        ("run.name=007", lambda r: r.run.name, "007"),
        ("model.name=a=b: ${HOME}", lambda r: r.model.name, "a=b: ${HOME}"),
        ("launch.hostfile=", lambda r: r.launch.hostfile, ""),
    ],
)
def test_override_values(recipe_file: Path, override: str, read: object, value: object) -> None:
    assert read(load_recipe(str(recipe_file), [override])) == value


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_shipped_recipes_load_and_describe_themselves(name: str) -> None:
    assert load_recipe(name).run.name == name
    assert len(recipe_names()[name]) > 20


def test_recipe_names_are_the_files() -> None:
    assert set(recipe_names()) == {"demo", "tiny", "peft", "instructgpt-1.3b", "tldr-pythia-1b"}
    assert RECIPES.is_dir()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.lrr=1", ["unknown field sft.lrr", "did you mean sft.lr?"]),
        ("ppo.minibatch=1", ["unknown field ppo.minibatch", "did you mean ppo.minibatch_size?"]),
        ("kl_coef=1", ["unknown field kl_coef", "did you mean ppo.kl_coef?"]),
        ("lr=1", ["did you mean sft.lr or reward.lr or ppo.lr?"]),
        ("model.peft.rnk=1", ["did you mean model.peft.rank?"]),
        ("sft=1", ["sft is a section", "batch_size"]),
        ("sft.lr", ["'sft.lr' is not an override", "section.field=value"]),
        ("=1", ["not an override"]),
        ("sft.lr=-1", ["sft.lr is -1", "a number, above 0"]),
        ("sft.lr=.inf", ["sft.lr is inf"]),
        ("sft.lr=.nan", ["sft.lr is nan"]),
        ("sft.lr=", ["sft.lr is None", "a number"]),
        ("sft.lr=fast", ["sft.lr is 'fast'", "a number"]),
        ("sft.batch_size=1.5", ["sft.batch_size is 1.5", "a whole number, at least 1"]),
        ("sft.batch_size=true", ["sft.batch_size is True", "a whole number"]),
        ("rank.outputs_per_prompt=17", ["at least 2 and at most 16"]),
        ("rank.agreement=0.5", ["above 0.5 and at most 1"]),
        ("sft.packing=maybe", ["true or false"]),
        ("model.peft={method: prompt, last_layers: 2}", ["model.peft is a section"]),
        ("launch.zero_stage=4", ["launch.zero_stage is 4", "one of: 0, 1, 2, 3"]),
        ("launch.zero_stage=true", ["launch.zero_stage is True"]),
        ("reward.ties=keep", ["one of: drop, half"]),
        ("run.stages=[sft,dpo]", ["run.stages[1] is 'dpo'", "ppo-ptx"]),
        ("run.stages=[]", ["not empty"]),
        ("data.prompts=a.jsonl", ["a list of texts"]),
        ("run.name=a/b", ["run.name is 'a/b'", "matching"]),
        ("sft.lr=[1", ["cannot be read"]),
    ],
)
def test_refused_overrides(recipe_file: Path, override: str, words: list[str]) -> None:
    error = refusal(recipe_file, override)
    for word in words:
        assert word in str(error)
    assert error.where and error.fix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sft:\n  lr: 1\n  epoch: 2\n", ["unknown field sft.epoch", "sft.epochs"]),
        ("sfd:\n  lr: 1\n", ["unknown field sfd", "did you mean sft?"]),
        ("launch:\n  cuda_graphs: true\n", ["unknown field launch.cuda_graphs"]),  # retired; its default was false
        ("sft:\n", ["the section sft is empty"]),
        ("sft: 3\n", ["the section sft is 3"]),
        ("sft: {lr: [1}\n", ["not valid YAML", "line 1"]),
        ("sft:\n  lr: 1\n  lr: 2\n", ["duplicate key", "line 3"]),
        ("run: {name: a}\nsft:\n\tlr: 1\n", ["not valid YAML", "line 3"]),
        ("- sft\n", ["a mapping of sections"]),
        ("sft\n", ["a mapping of sections"]),
        ("sft: {lr: fast}\n", ["sft.lr is 'fast'"]),
        ("run: !!python/object/apply:os.getcwd []\n", ["not valid"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    error = refusal(path)
    for word in words:
        assert word in str(error)
    assert str(path) in str(error)


def test_a_retired_field_loads_with_its_old_default_and_cannot_be_set(tmp_path: Path) -> None:
    """From the recipe.yaml of a run of the tiny recipe that was begun while launch.cuda_graphs existed."""
    path = tmp_path / "old.yaml"
    path.write_text(
        "launch:\n  processes: 1\n  frozen: whole\n  gather: once\n  gradient_checkpointing: false\n"
        "  cuda_graphs: false\n  vllm_url: ''\n  vllm_weights: /dev/shm\n"
    )
    assert load_recipe(str(path)) == Recipe()
    path.write_text("launch:\n  cuda_graphs: false\n")
    assert load_recipe(str(path)) == Recipe()
    assert "unknown field launch.cuda_graphs" in str(refusal(path, "launch.cuda_graphs=false"))


def test_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean demo?" in str(refusal("demos"))
    assert "no recipe 'nothing/like.yaml'" in str(refusal("nothing/like.yaml"))


def test_yaml_round_trip(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["run.name=007", "data.rankings=['a: b']", "sft.lr=1e-7"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(saved)) == recipe


def test_hash_and_changed_keys_leave_out_what_changes_no_result(recipe_file: Path) -> None:
    old = load_recipe(str(recipe_file))
    elsewhere = ["run.dir=elsewhere", "run.name=x", "tracking.wandb=disabled", "run.stages=[sft]"]
    moved = load_recipe(str(recipe_file), elsewhere)
    assert recipe_hash(old) == recipe_hash(moved)
    assert changed_keys(old, moved) == []
    new = load_recipe(str(recipe_file), ["run.seed=2", "model.peft.rank=8"])
    assert recipe_hash(old) != recipe_hash(new)
    assert changed_keys(old, new) == [("run.seed", 1, 2), ("model.peft.rank", 4, 8)]


def test_the_stages_of_a_recipe_are_those_of_the_table() -> None:
    (stage,) = get_args(RunSection.model_fields["stages"].annotation)
    assert sorted(get_args(stage)) == sorted(STAGES)


def test_every_field_says_what_it_may_hold() -> None:
    words = {name: allowed(info) for name, info in fields(Recipe)}
    assert words["ppo.clip"] == "a number, above 0 and below 1"
    assert words["sft.schedule"] == "one of: cosine, linear, constant"
    assert all(words.values())
