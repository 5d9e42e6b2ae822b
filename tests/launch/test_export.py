"""`rlhf export`: a stage's model as a plain folder, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.commands.export import export_model
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.folder import find_adapter
from rlhf.models.peft.methods import add_adapter
from support.peft_references import MERGED, METHODS, stir

SECTION = ModelSection(name="tiny")
IDS = torch.tensor([[5, 60, 7, 300, 2]])


def run_folder(folder: Path, base: str, method: str) -> Path:
    """Make a run whose SFT and reward stages have left models of a method, with weights changed by `stir`."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("run:\n  name: run\nmodel:\n  name: tiny\n")
    torch.manual_seed(3)
    peft = METHODS.get(method, PeftSection())
    policy = load_policy(base, SECTION)
    stir(add_adapter(policy, peft) if peft.on else policy)
    save_model(policy, load_tokenizer(base), folder / "sft" / "model")
    reward = new_reward_model(folder / "sft" / "model", SECTION, keep_layers=2, peft=peft)
    stir(reward)
    reward.config.reward_mean, reward.config.reward_std = 0.25, 1.5
    save_model(reward, load_tokenizer(base), folder / "reward" / "model")
    return folder


@pytest.mark.parametrize("method", [method for method in MERGED if method != "bitfit"])
def test_what_is_written_needs_no_base_and_computes_the_same(method: str, tiny_dir: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", tiny_dir, method)
    for stage, load in (("sft", load_policy), ("reward", load_reward_model)):
        out = export_model(run, stage)
        assert out == run / stage / "merged" and find_adapter(out) is None
        with torch.no_grad():
            merged, adapted = (load(folder, SECTION)(IDS).logits for folder in (out, run / stage / "model"))
        assert torch.allclose(merged, adapted, atol=1e-5)
    assert load_reward_model(run / "reward" / "merged", SECTION).config.reward_std == 1.5
    assert export_model(run) == run / "sft" / "merged"  # again, in place of the first


def test_a_folder_that_is_there_is_not_touched(tiny_dir: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for method in ("lora", "none"):
        run = run_folder(tmp_path / method, tiny_dir, method)
        with pytest.raises(UserError, match="nothing in it is touched"):
            export_model(run, out=mine)
        assert [file.name for file in mine.iterdir()] == ["thesis.txt"]
        out = export_model(run, out=tmp_path / f"{method}-out")
        assert out == tmp_path / f"{method}-out" and (out / "model.safetensors").is_file()
        assert not (run / "sft" / "merged").exists()


def test_a_plain_model_is_left_where_it_is(tiny_dir: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", tiny_dir, "none")
    assert export_model(run) == run / "sft" / "model"


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter"])
def test_a_method_that_cannot_be_merged_is_refused_with_the_reason(method: str, tiny_dir: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", tiny_dir, method)
    with pytest.raises(UserError) as error:
        export_model(run, "sft")
    assert error.value.what.startswith(f"it cannot be merged: {method} trains")
    assert error.value.where == str(run / "sft" / "model") and "load_policy" in error.value.fix


def test_what_is_not_there_is_named(tiny_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        export_model(tmp_path)
    assert "not a run folder" in error.value.what and error.value.where == str(tmp_path)
    run = run_folder(tmp_path / "run", tiny_dir, "lora")
    with pytest.raises(UserError) as error:
        export_model(run, "ppo-ptx", ema=True)
    assert error.value.what == "the run has no ppo-ptx/ema"
