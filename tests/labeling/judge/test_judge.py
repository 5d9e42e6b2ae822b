"""The judge as labeler: both orders, position bias, rankings by hand, kept answers, the rank stage."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import JudgeSection, Recipe
from rlhf.data.encoding import encode_prompt
from rlhf.data.few_shot import judge_template
from rlhf.data.prompt_template import Template, load_template
from rlhf.data.records import Drops, Prompt, read_rankings
from rlhf.errors import UserError
from rlhf.functional.judge_odds import BothOrders
from rlhf.labeling.base import Output
from rlhf.labeling.judge.judge import Judge, check_context_fits, load_judge, make_reader
from rlhf.labeling.judge.labeler import JudgeLabeler, position_bias
from rlhf.labeling.judge.local import Fields
from rlhf.labeling.labelers import make_evaluation_labeler, make_labeler
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rollout.scoring import token_logprobs
from rlhf.run.folder import RunFolder
from support.distributed_runs import arguments, run_ranks
from support.openai_double import Double, serving
from support.rank_stage_runs import outcome, start
from support.rigged_judge import Rigged, by_length

PROMPT = Prompt.from_text("why is the sky blue")


def outputs(*texts: str) -> list[Output]:
    return [Output(text, True) for text in texts]


def pair_judge(rule: Callable[[Fields], float], **how: Any) -> Judge:
    return Judge(load_template("pair-zero-shot"), Rigged(rule), **how)


def test_both_orders_are_asked_and_the_bias_cancels() -> None:
    judge = pair_judge(by_length(bias=5.0))
    triples = [(PROMPT.text, "aaa", "b"), (PROMPT.text, "cc", "dddd")]
    assert judge.both_orders(triples) == [pytest.approx((7.0, 3.0)), pytest.approx((3.0, 7.0))]
    assert judge.preferences(triples) == pytest.approx([2.0, -2.0])
    asked = [(q["first"], q["second"]) for q in judge.reader.asked]
    assert asked == [("aaa", "b"), ("b", "aaa"), ("cc", "dddd"), ("dddd", "cc")]
    assert judge.asked == 4  # and not again by `preferences`


def test_the_bias_is_what_it_was_rigged_to_be() -> None:
    def labels_of(bias: float) -> dict[str, Any]:
        labeler = JudgeLabeler(pair_judge(by_length(bias)))
        for n in range(1, 6):
            labeler.rank(Prompt.from_text(f"prompt {n}"), outputs("x" * n, "y" * 2 * n, "z" * 4 * n))
        return labeler.summary()

    fair, first, second = labels_of(0.0), labels_of(2.5), labels_of(-2.5)
    # Differences are n, 2n, 3n for n of 1 to 5: below 2.5 are 1 and 2 of n = 1, and 2 of n = 2. 3 of 15 pairs.
    assert (fair["position_flips"], first["position_flips"], second["position_flips"]) == (0, 0.2, 0.2)
    assert (first["position_first"], first["position_second"]) == (0.2, 0)
    assert (second["position_first"], second["position_second"]) == (0, 0.2)
    assert [x["position_shift"] for x in (fair, first, second)] == pytest.approx([0, 2.5, -2.5])
    assert fair["position_pairs"] == 15 and fair["judge_answers"] == 30
    assert fair["judge_template"] == "pair-zero-shot"
    assert first["position_flips_low"] < 0.2 < first["position_flips_high"]


def test_intervals_are_over_prompts() -> None:
    even = position_bias([[BothOrders(1, -1)] * 3] * 4)
    # No flip in the pairs of 4 prompts: Wilson's upper end z^2 / (n + z^2) = 3.8415 / 7.8415.
    assert (even["flips"], even["flips_low"]) == (0, 0)
    assert even["flips_high"] == pytest.approx(0.4899, abs=1e-4)
    assert (even["shift"], even["shift_low"], even["shift_high"]) == (0, None, None)  # log-odds are no shares


def test_k_outputs_are_ranked_by_their_mean_win_probability() -> None:
    p = {("a", "b"): 0.9, ("a", "c"): 0.6, ("a", "d"): 0.3, ("b", "c"): 0.2, ("b", "d"): 0.2, ("c", "d"): 0.5}

    def rule(q: Fields) -> float:
        a, b = q["first"], q["second"]
        share = p.get((a, b)) or 1 - p[(b, a)]
        return math.log(share / (1 - share)) + 0.4  # and a bias that must not show

    four = outputs("a", "b", "c", "d")
    labeler = JudgeLabeler(pair_judge(rule))
    # By hand in test_judge_odds.py: 0.6, 0.167, 0.567, 0.667.
    assert labeler.utilities(PROMPT, four) == pytest.approx([0.6, 0.5 / 3, 1.7 / 3, 2 / 3])
    assert labeler.rank(PROMPT, four) == labeler.rank(PROMPT, four, seed=7) == (2, 4, 3, 1)
    assert JudgeLabeler(labeler.judge, tie_margin=0.07).rank(PROMPT, four) == (1, 3, 2, 1)
    assert labeler.judge.asked == 12
    assert (labeler.prefers(PROMPT, four[0], four[1]), labeler.prefers(PROMPT, four[1], four[0])) == (1.0, 0.0)
    # 0.6 against 0.4 is a difference of 0.2.
    assert JudgeLabeler(labeler.judge, tie_margin=0.21).prefers(PROMPT, four[0], four[2]) == 0.5
    assert labeler.judge.asked == 12


def test_equal_texts_tie_and_are_not_asked_about() -> None:
    labeler = JudgeLabeler(pair_judge(by_length(bias=1.0)))
    assert labeler.rank(PROMPT, outputs("same", "longer one", "same")) == (2, 1, 2)
    assert labeler.judge.asked == 2
    assert labeler.prefers(PROMPT, *outputs("same", "same")) == 0.5
    assert labeler.judge.asked == 2


def test_points_rank_by_their_expectation() -> None:
    shares = {"a": (0.2, 0.3, 0.5), "b": (0.1, 0.6, 0.3), "c": (0.9, 0.05, 0.05)}  # points of 2.3, 2.2 and 1.15
    body = load_template("points-zero-shot").body
    reader = Rigged(lambda q: [math.log(x) for x in shares[q["response"]]])
    judge = Judge(Template("t", "points", "zero-shot", ("1", "2", "3"), "", body), reader)
    labeler = JudgeLabeler(judge, 0.04)
    assert labeler.utilities(PROMPT, outputs("a", "b", "c")) == pytest.approx([0.65, 0.6, 0.075])
    assert labeler.rank(PROMPT, outputs("a", "b", "c")) == (1, 2, 3)
    assert JudgeLabeler(judge, 0.06).rank(PROMPT, outputs("a", "b", "c")) == (1, 1, 2)
    assert judge.asked == 3
    # 0.5 x 0.7 + 0.3 x 0.1 = 0.38 above, 0.35 equal.
    assert judge.preferences([(PROMPT.text, "a", "b")]) == [pytest.approx(math.log(0.555 / 0.445))]
    assert "position_shift" not in labeler.summary()


def test_calibration_takes_off_what_is_said_without_content() -> None:
    # Of 1 and 2, without content 1 is said with 0.8; with it 0.8, or 0.5: 0.8/0.8 to 0.2/0.2, and 0.5/0.8 to 0.5/0.2.
    body = load_template("points-zero-shot").body
    template = Template("t", "points", "zero-shot", ("1", "2"), "", body)
    reader = Rigged(lambda q: [math.log(0.5)] * 2 if q["response"] == "good" else [math.log(0.8), math.log(0.2)])
    fair = Judge(template, reader, calibrate=True)
    assert [q["prompt"] for q in reader.asked] == ["N/A", "[MASK]", ""]
    found = fair.points([(PROMPT.text, "plain"), (PROMPT.text, "good")])
    assert [[math.exp(p) for p in row] for row in found] == [pytest.approx([0.5, 0.5]), pytest.approx([0.2, 0.8])]


def test_calibration_is_refused_where_it_changes_no_label() -> None:
    for name, word in (("pair-zero-shot", "cancels"), ("points-chain-of-thought", "reasons")):
        with pytest.raises(UserError, match=word):
            judge_template(JudgeSection(template=name, calibrate=True))
    assert judge_template(JudgeSection(template="points-few-shot", calibrate=True)).kind == "points"


def test_a_file_that_is_no_log_of_answers_is_left_as_it_is(tmp_path: Path) -> None:
    for text, line in (
        ("notes\nof years\n", 1),
        ("notes", 1),
        ('{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}\n', 1),
        ('{"judge": "x", "question": "q", "logprobs": [0], "reasoning": "", "bounded": 0}\nnotes\n', 2),
    ):
        log = tmp_path / "file"
        log.write_text(text)
        with pytest.raises(UserError) as caught:
            pair_judge(by_length(), log=log)
        assert caught.value.where == f"{log}, line {line}" and caught.value.fix
        assert log.read_text() == text


def test_what_was_answered_before_an_interruption_is_kept(tmp_path: Path) -> None:
    log, triples = tmp_path / "judge.jsonl", [("p", "a", "b" * n) for n in (1, 2, 3)]

    class Breaks(Rigged):
        def read(self, template, questions, advance=None, keep=None):
            for i, reading in enumerate(super().read(template, questions)):
                if i == 3:
                    raise KeyboardInterrupt
                keep({i: reading})

    with pytest.raises(KeyboardInterrupt):
        Judge(load_template("pair-zero-shot"), Breaks(by_length()), log=log).both_orders(triples)
    assert len(log.read_text().splitlines()) == 3
    again = pair_judge(by_length(), log=log)
    again.both_orders(triples)
    assert again.asked == 3 and len(log.read_text().splitlines()) == 6


def test_answers_of_another_prompt_format_are_another_judges() -> None:
    models = [recipe().model.model_copy(update={"prompt_format": name}) for name in ("plain", "verbatim")]
    plain, verbatim = (recipe().model_copy(update={"model": model}) for model in models)
    assert make_reader(plain)[1] == make_reader(plain)[1] != make_reader(verbatim)[1]


def test_answers_are_kept_and_taken_over_by_the_same_judge_alone(tmp_path: Path) -> None:
    log = tmp_path / "judge.jsonl"
    three = outputs("a", "bb", "cccc")
    first = pair_judge(by_length(), log=log, identity="model 1")
    ranks = JudgeLabeler(first).rank(PROMPT, three)
    assert len(log.read_text().splitlines()) == first.asked == 6
    with log.open("a") as file:
        file.write('{"judge": "cut off')
    again = pair_judge(by_length(), log=log, identity="model 1")
    assert JudgeLabeler(again).rank(PROMPT, three) == ranks and again.asked == 0
    assert JudgeLabeler(again).rank(PROMPT, outputs("a", "dd"))
    assert again.asked == 2
    assert [json.loads(line)["bounded"] for line in log.read_text().splitlines()] == [0] * 8
    others = [pair_judge(by_length(), log=log, identity="model 2"), Judge(load_template("pair-brief"), again.reader)]
    for other in others:
        JudgeLabeler(other).rank(PROMPT, three)
        assert other.asked == 6


# --- on the tiny model -----------------------------------------------------------------------------------------------


def recipe(**judge: Any) -> Recipe:
    values = {"model": {"name": "tiny"}, "run": {"device": "cpu"}, "rank": {"labeler": "judge"}}
    return Recipe.model_validate(values | {"judge": judge})


def test_make_labeler_reads_the_section(tmp_path: Path, tiny_dir: str) -> None:
    labeler = make_labeler("judge", recipe(template="pair-brief", tie_margin=0.3), RunFolder(tmp_path))
    assert isinstance(labeler, JudgeLabeler)
    assert (labeler.tie_margin, labeler.judge.template.name) == (0.3, "pair-brief")
    # The preference against a forward pass for each label and order.
    model, tokenizer = load_policy(tiny_dir, recipe().model), load_tokenizer(tiny_dir)
    odds = []
    for a, b in (("Blue light scatters.", "no"), ("no", "Blue light scatters.")):
        text = f"Request: {PROMPT.text}\n\nA: {a}\n\nB: {b}\n\nWhich reply is more helpful?"
        ids = encode_prompt(tokenizer, Prompt.from_text(text))
        said = [tokenizer(f"Better: {x}", add_special_tokens=False)["input_ids"] for x in "AB"]
        lp = [float(row.sum()) for row in token_logprobs(model, [(ids, s) for s in said])]
        odds.append(lp[0] - lp[1])
    found = labeler.judge.both_orders([(PROMPT.text, "Blue light scatters.", "no")])[0]
    assert found == pytest.approx(tuple(odds), abs=1e-4)


def test_evaluate_may_be_judged_as_well(tmp_path: Path) -> None:
    evaluate = Recipe().evaluate.model_copy(update={"labeler": "judge"})
    chosen = recipe(template="points-zero-shot").model_copy(update={"evaluate": evaluate})
    labeler = make_evaluation_labeler(chosen, RunFolder(tmp_path))
    (tmp_path / "evaluate").mkdir()
    assert labeler.prefers(PROMPT, *outputs("one", "two"), 0) in (0.0, 0.5, 1.0)
    assert len((tmp_path / "evaluate" / "judge.jsonl").read_text().splitlines()) == 2
    check_context_fits(chosen)
    with pytest.raises(UserError, match="judge.max_tokens"):
        check_context_fits(recipe(template="pair-few-shot", max_tokens=300))
    for most in (0, 5000):  # the tiny model has 1,024 positions, and two responses alone would take them
        long = recipe(template="pair-zero-shot", max_tokens=most)
        long = long.model_copy(update={"data": long.data.model_copy(update={"max_response_tokens": 500})})
        with pytest.raises(UserError, match="positions for 1024"):
            check_context_fits(long)


def test_a_stop_ends_the_labelling_and_what_was_answered_is_kept(tmp_path: Path, tiny_dir: str, monkeypatch) -> None:
    asked: list[str] = []
    plain = JudgeLabeler.rank

    def rank(self, prompt, outputs, seed=0):
        asked.append(prompt.key)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, prompt, outputs, seed)

    monkeypatch.setattr(JudgeLabeler, "rank", rank)
    extra = ["rank.labeler=judge", "judge.template=pair-brief"]
    assert start(tmp_path, tiny_dir, *extra) == 128 + signal.SIGTERM
    stage = tmp_path / "runs" / "t" / "rank"
    assert len(asked) == 2 and not (stage / "rankings.jsonl").exists()
    kept = len((stage / "judge.jsonl").read_text().splitlines())
    assert kept > 0
    assert start(tmp_path, tiny_dir, *extra) == 0
    answers = [json.loads(line)["question"] for line in (stage / "judge.jsonl").read_text().splitlines()]
    assert len(answers) == len(set(answers)) > kept


def test_the_rank_stage_with_a_judge(tmp_path: Path, tiny_dir: str) -> None:
    extra = ["rank.labeler=judge", "judge.template=pair-brief", "judge.tie_margin=0", "judge.max_tokens=300"]
    assert start(tmp_path, tiny_dir, *extra) == 0
    text, summary, _ = outcome(tmp_path)
    stage = tmp_path / "runs" / "t" / "rank"
    rankings = read_rankings([str(stage / "rankings.jsonl")], Drops())
    judge = load_judge(recipe(template="pair-brief"))
    for ranking in rankings:
        texts = [Output(text, True) for text in ranking.responses]
        assert JudgeLabeler(judge).rank(ranking.prompt, texts) == ranking.ranks
    assert summary["labeler"] == "judge" and summary["judge_template"] == "pair-brief"
    pairs = sum(len(r.responses) * (len(r.responses) - 1) // 2 for r in rankings)
    assert summary["position_pairs"] == pairs and summary["judge_answers"] == 2 * pairs
    assert 0 <= summary["position_flips"] <= 1 and 0 < summary["judge_label_mass"] < 1
    metrics = json.loads((stage / "stage.json").read_text())["metrics"]
    assert metrics["rank/position_shift"] == summary["position_shift"]
    assert len((stage / "judge.jsonl").read_text().splitlines()) == 2 * pairs


def test_questions_over_the_limit_are_dropped_and_counted(tmp_path: Path, tiny_dir: str) -> None:
    # The question without prompt and outputs has 55 tokens on the tiny vocabulary, two outputs some 20.
    prompts = ["a?", "Say what the weather was like when you last went out to the sea. " * 4]
    extra = ["rank.labeler=judge", "judge.template=pair-brief", "judge.max_tokens=110", "data.max_prompt_tokens=200"]
    assert start(tmp_path, tiny_dir, *extra, prompts=prompts) == 0
    text, summary, _ = outcome(tmp_path)
    assert summary["drops"]["question to the judge over judge.max_tokens"] == 1
    assert [json.loads(line)["prompt"] for line in text.splitlines()] == ["a?"]


def test_the_rank_stage_asks_an_endpoint_and_nothing_twice(tmp_path: Path, tiny_dir: str, capfd) -> None:
    model, tokenizer = load_policy(tiny_dir, recipe().model), load_tokenizer(tiny_dir)
    stage = tmp_path / "runs" / "t" / "rank"
    with serving(Double(model, tokenizer, {"A": 25.0, "B": 25.0}, patience=14)) as double:
        extra = ["rank.labeler=judge", f"judge.endpoint={double.url}", "judge.model=some", "judge.concurrency=2"]
        # Five prompts of three outputs are 30 questions; two of the third prompt's are answered before the others fail.
        assert start(tmp_path, tiny_dir, *extra) == 2
        assert "export OPENAI_API_KEY" in capfd.readouterr().err
        assert len((stage / "judge.jsonl").read_text().splitlines()) == 14
        double.patience = 10**9
        asked = len(double.bodies)
        assert start(tmp_path, tiny_dir, *extra) == 0
        assert len(double.bodies) - asked == 16
    _, summary, _ = outcome(tmp_path)
    assert summary["judge_answers"] == 30 and summary["judge_answers_with_bounds"] == 0


def test_the_stage_refuses_a_bad_template_before_it_samples(tmp_path: Path, tiny_dir: str, capfd) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("kind: pair\nform: zero-shot\nlabels: A B\n---\n{{ prompt }} {{ first }}\n")
    assert start(tmp_path, tiny_dir, "rank.labeler=judge", f"judge.template={bad}") == 2
    assert f"{bad}, line 5" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "t" / "rank" / "samples.jsonl").exists()


def test_the_section_has_a_range_for_every_number() -> None:
    for values in ({"tie_margin": 1.1}, {"shots": 0}, {"top_logprobs": 21}, {"timeout_s": 0}, {"reasoning_tokens": 0}):
        with pytest.raises(ValueError):
            JudgeSection(**values)


@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_two_processes_share_the_questions_and_rank_as_one(tmp_path: Path, tiny_dir: str) -> None:
    """Cover shared demonstrations, reasoning, and policies under a template, with whole and partitioned models."""
    few = tmp_path / "few.txt"
    example = {"prompt": "is it so? " * 40, "first": "yes", "second": "no", "label": "1"}
    head = "kind: pair\nform: few-shot\nlabels: 1 2\ncue: Better:\n---\n{{ prompt }} A {{ first }} B {{ second }}\n"
    few.write_text(f"{head}--- demonstrations\n{json.dumps(example)}\n")
    judged = ["rank.prompts=6", "rank.labeler=judge", "judge.tie_margin=0", "judge.reasoning_tokens=4"]
    prompted = ["evaluate.prompted=[few-shot,chain-of-thought]", "evaluate.prompts=3", "evaluate.reasoning_tokens=4"]
    work = {
        "few": ("rank", [*judged, f"judge.template={few}", "judge.batch_tokens=1024"]),
        "think": ("rank", [*judged, "judge.template=pair-chain-of-thought"]),
        "prompted": ("evaluate", prompted),
    }
    parted = ["launch.zero_stage=3", "launch.frozen=partitioned", "launch.gather=by_layer"]
    ways = {"one": [], "whole": ["launch.processes=2"], "parted": ["launch.processes=2", *parted]}
    jobs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for way, launch in ways.items():
        for name, (stage, more) in work.items():
            shutil.copytree(tiny_dir, tmp_path / f"{way}-{name}" / "sft" / "model")
            settings = arguments(tmp_path, f"{way}-{name}", "data.max_response_tokens=8", *more, *launch)
            jobs[way].append({"module": f"stages.{stage}", "arguments": settings})
    run_ranks(jobs["one"], tmp_path, processes=1)
    run_ranks([*jobs["whole"], *jobs["parted"]], tmp_path)

    def rows(path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]

    for way in ("whole", "parted"):
        for name in ("few", "think"):
            assert rows(f"{way}-{name}/rank/rankings.jsonl") == rows(f"one-{name}/rank/rankings.jsonl")
            expected = {row["question"]: row for row in rows(f"one-{name}/rank/judge.jsonl")}
            answers = rows(f"{way}-{name}/rank/judge.jsonl")
            assert len(answers) == len(expected) > 6
            for row in answers:
                assert row["logprobs"] == pytest.approx(expected[row["question"]]["logprobs"], abs=1e-4)
                assert row["reasoning"] == expected[row["question"]]["reasoning"]
        theirs, ours = (rows(f"{each}-prompted/evaluate/samples.jsonl") for each in (way, "one"))
        assert [row["responses"] for row in theirs] == [row["responses"] for row in ours]
