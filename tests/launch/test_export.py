"""`rlhf export`: a stage's model as a plain folder, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from launch.commands.export import export_model, push_to_hub
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.folder import find_adapter
from rlhf.models.peft.methods import add_adapter
from rlhf.rollout.probes import check_probes, write_probes
from rlhf.rollout.scoring import scores
from rlhf.run.folder import RunFolder
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
    for stage, load, scale in (("sft", load_policy, 1.0), ("reward", load_reward_model, 1.5)):
        out = export_model(run, stage)
        assert out == run / stage / "merged" and find_adapter(out) is None
        with torch.no_grad():
            merged, adapted = (load(folder, SECTION)(IDS).logits for folder in (out, run / stage / "model"))
        assert torch.allclose(merged * scale, adapted, atol=1e-5)
    config = load_reward_model(run / "reward" / "merged", SECTION).config
    assert config.reward_std == 1.0 and config.reward_mean == pytest.approx(0.25 / 1.5)
    assert export_model(run) == run / "sft" / "merged"  # again, in place of the first


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_alone_gives_an_exported_reward_model_s_scores(family: str, tiny_dir: str, tmp_path: Path) -> None:
    base = tiny_dir
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        torch.manual_seed(5)
        base = str(tmp_path / "gpt2")
        GPT2LMHeadModel(GPT2Config(vocab_size=1024, **sizes)).save_pretrained(base)
        load_tokenizer(tiny_dir).save_pretrained(base)
    run = run_folder(tmp_path / "run", base, "none")
    ours = load_reward_model(run / "reward" / "model", SECTION)
    pairs = [([5, 60, 7], [300, 41, 2]), ([5, 9, 60, 77, 7], [12, 300, 41, 66, 2]), ([8], [90, 2])]
    expected = scores(ours, pairs)
    write_probes(ours, load_tokenizer(base), pairs, run / "reward" / "model")

    out = export_model(run, "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    # transformers' GPT-2 counts positions from the padding on.
    for side in ("left", "right") if family == "llama" else ("right",):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": [p + r for p, r in pairs]}, return_tensors="pt")
        with torch.no_grad():
            found = theirs(**batch).logits[:, 0] - theirs.config.reward_mean
        assert torch.allclose(found, expected, atol=1e-4) and expected.std() > 1e-2
    check_probes(load_reward_model(out, SECTION), out)


def test_the_card_tells_data_results_licence_and_how_to_score(tiny_dir: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    mine = tmp_path / "secret-place" / "mine.jsonl"
    mine.parent.mkdir()
    mine.write_text("")
    run = run_folder(tmp_path / "run", str(base), "none")
    (run / "recipe.yaml").write_text(
        f"model:\n  name: {base}\ndata:\n  demonstrations: [{mine}, owner/set]\n"
        f"reward:\n  model: {base}\n  keep_layers: 2\n"
    )
    RunFolder(run).write_stage("reward", {"stage": "reward", "state": "done", "metrics": {"reward/accuracy": 0.625}})
    card = (export_model(run, "reward") / "README.md").read_text()
    assert ModelCard(card).data.license == "mit" and ModelCard(card).data.pipeline_tag == "text-classification"
    for words in ("| reward/accuracy | 0.625 |", "- mine.jsonl\n", "- owner/set", "reward.lr: 9e-06", "0.16666667"):
        assert words in card
    assert str(tmp_path) not in card  # no path of this machine is published
    (run / "recipe.yaml").write_text(f"model:\n  name: {base}\n  dtype: bfloat16\n")
    copied = export_model(run, "sft", copy=True)
    assert "reward_mean" not in (copied / "README.md").read_text()
    files = [load_file(folder / "model.safetensors") for folder in (copied, run / "sft" / "model")]
    assert all(torch.equal(files[0][name], tensor) for name, tensor in files[1].items())  # not rounded


def test_the_card_of_a_foreign_reward_model_names_its_origin(tiny_dir: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", tiny_dir, "none")
    (run / "recipe.yaml").write_text("model:\n  name: tiny\nreward:\n  model: owner/judge@v1\n  train: false\n")
    card = (export_model(run, "reward") / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.base_model, data.license) == ("owner/judge", None)  # the licence of tiny is not that of the judge
    assert "owner/judge, normalised and not trained" in card
    (run / "recipe.yaml").write_text(f"model:\n  name: tiny\nreward:\n  model: {tmp_path}/gone/judge\n  train: false\n")
    card = (export_model(run, "reward") / "README.md").read_text()
    assert ModelCard(card).data.base_model is None and "This is judge," in card and str(tmp_path) not in card


@pytest.mark.parametrize("prompt_format", ["auto", "plain"])
def test_the_program_on_the_card_gives_the_score(prompt_format: str, tiny_dir: str, tmp_path: Path) -> None:
    section = ModelSection(name="tiny", prompt_format=prompt_format)
    run = run_folder(tmp_path / "run", tiny_dir, "none")
    (run / "recipe.yaml").write_text(f"model:\n  name: tiny\n  prompt_format: {prompt_format}\n")
    tokenizer, ours = load_tokenizer(tiny_dir, section), load_reward_model(run / "reward" / "model", section)
    tokenizer.save_pretrained(run / "reward" / "model")
    out = export_model(run, "reward")
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    given = {"FOLDER": str(out), "messages": [{"role": "user", "content": "Why?"}], "text": "For fun."}
    exec(code, given)
    pair = (encode_prompt(tokenizer, Prompt.from_text("Why?")), encode_response(tokenizer, "For fun."))
    assert given["score"] == pytest.approx(float(scores(ours, [pair])[0]), abs=1e-4)


def test_pushing_makes_the_repository_and_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    class Hub:
        def create_repo(self, name: str, **options: object) -> str:
            calls.append({"name": name} | options)
            return f"https://hub.example/{name}"

        def upload_folder(self, **options: object) -> None:
            calls.append(options)

    monkeypatch.setattr("launch.commands.export.HfApi", Hub)
    assert push_to_hub(tmp_path, "me/policy", private=True) == "https://hub.example/me/policy"
    assert calls[0] == {"name": "me/policy", "private": True, "exist_ok": True}
    assert calls[1]["ignore_patterns"] == ["probes.json"]  # prompts and responses of the run
    push_to_hub(tmp_path, "me/policy", private=False)
    assert calls[2]["private"] is None  # the owner's default
    assert calls[1]["repo_id"] == "me/policy" and calls[1]["folder_path"] == tmp_path


def test_a_name_that_the_hub_refuses_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        push_to_hub(tmp_path, "no/such/name", private=False)
    assert error.value.where == "no/such/name" and str(tmp_path) in error.value.fix


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
