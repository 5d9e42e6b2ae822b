"""Loading, refusing, adapting, cutting and saving of models and tokenizers."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models import loading
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.models.placement import with_tied_names
from rlhf.models.tiny import train_tokenizer
from rlhf.models.tokenizer import PAD
from rlhf.rollout.batches import build_batch
from rlhf.rollout.scoring import response_logprobs
from support.peft_references import CASES, MERGED, METHODS, REFERENCES, stir

SECTION = ModelSection(name="tiny")
IDS = torch.tensor([[5, 60, 7, 300, 2]])


def copy_of(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding: matrix products depend on how a tensor happens to be aligned in memory."""
    return torch.allclose(a, b, atol=1e-6)


# --- names --------------------------------------------------------------------------------------------------------


def test_tiny_is_built_once_and_is_the_same_everywhere(tiny_dir: str) -> None:
    stamp = (Path(tiny_dir) / "model.safetensors").stat().st_mtime_ns
    assert loading.resolve_model("tiny") == tiny_dir
    assert (Path(tiny_dir) / "model.safetensors").stat().st_mtime_ns == stamp
    again = train_tokenizer()
    assert again.get_vocab() == AutoTokenizer.from_pretrained(tiny_dir).get_vocab()
    assert len(again) == 1024


def test_building_tiny_leaves_the_random_stream_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loading.resolve_model("tiny")
    assert torch.equal(torch.rand(2), expected)


def test_a_build_that_was_killed_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    from rlhf.system.build_cache import build_once

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("thing", fails)
    assert not (tmp_path / "thing").exists()
    done = build_once("thing", lambda folder: (folder / "whole").write_text("x") and None)
    assert [p.name for p in done.iterdir()] == ["whole"]


def test_any_rank_may_build_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' save_pretrained writes weights on the first rank of a group alone."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        load_policy("tiny", ModelSection(name="tiny"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["runs/x/sft/model", "./nothing", "/nothing/here"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        loading.resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_policy(tmp_path, SECTION)


def test_an_unreachable_hub_name_is_refused() -> None:
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer("nobody/no-such-model")
    with pytest.raises(UserError, match="could not be loaded"):
        load_policy("nobody/no-such-model", SECTION)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_pad_equal_to_eos_gets_a_token_of_its_own(tiny_dir: str, tmp_path: Path, capsys) -> None:
    folder = copy_of(tiny_dir, tmp_path)
    edit_json(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>"))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, 1024, 2)
    assert capsys.readouterr().err.count("serves as the tokenizer's pad token") == 1
    policy = load_policy(folder, SECTION)
    weight = policy.get_input_embeddings().weight
    assert weight.shape[0] == 1025 and policy.config.vocab_size == 1025
    assert torch.equal(weight[1024], weight[:1024].mean(0))
    assert policy.get_output_embeddings().weight is weight
    assert policy.config.pad_token_id == policy.generation_config.pad_token_id == 1024
    save_model(policy, tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.pad_token_id == 1024 and len(again) == 1025
    assert same(logits(load_policy(tmp_path / "saved", SECTION)), logits(policy))


def test_rows_that_are_already_there_are_not_resized(tiny_dir: str) -> None:
    assert load_policy(tiny_dir, SECTION).get_input_embeddings().weight.shape[0] == 1024


def test_templates(tiny_dir: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def render(tokenizer) -> str:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    chat = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert render(load_tokenizer(tiny_dir)) == chat + "<|im_start|>assistant\n"
    plain = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert render(load_tokenizer(tiny_dir, ModelSection(prompt_format="plain"))) == plain
    assert render(load_tokenizer(tiny_dir, ModelSection(prompt_format="verbatim"))) == "abc"
    folder = copy_of(tiny_dir, tmp_path)
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert render(tokenizer) == plain
    tokenizer.save_pretrained(tmp_path / "saved")
    assert render(AutoTokenizer.from_pretrained(tmp_path / "saved")) == plain


def test_a_tokenizer_without_eos_is_refused(tiny_dir: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_dir, tmp_path)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="no EOS"):
        load_tokenizer(folder)


def test_same_tokenizer_names_the_first_difference(tiny_dir: str, tiny_gpt2_dir: str, tmp_path: Path) -> None:
    ours = load_tokenizer(tiny_dir)
    loading.same_tokenizer(ours, load_tokenizer(tiny_gpt2_dir))
    other = load_tokenizer(tiny_dir)
    other.pad_token = "<|endoftext|>"
    with pytest.raises(UserError, match="pad_token_id is 3 and 0"):
        loading.same_tokenizer(ours, other)
    other = load_tokenizer(tiny_dir)
    other.add_tokens(["<new>"])
    with pytest.raises(UserError, match="token '<new>' has id None and 1024"):
        loading.same_tokenizer(ours, other)
    folder = copy_of(tiny_dir, tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"][:2] = state["model"]["merges"][1::-1]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="merge 0 is"):
        loading.same_tokenizer(ours, load_tokenizer(folder))


# --- policies -----------------------------------------------------------------------------------------------------


def test_dropout_is_off_unless_asked_for(tiny_gpt2_dir: str) -> None:
    off = load_policy(tiny_gpt2_dir, SECTION).config
    assert (off.resid_pdrop, off.embd_pdrop, off.attn_pdrop) == (0.0, 0.0, 0.0)
    policy = load_policy(tiny_gpt2_dir, SECTION, dropout=0.2)
    assert (policy.config.resid_pdrop, policy.config.embd_pdrop, policy.config.attn_pdrop) == (0.2, 0.0, 0.0)
    assert {m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.2}


def test_the_dropout_of_gpt_neo_has_a_name_of_its_own(tiny_dir: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
    config = transformers.GPTNeoConfig(attention_types=[[["global"], 1]], bos_token_id=0, eos_token_id=1, **sizes)
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(tiny_dir).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, SECTION.model_copy(update={"attention": "eager"}), dropout=0.2)
    dropouts = (policy.config.resid_dropout, policy.config.embed_dropout, policy.config.attention_dropout)
    assert dropouts == (0.2, 0.0, 0.0)
    with pytest.raises(UserError, match="rows may have 33 tokens, and gpt_neo has positions for 32"):
        loading.check_context(policy, 33, "reward.max_tokens")
    loading.check_context(policy, 32, "reward.max_tokens")


def test_recomputed_activations_give_the_same_gradient(tiny_gpt2_dir: str) -> None:
    gradients = []
    for recompute in (False, True):
        policy = load_policy(tiny_gpt2_dir, SECTION)
        if recompute:
            loading.recompute_activations(policy)
            assert any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())
        batch = build_batch([([5, 6, 7], [8, 9]), ([4], [3, 2, 1])], 0)
        response_logprobs(policy, batch, 1.0)[0].sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_without_effect_is_said(tiny_dir: str, capsys) -> None:
    load_policy(tiny_dir, SECTION, dropout=0.2)
    assert "no residual dropout" in capsys.readouterr().err


def test_dtype_and_generation_config(tiny_dir: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_dir, tmp_path)
    edit_json(folder / "generation_config.json", repetition_penalty=1.3, top_k=5, eos_token_id=[2, 0])
    policy = load_policy(folder, SECTION.model_copy(update={"dtype": "bfloat16"}))
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert not policy.training
    assert policy.generation_config.eos_token_id == [2, 0]
    assert policy.generation_config.repetition_penalty in (None, 1.0)
    assert policy.generation_config.top_k in (None, 50)
    assert {p.dtype for p in load_policy(folder, SECTION).parameters()} == {torch.float32}


def test_missing_weights_are_refused(tiny_dir: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_dir, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(folder, SECTION)
    with pytest.raises(UserError, match="weights are missing"):
        new_reward_model(folder, SECTION)


def test_a_damaged_file_is_refused(tiny_dir: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_dir, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="could not be loaded"):
        load_policy(folder, SECTION)


# --- reward models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny_dir", "tiny_gpt2_dir"])
def test_new_reward_model_saves_and_loads(which: str, request, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    torch.manual_seed(0)
    reward = new_reward_model(folder, SECTION)
    torch.manual_seed(0)
    assert torch.equal(new_reward_model(folder, SECTION).score.weight, reward.score.weight)
    assert reward.score.weight.shape == (1, 64)
    assert abs(reward.score.weight.std() - 1 / math.sqrt(65)) < 0.03
    assert (reward.config.reward_mean, reward.config.reward_std, reward.config.pad_token_id) == (0.0, 1.0, 3)
    reward.config.reward_mean = 0.25
    save_model(reward, load_tokenizer(folder), tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", SECTION)
    assert again.config.reward_mean == 0.25
    assert same(logits(again), logits(reward))
    with pytest.raises(UserError, match="not a policy"):
        load_policy(tmp_path / "reward", SECTION)
    config = tmp_path / "reward" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_causal": False}))
    with pytest.raises(UserError, match="is_causal is false"):
        load_reward_model(tmp_path / "reward", SECTION)


@pytest.mark.parametrize("which", ["tiny_dir", "tiny_gpt2_dir"])
def test_keep_layers(which: str, request, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    full, cut = new_reward_model(folder, SECTION), new_reward_model(folder, SECTION, keep_layers=1)
    name = "model.layers" if which == "tiny_dir" else "transformer.h"
    assert len(cut.get_submodule(name)) == 1 and cut.config.num_hidden_layers == 1
    layers = [model.get_submodule(f"{name}.0").parameters() for model in (cut, full)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*layers, strict=True))
    save_model(cut, load_tokenizer(folder), tmp_path / "reward")
    assert same(logits(load_reward_model(tmp_path / "reward", SECTION)), logits(cut))
    with pytest.raises(UserError, match="layers"):
        new_reward_model(folder, SECTION, keep_layers=5)


def test_a_head_that_was_not_loaded_is_refused(tiny_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model"):
        load_reward_model(tiny_dir, SECTION)
    folder = tmp_path / "reward"
    save_model(new_reward_model(tiny_dir, SECTION), load_tokenizer(tiny_dir), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"score\.weight"):
        load_reward_model(folder, SECTION)


# --- adapters -----------------------------------------------------------------------------------------------------


TINY = [(kind, method) for kind, method in CASES if kind in ("llama", "gpt2") and method in MERGED]


@pytest.mark.parametrize(("kind", "method"), TINY)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_merge_into_a_plain_folder(kind: str, method: str, task: str, request, tmp_path: Path) -> None:
    """With the weights that peft's own merge gives; bitfit's are put in place by name."""
    folder = request.getfixturevalue({"llama": "tiny_dir", "gpt2": "tiny_gpt2_dir"}[kind])
    plain = (load_policy if task == "CAUSAL_LM" else new_reward_model)(folder, SECTION)
    unchanged, reference = logits(plain), copy.deepcopy(plain).double()
    adapted = add_adapter(plain, METHODS[method])
    stir(adapted)
    values = {name: parameter.detach().double() for name, parameter in trainable(adapted).items()}
    with torch.no_grad():
        expected = REFERENCES[method](kind, reference, METHODS[method], values).state_dict()
    expected |= {name: value for name, value in values.items() if name == "score.weight"}
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    save_model(adapted, load_tokenizer(folder), tmp_path / "merged", merged=True)
    assert not [name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])]
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else transformers.AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert expected.keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-6, msg=name)
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(loaded), unchanged, atol=1e-2)


def test_adapters_on_the_last_layers_only(tiny_dir: str) -> None:
    lora = PeftSection(method="lora", rank=2, last_layers=1)
    adapted = new_reward_model(tiny_dir, SECTION, peft=lora)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert sum("score" in name for name in trained) == 1
    assert all(".layers.3." in name for name in trained if "score" not in name)
    # q, k, v, o, gate, up, down, each with A and B, and the head
    assert len(trained) == 15
    with pytest.raises(UserError, match="the model has 4"):
        new_reward_model(tiny_dir, SECTION, peft=PeftSection(method="lora", last_layers=5))


def test_saving_replaces_an_older_model(tiny_dir: str, tmp_path: Path) -> None:
    tokenizer, policy = load_tokenizer(tiny_dir), load_policy(tiny_dir, SECTION)
    save_model(policy, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "stale").write_text("x")
    with torch.no_grad():
        policy.model.norm.weight.mul_(2)
    save_model(policy, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    assert same(logits(load_policy(tmp_path / "model", SECTION)), logits(policy))
    mode = (tmp_path / "model" / "model.safetensors").stat().st_mode
    assert mode & 0o777 == 0o644 & (tmp_path / "model").stat().st_mode


def test_an_averaged_weight_is_averaged_under_every_name(tiny_dir: str) -> None:
    policy = load_policy(tiny_dir, SECTION)
    averages = {name: torch.zeros_like(parameter) for name, parameter in policy.named_parameters()}
    assert "lm_head.weight" not in averages  # it is the embeddings
    found = with_tied_names(policy, averages)
    assert found.keys() == policy.state_dict().keys()
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
