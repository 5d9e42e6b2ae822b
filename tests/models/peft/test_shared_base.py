"""One base for the four networks of PPO: nothing held twice, nothing changed, and the numbers of separate models."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.folder import base_hash, find_adapter
from rlhf.models.peft.merging import plain_name
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.models.peft.shared_base import share_base, share_base_with_scalar_head
from rlhf.recipe import load_recipe
from rlhf.rollout.experience import Experience
from rlhf.rollout.probes import write_probes
from rlhf.rollout.scoring import scores, token_logprobs, token_values
from rlhf.training import ppo_networks
from rlhf.training.ppo_state import Ppo, build
from stages import ppo as stage
from stages.ppo import advantages, ppo_step, rollout, score, update
from support.stage_runs import assert_same, stop_at

SECTION = ModelSection(name="tiny")
FIELDS = ["tracking.wandb=disabled", "run.device=cpu", "data.max_response_tokens=12"]
FIELDS += ["ppo.batch_size=8", "ppo.episodes=24", "ppo.minibatch_size=8", "ppo.micro_batch_size=4", "ppo.lr=0.01"]
METHODS = {
    "lora": ["model.peft.method=lora", "model.peft.rank=4", "model.peft.last_layers=1"],
    "prefix": ["model.peft.method=prefix", "model.peft.virtual_tokens=3", "sft.packing=false"],
    "prompt": ["model.peft.method=prompt", "model.peft.virtual_tokens=3", "sft.packing=false"],
    "adapter": ["model.peft.method=adapter", "model.peft.bottleneck=4"],
    "bitfit": ["model.peft.method=bitfit"],
}
PAIRS = [([5, 60, 7], [300, 2]), ([9], [8, 11, 12, 40]), ([77, 3, 4, 5, 6], [1])]
ALL = range(8)


@dataclass
class Given:
    """What the earlier stages would have left, adapters that have something to say."""

    base: str
    sft: Path
    reward: Path
    fields: list[str]

    def recipe(self, **more: str) -> Recipe:
        more_fields = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
        return load_recipe("tiny", [*FIELDS, *self.fields, f"model.name={self.base}", *more_fields])

    def build(self, **more: str) -> Ppo:
        return build(self.recipe(**more), False, self.sft, self.reward)


def make(base: str, folder: Path, method: str = "lora", keep_layers: int = 0) -> Given:
    """An SFT model and a reward model, both adapters on the base."""
    fields = [*METHODS[method], f"reward.keep_layers={keep_layers}"]
    given = Given(base, folder / "sft" / "model", folder / "reward" / "model", fields)
    recipe, tokenizer = given.recipe(), load_tokenizer(base)
    for path in (given.sft, given.reward):
        path.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        policy = add_adapter(load_policy(base, SECTION), recipe.model.peft)
        speak(policy)
        save_model(policy, tokenizer, given.sft)
        model = new_reward_model(given.sft, SECTION, keep_layers, peft=recipe.reward_peft)
        speak(model)
    model.config.reward_mean, model.config.reward_std = 0.3, 2.0
    save_model(model, tokenizer, given.reward)
    write_probes(model, tokenizer, PAIRS, given.reward)
    return given


def speak(model: nn.Module) -> None:
    """Some methods start at no change: move every trained weight."""
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


CASES = {
    "llama, lora": ("tiny_dir", "lora", 0),
    "llama, lora, reward model of 2 layers": ("tiny_dir", "lora", 2),
    "llama, prefix": ("tiny_dir", "prefix", 0),
    "llama, prefix, reward model of 2 layers": ("tiny_dir", "prefix", 2),
    "llama, prompt": ("tiny_dir", "prompt", 0),
    "gpt2, lora, reward model of 1 layer": ("tiny_gpt2_dir", "lora", 1),
    "gpt2, adapter": ("tiny_gpt2_dir", "adapter", 0),
    "gpt2, bitfit": ("tiny_gpt2_dir", "bitfit", 0),
}


@pytest.fixture(scope="module", params=CASES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Two adapters for all tests of a case; read only."""
    base, method, keep_layers = CASES[request.param]
    return make(request.getfixturevalue(base), tmp_path_factory.mktemp("given"), method, keep_layers)


@pytest.fixture
def llama_given(tiny_dir: str, tmp_path: Path) -> Given:
    """Two LoRA adapters that the test may change."""
    return make(tiny_dir, tmp_path)


def storages(*models: nn.Module) -> dict[int, int]:
    """Bytes of all memory that the models' weights and buffers lie in, by address."""
    tensors = (t for model in models for t in (*model.parameters(), *model.buffers()))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def digests(model: nn.Module, own: set[str]) -> Iterator[tuple[str, str]]:
    """Hash of each weight of the base by its name in a plain model."""
    for name, weight in model.state_dict().items():
        if name not in own:
            data = weight.contiguous().view(torch.uint8).numpy().tobytes()
            yield plain_name(name), hashlib.sha256(data).hexdigest()


def own_weights(model: nn.Module, peft: PeftSection) -> set[str]:
    """Names of what a network has besides the base."""
    marks = (".lora_", "virtual_tokens.", ".down.", ".up.", "score.")
    if peft.method == "bitfit":
        return {name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith("score.")}
    return {name for name, _ in model.named_parameters() if any(mark in name for mark in marks)}


def apart(monkeypatch: pytest.MonkeyPatch, given: Given, **more: str) -> Ppo:
    """The same run with four bases, each loaded by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(ppo_networks, "policies_share_base", lambda *_: False)
        return given.build(**more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_base_weight_is_held_twice_or_changed_by_training(given: Given, dtype: str, monkeypatch, capsys) -> None:
    if dtype == "bfloat16":  # of random weights as loud as these a score has one digit left
        monkeypatch.setattr("rlhf.rollout.probes.TOLERANCE", {torch.float32: 0.5, torch.bfloat16: 0.5})
    ppo = given.build(model__dtype=dtype, ppo__ratio_tolerance="0.2")
    assert "for policy, reference, value and reward model" in capsys.readouterr().out
    networks = (ppo.networks.policy, ppo.reference, ppo.networks.value, ppo.reward_model)
    peft = given.recipe().model.peft
    own = [own_weights(network, peft) for network in networks]
    assert own[0] == own[1] and own[2] == own[3]
    plain = load_policy(given.base, SECTION.model_copy(update={"dtype": dtype}))
    before = dict(digests(plain, set()))
    parts = [dict(network.named_parameters()) for network in networks]
    small = sum(parts[i][name].untyped_storage().nbytes() for i in range(4) for name in own[i])
    held = sum(storages(*networks).values())
    base = sum(storages(plain).values())
    if peft.method == "bitfit":  # each has biases of its own; the base's are let go
        base -= sum(p.untyped_storage().nbytes() for name, p in plain.named_parameters() if name.endswith("bias"))
    assert held == base + small
    assert len({parts[i][name].data_ptr() for i in range(4) for name in own[i]}) == sum(map(len, own))

    start = {name: weight.clone() for name, weight in ppo.engine.trainable().items()}
    frozen = [{name: weight.clone() for name, weight in each.state_dict().items()} for each in networks[1::2]]
    update(ppo, advantages(ppo, score(ppo, rollout(ppo))))
    for network, names in zip(networks, own, strict=True):
        found = dict(digests(network, names))
        assert found and all(before[name] == digest for name, digest in found.items())
    for each, kept in zip(networks[1::2], frozen, strict=True):
        assert all(torch.equal(kept[name], weight) for name, weight in each.state_dict().items())
    moved = {name for name, weight in ppo.engine.trainable().items() if not torch.equal(start[name], weight)}
    assert {name.split(".")[0] for name in moved} == {"policy", "value"} and "value.score.weight" in moved
    assert start.keys() == {f"policy.{n}" for n in own[0]} | {f"value.{n}" for n in own[2]}


def test_all_four_start_as_what_the_stages_left(given: Given) -> None:
    ppo, judge = given.build(), load_reward_model(given.reward, SECTION)
    expected = scores(judge, PAIRS)
    assert float(expected.std()) > 1e-2
    torch.testing.assert_close(scores(ppo.reward_model, PAIRS), expected, rtol=0, atol=1e-6)
    # The value before a token that follows the response is read where the response's score is.
    longer = [(prompt, [*response, 9]) for prompt, response in PAIRS]
    values = torch.stack([row[-1] for row in token_values(ppo.networks.value, longer)])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    values = torch.cat(token_values(judge, PAIRS))
    torch.testing.assert_close(torch.cat(token_values(ppo.networks.value, PAIRS)), values, rtol=0, atol=1e-6)
    sft = torch.cat(token_logprobs(load_policy(given.sft, SECTION), PAIRS))
    assert float((sft - torch.cat(token_logprobs(load_policy(given.base, SECTION), PAIRS))).abs().max()) > 1e-2
    for model in (ppo.networks.policy, ppo.reference):
        torch.testing.assert_close(torch.cat(token_logprobs(model, PAIRS)), sft, rtol=0, atol=1e-6)
    speak(ppo.networks.policy)
    speak(ppo.networks.value)
    torch.testing.assert_close(torch.cat(token_logprobs(ppo.reference, PAIRS)), sft, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores(ppo.reward_model, PAIRS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_numbers_and_gradients_of_separate_models(given: Given, recompute: str, monkeypatch, capsys) -> None:
    if recompute == "true" and given.recipe().model.peft.method == "prefix":
        pytest.skip("refused: layers that are computed again would not see the keys and values")
    how = {"launch__gradient_checkpointing": recompute}
    runs = [given.build(**how), apart(monkeypatch, given, **how)]
    assert "each of the four networks has a base of its own" in capsys.readouterr().out
    for run in runs:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            speak(run.networks.policy)
    experience, other = (advantages(run, score(run, rollout(run))) for run in runs)
    assert experience.pairs == other.pairs
    for name in ("logprobs", "ref_logprobs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(getattr(experience, name), getattr(other, name), rtol=0, atol=1e-5)
    assert float(experience.kl_per_response().abs().max()) > 0.01
    shared, separate = (gradients(run, experience) for run in runs)
    assert shared.keys() == separate.keys()
    for name, gradient in shared.items():
        assert float((gradient - separate[name]).norm()) < 1e-5 * max(1.0, float(separate[name].norm())), name
    assert {name.split(".")[0] for name, g in shared.items() if float(g.norm()) > 1e-4} == {"policy", "value"}


def gradients(run: Ppo, experience: Experience) -> dict[str, Tensor]:
    ppo_step(run, experience, ALL, ("policy", "value"))
    assert all(p.grad is None for p in run.networks.parameters() if not p.requires_grad)
    return {name: p.grad.clone() for name, p in run.engine.trainable().items()}


@pytest.mark.parametrize("base", ["tiny_dir", "tiny_gpt2_dir"])
def test_a_twin_leaves_the_policy_and_the_random_stream_alone(base: str, request: pytest.FixtureRequest) -> None:
    policy, keep = load_policy(request.getfixturevalue(base), SECTION), 1
    layers, state = policy.config.num_hidden_layers, torch.get_rng_state()
    twin, second = share_base_with_scalar_head(policy, keep), share_base(policy)
    assert twin is not None and torch.equal(torch.get_rng_state(), state)
    assert (twin.config.num_hidden_layers, policy.config.num_hidden_layers) == (keep, layers)
    body = getattr(twin, twin.base_model_prefix)
    assert body.config is twin.config and not set(body.modules()) & set(policy.modules())
    assert not set(second.modules()) & set(policy.modules()) and second.config is not policy.config
    ours = {id(p) for p in policy.parameters()}
    assert [name for name, p in twin.named_parameters() if id(p) not in ours] == ["score.weight"]
    assert {id(p) for p in second.parameters()} == ours
    add_adapter(policy, PeftSection(method="lora"))
    for make_twin in (share_base, lambda model: share_base_with_scalar_head(model, keep)):
        with pytest.raises(ValueError, match="has a method already"):
            make_twin(policy)


def test_a_reward_model_on_another_base_keeps_its_own(llama_given: Given, tiny_gpt2_dir: str, capsys) -> None:
    record = llama_given.reward / "adapter.json"
    adapter = find_adapter(llama_given.reward)
    assert adapter is not None
    # The same weights under another name and, being copied with another config file, another hash.
    other = llama_given.reward.parent / "base"
    shutil.copytree(llama_given.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "moved"}))
    changed = json.loads(record.read_text())
    changed["base"] = {"name": str(other), "hash": base_hash(str(other))}
    record.write_text(json.dumps(changed))
    ppo = llama_given.build()
    assert "value and reward model have their own" in capsys.readouterr().out
    shared = storages(ppo.networks.policy).keys()
    assert storages(ppo.reference).keys() & shared
    judge = load_reward_model(llama_given.reward, SECTION)
    for model in (ppo.reward_model, ppo.networks.value):
        assert not storages(model).keys() & shared
        assert torch.equal(scores(model, PAIRS), scores(judge, PAIRS))


def test_a_full_reward_model_leaves_policy_and_reference_on_one_base(llama_given: Given, capsys) -> None:
    model = new_reward_model(llama_given.sft, SECTION)  # all weights, SFT's adapter merged
    merged = load_policy(llama_given.sft, SECTION, merged=True)
    theirs = dict(merged.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters() if name != "score.weight")
    shutil.rmtree(llama_given.reward)
    save_model(model, load_tokenizer(llama_given.base), llama_given.reward)
    write_probes(model, load_tokenizer(llama_given.base), PAIRS, llama_given.reward)
    ppo = llama_given.build(reward__peft__method="none")
    assert "one base of" in (said := capsys.readouterr().out) and "have their own" in said
    assert sum(p.requires_grad for p in ppo.networks.value.parameters()) == len(list(model.parameters()))


def test_a_plain_sft_model_is_the_base_and_the_reference(llama_given: Given, capsys) -> None:
    shutil.rmtree(llama_given.sft)
    shutil.copytree(llama_given.base, llama_given.sft)
    ppo = llama_given.build()
    plain = torch.cat(token_logprobs(load_policy(llama_given.base, SECTION), PAIRS))
    for model in (ppo.networks.policy, ppo.reference):  # a new LoRA adapter changes nothing yet
        torch.testing.assert_close(torch.cat(token_logprobs(model, PAIRS)), plain, rtol=0, atol=1e-6)
    speak(ppo.networks.policy)
    torch.testing.assert_close(torch.cat(token_logprobs(ppo.reference, PAIRS)), plain, rtol=0, atol=1e-6)
    llama_given.fields[:] = METHODS["prompt"]
    shutil.rmtree(llama_given.reward)
    shutil.copytree(llama_given.base, llama_given.reward)
    with pytest.raises(UserError, match="new virtual tokens"):
        llama_given.build()


def test_all_weights_are_trained_as_before(llama_given: Given, capsys) -> None:
    shutil.rmtree(llama_given.sft)
    shutil.copytree(llama_given.base, llama_given.sft)
    llama_given.fields[:] = []
    ppo = llama_given.build()
    assert "base" not in capsys.readouterr().out
    models = (ppo.networks.policy, ppo.networks.value, ppo.reference)
    assert sum(len(storages(model)) for model in models) == len(storages(*models))


def test_another_method_than_the_recipes_is_told(llama_given: Given) -> None:
    llama_given.fields.append("model.peft.rank=8")
    with pytest.raises(UserError, match=r"adapter of lora \(rank 4, .* and the recipe trains lora \(rank 8"):
        llama_given.build()


def test_a_stopped_run_resumes_exactly(tiny_dir: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Stopped twice; tests/stages/test_peft_stages.py resumes every method from a kill."""
    given = make(tiny_dir, tmp_path / "whole", keep_layers=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    fields = [*FIELDS, *given.fields, f"model.name={tiny_dir}", f"run.dir={tmp_path}", "ppo.save_every=0"]
    arguments = ["tiny", *fields, "--variant", "ppo-ptx"]
    assert stage.main([*arguments, "run.name=whole"]) == 0
    for ask in (2, 2):
        with monkeypatch.context() as patch:
            stop_at(patch, ask)
            assert stage.main([*arguments, "run.name=stopped"]) == 143
    assert stage.main([*arguments, "run.name=stopped"]) == 0
    assert capsys.readouterr().out.count("one base of") == 4
    assert_same(tmp_path / "whole" / "ppo-ptx", tmp_path / "stopped" / "ppo-ptx")
    # What it saves is the policy's adapter alone, and no longer SFT's.
    saved, sft = (find_adapter(tmp_path / "stopped" / part / "model") for part in ("ppo-ptx", "sft"))
    assert saved is not None and sft is not None
    ours, before = saved.tensors(), sft.tensors()
    assert ours.keys() == before.keys()
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
