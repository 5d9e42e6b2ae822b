"""Policies under a template: the prompt they see, the answer that is judged, and the evaluate stage with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.prompt_template import Template, load_template, parse_template
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.evaluation.heldout import HeldOut
from rlhf.evaluation.prompted_baseline import PromptedResponses, answer_prompted, prompted_messages, response_ids
from rlhf.evaluation.report import label, print_summary, write_report
from rlhf.functional.seeding import row_seed
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_tokenizer, new_reward_model, save_model
from rlhf.recipe import load_recipe
from rlhf.rollout.probes import write_probes
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import scores
from stages import evaluate

FEW = """kind: answer
form: few-shot
stop: Human:
---
Q: {{ prompt }}
--- demonstrations
{"prompt": "one?", "response": "1"}
"""
THINK = """kind: answer
form: chain-of-thought
cue: So:
---
{{ prompt }} Think.
--- demonstrations
{"prompt": "one?", "reason": "it is the first", "response": "1"}
"""
PROMPTS = [Prompt.from_text(text) for text in ("Name a river.", "Boil an egg, please.", "hi")]


def recipe(**evaluate: object) -> Recipe:
    sections = {"model": {"name": "tiny"}, "data": {"max_response_tokens": 6}}
    return Recipe.model_validate(sections | {"evaluate": {"reasoning_tokens": 5} | evaluate})


@pytest.fixture
def policy(tiny_policy: PreTrainedModel) -> PreTrainedModel:
    """Return the tiny policy with another head, whose logits are far from uniform."""
    torch.manual_seed(0)
    tiny_policy.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny_policy.lm_head.weight) * 0.3)
    return tiny_policy


def test_the_examples_are_turns_before_the_dialogue() -> None:
    few, think = parse_template(FEW, "f", "few"), parse_template(THINK, "t", "think")
    expected = (("user", "Q: one?"), ("assistant", "1"), ("user", "Q: Name a river."))
    assert prompted_messages(few, PROMPTS[0]).messages == expected
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert prompted_messages(think, Prompt(turns)).messages == (
        ("system", "s"),
        ("user", "one? Think."),
        ("assistant", "it is the first\nSo: 1"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c Think."),
    )


def draw(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], n: int, seeds: list[int]):
    return sample(policy, tokenizer, rows, SamplingParams(n, 1.0, stop_ids(tokenizer, policy)), seeds=seeds)


def heldout(tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    return HeldOut(PROMPTS, [encode_prompt(tokenizer, prompt) for prompt in PROMPTS], [7, 8, 9])


def ask(template: Template, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PromptedResponses:
    asked, done = heldout(tokenizer), list[int]()
    found = answer_prompted(recipe(), policy, tokenizer, template, asked, done.append)
    assert sum(done) == len(PROMPTS) * (1 + template.reasons)
    assert [found.rollout.prompt(i) for i in range(3)] == asked.ids
    assert found.texts == found.rollout.texts(tokenizer)
    return found


def test_a_few_shot_answer_is_a_draw_under_the_longer_prompt(
    policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    template = parse_template(FEW, "f", "few")
    answers = ask(template, policy, tiny_tokenizer)
    rows = [encode_prompt(tiny_tokenizer, prompted_messages(template, prompt)) for prompt in PROMPTS]
    expected = draw(policy, tiny_tokenizer, rows, 6, [7, 8, 9])
    assert [answers.rollout.response(i) for i in range(3)] == [expected.response(i) for i in range(3)]
    assert answers.rollout.finished.tolist() == expected.finished.tolist()
    assert answers.reasoning == ["", "", ""]


def test_of_a_reasoned_answer_only_what_follows_the_cue_is_left(
    policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    template = parse_template(THINK, "t", "think")
    answers = ask(template, policy, tiny_tokenizer)
    rows = [encode_prompt(tiny_tokenizer, prompted_messages(template, prompt)) for prompt in PROMPTS]
    thoughts = draw(policy, tiny_tokenizer, rows, 5, [row_seed(seed, "reasoning") for seed in (7, 8, 9)])
    words = [text.strip() for text in thoughts.texts(tiny_tokenizer)]
    assert answers.reasoning == words and all(words)
    ends = [tiny_tokenizer(f"{said}\nSo:", add_special_tokens=False)["input_ids"] for said in words]
    rows = [row + end for row, end in zip(rows, ends, strict=True)]
    expected = draw(policy, tiny_tokenizer, rows, 6, [7, 8, 9])
    assert answers.texts == [text.lstrip() for text in expected.texts(tiny_tokenizer)]
    assert not any(said in text for said, text in zip(words, answers.texts, strict=True))


@pytest.mark.parametrize(
    ("form", "text", "finished", "expected"),
    [
        ("few", "It is 7.\n\nHuman: and", False, ("It is 7.", True)),  # stopped, so finished
        ("few", "The robot said: Human: you lie", False, None),  # within a line it begins no turn
        ("few", "It is 7.", False, None),
        ("few", " It is 7.", False, None),  # judged with its blank, as every policy is
        ("few", "Human: more", False, ("", True)),
        ("think", " It is 7.", False, ("It is 7.", False)),
        ("think", " It is 7.", True, ("It is 7.", True)),
        ("think", "  ", False, None),  # nothing would be left
    ],
)
def test_response_ids_by_hand(
    tiny_dir: str, form: str, text: str, finished: bool, expected: tuple[str, bool] | None
) -> None:
    template = parse_template(FEW if form == "few" else THINK, "x", "x")
    tokenizer = load_tokenizer(tiny_dir, ModelSection(prompt_format="plain"))
    ids = encode_response(tokenizer, text, finished)
    found = response_ids(tokenizer, template, ids, text, finished)
    assert found == (ids if expected is None else encode_response(tokenizer, *expected))
    assert found


def test_plain_turn_words_stop_nothing_where_tokens_mark_the_turns(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Ann: hello\nHuman: hello"
    ids = encode_response(tiny_tokenizer, text, False)
    assert response_ids(tiny_tokenizer, parse_template(FEW, "x", "x"), ids, text, False) == ids


def test_a_template_that_does_not_fit_is_refused(
    policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    long = parse_template(FEW.replace("Q: {{", "word " * 700 + "{{"), "f", "few")
    with pytest.raises(UserError, match="evaluate.prompted"):
        answer_prompted(recipe(), policy, tiny_tokenizer, long, heldout(tiny_tokenizer))


def test_the_recipe_names_templates_for_answers(tmp_path: Path) -> None:
    from rlhf.run.preflight import check

    check(load_recipe("tiny", ["evaluate.prompted=[few-shot,chain-of-thought]", "evaluate.prompted_policies=[sft]"]))
    for name, words in [("few-shots", "did you mean few-shot?"), ("pair-brief", "no template 'pair-brief'")]:
        with pytest.raises(UserError, match=words):
            check(load_recipe("tiny", [f"evaluate.prompted=[{name}]"]))
    with pytest.raises(UserError, match="prompted_policies"):
        load_recipe("tiny", ["evaluate.prompted_policies=[ppo]"])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_dir: str) -> Path:
    """Evaluate a run whose SFT policy is the tiny model with other embeddings, with four prompted baselines."""
    folder = tmp_path_factory.mktemp("prompted")
    run = folder / "runs" / "t"
    section, tokenizer = Recipe().model, load_tokenizer(tiny_dir)
    torch.manual_seed(3)
    sft = load_policy(tiny_dir, section)
    with torch.no_grad():
        sft.model.embed_tokens.weight.mul_(1.5)
    save_model(sft, tokenizer, run / "sft" / "model")
    reward = new_reward_model(tiny_dir, section, head_init="normal")
    save_model(reward, tokenizer, run / "reward" / "model")
    write_probes(reward, tokenizer, [([5, 6], [7, 8])], run / "reward" / "model")
    prompts, mine = folder / "prompts.jsonl", folder / "mine.txt"
    prompts.write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in PROMPTS))
    mine.write_text(THINK)
    settings = folder / "recipe.yaml"
    settings.write_text(f"run: {{dir: '{folder / 'runs'}'}}\ndata: {{prompts_heldout: ['{prompts}'], prompts: []}}\n")
    arguments = ["model.name=tiny", "run.name=t", "run.device=cpu", "data.max_response_tokens=8"]
    arguments += ["evaluate.samples_per_prompt=2", "evaluate.bootstrap=100", "tracking.wandb=disabled"]
    arguments += ["data.pretraining_heldout=[]", "evaluate.cloze_questions=4", "evaluate.reasoning_tokens=5"]
    arguments += [f"evaluate.prompted=[few-shot,{mine}]", "evaluate.prompted_policies=[base,sft]"]
    assert evaluate.main([str(settings), *arguments]) == 0
    return run


def test_the_win_rate_table_has_the_baselines(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((evaluated / "evaluate" / "results.json").read_text())
    names = ["base-few-shot", "base-mine", "sft-few-shot", "sft-mine"]
    assert list(results["policies"]) == ["sft", *names]
    over_sft = {row["a"]: row for row in results["comparisons"] if row["b"] == "sft"}
    assert set(over_sft) == set(names)
    for name in names:
        row = results["policies"][name]
        assert (row["prompted"], row["kl"], row["responses"]) == (name.split("-", 1)[1], None, 6)
        assert 0 <= over_sft[name]["low"] <= over_sft[name]["win_rate"] <= over_sft[name]["high"] <= 1
        assert "cloze_accuracy" not in row and row["response_length"]["mean"] <= 9
    assert (results["policies"]["sft"]["prompted"], results["policies"]["sft"]["kl"]) == ("", 0.0)
    metrics = json.loads((evaluated / "evaluate" / "stage.json").read_text())
    assert metrics["metrics"]["evaluate/win_rate/base-few-shot"] == over_sft["base-few-shot"]["win_rate"]
    assert any(key.endswith("mine.txt") for key in metrics["inputs"])
    print_summary(evaluated)
    assert "Base, few-shot" in capsys.readouterr().out
    html = write_report(evaluated).read_text()
    assert "SFT, mine" in html and "answered under a template" in html
    tax = html[html.index("<h2>Alignment tax</h2>") :].split("</table>")[0]
    assert "Base, few-shot" not in tax and ">SFT<" in tax
    assert (label("base-few-shot"), label("sft"), label("ppo-ptx")) == ("Base, few-shot", "SFT", "PPO-ptx")


def test_scores_are_those_of_the_answer_to_the_plain_request(evaluated: Path, tiny_dir: str) -> None:
    from rlhf.models.loading import load_reward_model

    rows = [json.loads(line) for line in (evaluated / "evaluate" / "samples.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(tiny_dir)
    reward = load_reward_model(evaluated / "reward" / "model", Recipe().model)
    assert len(rows) == 6
    compared = 0
    for row in rows:
        assert row["kl"]["sft-mine"] is None and set(row["responses"]) == set(row["scores"])
        for name in ("base-few-shot", "sft-mine"):
            prompt = encode_prompt(tokenizer, Prompt.from_text(row["prompt"]))
            ids = encode_response(tokenizer, row["responses"][name], row["finished"][name])
            if len(ids) == row["lengths"][name]:  # random bytes do not always encode as they were sampled
                assert row["scores"][name] == pytest.approx(float(scores(reward, [(prompt, ids)])[0]), abs=1e-4)
                compared += 1
    assert compared >= 4
    assert sum(len(row["responses"]["sft-mine"]) > 0 for row in rows) == 6


def test_without_templates_the_base_is_not_loaded(evaluated: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(evaluated / "sft", tmp_path / "runs" / "u" / "sft")
    loaded: list[Path] = []
    real = evaluate.load_frozen_policy

    def load(recipe: Recipe, device: torch.device, where: Path, *args: object) -> PreTrainedModel:
        loaded.append(where)
        return real(recipe, device, where, *args)

    monkeypatch.setattr(evaluate, "load_frozen_policy", load)
    prompts = evaluated.parent.parent / "prompts.jsonl"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {{dir: '{tmp_path / 'runs'}'}}\ndata: {{prompts_heldout: ['{prompts}'], prompts: []}}\n")
    arguments = ["model.name=tiny", "run.name=u", "run.device=cpu", "data.max_response_tokens=4", "data.cloze=[]"]
    arguments += ["data.pretraining_heldout=[]", "tracking.wandb=disabled"]
    assert evaluate.main([str(recipe), *arguments]) == 0
    assert [where.parent.name for where in loaded] == ["sft"]


def test_shipped_templates_answer(policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("few-shot", "chain-of-thought"):
        answers = ask(load_template(name, "answer"), policy, tiny_tokenizer)
        assert len(answers.texts) == 3
