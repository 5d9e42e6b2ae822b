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
from test_resume import assert_same, stop_at
from torch import Tensor, nn

from rlhf import ppo_state
from rlhf.adapters import add_lora
from rlhf.config import ModelSection, Recipe
from rlhf.errors import UserError
from rlhf.experience import Experience
from rlhf.models import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.phasetime import PhaseTimes
from rlhf.ppo_state import Ppo, build, load_checkpoint, save_checkpoint
from rlhf.probes import write_probes
from rlhf.recipe import load_recipe
from rlhf.rundir import hash_path
from rlhf.saving import Checkpoints
from rlhf.scoring import scores, token_logprobs, token_values
from rlhf.shared_base import FOLDER, save_adapter, scalar_twin, trainable
from stages import ppo as stage
from stages.ppo import ppo_step, rollout, score, update

SECTION = ModelSection(name="tiny")
FIELDS = ["tracking.wandb=disabled", "run.device=cpu", "model.lora.enabled=true", "reward.lora.enabled=true"]
FIELDS += ["model.lora.rank=4", "reward.lora.rank=3", "reward.lora.last_layers=1", "data.max_response_tokens=12"]
FIELDS += ["ppo.batch_size=8", "ppo.episodes=24", "ppo.minibatch_size=8", "ppo.micro_batch_size=4", "ppo.lr=0.01"]
PAIRS = [([5, 60, 7], [300, 2]), ([9], [8, 11, 12, 40]), ([77, 3, 4, 5, 6], [1])]
ALL = range(8)


@dataclass
class Given:
    """What the earlier stages would have left, with an adapter that has something to say."""

    sft: Path
    reward: Path
    recipe: Recipe

    def build(self, **more: str) -> Ppo:
        recipe = load_recipe("tiny", [*FIELDS, *(f"{key.replace('__', '.')}={value}" for key, value in more.items())])
        return build(recipe, False, self.sft, self.reward, (hash_path(self.sft), hash_path(self.reward)))


def make(source: str, folder: Path, keep_layers: int = 0) -> Given:
    """An SFT model, and a reward model that is an adapter on it, merged and by itself."""
    shutil.copytree(source, folder / "sft" / "model")
    given = Given(folder / "sft" / "model", folder / "reward" / "model", load_recipe("tiny", FIELDS))
    keep = [f"reward.keep_layers={keep_layers}"]
    recipe, tokenizer = load_recipe("tiny", [*FIELDS, *keep]), load_tokenizer(source)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = add_lora(new_reward_model(given.sft, SECTION, keep_layers), recipe.reward.lora, "SEQ_CLS")
        speak(model)
    model.config.reward_mean, model.config.reward_std = 0.3, 2.0
    save_model(model, tokenizer, given.reward)
    write_probes(model, tokenizer, PAIRS, given.reward)
    hashes = (hash_path(given.sft), hash_path(given.reward))
    save_adapter(model, model.state_dict(), recipe, folder / "reward" / FOLDER, *hashes)
    return given


def speak(model: nn.Module) -> None:
    """B starts at zero: draw every trained weight."""
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.2)


@pytest.fixture(params=["llama", "gpt2", "llama, 2 layers", "gpt2, 1 layer"])
def given(request: pytest.FixtureRequest, tiny_dir: str, tiny_gpt2_dir: str, tmp_path: Path) -> Given:
    name, _, layers = request.param.partition(", ")
    return make(tiny_dir if name == "llama" else tiny_gpt2_dir, tmp_path, int(layers[:1] or 0))


@pytest.fixture
def llama_given(tiny_dir: str, tmp_path: Path) -> Given:
    return make(tiny_dir, tmp_path)


def storages(*models: nn.Module) -> dict[int, int]:
    """Bytes of all memory that the models' weights and buffers lie in, by address."""
    tensors = (t for model in models for t in (*model.parameters(), *model.buffers()))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def digests(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Hash of each weight by its name in a plain model, adapters and head left out."""
    for name, weight in model.state_dict().items():
        if ".lora_" in name or "score" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield plain, hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def apart(monkeypatch: pytest.MonkeyPatch, given: Given, **more: str) -> Ppo:
    """The same run with three bases, each loaded by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(ppo_state, "scalar_twin", lambda *_: None)
        return given.build(**more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_base_weight_is_held_twice_or_changed_by_training(given: Given, dtype: str, capsys) -> None:
    ppo = given.build(model__dtype=dtype, ppo__ratio_tolerance="0.2")
    assert "for policy, reference, value and reward model" in capsys.readouterr().out
    networks = (ppo.networks.policy, ppo.networks.value, ppo.reward_model)
    plain = load_policy(given.sft, SECTION.model_copy(update={"dtype": dtype}))
    before = dict(digests(plain))
    small = sum(sum(storages(p).values()) for p in map(only_own, networks))
    assert sum(storages(*networks).values()) == sum(storages(plain).values()) + small
    assert small < 0.5 * sum(storages(plain).values())

    start = {name: weight.clone() for name, weight in ppo.engine.trainable().items()}
    frozen = {name: weight.clone() for name, weight in ppo.reward_model.state_dict().items()}
    update(ppo, score(ppo, rollout(ppo)), PhaseTimes(ppo.engine.device, torch.float32))
    for network in networks:
        found = dict(digests(network))
        assert found and all(before[name] == digest for name, digest in found.items())
    assert all(torch.equal(frozen[name], weight) for name, weight in ppo.reward_model.state_dict().items())
    moved = {name for name, weight in ppo.engine.trainable().items() if not torch.equal(start[name], weight)}
    assert {name.split(".")[0] for name in moved} == {"policy", "value"}
    assert any("score.modules_to_save" in name for name in moved)
    assert start.keys() == {f"policy.{n}" for n in trainable(networks[0])} | {
        f"value.{n}" for n in trainable(networks[1])
    }


def only_own(model: nn.Module) -> nn.Module:
    """What a network has besides the base: adapters, heads."""
    own = nn.ParameterList(p for name, p in model.named_parameters() if ".lora_" in name or "score" in name)
    return own


def test_value_and_reward_model_start_as_the_merged_reward_model(given: Given) -> None:
    ppo, merged = given.build(), load_reward_model(given.reward, SECTION)
    expected = scores(merged, PAIRS)
    assert float(expected.std()) > 1e-2
    torch.testing.assert_close(scores(ppo.reward_model, PAIRS), expected, rtol=0, atol=1e-5)
    # The value before a token that follows the response is read where the response's score is.
    longer = [(prompt, [*response, 9]) for prompt, response in PAIRS]
    values = torch.stack([row[-1] for row in token_values(ppo.networks.value, longer)])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(token_values(ppo.networks.value, PAIRS)), torch.cat(token_values(merged, PAIRS)), rtol=0, atol=1e-5
    )
    plain = load_policy(given.sft, SECTION)
    speak(ppo.networks.policy)
    torch.testing.assert_close(
        torch.cat(ppo.reference(PAIRS, 2048)), torch.cat(token_logprobs(plain, PAIRS)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_numbers_and_gradients_of_separate_models(
    given: Given, recompute: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    runs = [given.build(), apart(monkeypatch, given, launch__gradient_checkpointing=recompute)]
    assert "value and reward model have their own" in capsys.readouterr().out
    if recompute == "true":
        runs[0] = given.build(launch__gradient_checkpointing=recompute)
    for run in runs:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            speak(run.networks.policy)
    experience = score(runs[0], rollout(runs[0]))
    other = score(runs[1], rollout(runs[1]))
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
    ppo_step(run, experience, ALL)
    assert all(p.grad is None for p in run.networks.parameters() if not p.requires_grad)
    return {name: p.grad.clone() for name, p in run.engine.trainable().items()}


def test_a_twin_leaves_the_policy_and_the_random_stream_alone(given: Given) -> None:
    policy, keep = load_policy(given.sft, SECTION), 1
    layers, state = policy.config.num_hidden_layers, torch.get_rng_state()
    twin = scalar_twin(policy, keep)
    assert twin is not None and torch.equal(torch.get_rng_state(), state)
    assert (twin.config.num_hidden_layers, policy.config.num_hidden_layers) == (keep, layers)
    body = getattr(twin, twin.base_model_prefix)
    assert body.config is twin.config and not set(body.modules()) & set(policy.modules())
    ours = {id(p) for p in policy.parameters()}
    assert [name for name, p in twin.named_parameters() if id(p) not in ours] == ["score.weight"]
    with pytest.raises(ValueError, match="adapters already"):
        scalar_twin(add_lora(policy, load_recipe("tiny", FIELDS).model.lora, "CAUSAL_LM"), keep)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base", "belongs to another SFT model"),
        ("merged", "belongs to another reward model"),
        ("lora", "belongs to other settings of reward.lora"),
        ("", "there is no"),
    ],
)
def test_an_adapter_that_does_not_fit_is_left_alone(llama_given: Given, key: str, reason: str, capsys) -> None:
    folder = llama_given.reward.parent / FOLDER
    if key:
        record = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps(record | {key: "x"}))
    else:
        shutil.rmtree(folder)
    ppo = llama_given.build()
    said = capsys.readouterr().out
    assert "value and reward model have their own" in said and reason in said
    assert ppo.value_on == "reward"
    assert not storages(ppo.reward_model).keys() & storages(ppo.networks.policy).keys()
    merged = load_reward_model(llama_given.reward, SECTION)
    for model in (ppo.reward_model, ppo.networks.value):
        torch.testing.assert_close(scores(model, PAIRS), scores(merged, PAIRS), rtol=0, atol=1e-5)


def test_all_weights_are_trained_as_before(llama_given: Given, capsys) -> None:
    ppo = llama_given.build(model__lora__enabled="false")
    assert "base" not in capsys.readouterr().out and ppo.value_on == "reward"
    assert not storages(ppo.networks.value).keys() & storages(ppo.networks.policy).keys()


def test_a_checkpoint_goes_on_with_the_base_it_began_with(llama_given: Given, tmp_path: Path) -> None:
    ppo = llama_given.build()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "x", lambda: None)
    save_checkpoint(ppo, checkpoints)
    checkpoints.wait()
    sealed = checkpoints.newest()
    assert sealed is not None
    load_checkpoint(llama_given.build(), sealed)
    shutil.rmtree(llama_given.reward.parent / FOLDER)
    with pytest.raises(UserError, match="sits on the sft model, and here on the reward model"):
        load_checkpoint(llama_given.build(), sealed)


def test_a_stopped_run_resumes_exactly(tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    make(tiny_dir, tmp_path / "whole", keep_layers=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    arguments = ["tiny", *FIELDS, f"run.dir={tmp_path}", "ppo.save_every=0", "--variant", "ppo-ptx"]
    assert stage.main([*arguments, "run.name=whole"]) == 0
    for ask in (2, 2):
        with monkeypatch.context() as patch:
            stop_at(patch, ask)
            assert stage.main([*arguments, "run.name=stopped"]) == 143
    assert stage.main([*arguments, "run.name=stopped"]) == 0
    assert capsys.readouterr().out.count("one base of") == 4
    assert_same(tmp_path / "whole" / "ppo-ptx", tmp_path / "stopped" / "ppo-ptx")
    # What it saves is a plain model: the SFT model with the adapter merged.
    saved, sft = (load_policy(tmp_path / "stopped" / part / "model", SECTION) for part in ("ppo-ptx", "sft"))
    changed = [n for (n, p), q in zip(saved.named_parameters(), sft.parameters(), strict=True) if not torch.equal(p, q)]
    assert changed and all("_proj" in name for name in changed)
