"""Adapters in peft's layout: peft's loader computes what ours does, and the old layout is still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.rollout.scoring import scores
from support.adapter_files import BESIDE_PEFT, IN_PEFT, as_old_layout, weights_file
from support.peft_references import METHODS, VIRTUAL, stir

SECTION = ModelSection(name="tiny")
IDS = torch.tensor([[5, 60, 7, 300, 2], [9, 8, 71, 16, 2]])
KINDS = ("llama", "gpt2")
LOADED_BY_PEFT = [(kind, method) for kind in KINDS for method in (*IN_PEFT, *BESIDE_PEFT)]
ALL = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) != ("llama", "bitfit")]
MEAN, STD = 0.25, 1.5


@pytest.fixture(scope="module")
def bases(tiny_dir: str, tiny_gpt2_dir: str) -> dict[str, str]:
    return {"llama": tiny_dir, "gpt2": tiny_gpt2_dir}


def policy(base: str, peft: PeftSection) -> PreTrainedModel:
    torch.manual_seed(1)
    model = add_adapter(load_policy(base, SECTION), peft)
    stir(model)
    return model.eval()


def reward(base: str, peft: PeftSection, keep_layers: int) -> PreTrainedModel:
    torch.manual_seed(2)
    model = new_reward_model(base, SECTION, keep_layers, peft=peft)
    stir(model)
    model.config.reward_mean, model.config.reward_std = MEAN, STD
    return model.eval()


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, load_tokenizer(model.base_name), folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def assert_bits(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    one, other = trainable(ours), trainable(theirs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(("kind", "method"), LOADED_BY_PEFT)
def test_peft_loads_a_policys_folder_to_the_same_logits(kind, method, bases, tmp_path) -> None:
    model = policy(bases[kind], METHODS[method])
    folder = saved(model, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(bases[kind]).eval()
    before = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, folder))[:, -IDS.shape[1] :]  # peft keeps the virtual tokens' own
    assert torch.allclose(theirs, logits(model), atol=1e-5)
    assert (theirs - before).abs().max() > 0.05, "the adapter has an effect"
    assert_bits(load_policy(folder, SECTION), model)


@pytest.mark.parametrize("keep_layers", [0, 1])
@pytest.mark.parametrize(("kind", "method"), LOADED_BY_PEFT)
def test_peft_loads_a_reward_models_folder_to_the_same_scores(kind, method, keep_layers, bases, tmp_path) -> None:
    """The base is cut to the layers that are kept by its config; its head is replaced by the adapter's."""
    model = reward(bases[kind], METHODS[method], keep_layers)
    folder = saved(model, tmp_path / "model")
    cut = {"num_hidden_layers": keep_layers} if keep_layers else {}
    plain = AutoModelForSequenceClassification.from_pretrained(bases[kind], num_labels=1, **cut)
    theirs = logits(PeftModel.from_pretrained(plain, folder).eval())
    assert torch.allclose(theirs, logits(model), atol=1e-5)
    again = load_reward_model(folder, SECTION)
    assert_bits(again, model)
    record = json.loads((folder / "adapter.json").read_text())
    assert (record["reward_mean"], record["reward_std"], record["keep_layers"]) == (MEAN, STD, keep_layers)
    pairs = [(row[:2], row[2:]) for row in IDS.tolist()]
    assert torch.allclose(scores(again, pairs), (theirs[:, 0] - MEAN) / STD, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind in KINDS for method in IN_PEFT])
def test_the_file_has_the_names_that_peft_gives(kind, method, bases, tmp_path) -> None:
    for model in (policy(bases[kind], METHODS[method]), reward(bases[kind], METHODS[method], 0)):
        folder = saved(model, tmp_path / type(model).__name__)
        scalar = hasattr(model, "score")
        auto, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if scalar else (AutoModelForCausalLM, {})
        loaded = PeftModel.from_pretrained(auto.from_pretrained(bases[kind], **more), folder)
        stored, theirs = load_file(weights_file(folder)), get_peft_model_state_dict(loaded)
        assert stored.keys() == theirs.keys()
        assert all(torch.equal(stored[name], theirs[name]) for name in stored)
        config = PeftConfig.from_pretrained(folder)
        assert (config.task_type, config.inference_mode) == ("SEQ_CLS" if scalar else "CAUSAL_LM", True)
        assert config.base_model_name_or_path == bases[kind]
        assert config.modules_to_save == (["score"] if scalar else None)


def test_the_last_layers_alone_are_named(bases, tmp_path) -> None:
    peft = METHODS["lora"].model_copy(update={"last_layers": 1})
    model = policy(bases["llama"], peft)
    folder = saved(model, tmp_path / "model")
    maps = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    config = PeftConfig.from_pretrained(folder)
    assert set(config.target_modules) == {f"model.layers.3.{name}" for name in maps}
    assert (config.r, config.lora_alpha, config.use_dora, config.fan_in_fan_out) == (3, 6.0, False, False)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)


def test_a_built_in_base_is_named_by_its_folder(tmp_path) -> None:
    """No other program knows the names of built-in models."""
    model = policy("tiny", METHODS["lora"])
    folder = saved(model, tmp_path / "model")
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(model), atol=1e-5)
    assert json.loads((folder / "adapter.json").read_text())["base"]["name"] == "tiny"


def test_virtual_tokens_that_a_network_makes_are_for_peft_alone(bases, tmp_path) -> None:
    """Training goes on from the network, which peft does not store."""
    model = policy(bases["llama"], METHODS["prefix"])
    folder = saved(model, tmp_path / "model")
    tokens = load_file(folder / "adapter_model.safetensors")
    shapes = {name: tuple(each.shape) for name, each in tokens.items()}
    assert shapes == {"prompt_embeddings": (VIRTUAL, 2 * 4 * 2 * 16)}  # of 4 layers, with 2 heads of 16 numbers
    (folder / "adapter_model.safetensors").unlink()
    assert_bits(load_policy(folder, SECTION), model)


def test_saving_draws_nothing_from_the_random_stream(bases, tmp_path) -> None:
    model = policy(bases["llama"], METHODS["prefix"])
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    saved(model, tmp_path / "model")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_folders_of_the_old_layout_are_read(kind, method, bases, tmp_path) -> None:
    model, judge = policy(bases[kind], METHODS[method]), reward(bases[kind], METHODS[method], 1)
    old = as_old_layout(saved(model, tmp_path / "policy"), trainable(model))
    assert not (old / "adapter_config.json").exists()
    again = load_policy(old, SECTION)
    assert_bits(again, model)
    assert_bits(load_policy(saved(again, tmp_path / "new"), SECTION), model)
    old = as_old_layout(saved(judge, tmp_path / "reward"), trainable(judge))
    again = load_reward_model(old, SECTION)
    assert_bits(again, judge)
    assert (again.config.reward_mean, again.config.reward_std) == (MEAN, STD)


@pytest.mark.parametrize("method", ["bitfit", "adapter"])
def test_what_peft_does_not_have_stays_in_the_old_layout(method, bases, tmp_path) -> None:
    folder = saved(policy(bases["gpt2"], METHODS[method]), tmp_path / "model")
    assert not {"adapter_config.json", "adapter_model.safetensors"} & {file.name for file in folder.iterdir()}
    assert (folder / "adapter.safetensors").is_file()
