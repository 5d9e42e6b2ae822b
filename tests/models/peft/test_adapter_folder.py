"""Adapters on disk: what is written, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.attaching import attach_adapter, check_method
from rlhf.models.peft.folder import AdapterFolder, Origin, base_hash, find_adapter, load_adapter_weights
from rlhf.models.peft.methods import add_adapter, peft_of, trainable
from support.adapter_files import BESIDE_PEFT, IN_PEFT, OWN, PEFT, peft_name, stored_weights, weights_file
from support.peft_references import CACHED, MERGED, METHODS, VIRTUAL, stir

SECTION = ModelSection(name="tiny")
IDS = torch.tensor([[5, 60, 7, 300, 2]])
CASES = [(kind, method) for method in METHODS for kind in ("llama", "gpt2") if (kind, method) != ("llama", "bitfit")]


@pytest.fixture(scope="module")
def bases(tiny_dir: str, tiny_gpt2_dir: str) -> dict[str, str]:
    """Tiny Llama of 4 layers, tiny GPT-2 of 2."""
    return {"llama": tiny_dir, "gpt2": tiny_gpt2_dir}


@pytest.fixture(scope="module")
def folders(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Policies of every method, trained as far as `stir` goes; read only."""
    made = {}
    for kind, method in CASES:
        made[kind, method] = saved(policy(bases[kind], METHODS[method]), tmp_path_factory.mktemp(method) / "model")
    return made


def policy(base: str, peft: PeftSection) -> PreTrainedModel:
    torch.manual_seed(1)
    model = add_adapter(load_policy(base, SECTION), peft)
    stir(model)
    return model


def reward(base: str, peft: PeftSection, keep_layers: int = 0) -> PreTrainedModel:
    torch.manual_seed(2)
    model = new_reward_model(base, SECTION, keep_layers, peft=peft)
    stir(model)
    model.config.reward_mean, model.config.reward_std = 0.25, 1.5
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, load_tokenizer(model.base_name), folder)
    return folder


def copy_of(folder: Path | str, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def refusal(error: pytest.ExceptionInfo[UserError]) -> tuple[str, str, str]:
    """What is wrong, where, and what to do; none of them empty."""
    assert error.value.what and error.value.where and error.value.fix
    return error.value.what, error.value.where, error.value.fix


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_folder_holds_what_was_trained_alone_and_gives_it_back(kind, method, folders, bases) -> None:
    folder, model = folders[kind, method], policy(bases[kind], METHODS[method])
    stored = stored_weights(folder, trainable(model))
    assert stored.keys() == trainable(model).keys()
    assert all(torch.equal(stored[name], weight) for name, weight in trainable(model).items())
    names = {file.name for file in folder.iterdir()}
    assert {"adapter.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (OWN in names) == (method not in IN_PEFT)
    assert (PEFT in names) == ("adapter_config.json" in names) == (method in (*IN_PEFT, *BESIDE_PEFT))
    assert not any(name == "config.json" or name.startswith("model") for name in names)
    record = json.loads((folder / "adapter.json").read_text())
    assert PeftSection(**record["peft"]) == METHODS[method]
    assert record["base"] == {"name": bases[kind], "hash": base_hash(bases[kind])}
    layout = 2 if method in IN_PEFT else 1
    assert (record["format"], record["scalar"], record["keep_layers"]) == (layout, False, 0)

    torch.manual_seed(99)
    again = load_policy(folder, SECTION)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(1), drawn), "loading takes nothing from the random stream"
    assert peft_of(again) == METHODS[method] and not again.training
    assert trainable(again).keys() == stored.keys()
    assert all(torch.equal(weight, stored[name]) for name, weight in trainable(again).items())
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_loaded_merged_it_answers_the_same(kind, method, folders) -> None:
    apart, merged = (load_policy(folders[kind, method], SECTION, merged=merged) for merged in (False, True))
    assert (peft_of(merged) is None) == (method in MERGED), "what cannot be merged stays an adapter"
    assert torch.allclose(logits(merged), logits(apart), atol=1e-5)
    if method in MERGED:
        assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_brings_head_layers_and_normalisation(method, bases, tmp_path) -> None:
    base = bases["gpt2" if method == "bitfit" else "llama"]
    model = reward(base, METHODS[method], keep_layers=1)
    folder = saved(model, tmp_path / "model")
    stored = stored_weights(folder, trainable(model))
    assert torch.equal(stored["score.weight"], model.score.weight)
    record = json.loads((folder / "adapter.json").read_text())
    assert (record["scalar"], record["keep_layers"]) == (True, 1)
    for merged in (False, True):
        again = load_reward_model(folder, SECTION, merged)
        assert again.config.num_hidden_layers == 1
        assert (again.config.reward_mean, again.config.reward_std) == (0.25, 1.5)
        assert (peft_of(again) is None) == (merged and method in MERGED)
        assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_written_as_a_plain_folder_it_needs_no_base(folders, tmp_path) -> None:
    model = load_policy(folders["llama", "dora"], SECTION)
    save_model(model, load_tokenizer(folders["llama", "dora"]), tmp_path / "plain", merged=True)
    assert find_adapter(tmp_path / "plain") is None
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


@pytest.mark.parametrize("method", ["bitfit", "adapter"])
def test_a_folder_of_our_own_is_no_model_to_other_programs(method, folders) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(folders["gpt2", method])


def test_the_folder_has_its_tokenizer(folders, tiny_tokenizer) -> None:
    folder = folders["llama", "lora"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_a_pad_token_that_was_added_is_there_when_it_comes_back(tiny_dir, tmp_path) -> None:
    """The base has no row for it: the tokenizer beside the adapter says how many there must be."""
    base = copy_of(tiny_dir, tmp_path / "base")
    edit(base / "tokenizer_config.json", pad_token="<|im_end|>")
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>"))
    model = policy(str(base), METHODS["lora"])
    assert model.config.vocab_size == 1025
    again = load_policy(saved(model, tmp_path / "model"), SECTION)
    assert again.get_input_embeddings().weight.shape[0] == 1025 and again.config.pad_token_id == 1024
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert torch.allclose(logits(load_policy(tmp_path / "model", SECTION, merged=True)), logits(model), atol=1e-5)


def test_an_adapter_is_float32_on_a_bfloat16_base(folders) -> None:
    section = SECTION.model_copy(update={"dtype": "bfloat16"})
    again = load_policy(folders["llama", "lora"], section)
    assert {p.dtype for p in trainable(again).values()} == {torch.float32}
    assert {p.dtype for p in again.parameters() if not p.requires_grad} == {torch.bfloat16}
    merged = load_policy(folders["llama", "lora"], section, merged=True)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


# --- where a base is --------------------------------------------------------------------------------------------------


def test_a_base_is_called_by_what_holds_anywhere(tiny_dir, tmp_path, monkeypatch) -> None:
    base = copy_of(tiny_dir, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert load_policy("base", SECTION).base_name == str(base)
    assert load_policy("tiny", SECTION).base_name == "tiny"
    (tmp_path / "tiny").mkdir()  # as of a run of that name
    assert load_policy("tiny", SECTION).base_name == "tiny"


def test_the_hash_is_of_config_and_weights(tiny_dir, tmp_path) -> None:
    base = copy_of(tiny_dir, tmp_path / "base")
    before = base_hash(str(base))
    assert before == base_hash(tiny_dir) and len(before) == 64
    (base / "README.md").write_text("x")
    (base / "optimizer.bin").write_text("no weights of the model")
    edit(base / "config.json", transformers_version="4.0.0")  # saved again by another version
    assert base_hash(str(base)) == before
    weights = base / "model.safetensors"
    stamp = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    after = base_hash(str(base))
    assert after != before
    edit(base / "config.json", rope_theta=20000.0)
    assert base_hash(str(base)) not in (before, after)


def test_another_base_is_refused(tiny_dir, tmp_path) -> None:
    base = copy_of(tiny_dir, tmp_path / "base")
    folder = saved(policy(str(base), METHODS["lora"]), tmp_path / "policy")
    judge = saved(reward(str(base), METHODS["lora"]), tmp_path / "judge")
    edit(base / "config.json", rope_theta=20000.0)
    for where, load in (
        (folder, lambda: load_policy(folder, SECTION)),
        (folder, lambda: load_policy(folder, SECTION, merged=True)),
        (judge, lambda: load_reward_model(judge, SECTION)),
        (folder, lambda: new_reward_model(folder, SECTION)),
        (folder, lambda: new_reward_model(folder, SECTION, peft=METHODS["lora"])),
    ):
        with pytest.raises(UserError) as error:
            load()
        what, found, _ = refusal(error)
        assert f"trained on {base} with hash" in what and found == str(where)
    shutil.rmtree(base)
    with pytest.raises(UserError) as error:
        load_policy(folder, SECTION)
    assert refusal(error)[1] == str(base)


def test_an_adapter_on_an_adapter_is_refused(folders, tmp_path) -> None:
    below = folders["llama", "lora"]
    folder = copy_of(below, tmp_path / "model")
    for base in (below, folder):  # and one on itself
        edit(folder / "adapter.json", base={"name": str(base), "hash": "00"})
        with pytest.raises(UserError) as error:
            load_policy(folder, SECTION)
        what, where, fix = refusal(error)
        assert f"the base {base} is an adapter itself" in what and where == str(folder / "adapter.json")
        assert "rlhf export" in fix


def test_code_of_a_base_is_run_only_if_the_recipe_names_that_base(tiny_dir, folders, tmp_path) -> None:
    """The record of a folder from elsewhere names a base that brings a program."""
    base = copy_of(tiny_dir, tmp_path / "base")
    edit(base / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Config: pass\n")
    folder = copy_of(folders["llama", "lora"], tmp_path / "model")
    edit(folder / "adapter.json", base={"name": str(base), "hash": "00"})
    trusting = SECTION.model_copy(update={"trust_remote_code": True})
    for load in (load_policy, new_reward_model):
        with pytest.raises(UserError):
            load(folder, trusting)
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(Exception):  # noqa: B017 (whatever comes of that program)
        load_policy(folder, trusting.model_copy(update={"name": str(base)}))
    assert (tmp_path / "was_run").exists()


def test_a_base_that_was_never_loaded_is_named() -> None:
    with pytest.raises(UserError) as error:
        base_hash("nobody/no-such-model")
    assert refusal(error)[:2] == ("the base model is not here", "nobody/no-such-model")


# --- broken folders ---------------------------------------------------------------------------------------------------


def test_folders_without_an_adapter(tiny_dir, tmp_path) -> None:
    assert find_adapter(tiny_dir) is None and find_adapter(tmp_path) is None
    assert find_adapter("nobody/no-such-model") is None and find_adapter("tiny") is None


RECORD = {"format": 1, "peft": METHODS["lora"].model_dump(), "base": {"name": "tiny", "hash": "00"}}
RECORD |= {"scalar": False, "keep_layers": 0, "reward_mean": 0.0, "reward_std": 1.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('"text"', "TypeError"),
        ("{}", "format"),
        (json.dumps(RECORD | {"format": 3}), "format 3 of adapters is not known here, 1 and 2 are"),
        *((json.dumps({k: v for k, v in RECORD.items() if k != name}), name) for name in RECORD),
        (json.dumps(RECORD | {"peft": {"method": "magic"}}), "peft.method: Input should be 'none', 'lora'"),
        (json.dumps(RECORD | {"peft": {"method": "lora", "colour": 1}}), "peft.colour: Extra inputs"),
        (json.dumps(RECORD | {"peft": {"method": "lora", "rank": 0}}), "peft.rank: Input should be greater than"),
        (json.dumps(RECORD | {"peft": {"method": "ia3", "rank": 3}}), "ia3 has no rank"),
        (json.dumps(RECORD | {"peft": 3}), "PeftSection"),
        (json.dumps(RECORD | {"base": {"name": "tiny"}}), "hash"),
        (json.dumps(RECORD | {"keep_layers": "few"}), "few"),
        (json.dumps(RECORD | {"reward_std": None}), "NoneType"),
    ],
)
def test_a_record_that_cannot_be_read_says_why(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text(text)
    with pytest.raises(UserError) as error:
        find_adapter(tmp_path)
    what, where, _ = refusal(error)
    assert words in what and where == str(tmp_path / "adapter.json")


def test_a_sound_record_is_read(tmp_path) -> None:
    (tmp_path / "adapter.json").write_text(json.dumps(RECORD | {"scalar": True, "keep_layers": 2, "reward_mean": 3}))
    kept = {"scalar": True, "keep_layers": 2, "reward_mean": 3.0, "reward_std": 1.0}
    assert find_adapter(str(tmp_path)) == AdapterFolder(tmp_path, METHODS["lora"], Origin("tiny", "00"), **kept)


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_weights_that_cannot_be_read_are_refused(damage: str, folders, tmp_path) -> None:
    folder = copy_of(folders["llama", "lora"], tmp_path / "model")
    weights = weights_file(folder)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    if damage == "missing":
        weights.unlink()
    for merged in (False, True):
        with pytest.raises(UserError) as error:
            load_policy(folder, SECTION, merged=merged)
        what, where, _ = refusal(error)
        assert what.startswith("the adapter cannot be read") and where == str(weights)


def with_weights(folder: Path, to: Path, change: dict[str, Tensor | None]) -> AdapterFolder:
    """A copy with some weights replaced, or taken out where the change is None."""
    copy = copy_of(folder, to)
    stored = load_file(weights_file(copy)) | {peft_name(name): each for name, each in change.items()}
    save_file({name: each for name, each in stored.items() if each is not None}, weights_file(copy))
    found = find_adapter(copy)
    assert found is not None
    return found


def test_weights_of_other_names_or_shapes_are_refused(folders, bases, tmp_path) -> None:
    folder, name = folders["llama", "lora"], "model.layers.1.mlp.up_proj.lora_A.default.weight"
    changes = {
        "less": ({name: None}, "is in one alone"),
        "more": ({"model.layers.9.extra": torch.zeros(1)}, "model.layers.9.extra is in one alone"),
        "wide": ({name: torch.zeros(4, 64)}, f"{name} is (4, 64) in the file and (3, 64) in the model"),
        "flat": ({name: torch.zeros(192)}, f"{name} is (192,) in the file and (3, 64) in the model"),
    }
    for place, (change, words) in changes.items():
        adapter = with_weights(folder, tmp_path / place, change)
        with pytest.raises(UserError) as error:
            load_policy(adapter.folder, SECTION)
        what, where, _ = refusal(error)
        assert words in what and where == str(adapter.path)
    # Less than what is there is no part of it.
    model = add_adapter(new_reward_model(bases["llama"], SECTION), METHODS["lora"])
    for place in ("flat", "narrow"):
        change = changes.get(place, ({name: torch.zeros(3, 63)}, ""))[0]
        adapter = with_weights(folder, tmp_path / f"{place}-partly", change)
        with pytest.raises(UserError, match="in the file and"):
            load_adapter_weights(model, adapter, partly=True)


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_reward_model_goes_on_from_the_policys_adapter(kind, method, folders, bases) -> None:
    peft, start = METHODS[method], load_policy(folders[kind, method], SECTION)
    model = new_reward_model(folders[kind, method], SECTION, head_init="zero", peft=peft)
    assert peft_of(model) == peft and model.score.weight.requires_grad and not model.score.weight.any()
    assert (model.config.reward_mean, model.config.reward_std, model.base_name) == (0.0, 1.0, bases[kind])
    ours = trainable(model)
    assert ours.keys() == trainable(start).keys() | {"score.weight"}
    assert all(torch.equal(ours[name], weight) for name, weight in trainable(start).items())
    with torch.no_grad():
        bodies = [getattr(m, m.base_model_prefix)(IDS).last_hidden_state for m in (model, start)]
    assert torch.allclose(*bodies, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_in_fewer_layers_it_goes_on_from_those_that_are_kept(method, folders, bases) -> None:
    """Against the whole policy's layers run up to there, by their hidden states."""
    kind, keep = ("gpt2", 1) if method == "bitfit" else ("llama", 3)
    policy_, peft = load_policy(folders[kind, method], SECTION), METHODS[method]
    model = new_reward_model(folders[kind, method], SECTION, keep, peft=peft)
    assert model.kept_layers == model.config.num_hidden_layers == keep
    layers = policy_.model.layers if kind == "llama" else policy_.transformer.h
    seen: list[Tensor] = []
    layers[keep - 1].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    body = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        policy_(IDS)
        norm = model.model.norm if kind == "llama" else model.transformer.ln_f
        expected = norm(seen[0][:, -IDS.shape[1] :])
        assert torch.allclose(body(IDS).last_hidden_state, expected, atol=1e-5)
    if method in CACHED:  # the first layers' keys and values [2 layers, heads, V, size]
        made, whole = (each.model.virtual_tokens() for each in (model, policy_))
        assert made.shape == (2 * keep, 2, VIRTUAL, 16) and whole.shape[0] == 8
        assert torch.allclose(made, whole[: 2 * keep], atol=1e-6)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_reward_model_of_all_weights_starts_from_the_merged_policy(kind, method, folders) -> None:
    folder = folders[kind, method]
    for peft in (None, PeftSection()):
        if method in MERGED:
            model, start = new_reward_model(folder, SECTION, peft=peft), load_policy(folder, SECTION)
            assert peft_of(model) is None and all(p.requires_grad for p in model.parameters())
            with torch.no_grad():
                bodies = [getattr(m, m.base_model_prefix)(IDS).last_hidden_state for m in (model, start)]
            assert torch.allclose(*bodies, atol=1e-5)
        else:
            with pytest.raises(UserError) as error:
                new_reward_model(folder, SECTION, peft=peft)
            what, where, _ = refusal(error)
            assert method in what and where == str(folder)


def test_a_reward_models_adapter_keeps_its_head_and_its_layers(bases, tmp_path) -> None:
    peft = METHODS["lora"]
    first = reward(bases["llama"], peft, keep_layers=3)
    folder = saved(first, tmp_path / "model")
    for method in (peft, None):
        again = new_reward_model(folder, SECTION, peft=method)
        assert torch.equal(again.score.weight, first.score.weight)
        assert again.kept_layers == again.config.num_hidden_layers == 3
        assert torch.allclose(logits(again), logits(first), atol=1e-5)
        assert (again.config.reward_mean, again.config.reward_std) == (0.0, 1.0)
        fewer = new_reward_model(folder, SECTION, keep_layers=2, peft=method)
        assert fewer.kept_layers == fewer.config.num_hidden_layers == 2
    with pytest.raises(UserError, match="the model has 3 layers and 4 are to be kept"):
        new_reward_model(folder, SECTION, keep_layers=4, peft=peft)


def test_a_plain_policy_gets_a_new_method_with_its_head(bases) -> None:
    model = new_reward_model(bases["llama"], SECTION, peft=METHODS["lora"])
    assert peft_of(model) == METHODS["lora"] and "score.weight" in trainable(model)
    assert torch.allclose(logits(model), logits(zeroed(model)), atol=1e-6), "B is zero"


def zeroed(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if "lora_A" in name:
                weight.zero_()
    return model


def test_another_method_or_setting_is_refused(folders) -> None:
    folder = folders["llama", "lora"]
    adapter = find_adapter(folder)
    assert adapter is not None
    check_method(adapter, METHODS["lora"])
    given = "lora (rank 3, alpha 6, all layers), and the recipe trains"
    for peft, words in (
        (PeftSection(method="lora", rank=4, alpha=6.0), f"{given} lora (rank 4, alpha 6, all layers)"),
        (PeftSection(method="lora", rank=3, alpha=7.5), f"{given} lora (rank 3, alpha 7.5, all layers)"),
        (METHODS["dora"], f"{given} dora (rank 3, alpha 6, all layers)"),
        (METHODS["prefix"], f"{given} prefix (virtual_tokens 3, hidden 7)"),
    ):
        for refuse in (
            lambda peft=peft: check_method(adapter, peft),
            lambda peft=peft: new_reward_model(folder, SECTION, peft=peft),
        ):
            with pytest.raises(UserError) as error:
                refuse()
            what, where, _ = refusal(error)
            assert words in what and where == str(folder)


def test_policies_and_reward_models_are_not_taken_for_each_other(folders, bases, tmp_path) -> None:
    judge = saved(reward(bases["llama"], METHODS["lora"]), tmp_path / "judge")
    with pytest.raises(UserError) as error:
        load_policy(judge, SECTION)
    assert "not a policy" in refusal(error)[0] and refusal(error)[1] == str(judge)
    with pytest.raises(UserError) as error:
        load_reward_model(folders["llama", "lora"], SECTION)
    assert "no reward model" in refusal(error)[0] and refusal(error)[1] == str(folders["llama", "lora"])


def test_put_on_leaves_the_base_and_the_normalisation_of_policies(folders, bases) -> None:
    base = load_policy(bases["llama"], SECTION)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapter = find_adapter(folders["llama", "lora"])
    assert adapter is not None
    torch.manual_seed(5)
    model = attach_adapter(replace(adapter, reward_mean=9.0), base)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert model is base and torch.equal(torch.rand(1), drawn)
    assert not hasattr(model.config, "reward_mean")
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
