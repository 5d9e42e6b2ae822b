"""Supervised fine-tuning: which tokens are trained, that packed rows do not mix, schedules, resuming, adapters."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config import Recipe, TrackingSection
from rlhf.data.encoding import Encoded, encode_prompt, encode_response
from rlhf.data.records import Demonstration, Drops, Prompt
from rlhf.data.text_blocks import demonstration_row, text_rows
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, save_model
from rlhf.models.packing_probe import keeps_documents_apart
from rlhf.models.peft.methods import add_adapter, peft_of, trainable
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.tracking import Tracker
from rlhf.training.sft_trainer import Reporter, Trainer, check_layout, layout_of, train_sft, trainer_config
from stages.sft import main, mix_rows, validation_loss, write_policy

ANSWERS = [
    ("What is a river?", "Water that runs to the sea."),
    ("Name a town.", "Prague."),
    ("How do I boil an egg?", "Put it into hot water for eight minutes and cool it."),
    ("Say yes.", "Yes."),
    ("Give me an idea for a present.", "A pair of good gloves."),
    ("What is a bridge for?", "People stand on it and watch the boats."),
    ("Count to three.", "1 2 3"),
    ("Is it cold?", "It is not cold today."),
]


def make_recipe(**sft: Any) -> Recipe:
    options = {"epochs": 1, "batch_size": 8, "micro_batch_size": 8, "lr": 1e-3, "packing": False, **sft}
    data = {"max_prompt_tokens": 48, "max_response_tokens": 48}
    run = {"seed": 3, "device": "cpu"}
    return Recipe.model_validate({"model": {"name": "tiny"}, "run": run, "data": data, "sft": options})


def make_tracker(folder: Path) -> Tracker:
    return Tracker(folder, "test", "sft", TrackingSection(wandb="disabled"), {}, axis="tokens")


def logged(folder: Path) -> list[dict[str, float]]:
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: point[name] for name in ("step", "sft/loss", "sft/lr")} for point in points]


def run(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list,
    recipe: Recipe,
    folder: Path,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trainer:
    tracker = make_tracker(folder)
    checkpoints = Checkpoints(folder / "checkpoints", before=tracker.flush)
    reporter = Reporter(checkpoints, tracker, stop_requested, layout_of(recipe))
    result = train_sft(policy, tokenizer, rows, recipe, folder, reporter)
    checkpoints.wait()
    tracker.close()
    return result


@pytest.fixture
def encoded(tiny_tokenizer: PreTrainedTokenizerBase) -> list[Encoded[Demonstration]]:
    demonstrations = [Demonstration(Prompt.from_text(question), answer) for question, answer in ANSWERS]
    return [
        Encoded(d, encode_prompt(tiny_tokenizer, d.prompt), [encode_response(tiny_tokenizer, d.response)])
        for d in demonstrations
    ]


def hand_loss(policy: PreTrainedModel, encoded: list[Encoded[Demonstration]]) -> float:
    """Mean over all response tokens of -log p, one sequence at a time, without padding."""
    total, count = 0.0, 0
    for row in encoded:
        ids = row.prompt + row.responses[0]
        with torch.no_grad():
            logp = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(len(row.prompt), len(ids)):
            total -= float(logp[t - 1, ids[t]])
            count += 1
    return total / count


def test_a_row_trains_the_response_and_its_eos(encoded, tiny_tokenizer) -> None:
    row = demonstration_row(encoded[1])
    trained = [t for t, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tiny_tokenizer.decode(trained) == "Prague.<|im_end|>"
    assert tiny_tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\nName a town.<|im_end|>")


@pytest.mark.parametrize("model", ["tiny_policy", "tiny_gpt2"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_response_tokens(model, packing, encoded, tiny_tokenizer, request, tmp_path) -> None:
    """Packed too: were the documents to see each other, the loss would differ."""
    policy = request.getfixturevalue(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4)  # far from uniform, so that attention matters
    expected = hand_loss(policy, encoded)
    assert validation_loss(policy, encoded) == pytest.approx(expected, rel=1e-5)
    recipe = make_recipe(packing=packing, max_tokens=120)
    run(policy, tiny_tokenizer, [demonstration_row(e) for e in encoded], recipe, tmp_path)
    points = logged(tmp_path)
    assert len(points) == 1
    assert points[0]["sft/loss"] == pytest.approx(expected, rel=1e-4)
    assert points[0]["step"] == sum(len(e.prompt) + len(e.responses[0]) for e in encoded)


ARCHITECTURES: dict[str, tuple[PretrainedConfig, bool]] = {  # with whether packed documents are kept apart
    "llama": (LlamaConfig(num_hidden_layers=2, intermediate_size=96, hidden_size=64, num_attention_heads=4), True),
    "gpt2": (GPT2Config(n_layer=2, n_embd=64, n_head=4), True),
    "opt": (OPTConfig(num_hidden_layers=2, ffn_dim=96, hidden_size=64, num_attention_heads=4), False),
    "bloom": (BloomConfig(n_layer=2, hidden_size=64, n_head=4), False),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_first_loss_bears_out_the_probe_of_packing(kind: str, encoded, tiny_tokenizer, tmp_path: Path) -> None:
    """What rlhf/models/packing_probe.py says of a random copy shows in the loss: packed it is that of single rows."""
    config, apart = copy.deepcopy(ARCHITECTURES[kind])
    config.vocab_size, config.word_embed_proj_dim = len(tiny_tokenizer), 64
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        setattr(config, name, 0.0)
    attention = "eager" if kind == "bloom" else "sdpa"
    torch.manual_seed(4)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    expected = hand_loss(policy.eval(), encoded)
    rows = [demonstration_row(e) for e in encoded]
    run(policy, tiny_tokenizer, rows, make_recipe(packing=True, max_tokens=120), tmp_path)
    gap = abs(logged(tmp_path)[0]["sft/loss"] - expected)
    assert gap < 1e-3 if apart else gap > 1e-2
    assert keeps_documents_apart(config, ModelSection(attention=attention)) is apart


def test_packed_documents_would_be_noticed(tiny_policy, encoded) -> None:
    """The check above has teeth: attention across documents moves the loss by far more than its tolerance."""
    with torch.no_grad():
        for parameter in tiny_policy.parameters():
            parameter.mul_(4)
    joined = [t for e in encoded for t in e.prompt + e.responses[0]]
    with torch.no_grad():
        logp = tiny_policy(torch.tensor([joined])).logits[0].log_softmax(-1)
    start, total, count = 0, 0.0, 0
    for e in encoded:
        for t in range(start + len(e.prompt), start + len(e.prompt) + len(e.responses[0])):
            total -= float(logp[t - 1, joined[t]])
            count += 1
        start += len(e.prompt) + len(e.responses[0])
    assert abs(total / count - hand_loss(tiny_policy, encoded)) > 1e-2


def test_micro_batches_do_not_change_the_step(tiny_dir, encoded, tiny_tokenizer, tmp_path) -> None:
    rows, weights = [demonstration_row(e) for e in encoded], []
    for micro in (8, 2):
        recipe = make_recipe(micro_batch_size=micro)
        policy = load_policy(tiny_dir, recipe.model)
        run(policy, tiny_tokenizer, rows, recipe, tmp_path / str(micro))
        weights.append(policy.lm_head.weight.detach())
    assert torch.allclose(*weights, atol=2e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # the rate of each of four steps; the decay reaches its share after the last one
        ("cosine", [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ("linear", [0.1 + 0.9 * (1 - k / 4) for k in range(4)]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_end_at_their_share(schedule, expected, tiny_policy, encoded, tiny_tokenizer, tmp_path) -> None:
    recipe = make_recipe(schedule=schedule, batch_size=2, micro_batch_size=2)
    run(tiny_policy, tiny_tokenizer, [demonstration_row(e) for e in encoded], recipe, tmp_path)
    assert [p["sft/lr"] / 1e-3 for p in logged(tmp_path)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_schedule_that_ends_where_it_began_is_constant(schedule, tmp_path) -> None:
    recipe = make_recipe(schedule=schedule, final_lr_fraction=1.0)
    assert trainer_config(recipe, tmp_path).lr_scheduler_type == "constant_with_warmup"


def test_training_lowers_the_loss(tiny_policy, encoded, tiny_tokenizer, tmp_path) -> None:
    before = validation_loss(tiny_policy, encoded)
    recipe = make_recipe(epochs=6, packing=True, max_tokens=64, batch_size=1, micro_batch_size=1, lr=3e-3)
    run(tiny_policy, tiny_tokenizer, [demonstration_row(e) for e in encoded], recipe, tmp_path)
    assert validation_loss(tiny_policy, encoded) < before - 1


@pytest.mark.parametrize("model", ["tiny_dir", "tiny_gpt2_dir"])
def test_a_stopped_run_resumes_exactly(model, encoded, tiny_tokenizer, tmp_path, request) -> None:
    folder = request.getfixturevalue(model)
    # With dropout, so that the random streams matter (Llama has none).
    recipe = make_recipe(epochs=3, batch_size=2, micro_batch_size=1, save_every=2, dropout=0.2)
    rows = [demonstration_row(e) for e in encoded]

    whole = load_policy(folder, recipe.model, dropout=0.2)
    run(whole, tiny_tokenizer, rows, recipe, tmp_path / "whole")

    first = load_policy(folder, recipe.model, dropout=0.2)
    asked = iter([False] * 4 + [True] * 20)
    trainer = run(first, tiny_tokenizer, rows, recipe, tmp_path / "cut", stop_requested=lambda: next(asked))
    assert trainer.state.global_step == 5
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005"]
    second = load_policy(folder, recipe.model, dropout=0.2)
    trainer = run(second, tiny_tokenizer, rows, recipe, tmp_path / "cut")

    assert trainer.state.global_step == trainer.state.max_steps == 12
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    for (name, ours), theirs in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    # A finished training that is resumed (a kill during validation) trains no more.
    third = load_policy(folder, recipe.model, dropout=0.2)
    trainer = run(third, tiny_tokenizer, rows, recipe, tmp_path / "cut")
    assert len(logged(tmp_path / "cut")) == 12
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), whole.parameters(), strict=True))


def test_adapters_train_and_are_saved_alone(tiny_dir, encoded, tiny_tokenizer, tmp_path) -> None:
    recipe = make_recipe(epochs=4, batch_size=2, micro_batch_size=2, lr=1e-2)
    policy = load_policy(tiny_dir, recipe.model)
    base = {name: p.detach().clone() for name, p in policy.named_parameters()}
    adapted = add_adapter(policy, PeftSection(method="lora", last_layers=2))
    trainer = run(adapted, tiny_tokenizer, [demonstration_row(e) for e in encoded], recipe, tmp_path)
    write_policy(trainer, tiny_tokenizer, tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()
    again = load_policy(tmp_path / "model", recipe.model)
    assert validation_loss(again, encoded) == validation_loss(trainer.model, encoded)
    merged = load_policy(tmp_path / "model", recipe.model, merged=True)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, base[name])}
    assert len(changed) == 14 and all(".layers.2." in name or ".layers.3." in name for name in changed)
    assert validation_loss(merged, encoded) == pytest.approx(validation_loss(trainer.model, encoded), rel=1e-5)


def test_a_model_that_is_an_adapter_is_refused(tiny_dir, tiny_tokenizer, tmp_path, capsys) -> None:
    policy = add_adapter(load_policy(tiny_dir, ModelSection(name="tiny")), PeftSection(method="lora"))
    save_model(policy, tiny_tokenizer, tmp_path / "model")
    for method in ("none", "lora", "prompt"):
        more = [f"run.dir={tmp_path}", f"run.name={method}", f"model.peft.method={method}", "sft.packing=false"]
        more += ["reward.peft.method=model", "tracking.wandb=disabled"]
        assert main(["tiny", f"model.name={tmp_path / 'model'}", *more]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "holds an adapter, and SFT starts from plain weights where: model.name fix: name its base" in told


def test_a_loss_that_is_not_finite_ends_the_run(tiny_policy, encoded, tiny_tokenizer, tmp_path) -> None:
    with torch.no_grad():
        tiny_policy.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="loss nan"):
        run(tiny_policy, tiny_tokenizer, [demonstration_row(e) for e in encoded], make_recipe(), tmp_path)


def test_rows_of_text(tiny_tokenizer) -> None:
    eos = tiny_tokenizer.eos_token_id
    ids = tiny_tokenizer("The old town has three bridges.", add_special_tokens=False)["input_ids"] + [eos]
    rows = text_rows(["The old town has three bridges."], tiny_tokenizer, 5, -(-len(ids) // 5), seed=0)
    assert sorted(t for row in rows for t in row["input_ids"]) == sorted(ids)
    assert all(row["completion_mask"] == [1] * len(row["input_ids"]) for row in rows)
    assert max(len(row["input_ids"]) for row in rows) == 5
    with pytest.raises(UserError, match="needs 100 rows"):
        text_rows(["The old town."], tiny_tokenizer, 5, 100, seed=0)


def test_a_tenth_of_the_rows_is_text(encoded, tiny_tokenizer, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("The old town has three bridges. " * 200)
    rows = [demonstration_row(e) for e in encoded for _ in range(9)]
    recipe = make_recipe(pretraining_mix=0.1)
    data = recipe.data.model_copy(update={"pretraining": [str(tmp_path / "text.txt")]})
    mixed = mix_rows(rows, recipe.model_copy(update={"data": data}), tiny_tokenizer, Drops())
    assert len(mixed) == 80 and sum(0 not in row["completion_mask"] for row in mixed) == 8
    assert mix_rows(rows, make_recipe(), tiny_tokenizer, Drops()) == rows


def test_the_whole_stage(tmp_path, capsys) -> None:
    """From a recipe file to an adapter that loads on its base, with the metrics of both validation passes."""
    demonstrations = [
        {"prompt": f"{question} ({n})", "response": answer} for question, answer in ANSWERS for n in range(5)
    ]
    long = {"prompt": "Say yes.", "response": "yes " * 60}
    file = tmp_path / "demonstrations.jsonl"
    file.write_text("\n".join(map(json.dumps, [*demonstrations, long])))
    limits = {"max_prompt_tokens": 48, "max_response_tokens": 48, "validation_fraction": 0.3}
    recipe = {
        "run": {"name": "t", "dir": str(tmp_path / "runs"), "seed": 3, "device": "cpu"},
        "model": {"name": "tiny", "peft": {"method": "lora", "rank": 4}},
        "data": {"demonstrations": [str(file)], **limits},
        "sft": {"epochs": 4, "batch_size": 4, "micro_batch_size": 4, "lr": 0.01, "packing": False},
        "tracking": {"wandb": "disabled"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main([str(tmp_path / "recipe.yaml")]) in (0, None)
    stage = tmp_path / "runs" / "t" / "sft"
    metrics = json.loads((stage / "stage.json").read_text())["metrics"]
    assert metrics["sft/demonstrations"] + metrics["sft/heldout_demonstrations"] == 40
    assert metrics["sft/heldout_demonstrations"] > 0
    assert metrics["sft/validation_loss"] < metrics["sft/validation_loss_before"] - 0.05
    assert "response over 48 tokens" in capsys.readouterr().out
    policy = load_policy(stage / "model", ModelSection(name="tiny"))
    peft = PeftSection(method="lora", rank=4)
    assert peft_of(policy) == peft and len(trainable(policy)) == 4 * 7 * 2
    files = {path.name for path in (stage / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert not (stage / "trainer").exists()


@pytest.mark.parametrize(("theirs", "refused"), [((1, 0), False), ((2, 0), False), ((2, 2), True), ((4, 3), True)])
def test_deepspeeds_checkpoints_are_refused_by_another_layout(
    tmp_path: Path, theirs: tuple[int, int], refused: bool
) -> None:
    (tmp_path / "layout.json").write_text(json.dumps({"processes": theirs[0], "zero_stage": theirs[1]}))
    refusal = pytest.raises(UserError, match=f"of {theirs[0]} processes under ZeRO {theirs[1]}, and this run has 1")
    with refusal if refused else nullcontext():
        check_layout(make_recipe(), tmp_path)
