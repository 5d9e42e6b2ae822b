"""PPO from a reward model off the shelf (reward.train=false): normalised, measured, kept as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, PreTrainedTokenizerBase

from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Drops, read_demonstrations
from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from rlhf.run.preflight import plan_rows
from stages import ppo, reward, sft
from support.data_files import write_lines
from support.ppo_runs import network

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey", "gold", "cyan", "teal", "plum"]
ROWS = [
    {"prompt": f"Name a colour like {colour}.", "response": f"A colour like {colour} is blue."} for colour in COLOURS
]
RANKED = [{"prompt": row["prompt"], "responses": ["Blue.", "No.", "Well, red."], "ranks": [1, 3, 2]} for row in ROWS]
SIZES = ["tiny", "run.name=run", "run.device=cpu", "tracking.wandb=disabled", "data.demonstrations=[demos.jsonl]"]
SIZES += ["data.prompts=[demos.jsonl]", "sft.batch_size=4", "sft.micro_batch_size=4", "sft.epochs=1"]
SIZES += [
    "data.max_prompt_tokens=64",
    "data.max_response_tokens=24",
    "reward.max_tokens=96",
    "ppo.ratio_tolerance=1e-4",
]
SIZES += ["ppo.episodes=8", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=8", "ppo.epochs=1"]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a folder with data and a random reward model; return the arguments of a stage that uses it as it is."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "demos.jsonl", *ROWS)
    write_lines(tmp_path / "ranked.jsonl", *RANKED)
    network(LlamaForSequenceClassification, tiny_tokenizer, seed=4).save_pretrained("shelf")
    tiny_tokenizer.save_pretrained("shelf")
    return [*SIZES, "reward.train=false", "reward.model=shelf"]


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


def test_what_it_cannot_be_is_told_first(shelf: list[str], tiny_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (["reward.train=false"], ["reward.train=false", "reward.model=shelf", "reward.keep_layers=1"]):
        with pytest.raises(UserError, match="used as it is"):
            load_recipe("tiny", settings)
    assert ("reward", "shelf as it is") in plan_rows(load_recipe("tiny", shelf[1:]))
    assert sft.main(shelf) == 0
    tokenizer = json.loads(Path("shelf/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    Path("shelf/tokenizer.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert reward.main(shelf) == 2
    assert "different tokenizers" in capsys.readouterr().err
