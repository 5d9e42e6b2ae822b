"""An OpenAI-compatible endpoint: the real client over real HTTP, against a double that runs the tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.prompt_template import load_template
from rlhf.errors import UserError
from rlhf.labeling.judge import endpoint as judge_endpoint
from rlhf.labeling.judge.endpoint import KEY, EndpointReader, chat, read_labels
from rlhf.labeling.judge.judge import Judge
from support.openai_double import Double, serving

QUESTIONS = [{"prompt": f"Name {n} rivers.", "first": "The Elbe.", "second": "Rivers are water."} for n in range(6)]


@pytest.fixture(autouse=True)
def no_key_and_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


Endpoint = Callable[..., AbstractContextManager[tuple[Double, EndpointReader]]]


@pytest.fixture
def endpoint(tiny_policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> Endpoint:
    """Return a function that serves the tiny model with a random head: endpoint(fault, **bias)."""
    torch.manual_seed(0)
    tiny_policy.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny_policy.lm_head.weight) * 0.5)

    @contextmanager
    def served(fault: str = "", **bias: float) -> Iterator[tuple[Double, EndpointReader]]:
        with serving(Double(tiny_policy, tiny_tokenizer, bias, fault)) as double:
            yield double, EndpointReader(double.url, "some-model", reasoning_tokens=5, timeout_s=1.0 if fault else 30.0)

    return served


def test_labels_are_what_the_model_gives_them(endpoint: Endpoint, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv(KEY, "a-secret")
    template = load_template("pair-few-shot")
    # Both spellings of a label count for it: with and without a blank before it.
    with endpoint(**{"A": 22.0, "ĠA": 18.0, "B": 20.0}) as (double, reader):
        counted: list[int] = []
        found = reader.read(template, QUESTIONS, counted.append)
    assert sum(counted) == len(QUESTIONS) == len(double.bodies)
    assert set(double.keys) == {"Bearer a-secret"}
    ids = {name: tiny_tokenizer.convert_tokens_to_ids(name) for name in ("A", "ĠA", "B")}
    for question, reading in zip(QUESTIONS, found, strict=True):
        logp = double.distribution(chat(template, question), [])
        p = {name: math.exp(float(logp[i])) for name, i in ids.items()}
        assert reading.logprobs == pytest.approx((math.log(p["A"] + p["ĠA"]), math.log(p["B"])), abs=1e-6)
        assert reading.bounded == 0
    body = double.bodies[0]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("some-model", 1, True, 20)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"] * 4 + ["user"]
    assert body["messages"][1]["content"] == "A"
    assert body["messages"][-1]["content"].endswith("Which answer is better, A or B?\n\nThe better answer is")


def test_reasoning_comes_first_and_the_cue_is_a_turn(endpoint: Endpoint) -> None:
    template = load_template("pair-chain-of-thought")
    with endpoint(A=25.0, B=25.0) as (double, reader):
        reading = reader.read(template, QUESTIONS[:1])[0]
    first, second = double.bodies
    assert first["max_tokens"] == 5 and "logprobs" not in first
    assert second["messages"][:-2] == first["messages"]
    assert [m["role"] for m in second["messages"][-2:]] == ["assistant", "user"]
    assert second["messages"][-1]["content"] == "The better answer is"
    assert reading.reasoning and reading.reasoning == second["messages"][-2]["content"]
    example, shown = template.examples[0], [m["content"] for m in first["messages"][1:4]]
    assert shown == [example.reason, "The better answer is", example.answer]


def test_a_label_that_is_not_told_has_a_bound_and_is_counted() -> None:
    # 0.5 + 0.2 + 0.1 leave 0.2; what is not told has at most 0.1, the least that was.
    told = {" A": math.log(0.5), "The": math.log(0.2), "a": math.log(0.1)}
    assert read_labels(told, ("A", "B")) == (pytest.approx((math.log(0.5), math.log(0.1))), 1)
    # 0.7 + 0.28 leave 0.02, less than the least.
    told = {"A": math.log(0.7), "x": math.log(0.28)}
    assert read_labels(told, ("A", "B")) == (pytest.approx((math.log(0.7), math.log(0.02))), 1)
    # Neither is told: even, and both are counted.
    (a, b), bounded = read_labels({"x": math.log(0.9)}, ("A", "B"))
    assert (a, bounded) == (b, 2)
    # Rounded to more than 1, and OpenAI's number for nothing.
    assert read_labels({"A": 0.0, "B": -9999.0}, ("A", "B"))[0] == pytest.approx((0.0, math.log(1e-9)))
    assert read_labels({"A": 0.0, "x": -1.0}, ("A", "B")) == (pytest.approx((0.0, math.log(1e-9))), 1)


def test_labels_missing_over_http(endpoint: Endpoint, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with endpoint(A=30.0, B=-30.0) as (double, reader):
        reading = reader.read(load_template("pair-zero-shot"), QUESTIONS[:1])[0]
    assert reading.bounded == 1 and reading.logprobs[0] == pytest.approx(0, abs=1e-3)
    logp = double.distribution(chat(load_template("pair-zero-shot"), QUESTIONS[0]), [])
    b = float(logp[tiny_tokenizer.convert_tokens_to_ids("B")])
    assert b < reading.logprobs[1] <= max(math.log(1e-9), float(logp.topk(20).values[-1])) + 1e-9


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    with endpoint("busy", A=25.0, B=25.0) as (double, reader):
        assert len(reader.read(load_template("pair-zero-shot"), QUESTIONS)) == len(QUESTIONS)
    assert len(double.bodies) == len(QUESTIONS) + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("key", "export OPENAI_API_KEY"),
        ("model", "knows no such model"),
        ("bare", "no log-probabilities"),
        ("empty", "no choices"),
        ("page", "mostly ends in /v1"),
        ("quotes", "refuses the key"),
        ("slow", "did not answer in time"),
    ],
)
def test_what_an_endpoint_may_do_wrong_is_told(endpoint: Endpoint, fault: str, words: str, monkeypatch) -> None:
    monkeypatch.setattr(judge_endpoint, "RETRIES", 0)
    monkeypatch.setenv(KEY, "a-secret")
    with endpoint(fault, A=9.0) as (double, reader), pytest.raises(UserError, match=words) as caught:
        reader.read(load_template("pair-zero-shot"), QUESTIONS[:2])
    assert double.url in str(caught.value) and "a-secret" not in str(caught.value)


def test_a_question_over_the_context_has_no_answer(endpoint: Endpoint) -> None:
    with endpoint("long", A=9.0) as (_, reader):
        read = reader.read(load_template("pair-zero-shot"), QUESTIONS[:2])
        assert [reading.refused for reading in read] == [True, True]
        judge = Judge(load_template("pair-zero-shot"), reader)
        assert not judge.all_answered(judge.questions_for("p", ["a", "b"]))
        with pytest.raises(UserError, match="too long for the endpoint's model"):
            judge.preferences([("p", "a", "b")])


def test_what_was_answered_is_kept_when_another_question_fails(endpoint: Endpoint) -> None:
    kept: dict[int, object] = {}
    with endpoint(A=25.0, B=25.0) as (double, reader):
        double.patience = 4
        with pytest.raises(UserError, match="refuses the key"):
            reader.read(load_template("pair-zero-shot"), QUESTIONS, keep=kept.update)
    assert len(kept) == 4


def test_an_endpoint_that_never_says_a_label_is_given_up(endpoint: Endpoint) -> None:
    template = replace(load_template("pair-zero-shot"), labels=("better", "worse"))  # of several tokens
    with endpoint(A=25.0, B=25.0) as (_, reader):
        assert all(reading.bounded == 2 for reading in reader.read(template, QUESTIONS * 3))  # 18
        with pytest.raises(UserError, match="in none of 24 answers a label .better, worse."):
            reader.read(template, QUESTIONS)
    with endpoint(A=25.0, B=25.0) as (_, reader):
        reader.read(load_template("pair-zero-shot"), QUESTIONS[:1])
        assert len(reader.read(template, QUESTIONS * 4)) == 24  # one had a label


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_endpoint, "RETRIES", 0)
    with pytest.raises(UserError, match="cannot be reached"):
        EndpointReader("http://127.0.0.1:9/v1", "m").read(load_template("pair-zero-shot"), QUESTIONS[:1])
