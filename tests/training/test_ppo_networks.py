"""The four networks of PPO: what each starts as, which share a base, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.methods import add_adapter, peft_of, trainable
from rlhf.training import ppo_networks
from rlhf.training.ppo_networks import PpoNetworks, add_fresh_adapter, load_networks, policy_to_train, value_to_train
from support.peft_references import CACHED, EMBEDDED, MERGED, METHODS, stir

SECTION = ModelSection(name="tiny")
IDS = torch.tensor([[5, 60, 7, 300, 2]])
CPU = torch.device("cpu")
OF_LLAMA = [method for method in METHODS if method != "bitfit"]
STARTS_AT_NO_CHANGE = ("lora", "dora", "ia3", "adapter")


@pytest.fixture(scope="module")
def run(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft-METHOD and reward-METHOD, and plain ones as sft-none and reward-none; read only."""
    folder = tmp_path_factory.mktemp("run")
    for method in ("none", *OF_LLAMA):
        peft = METHODS.get(method, PeftSection())
        torch.manual_seed(1)
        policy = load_policy(tiny_dir, SECTION)
        if peft.on:
            stir(add_adapter(policy, peft))
        write(policy, folder / f"sft-{method}")
        reward = new_reward_model(folder / f"sft-{method}", SECTION, peft=peft)
        stir(reward)
        reward.config.reward_mean, reward.config.reward_std = 0.25, 1.5
        write(reward, folder / f"reward-{method}")
    return folder


def write(model: PreTrainedModel, folder: Path) -> None:
    save_model(model, load_tokenizer(model.base_name), folder)


def recipe(method: str = "none", reward: str = "model", **peft: object) -> Recipe:
    section = METHODS.get(method, PeftSection()).model_dump() | peft
    return Recipe.model_validate(
        {"model": {"name": "tiny", "peft": section}, "reward": {"peft": {"method": reward}}, "sft": {"packing": False}}
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return torch.allclose(logits(a), logits(b), atol=1e-5)


def refusal(error: pytest.ExceptionInfo[UserError]) -> tuple[str, str, str]:
    """What is wrong, where, and what to do; none of them empty."""
    assert error.value.what and error.value.where and error.value.fix
    return error.value.what, error.value.where, error.value.fix


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OF_LLAMA)
def test_a_policy_goes_on_from_its_adapter(method: str, run: Path) -> None:
    folder = run / f"sft-{method}"
    policy = policy_to_train(folder, recipe(method).model)
    before = load_policy(folder, SECTION)
    assert peft_of(policy) == METHODS[method] and not policy.training
    assert trainable(policy).keys() == trainable(before).keys()
    assert same(policy, before)


@pytest.mark.parametrize("method", OF_LLAMA)
def test_a_policy_of_all_weights_starts_from_a_merged_adapter(method: str, run: Path) -> None:
    folder = run / f"sft-{method}"
    if method in MERGED:
        policy = policy_to_train(folder, recipe().model)
        assert peft_of(policy) is None and len(trainable(policy)) == len(list(policy.parameters()))
        assert same(policy, load_policy(folder, SECTION))
        return
    with pytest.raises(UserError) as error:
        policy_to_train(folder, recipe().model)
    what, where, fix = refusal(error)
    assert what.startswith("all weights are to be trained, and ") and method in what
    assert (where, fix) == (str(folder), f"set model.peft.method={method}")


@pytest.mark.parametrize("method", ["none", *OF_LLAMA])
def test_a_plain_policy_gets_a_method_that_changes_nothing(method: str, run: Path) -> None:
    folder = run / "sft-none"
    if method in (*EMBEDDED, *CACHED):
        with pytest.raises(UserError) as error:
            policy_to_train(folder, recipe(method).model)
        what, where, fix = refusal(error)
        assert f"new virtual tokens ({method}) would change what it computes" in what
        assert where == str(folder) and "lora" in fix
        return
    policy = policy_to_train(folder, recipe(method).model)
    assert peft_of(policy) == (None if method == "none" else METHODS[method])
    assert same(policy, load_policy(folder, SECTION))


def test_another_method_than_the_recipes_is_refused(run: Path) -> None:
    for settings in ({"rank": 4}, {"alpha": 7.0}, {"last_layers": 1}):
        with pytest.raises(UserError, match="is an adapter of lora") as error:
            policy_to_train(run / "sft-lora", recipe("lora", **settings).model)
        assert refusal(error)[1] == str(run / "sft-lora")
        with pytest.raises(UserError, match="is an adapter of lora") as error:
            value_to_train(run / "reward-lora", recipe("lora", **settings))
        assert refusal(error)[1] == str(run / "reward-lora")
    with pytest.raises(UserError, match="the recipe trains prefix"):
        policy_to_train(run / "sft-lora", recipe("prefix").model)


@pytest.mark.parametrize("method", OF_LLAMA)
def test_a_value_model_goes_on_from_the_reward_model(method: str, run: Path) -> None:
    folder = run / f"reward-{method}"
    value = value_to_train(folder, recipe(method))
    assert peft_of(value) == METHODS[method]
    assert {"score.weight"} < trainable(value).keys()
    assert (value.config.reward_mean, value.config.reward_std) == (0.25, 1.5)
    if method not in MERGED:
        with pytest.raises(UserError) as error:
            value_to_train(folder, recipe())
        what, where, fix = refusal(error)
        assert what.startswith("all weights of the value model are to be trained, and ") and method in what
        assert (where, fix) == (str(folder), "set reward.peft.method=model")
        return
    whole = value_to_train(folder, recipe(method, reward="none"))
    assert peft_of(whole) is None and len(trainable(whole)) == len(list(whole.parameters()))
    assert (whole.config.reward_mean, whole.config.reward_std) == (0.25, 1.5)
    assert same(whole, value) and logits(value).abs().max() > 0.01


@pytest.mark.parametrize("method", ["none", *OF_LLAMA])
def test_a_plain_reward_model_gets_a_method_that_changes_nothing(method: str, run: Path) -> None:
    folder = run / "reward-none"
    if method in (*EMBEDDED, *CACHED):
        with pytest.raises(UserError, match="new virtual tokens") as error:
            value_to_train(folder, recipe(method))
        assert refusal(error)[1] == str(folder)
        return
    value = value_to_train(folder, recipe(method))
    assert ("score.weight" in trainable(value)) and same(value, value_to_train(folder, recipe()))
    assert (value.config.reward_mean, value.config.reward_std) == (0.25, 1.5)
    assert (len(trainable(value)) < len(list(value.parameters()))) == (method != "none")


@pytest.mark.parametrize("method", OF_LLAMA)
def test_a_first_adapter_is_one_that_starts_at_no_change(method: str, run: Path) -> None:
    model = load_policy(run / "sft-none", SECTION)
    if method in STARTS_AT_NO_CHANGE:
        assert peft_of(add_fresh_adapter(METHODS[method], model, run)) == METHODS[method]
    else:
        with pytest.raises(UserError):
            add_fresh_adapter(METHODS[method], model, run)
        assert peft_of(model) is None and all(p.requires_grad for p in model.parameters())


# --- all four ---------------------------------------------------------------------------------------------------------


def load(run: Path, sft: str, reward: str, given: Recipe) -> PpoNetworks:
    return load_networks(given, run / f"sft-{sft}", run / f"reward-{reward}", CPU)


def same_base(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether the embeddings of both are one tensor in memory."""
    return a.get_input_embeddings().weight is b.get_input_embeddings().weight


def check_starts(networks: PpoNetworks, sft: PreTrainedModel, reward: PreTrainedModel) -> None:
    """Policy and reference are the SFT model, value and reward model the reward model; only two of them train."""
    assert same(networks.policy, sft) and same(networks.reference, sft)
    assert same(networks.value, reward) and same(networks.reward, reward)
    for model in (networks.value, networks.reward):
        assert (model.config.reward_mean, model.config.reward_std) == (0.25, 1.5)
    for model in (networks.reference, networks.reward):
        assert trainable(model) == {}
    for model in (networks.policy, networks.value):
        assert trainable(model)
    assert not any(m.training for m in (networks.policy, networks.reference, networks.value, networks.reward))
    stir(networks.policy)
    stir(networks.value)
    assert not same(networks.policy, sft) and same(networks.reference, sft)
    assert not same(networks.value, reward) and same(networks.reward, reward)


@pytest.mark.parametrize("method", OF_LLAMA)
def test_four_adapters_on_one_base(method: str, run: Path) -> None:
    networks = load(run, method, method, recipe(method))
    assert networks.bases.startswith("one base of ")
    assert networks.bases.endswith(" GB for policy, reference, value and reward model")
    for other in (networks.reference, networks.value, networks.reward):
        assert same_base(networks.policy, other)
    sft = load_policy(run / f"sft-{method}", SECTION)
    check_starts(networks, sft, value_to_train(run / f"reward-{method}", recipe(method)))


@pytest.mark.parametrize("zero", [2, 3])
def test_the_references_adapter_is_rounded_where_deepspeed_rounds_ours(
    zero: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on several processes; what DeepSpeed does to the policy is done by hand."""
    monkeypatch.setattr(ppo_networks, "processes", lambda: 2)
    monkeypatch.setattr(ppo_networks, "zero_stage", lambda recipe: zero)
    given = recipe("lora")
    given = given.model_copy(update={"model": given.model.model_copy(update={"dtype": "bfloat16"})})
    networks = load(run, "lora", "lora", given)
    assert same_base(networks.policy, networks.reference) == (zero == 2)
    for weight in networks.policy.parameters():  # and no buffers
        weight.data = weight.data.to(torch.bfloat16)
    assert torch.equal(logits(networks.policy), logits(networks.reference))
    monkeypatch.setattr(ppo_networks, "processes", lambda: 1)
    kept = load(run, "lora", "lora", given)
    assert torch.equal(logits(kept.policy), logits(kept.reference))
    assert not torch.equal(logits(kept.policy), logits(networks.policy)), "a single process keeps float32"


def test_without_a_method_there_are_four_models(run: Path) -> None:
    networks = load(run, "none", "none", recipe())
    assert networks.bases == "" and not same_base(networks.policy, networks.reference)
    check_starts(networks, load_policy(run / "sft-none", SECTION), value_to_train(run / "reward-none", recipe()))


def test_all_weights_go_on_from_merged_adapters(run: Path) -> None:
    networks = load(run, "lora", "lora", recipe())
    assert networks.bases == "" and peft_of(networks.reference) is None
    sft, reward = load_policy(run / "sft-lora", SECTION), value_to_train(run / "reward-lora", recipe("lora"))
    check_starts(networks, sft, reward)


@pytest.mark.parametrize("method", STARTS_AT_NO_CHANGE)
def test_a_plain_sft_model_is_the_base_of_policy_and_reference(method: str, run: Path) -> None:
    networks = load(run, "none", "none", recipe(method))
    assert networks.bases.endswith(" GB for policy and reference; value and reward model have their own")
    assert same_base(networks.policy, networks.reference) and peft_of(networks.reference) is None
    assert not same_base(networks.policy, networks.value) and not same_base(networks.value, networks.reward)
    sft, reward = load_policy(run / "sft-none", SECTION), value_to_train(run / "reward-none", recipe())
    check_starts(networks, sft, reward)


def test_a_value_model_of_all_weights_has_a_base_of_its_own(run: Path) -> None:
    given = recipe("lora", reward="none")
    networks = load(run, "lora", "lora", given)
    assert networks.bases.endswith(" GB for policy and reference; value and reward model have their own")
    assert peft_of(networks.value) is None and not same_base(networks.policy, networks.value)
    sft, reward = load_policy(run / "sft-lora", SECTION), value_to_train(run / "reward-lora", recipe("lora"))
    check_starts(networks, sft, reward)


def test_a_reward_model_on_another_base_has_its_own(run: Path, tiny_dir: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    reward = new_reward_model(str(base), SECTION, peft=METHODS["lora"])
    stir(reward)
    write(reward, tmp_path / "reward")
    networks = load_networks(recipe("lora"), run / "sft-lora", tmp_path / "reward", CPU)
    assert networks.bases.endswith("value and reward model have their own")
    assert same_base(networks.policy, networks.reference) and not same_base(networks.policy, networks.reward)
    assert same(networks.reward, reward)


def test_a_copy_of_the_base_is_the_same_base(run: Path, tiny_dir: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    write(new_reward_model(str(base), SECTION, peft=METHODS["lora"]), tmp_path / "reward")
    networks = load_networks(recipe("lora"), run / "sft-lora", tmp_path / "reward", CPU)
    assert same_base(networks.policy, networks.reward)


def test_what_does_not_go_together_is_refused(run: Path) -> None:
    for sft, reward, given, words, where in (
        ("lora", "lora", recipe("lora", rank=4), "is an adapter of lora", "sft-lora"),
        ("lora", "dora", recipe("lora"), "is an adapter of dora", "reward-dora"),
        ("none", "none", recipe("prefix"), "new virtual tokens", "sft-none"),
        ("prefix", "none", recipe("prefix"), "new virtual tokens", "reward-none"),
        ("prefix", "lora", recipe(), "all weights are to be trained", "sft-prefix"),
        ("lora", "prefix", recipe(), "all weights of the value model are to be trained", "reward-prefix"),
    ):
        with pytest.raises(UserError, match=words) as error:
            load(run, sft, reward, given)
        assert refusal(error)[1] == str(run / where)


def test_a_policy_on_a_base_that_was_changed_is_refused(tiny_dir: str, run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    write(add_adapter(load_policy(str(base), SECTION), METHODS["lora"]), tmp_path / "sft")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match="bring the base back") as error:
        load_networks(recipe("lora"), tmp_path / "sft", run / "reward-lora", CPU)
    assert refusal(error)[1] == str(tmp_path / "sft")
