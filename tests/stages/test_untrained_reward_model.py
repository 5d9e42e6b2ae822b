"""PPO from a reward model off the shelf (reward.train=false): normalised, measured, kept as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Drops, Prompt, read_demonstrations
from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.recipe import load_recipe
from rlhf.run.preflight import plan_rows
from rlhf.training.ppo_state import build
from rlhf.training.reward_format import own_format
from stages import evaluate, ppo, reward, sft
from support.data_files import write_lines
from support.families import SMALL_RECIPE, make_family
from support.ppo_runs import network

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey", "gold", "cyan", "teal", "plum"]
ROWS = [
    {"prompt": f"Name a colour like {colour}.", "response": f"A colour like {colour} is blue."} for colour in COLOURS
]
RANKED = [{"prompt": row["prompt"], "responses": ["Blue.", "No.", "Well, red."], "ranks": [1, 3, 2]} for row in ROWS]
RECIPE = ["tiny", *SMALL_RECIPE, "data.demonstrations=[demos.jsonl]", "data.prompts=[demos.jsonl]"]
RECIPE += ["data.prompts_heldout=[asked.jsonl]"]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a folder with data and a random reward model; return the arguments of a stage that uses it as it is."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "demos.jsonl", *ROWS)
    write_lines(tmp_path / "ranked.jsonl", *RANKED)
    write_lines(tmp_path / "asked.jsonl", *({"prompt": f"Is {colour} a colour?"} for colour in COLOURS[:4]))
    network(LlamaForSequenceClassification, tiny_tokenizer, seed=4).save_pretrained("shelf")
    tiny_tokenizer.save_pretrained("shelf")
    return [*RECIPE, "reward.train=false", "reward.model=shelf"]


def raw_scores(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Return the scores that transformers' own classifier gives, one text at a time."""
    theirs = AutoModelForSequenceClassification.from_pretrained("shelf").eval()
    with torch.no_grad():
        return torch.stack([theirs(torch.tensor([prompt + response])).logits[0, 0] for prompt, response in pairs])


@pytest.mark.parametrize("ranked", [True, False])
def test_it_is_normalised_and_otherwise_unchanged(
    ranked: bool, shelf: list[str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    shelf += ["data.rankings=[ranked.jsonl]"] * ranked
    for module in (sft, reward, ppo):
        assert module.main(shelf) == 0

    demos = read_demonstrations(["demos.jsonl"], Drops())
    pairs = [(encode_prompt(tiny_tokenizer, d.prompt), encode_response(tiny_tokenizer, d.response)) for d in demos]
    raw, std = raw_scores(tiny_tokenizer, pairs), 1.0
    if ranked:
        texts = [(pair[0], encode_response(tiny_tokenizer, text)) for pair in pairs for text in RANKED[0]["responses"]]
        three = raw_scores(tiny_tokenizer, texts)
        std = float(three.std())
        better = [(three[i] > three[i + 2]).float() for i in range(0, len(three), 3)]
        worse = [(three[i + 2] > three[i + 1]).float() for i in range(0, len(three), 3)]
        best = [(three[i] > three[i + 1]).float() for i in range(0, len(three), 3)]
    config = json.loads(Path("runs/run/reward/model/config.json").read_text())
    assert config["reward_mean"] == pytest.approx(float(raw.mean()), abs=1e-4)
    assert config["reward_std"] == pytest.approx(std, rel=1e-4)
    kept = AutoModelForSequenceClassification.from_pretrained("runs/run/reward/model")
    for name, weight in AutoModelForSequenceClassification.from_pretrained("shelf").named_parameters():
        assert torch.equal(weight, kept.get_parameter(name))

    metrics = json.loads(Path("runs/run/reward/stage.json").read_text())["metrics"]
    if ranked:
        expected = torch.stack([*better, *worse, *best]).mean()
        assert metrics["reward/accuracy"] == pytest.approx(float(expected))
    else:
        assert "reward/accuracy" not in metrics
    probes = json.loads(Path("runs/run/reward/model/probes.json").read_text())
    assert len(probes) == 8
    for probe in probes:
        (alone,) = raw_scores(tiny_tokenizer, [(probe["prompt_ids"], probe["response_ids"])])
        assert probe["score"] == pytest.approx((float(alone) - float(raw.mean())) / std, abs=1e-4)
    assert json.loads(Path("runs/run/ppo-ptx/stage.json").read_text())["state"] == "done"


def test_another_tokenizer_s_reward_model_is_asked_by_text(tmp_path: Path, shelf: list[str]) -> None:
    make_family("Phi-3", tmp_path / "phi")
    torch.manual_seed(6)
    config = AutoConfig.from_pretrained("phi", num_labels=1, initializer_range=0.2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("shelf")
    theirs = AutoTokenizer.from_pretrained("phi")
    theirs.save_pretrained("shelf")
    for module in (sft, reward, ppo, evaluate):
        assert module.main(shelf) == 0

    ppo_run = build(load_recipe("tiny", shelf[1:]), False, Path("runs/run/sft/model"), Path("runs/run/reward/model"))
    episodes = ppo.rollout(ppo_run)
    found = ppo.score(ppo_run, episodes)
    settings = json.loads(Path("runs/run/reward/model/config.json").read_text())
    prompts = [ppo_run.tokenizer.decode(prompt) for prompt, _ in episodes.pairs()]
    pairs = []
    for words, text, finished in zip(prompts, episodes.texts(ppo_run.tokenizer), episodes.finished, strict=True):
        asked = next(row["prompt"] for row in ROWS if row["prompt"] in words)
        turns = [{"role": "user", "content": asked}]
        head = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        end = [theirs.convert_tokens_to_ids("<|end|>")] if finished else []
        answer = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pairs.append((head, [*answer, *end]))
    expected = (raw_scores(theirs, pairs) - settings["reward_mean"]) / settings["reward_std"]
    assert torch.allclose(found.scores, expected, atol=1e-4) and expected.std() > 1e-2

    # The value model reads the policy's tokens: it starts from the policy, and a new head says 0.
    policy, value = load_policy("runs/run/sft/model", ModelSection(name="tiny")), ppo_run.networks.value
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, value.get_parameter(f"model.{name}"))
    assert not found.values.any()


def test_another_template_is_another_format(shelf: list[str]) -> None:
    assert sft.main(shelf) == 0
    prompt = Prompt.from_text(ROWS[0]["prompt"])
    recipe, policy_tokenizer = load_recipe("tiny", shelf[1:]), load_tokenizer("runs/run/sft/model")
    ids = encode_prompt(policy_tokenizer, prompt)
    assert own_format(recipe, policy_tokenizer, Path("shelf"), [(prompt, ids)]) is None
    tokenizer = AutoTokenizer.from_pretrained("shelf")
    tokenizer.chat_template = "{% for m in messages %}{{ 'Q: ' + m['content'] + ' A: ' }}{% endfor %}"
    tokenizer.save_pretrained("shelf")
    own = own_format(recipe, policy_tokenizer, Path("shelf"), [(prompt, ids)])
    assert own is not None and tokenizer.decode(own.prompts[tuple(ids)]) == f"Q: {ROWS[0]['prompt']} A: "


def test_what_it_cannot_be_is_told_first(shelf: list[str]) -> None:
    for settings in (["reward.train=false"], ["reward.train=false", "reward.model=shelf", "reward.keep_layers=1"]):
        with pytest.raises(UserError, match="used as it is"):
            load_recipe("tiny", settings)
    assert ("reward", "shelf as it is") in plan_rows(load_recipe("tiny", shelf[1:]))
