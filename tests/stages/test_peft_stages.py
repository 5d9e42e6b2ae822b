"""Every parameter-efficient method in every stage, on a Llama-like and a GPT-2-like model that were trained a little.

A cell is a base and a method (tests/support/peft_stages.py). Its stages run once, as a user runs them. The tests look
at the results: what was trained and that it learned, the base, the folder, the checkpoint in the middle, and where PPO
began.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.ppo import masked_mean
from rlhf.model_config import KV_PREFIX_METHODS, UNMERGEABLE, VIRTUAL_TOKEN_METHODS
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rlhf.models.peft.methods import trainable
from rlhf.recipe import load_recipe
from rlhf.rollout import sampling
from rlhf.rollout.batches import Pair, build_batch
from rlhf.rollout.decoding import ModelDecoding
from rlhf.rollout.experience import pad_rows
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import scores, token_logprobs, token_values
from rlhf.training.ppo_state import build
from stages import ppo, sft
from support import peft_stages
from support.adapter_files import BESIDE_PEFT, IN_PEFT, OWN, PEFT, stored_weights
from support.peft_stages import ANSWERS, CELLS, GPT2, LLAMA, QUESTIONS, RANKED, SETTINGS, SMALL, STAGES, VARIANTS, Cell
from support.stage_runs import assert_same


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return peft_stages.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return peft_stages.make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def cells(bases: dict[str, Path], data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    """All cells, none of which has run yet, by name."""
    made = {f"{kind}-{method}": (kind, method, tmp_path_factory.mktemp("runs")) for kind, method in CELLS}
    return {name: Cell(kind, method, bases[kind], data, runs) for name, (kind, method, runs) in made.items()}


@pytest.fixture(params=["-".join(cell) for cell in CELLS])
def cell(request: pytest.FixtureRequest, cells: dict[str, Cell]) -> Cell:
    return cells[request.param]


@pytest.fixture(params=["-".join(cell) for cell in CELLS if cell[1] in VIRTUAL_TOKEN_METHODS])
def virtual(request: pytest.FixtureRequest, cells: dict[str, Cell]) -> Cell:
    """Those whose method puts tokens before every row."""
    return cells[request.param]


@pytest.fixture(scope="module")
def pairs(bases: dict[str, Path]) -> list[Pair]:
    """Prompts and responses of all lengths, as ids."""
    tokenizer = load_tokenizer(str(bases[LLAMA]))
    texts = zip(QUESTIONS[:6], [*RANKED, *ANSWERS, "Yes."], strict=True)
    return [(encode_prompt(tokenizer, Prompt.from_text(q)), encode_response(tokenizer, answer)) for q, answer in texts]


def mean_nll(policy: nn.Module, texts: Sequence[Sequence[int]]) -> float:
    return -float(torch.cat(token_logprobs(policy, [(row[:1], row[1:]) for row in texts])).mean())


def gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of two lists of rows."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


# --- what is trained, and that it learns ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_the_method_is_trained_and_the_base_is_not(cell: Cell, name: str) -> None:
    stage = cell.stage(name)
    assert stage.models.keys() == {"sft": {"policy"}, "reward": {"reward"}}.get(name, {"policy", "value"})
    for which, model in stage.models.items():
        named = dict(model.named_parameters())
        own = {key for key in named if cell.is_own(key)}
        assert own == stage.start[which].keys()
        still = [key for key in own if torch.equal(named[key], stage.start[which][key])]
        assert not still, f"{which}: not trained"
        of_base = {peft_stages.plain(key): weight for key, weight in named.items() if key not in own}
        changed = [key for key, weight in of_base.items() if not torch.equal(weight, cell.plain[key])]
        assert not changed, which
        cut = "model.layers.2." if which in ("reward", "value") else "none"  # Llama's, by reward.keep_layers
        assert of_base.keys() == {key for key in cell.plain if not cell.is_own(key) and not key.startswith(cut)}


def test_each_stage_starts_where_the_one_before_ended(cell: Cell) -> None:
    policy, judge = cell.stage("sft").weights, cell.stage("reward").weights
    start = cell.stage("reward").start["reward"]
    assert not start["score.weight"].any()
    if cell.method in KV_PREFIX_METHODS:  # of fewer layers
        ours, of_policy = peft_stages.tokens_by_hand(cell, start), peft_stages.tokens_by_hand(cell, policy)
        assert torch.equal(ours, of_policy[:, : 2 * 2])
    else:
        others = start.keys() - {"score.weight"}
        assert others == {key for key in policy if cell.kind == GPT2 or not key.startswith("model.layers.2.")}
        assert all(torch.equal(start[key], policy[key]) for key in others)
    for variant in VARIANTS:
        for which, weights in (("policy", policy), ("value", judge)):
            start = cell.stage(variant).start[which]
            assert start.keys() == weights.keys() and all(torch.equal(start[key], weights[key]) for key in weights)


def test_sft_learns(cell: Cell) -> None:
    stage = cell.stage("sft")
    assert stage.headline("sft/validation_loss") < stage.headline("sft/validation_loss_before") - 0.1


def test_the_reward_model_learns(cell: Cell) -> None:
    losses = cell.stage("reward").column("reward/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_learns(cell: Cell, variant: str) -> None:
    """On the episodes of the first iteration: values come nearer to the returns, and what was better than expected is
    likelier; ptx brings back what SFT took of the text."""
    stage = cell.stage(variant)
    first, policy, value = stage.first, stage.models["policy"], stage.models["value"]
    assert first is not None and stage.ppo is not None
    width = first.mask.shape[1]
    error = first.returns - pad_rows(token_values(value, first.pairs), width)
    assert masked_mean(error**2, first.mask) < 0.97 * masked_mean((first.returns - first.values) ** 2, first.mask)
    kl = stage.column("ppo/kl_k3")
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-3
    if variant == "ppo":
        log_ratio = pad_rows(token_logprobs(policy, first.pairs), width) - first.logprobs
        assert masked_mean(first.advantages * log_ratio, first.mask) > 0
        assert not stage.column("ppo/ptx_loss")
    else:
        assert mean_nll(policy, stage.ppo.ptx_rows) < mean_nll(stage.ppo.reference, stage.ppo.ptx_rows)
        assert len(stage.column("ppo/ptx_loss")) == 4


# --- what a stage leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_the_folder_holds_the_adapter_alone(cell: Cell, name: str) -> None:
    stage = cell.stage(name)
    which = "reward" if name == "reward" else "policy"
    for folder in ["model"] + ["ema"] * (name in VARIANTS):
        files = {file.name for file in (stage.folder / folder).iterdir()}
        assert {"adapter.json", "tokenizer.json"} <= files
        of_models = {file for file in files if file == "config.json" or file.endswith((".safetensors", ".bin"))}
        expected = [OWN] * (cell.method not in IN_PEFT) + [PEFT] * (cell.method in (*IN_PEFT, *BESIDE_PEFT))
        assert of_models == set(expected)
        named = dict(stage.models[which].named_parameters())
        weights = stored_weights(stage.folder / folder, named)
        assert weights.keys() == {key for key in named if cell.is_own(key)}
        same = [torch.equal(weights[key], named[key]) for key in weights]
        assert all(same) if folder == "model" else not any(same)
    record = json.loads((stage.folder / "model" / "adapter.json").read_text())
    assert record["base"]["name"] == str(cell.base) and record["peft"]["method"] == cell.method
    assert record["scalar"] == (name == "reward")
    assert record["keep_layers"] == (2 if name == "reward" and cell.kind == LLAMA else 0)


@pytest.mark.parametrize("name", STAGES)
def test_it_reloads_to_the_same_outputs(cell: Cell, name: str, pairs: list[Pair]) -> None:
    stage = cell.stage(name)
    folder = stage.folder / "model"
    if name == "reward":
        ours, theirs = stage.models["reward"], load_reward_model(folder, cell.section)
        assert gap([scores(ours, pairs)], [scores(theirs, pairs)]) < 1e-5
        assert float(scores(ours, pairs).std()) > 0.1
    else:
        policy = load_policy(folder, cell.section)
        assert gap(token_logprobs(stage.models["policy"], pairs), token_logprobs(policy, pairs)) < 1e-5


# What a checkpoint holds depends on the method and not on the base: every method once, on alternating bases, and PPO
# with the pretraining loss, which has PPO's whole state; without it once.
ALTERNATING = [f"{(GPT2, LLAMA)[i % 2]}-{method}" for i, method in enumerate(SETTINGS)]
RESUMED = [(cell, name) for cell in ALTERNATING for name in ("sft", "reward", "ppo-ptx")] + [("gpt2-lora", "ppo")]


@pytest.mark.parametrize(("which", "name"), RESUMED)
def test_it_resumes_exactly(cells: dict[str, Cell], which: str, name: str, tmp_path: Path) -> None:
    """As if killed after the checkpoint in the middle: nothing that came later exists."""
    cell = cells[which]
    whole = cell.stage(name).folder
    shutil.copytree(whole.parent, tmp_path / "run", ignore=shutil.ignore_patterns(*set(VARIANTS) - {name}))
    folder = tmp_path / "run" / name
    for path in folder.glob("*/adapter.json"):
        shutil.rmtree(path.parent)
    _, end = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(end)
    record = json.loads((folder / "stage.json").read_text()) | {"state": "running", "metrics": {}}
    (folder / "stage.json").write_text(json.dumps(record))
    assert cell.main(name, tmp_path) == 0
    assert_same(whole, folder)


# --- where PPO begins -------------------------------------------------------------------------------------------------


def test_ppo_starts_at_the_reference(
    cell: Cell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL is 0 and the ratio 1 before any step, by every engine; those that are not merged cannot go to vLLM, and the
    run says that another engine takes them."""
    cell.stage("reward")
    folders = [cell.runs / "run" / name / "model" for name in ("sft", "reward")]
    engines = ["native", "generate"] + ["vllm"] * (cell.method in UNMERGEABLE)
    recipes = [load_recipe(cell.arguments[0], [*cell.arguments[1:], f"ppo.rollout={engine}"]) for engine in engines]
    begun = build(recipes[-1], False, *folders)
    sft_policy = load_policy(folders[0], cell.section)
    monkeypatch.setattr(sampling, "_reported", set())
    found = {}
    for recipe in recipes:
        now = replace(begun, recipe=recipe)
        episodes = ppo.rollout(now)
        assert len(set(episodes.prompt_lengths.tolist())) > 3 and len(set(episodes.lengths.tolist())) > 1
        experience = ppo.advantages(now, ppo.score(now, episodes))
        reference = pad_rows(token_logprobs(sft_policy, experience.pairs), experience.mask.shape[1])
        assert gap([experience.ref_logprobs], [reference]) < 1e-5
        assert gap([experience.logprobs], [experience.ref_logprobs]) < 2e-5
        assert float(experience.kl_per_response().abs().max()) < 1e-4
        metrics = ppo.ppo_step(now, experience, range(8), ("policy", "value"))
        assert metrics["ratio_error"] < 2e-5 and metrics["ppo/clip_fraction"] == 0
        found[recipe.ppo.rollout] = experience.pairs
    assert found.get("vllm", found["native"]) == found["native"] != found["generate"]
    assert ("sampling with the native engine" in capsys.readouterr().err) == (cell.method in UNMERGEABLE)


def test_both_engines_take_the_likeliest_tokens(cell: Cell) -> None:
    """Prompts of different lengths, and rows that end before others."""
    cell.stage("sft")
    folder = cell.runs / "run" / "sft" / "model"
    policy, tokenizer = load_policy(folder, cell.section), load_tokenizer(str(folder))
    texts = [" ".join(text.split()[: 2 + 3 * i]) for i, text in enumerate(peft_stages.documents()[:8])]
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    both = [SamplingParams(24, 0.0, stop_ids(tokenizer, policy), engine) for engine in ("native", "generate")]
    ours, theirs = (sampling.sample(policy, tokenizer, prompts, each, seeds=[0] * len(prompts)) for each in both)
    assert ours.pairs() == theirs.pairs() and len({tuple(answer) for _, answer in ours.pairs()}) > 5
    assert gap([ours.logprobs], [theirs.logprobs]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_four_networks_have_one_base(cell: Cell, variant: str) -> None:
    stage = cell.stage(variant)
    assert stage.ppo is not None
    networks = [*stage.models.values(), stage.ppo.reference, stage.ppo.reward_model]
    base: dict[str, set[int]] = {}
    own: list[int] = []
    for model in networks:
        for key, weight in model.named_parameters():
            if cell.is_own(key):
                own.append(weight.data_ptr())
            else:
                base.setdefault(peft_stages.plain(key), set()).add(weight.data_ptr())
    assert len(base) == len([key for key in cell.plain if not cell.is_own(key)])
    for model in networks:
        for key, buffer in model.named_buffers():
            base.setdefault(peft_stages.plain(key), set()).add(buffer.data_ptr())
    assert all(len(places) == 1 for places in base.values())
    assert len(set(own)) == len(own) == 2 * sum(map(len, stage.start.values()))
    # The reference and the reward model stay what SFT and the reward stage have left.
    for model, name in ((stage.ppo.reference, "sft"), (stage.ppo.reward_model, "reward")):
        named, stored = dict(model.named_parameters()), cell.stage(name).weights
        assert all(torch.equal(named[key], stored[key]) for key in stored)
        assert not trainable(model)


# --- virtual tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_virtual_tokens_stand_before_every_row(virtual: Cell, pairs: list[Pair]) -> None:
    """Each row is what it is by itself: padded on the right, as scoring and as TRL have it, and token by token with a
    cache behind prompts that are padded on the left."""
    policy = load_policy(virtual.stage("sft").folder / "model", virtual.section)
    base = AutoModelForCausalLM.from_pretrained(virtual.base)
    made = peft_stages.tokens_by_hand(virtual, virtual.stage("sft").weights)
    expected = [peft_stages.logprobs_by_hand(virtual, base, made, pair) for pair in pairs]
    without = token_logprobs(base, pairs)
    assert min(float((a - b).abs().max()) for a, b in zip(expected, without, strict=True)) > 0.1
    assert gap(token_logprobs(policy, pairs), expected) < 1e-4
    right = build_batch(pairs, 0)
    mask = torch.arange(right.input_ids.shape[1]) <= right.last[:, None]
    logits = policy(input_ids=right.input_ids, attention_mask=mask.long()).logits[right.rows, right.before]
    assert gap([logits.log_softmax(-1).gather(1, right.targets[:, None]).squeeze(1)], [torch.cat(expected)]) < 1e-4
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    decoding = ModelDecoding(policy)
    logits = decoding.prefill([list(prompt) for prompt in prompts], torch.arange(len(prompts)), 0)
    for t in range(min(map(len, answers))):
        tokens = torch.tensor([answer[t] for answer in answers])
        found = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        assert gap([found], [torch.stack([row[t] for row in expected])]) < 1e-4
        logits = decoding.step(tokens)


def test_virtual_tokens_start_where_the_layers_know_their_way(virtual: Cell) -> None:
    """Prompt tuning at words of the vocabulary, P-tuning v2 no louder than the weights of a new model."""
    start = virtual.stage("sft").start["policy"]
    weight = next(start[key] for key in start if key.endswith("embedding.weight"))
    if virtual.method == "prompt":
        words = virtual.plain["model.embed_tokens.weight" if virtual.kind == LLAMA else "transformer.wte.weight"]
        assert all(any(torch.equal(token, word) for word in words) for token in weight)
    if virtual.method == "p_tuning_v2":
        assert float(weight.std()) == pytest.approx(0.08, rel=0.15)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bitfit_is_refused_without_biases(
    bases: dict[str, Path], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [f"model.name={bases[LLAMA]}", "model.peft.method=bitfit", f"run.dir={tmp_path}"]
    assert sft.main([*SMALL, *data, *model]) == 2
    told = capsys.readouterr().err
    assert "bitfit trains bias vectors, and LlamaForCausalLM has none" in told
    assert "model.peft.method=bitfit" in told and "ia3" in told
    assert all(name in told for name in ("GPT-2", "GPT-NeoX", "OPT", "BLOOM"))
    assert not (tmp_path / "run" / "sft" / "model").exists()


def test_virtual_tokens_take_positions_of_the_context(
    bases: dict[str, Path], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    virtual_tokens = f"model.peft.virtual_tokens={peft_stages.TOKENS}"
    tokens = ["model.peft.method=prompt", virtual_tokens, "data.max_response_tokens=76"]
    assert sft.main([*SMALL, *data, f"model.name={bases[GPT2]}", *tokens, f"run.dir={tmp_path}"]) == 2
    assert "rows may have 124 tokens and 5 virtual ones, and gpt2 has positions for 128" in capsys.readouterr().err


def test_another_base_and_another_set_of_weights_are_refused(cells: dict[str, Cell], tmp_path: Path) -> None:
    cell = cells["gpt2-lora"]
    cell.stage("reward")
    loads = {"sft": load_policy, "reward": load_reward_model}
    other = shutil.copytree(cell.base, tmp_path / "base")
    moved = {"transformer.ln_f.bias": cell.plain["transformer.ln_f.bias"] + 1e-3}
    save_file(cell.plain | moved, other / "model.safetensors")
    for name, load in loads.items():
        folder = shutil.copytree(cell.runs / "run" / name / "model", tmp_path / name / "model")
        load(folder, cell.section)
        (folder / "adapter.json").write_text((folder / "adapter.json").read_text().replace(str(cell.base), str(other)))
        with pytest.raises(UserError, match="the adapter was trained on .* with hash"):
            load(folder, cell.section)
    recipe = load_recipe(cell.arguments[0], cell.arguments[1:])
    with pytest.raises(UserError, match="the adapter was trained on .* with hash"):
        build(recipe, False, tmp_path / "sft" / "model", cell.runs / "run" / "reward" / "model")
    for name, load in loads.items():
        folder = shutil.copytree(cell.runs / "run" / name / "model", tmp_path / "less" / name)
        weights = load_file(folder / PEFT)
        gone = min(key for key in weights if "lora_A" in key)
        save_file({key: weight for key, weight in weights.items() if key != gone}, folder / PEFT)
        gone = gone.removeprefix("base_model.model.").replace("lora_A.", "lora_A.default.")
        with pytest.raises(UserError, match=f"do not hold the same weights: {re.escape(gone)}"):
            load(folder, cell.section)
