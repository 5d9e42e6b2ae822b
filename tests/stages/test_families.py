"""The whole recipe on small models with the traits of families; `make models` runs all and writes docs/models.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.data.chat_template import turn_end
from rlhf.data.encoding import encode_prompt, fit_rankings
from rlhf.data.records import Drops, Prompt, read_rankings
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rollout.llama_forward import llama_forward_for
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from stages import evaluate, ppo, rank, reward, sft
from support.families import FAMILIES, SMALL_RECIPE, make_family
from support.paths import ROOT

QUICK = ("Llama 3", "Gemma 2", "Phi-3", "Granite")
REFUSED: tuple[str, ...] = ()  # families that are told before anything is trained that they cannot be
STAGES = {"sft": sft, "rank": rank, "reward": reward, "ppo": ppo, "evaluate": evaluate}
TABLE: dict[str, list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Write docs/models.md after the whole matrix."""
    yield
    if set(TABLE) == set(FAMILIES):
        head = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("| model |")[0]
        lines = ["| model | attention | passes | ends a turn with | whole recipe |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join([name, *TABLE[name]])} |" for name in FAMILIES]
        (ROOT / "docs" / "models.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.models) for n in FAMILIES])
def test_the_whole_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """PPO's own checks hold the ratio to 1 and the KL to 0 at its start, to 1e-4."""
    family = FAMILIES[name]
    monkeypatch.chdir(tmp_path)
    make_family(name, tmp_path / "base")
    section = ModelSection(name=str(tmp_path / "base"), attention=family.attention)
    arguments = ["tiny", f"model.name={section.name}", f"model.attention={section.attention}", *SMALL_RECIPE]
    arguments.append(f"sft.packing={str(family.packing).lower()}")
    for stage, module in STAGES.items():
        code = module.main(arguments)
        told = capsys.readouterr()
        if code == 2 and stage == "sft":  # refused before anything is trained
            reason = next(line for line in told.err.splitlines() if line.startswith("error: "))
            TABLE[name] = [family.attention, "-", "-", f"refused: {reason.removeprefix('error: ')}"]
            assert name in REFUSED, told.err
            return
        assert code == 0, f"{stage}: {told.out[-2000:]}{told.err[-2000:]}"

    run = tmp_path / "runs" / "run"
    tokenizer, policy = load_tokenizer(run / "sft" / "model"), load_policy(run / "sft" / "model", section)
    end = tokenizer.convert_tokens_to_ids(family.end) if family.end else tokenizer.eos_token_id
    assert turn_end(tokenizer) == end

    # Log-probabilities of sampled responses are those of transformers' own forward over the vocabulary's tokens.
    theirs = AutoModelForCausalLM.from_pretrained(run / "sft" / "model", attn_implementation=family.attention).eval()
    prompts = [encode_prompt(tokenizer, Prompt.from_text(text)) for text in ("Why?", "Name a town.", "Go on.")] * 4
    stops = [end, tokenizer.eos_token_id, *range(8, 1024, 16)]
    rollout = sample(policy, tokenizer, prompts, SamplingParams(24, 1.0, stops), seeds=list(range(12)))
    for i, (prompt, response) in enumerate(rollout.pairs()):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + response])).logits[0, :, : len(tokenizer)].double()
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
        assert rollout.logprobs[i, : len(response)].tolist() == pytest.approx(expected.tolist(), abs=1e-4)

    # What PPO scores ends as in reward training, whichever id has stopped the response.
    scored = {ids[-1] for (_, ids), stopped in zip(rollout.ended_pairs(), rollout.finished, strict=True) if stopped}
    rankings = fit_rankings(read_rankings([str(run / "rank" / "rankings.jsonl")], Drops()), tokenizer, 999, Drops())
    outputs = [pair for row in rankings for pair in zip(row.responses, row.item.finished, strict=True)]
    trained = {ids[-1] for ids, finished in outputs if finished} or {end}
    assert scored == trained == {end}
    assert max(i for _, response in rollout.pairs() for i in response) < len(tokenizer)
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results
    passes = "fast" if llama_forward_for(policy) else "the model's own"
    text = tokenizer.convert_ids_to_tokens(end).replace("|", r"\|")  # a bar would end a cell of the table
    said = "passes" if family.packing else "passes, with sft.packing=false"
    TABLE[name] = [family.attention, passes, f"`{text}`", said]
