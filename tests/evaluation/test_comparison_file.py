"""Comparison files: the recipes that they give, and refusals that name file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.evaluation.comparison_file import FILE, comparison_names, read_comparison, write_comparison
from rlhf.recipe import load_recipe
from rlhf.run.preflight import check

FILE_TEXT = """\
# Three arms.
recipe: tiny
reference: full
common:
  reward.peft.method: none
  sft.packing: false
  run.name: three
arms:
  full: {}
  lora: {model.peft.method: lora, sft.lr: 5.0e-3}
  prompt:
    model.peft.method: prompt
    ppo.lr: 0.01
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(FILE_TEXT)
    return path


def test_the_reference_is_a_whole_run_and_the_others_have_its_reward_model(file: Path) -> None:
    comparison = read_comparison(str(file), ["run.dir=here", "run.seed=7"])
    assert comparison.folder == Path("here/three") and comparison.variant == "ppo-ptx"
    full, lora = comparison.load("full"), comparison.load("lora")
    assert full.run.stages == ["sft", "rank", "reward", "ppo-ptx", "ppo", "evaluate"]
    assert lora.run.stages == ["sft", "ppo-ptx", "ppo", "evaluate"]
    assert (full.run.dir, full.run.name, full.reward.model) == ("here/three", "full", "sft")
    assert (lora.run.dir, lora.run.name, lora.reward.model) == ("here/three", "lora", "here/three/full/sft/model")
    assert (lora.model.peft.method, lora.sft.lr, lora.sft.packing) == ("lora", 0.005, False)
    assert full.sft.lr == load_recipe("tiny").sft.lr and comparison.load("prompt").ppo.lr == 0.01
    assert {comparison.load(arm).run.seed for arm in comparison.arms} == {7}


def test_what_is_written_into_the_folder_reads_back_equal(file: Path, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "data.prompts=[a.jsonl,b.jsonl]", "tracking.project=a: b"]
    comparison = read_comparison(str(file), overrides)
    path = write_comparison(comparison)
    assert path == tmp_path / "three" / FILE
    again = read_comparison(str(path))
    assert again == comparison
    assert again.load("lora").data.prompts == ["a.jsonl", "b.jsonl"] and again.load("lora").tracking.project == "a: b"
    assert [again.load(arm) for arm in again.arms] == [comparison.load(arm) for arm in comparison.arms]


def test_a_recipe_file_is_looked_for_beside_the_comparison(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text("run: {name: own}\nmodel: {name: tiny}\n")
    file.write_text(FILE_TEXT.replace("recipe: tiny", "recipe: own.yaml"))
    monkeypatch.chdir("/")
    assert read_comparison(str(file)).load("full").model.name == "tiny"


REFUSALS = [
    ("recipe: tiny", "recipe: tny", ["there is no recipe 'tny'", "line 2, recipe", "did you mean tiny?"]),
    ("recipe: tiny", "recipe: [tiny]", ["recipe is ['tiny']", "line 2, recipe"]),
    (
        "reference: full",
        "reference: whole",
        ["reference whole is not an arm", "line 3, reference", "full, lora, prompt"],
    ),
    ("reference: full\n", "", ["reference is None", "my.yaml, reference"]),
    ("arms:", "ways:", ["unknown section ways", "line 8, ways", "rename it to arms"]),
    ("common:", "comon:", ["unknown section comon", "line 4, comon", "recipe, reference, common, arms"]),
    ("sft.packing: false", "sft.pack: false", ["unknown field sft.pack", "line 6, common: sft.pack", "sft.packing"]),
    ("sft.packing: false", "sft.packing: 7", ["sft.packing is 7", "line 6, common: sft.packing"]),
    ("sft.lr: 5.0e-3", "sft.lrr: 5.0e-3", ["unknown field sft.lrr", "line 10, arms: lora: sft.lrr", "sft.lr?"]),
    ("ppo.lr: 0.01", "ppo.lr: fast", ["ppo.lr is 'fast'", "line 13, arms: prompt: ppo.lr", "a number, above 0"]),
    ("ppo.lr: 0.01", "ppo: {lr: 0.01}", ["ppo is a section", "line 13, arms: prompt: ppo"]),
    ("ppo.lr: 0.01", "run.name: x", ["run.name is the same", "line 13, arms: prompt: run.name"]),
    ("ppo.lr: 0.01", "evaluate.prompts: 9", ["evaluate.prompts is the same", "under common"]),
    ("ppo.lr: 0.01", "reward.lr: 0.1", ["reward.lr is the same", "line 13"]),
    ("sft.packing: false", "sft.packing: true", ["sft.packing is true", "line 11, arms: prompt"]),
    ("reward.peft.method: none", "reward.peft.method: model", ["share one reward model", "reward.peft.method=none"]),
    ("  lora: {", "  lo/ra: {", ["'lo/ra' cannot be the name of a folder", "line 10"]),
    ("  lora: {model", "  lora: [model", ["not valid YAML", "line 10"]),
    ("  lora: {model.peft.method: lora, sft.lr: 5.0e-3}", "  lora: 3", ["lora is 3", "line 10, arms: lora"]),
    ("run.name: three", "run.stages: [sft, reward, ppo]", ["run.stages lacks evaluate"]),
]


@pytest.mark.parametrize(("before", "after", "words"), REFUSALS)
def test_refusals_name_file_line_and_field(file: Path, before: str, after: str, words: list[str]) -> None:
    assert before in FILE_TEXT
    file.write_text(FILE_TEXT.replace(before, after, 1))
    with pytest.raises(UserError) as caught:
        read_comparison(str(file))
    for word in words:
        assert word in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_without_arms_and_an_unknown_comparison(file: Path, tmp_path: Path) -> None:
    file.write_text("recipe: tiny\nreference: full\narms:\n")
    with pytest.raises(UserError, match="arms is missing or empty"):
        read_comparison(str(file))
    with pytest.raises(UserError, match="there is no comparison 'peff'[\\s\\S]*did you mean peft"):
        read_comparison("peff")
    file.write_text("- recipe\n")
    words = "a comparison is a mapping of sections[\\s\\S]*recipe, reference, common, arms"
    with pytest.raises(UserError, match=words):
        read_comparison(str(file))


def test_the_command_line_does_not_set_what_the_arms_differ_in(file: Path) -> None:
    with pytest.raises(UserError, match="sft.lr is what the arms differ in: lora"):
        read_comparison(str(file), ["sft.lr=1"])
    with pytest.raises(UserError, match=r"unknown field sft\.lrr\n  where: the command line"):
        read_comparison(str(file), ["sft.lrr=1"])


@pytest.mark.parametrize("name", sorted(comparison_names()))
def test_shipped_comparisons_are_whole(name: str) -> None:
    comparison = read_comparison(name)
    assert comparison.folder.name == name and len(comparison_names()[name]) > 20
    for arm in comparison.arms:
        check(comparison.load(arm))


def test_peft_has_every_method_that_its_model_can_take() -> None:
    comparison = read_comparison("peft")
    methods = [comparison.load(arm).model.peft.method for arm in comparison.arms]
    expected = ["none", "lora", "dora", "prefix", "p_tuning", "p_tuning_v2", "prompt", "adapter", "ia3"]
    assert sorted(methods) == sorted(expected)
    budgets = {
        (r.sft.epochs, r.sft.batch_size, r.ppo.episodes, r.ppo.batch_size, r.ppo.minibatch_size, r.run.seed)
        for r in map(comparison.load, comparison.arms)
    }
    assert len(budgets) == 1


def test_bitfit_can_be_an_arm_for_a_model_with_biases(tmp_path: Path, tiny_gpt2_dir: str) -> None:
    file = tmp_path / "gpt2.yaml"
    file.write_text(
        f"recipe: peft\nreference: full\ncommon: {{model.name: '{tiny_gpt2_dir}'}}\n"
        "arms: {full: , bitfit: {model.peft.method: bitfit, sft.lr: 1.0e-3}}\n"
    )
    assert read_comparison(str(file)).load("bitfit").model.peft.method == "bitfit"
