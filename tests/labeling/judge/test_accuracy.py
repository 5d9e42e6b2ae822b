"""Judges measured on ranked data by hand-made answers; the search finds what was planted; the commands on files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cli
from rlhf.config import JudgeSection
from rlhf.data.prompt_template import Template, load_template
from rlhf.data.records import Drops, Prompt, Ranking
from rlhf.errors import UserError
from rlhf.labeling.base import Output
from rlhf.labeling.judge import accuracy
from rlhf.labeling.judge.accuracy import GradedPrompt, measure_judge
from rlhf.labeling.judge.judge import Judge
from rlhf.labeling.judge.labeler import JudgeLabeler
from rlhf.labeling.judge.local import Fields
from rlhf.labeling.judge.template_search import candidate_templates, search, split_rankings, template_comments
from support.rigged_judge import Rigged, by_length


def ranking(name: str, responses: list[str], ranks: list[int]) -> Ranking:
    return Ranking(Prompt.from_text(name), tuple(responses), tuple(ranks))


def pair_judge(rule, template: str = "pair-zero-shot", longest: int = 10**6) -> Judge:
    return Judge(load_template(template), Rigged(rule, longest))


def test_pairs_of_one_prompt_come_together_and_ties_are_left_out() -> None:
    drops = Drops()
    rankings = [ranking("p", ["a", "b", "c"], [2, 1, 2]), ranking("q", ["x", "y"], [1, 1])]
    items = accuracy.graded_prompts([*rankings, ranking(" p", ["d", "e"], [1, 2])], drops)
    assert items == [GradedPrompt("p", ["a", "b", "c", "d", "e"], [("b", "a"), ("b", "c"), ("d", "e")])]
    assert dict(drops.table()) == {"ranking without an ordered pair": 1}


def test_the_order_is_that_of_the_hashes_and_the_limit_counts_what_fits() -> None:
    rankings = [ranking(f"prompt {i}", ["aa", "b" * (i + 1)], [1, 2]) for i in range(9)]
    items = accuracy.graded_prompts(rankings, Drops())
    assert [item.prompt for item in items] == [r.prompt.text for r in sorted(rankings, key=lambda r: r.prompt.key)]
    assert accuracy.graded_prompts(rankings[::-1], Drops()) == items
    # "prompt i" has 8 characters, the outputs 2 and i + 1: those up to i = 4 have at most 15.
    judges, drops = [pair_judge(by_length()), pair_judge(by_length(), "pair-brief", longest=15)], Drops()
    kept = accuracy.drop_too_long_for_any(items, judges, 0, drops)
    assert kept == [item for item in items if int(item.prompt[-1]) <= 4]
    assert dict(drops.table()) == {"prompt with a question over judge.max_tokens by template pair-brief": 4}
    assert accuracy.drop_too_long_for_any(items, judges, 2, Drops()) == kept[:2]
    with pytest.raises(UserError, match="no pair"):
        accuracy.drop_too_long_for_any(items, [pair_judge(by_length(), longest=3)], 0, Drops())


def test_measures_by_hand() -> None:
    # The judge likes length, and whatever stands first by 3. The preferred ones have 4, 2, -2 and 0 characters more.
    pairs = [("aaaaaa", "aa"), ("bbbb", "bb"), ("cc", "cccc"), ("dd", "ee")]
    items = [GradedPrompt("p", [t for pair in pairs[:2] for t in pair], pairs[:2])]
    items += [GradedPrompt(f"q{i}", list(pair), [pair]) for i, pair in enumerate(pairs[2:])]
    judge, counted = pair_judge(by_length(3.0)), []
    assert len(accuracy.questions(judge, items)) == 8
    row = measure_judge(judge, items, advance=counted.append)
    assert (row["prompts"], row["pairs"], row["questions"]) == (3, 4, 8)
    assert row["accuracy"] == (1 + 1 + 0 + 0.5) / 4
    p = [1 / (1 + math.exp(-x)) for x in (4, 2, -2, 0)]
    assert row["log_loss"] == pytest.approx(-sum(map(math.log, p)) / 4)
    assert row["brier"] == pytest.approx(sum((1 - x) ** 2 for x in p) / 4)
    # Four bins of one pair (of five asked for), least confident first: 0, then 2 and -2, then 4.
    confidence = [0.5, p[1], p[1], p[0]]
    assert [b["confidence"] for b in row["reliability"]] == pytest.approx(confidence)
    assert [b["accuracy"] for b in row["reliability"]] == [0.5, 1, 0, 1]
    assert row["calibration_error"] == pytest.approx((0 + (1 - p[1]) + p[1] + (1 - p[0])) / 4)
    # 4 against a bias of 3 keeps its winner; 2, -2 and 0 do not.
    assert (row["position"]["flips"], row["position"]["first"], row["position"]["shift"]) == (0.75, 0.75, 3)
    masses = [math.exp(d / 2 - 9) + math.exp(-d / 2 - 9) for d in (7, -1, 5, 1, 1, 5, 3, 3)]
    assert row["label_mass"] == pytest.approx(sum(masses) / 8)
    assert measure_judge(judge, items)["questions"] == 0  # known already


def test_points_have_no_position_and_ask_once_for_each_output() -> None:
    judge = Judge(load_template("points-zero-shot"), Rigged(lambda q: [-abs(i - len(q["response"])) for i in range(7)]))
    items = [GradedPrompt("p", ["aaaa", "aa", "a"], [("aaaa", "aa"), ("aaaa", "a"), ("a", "aa")])]
    row = measure_judge(judge, items)
    assert row["position"] is None and row["questions"] == len(accuracy.questions(judge, items)) == 3
    assert row["accuracy"] == pytest.approx(2 / 3)


def test_points_are_right_by_the_labelers_rule_and_close_ones_are_ties() -> None:
    # a: 1 with 0.4 and 7 with 0.6, expected 4.6; b: 6. A draw of a's is above b's in 0.6, and yet b ranks better.
    least = math.log(1e-12)
    rows = {"a": [math.log(0.4), *[least] * 5, math.log(0.6)], "b": [*[least] * 5, 0.0, least]}
    judge = Judge(load_template("points-zero-shot"), Rigged(lambda q: rows[q["response"]]))
    items = [GradedPrompt(f"p{i}", ["a", "b"], [("b", "a")]) for i in range(2)]
    assert judge.preferences(items[0].triples)[0] < 0
    assert judge.utility_gaps(items[0].triples) == [pytest.approx(1.4 / 6)]
    row = measure_judge(judge, items, tie_margin=0.2)
    assert (row["accuracy"], row["ties"]) == (1.0, 0.0)
    assert measure_judge(judge, items, tie_margin=0.24)["ties"] == 1.0
    labeler = JudgeLabeler(judge, 0.2)
    assert labeler.rank(Prompt.from_text("p0"), [Output("b", True), Output("a", True)]) == (1, 2)


def test_templates_by_name(tmp_path: Path) -> None:
    rows = tmp_path / "r.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{i}", "chosen": "c", "rejected": "r"}}\n' for i in range(5)))
    cfg = JudgeSection(demonstrations=str(rows), shots=3)
    zero, few = accuracy.templates_of(cfg, ["pair-zero-shot", "pair-few-shot"])
    assert (len(zero.examples), [e.fields["prompt"] for e in few.examples]) == (0, ["p0", "p1", "p2"])
    with pytest.raises(UserError, match="two templates are called pair-brief"):
        accuracy.templates_of(JudgeSection(), ["pair-brief", "pair-brief"])


# --- search ----------------------------------------------------------------------------------------------------------


def pool(n: int = 120) -> list[Ranking]:
    """Return n rankings in which the shorter output is better, wherever it is in the file."""
    ways = [1 if i % 2 else -1 for i in range(n)]
    return [ranking(f"prompt number {i}", ["short", "rather longer"][::w], [1, 2][::w]) for i, w in enumerate(ways)]


def test_the_parts_share_no_prompt_and_follow_the_seed() -> None:
    rankings = [*pool(), *pool(20)]  # some prompts twice
    parts = split_rankings(rankings, seed=3)
    keys = [{r.prompt.key for r in part} for part in parts]
    assert len(set.union(*keys)) == sum(map(len, keys)) == 120
    assert sum(map(len, parts)) == 140
    assert [len(k) for k in keys] == [pytest.approx(n, abs=15) for n in (20, 60, 40)]
    assert split_rankings(rankings, seed=3) == parts != split_rankings(rankings, seed=4)


def test_candidates_are_templates_as_they_are_and_seeded_draws() -> None:
    templates = [load_template("pair-brief"), load_template("pair-chain-of-thought"), load_template("points-zero-shot")]
    found = candidate_templates(templates, pool(30), [2, 4], trials=2, seed=1)
    assert [t.name for t in found] == [
        "pair-brief",
        *(f"pair-brief-{n}-shots-{i}" for n in (2, 4) for i in (1, 2)),
        "pair-chain-of-thought",
        "points-zero-shot",
        *(f"points-zero-shot-{n}-shots-{i}" for n in (2, 4) for i in (1, 2)),
    ]
    drawn = found[3]
    assert drawn.form == "few-shot" and [e.answer for e in drawn.examples] == ["A", "B", "B", "A"]
    assert drawn.examples[0].fields["first"] == "short"
    assert candidate_templates(templates, pool(30), [2, 4], 2, seed=1) == found
    assert candidate_templates(templates, pool(30), [2, 4], 2, seed=2) != found
    with pytest.raises(UserError, match="the pool has 3"):
        candidate_templates(templates, pool(3), [4], 1, seed=1)
    long = [ranking(f"p{i}", ["word " * 70, "x " * 60], [1, 2]) for i in range(9)]
    with pytest.raises(UserError, match="the pool has 0 .of 9"):
        candidate_templates(templates, long, [2], 1, seed=1)


class Planted(Rigged):
    """Right (the shorter one) in a share of prompts that depends on the template alone, else wrong."""

    def __init__(self, template: Template, share: float) -> None:
        super().__init__(self.odds)
        self.share, self.template = share, template

    def odds(self, q: Fields) -> float:
        knows = int(q["prompt"].split()[-1]) % 10 < 10 * self.share
        return (len(q["second"]) - len(q["first"])) * (1 if knows else -1)


def test_the_search_finds_the_planted_template_and_confirms_elsewhere(tmp_path: Path) -> None:
    parts = split_rankings(pool(), seed=1)
    templates = [load_template("pair-zero-shot"), load_template("pair-brief")]
    found = candidate_templates(templates, parts.pool, [2], 2, seed=1)
    planted = found[4]
    assert planted.name == "pair-brief-2-shots-1"
    judges = [Judge(t, Planted(t, 0.9 if t is planted else 0.6)) for t in found]
    result = search(judges, parts, Drops())
    assert result.template is planted and result.report["chosen"] == planted.name
    assert result.report["score"]["accuracy"] == pytest.approx(0.9, abs=0.1)
    assert result.report["first_candidate_confirmation"]["accuracy"] == pytest.approx(0.6, abs=0.2)
    # What was asked about in each part is of that part alone; the losers never saw the third.
    prompts = [{r.prompt.text for r in part} for part in parts]
    asked = {q["prompt"] for q in judges[4].reader.asked}
    assert asked == prompts[1] | prompts[2] and not asked & prompts[0]
    assert {q["prompt"] for q in judges[1].reader.asked} == prompts[1]
    assert {e.fields["prompt"] for e in planted.examples} <= prompts[0]
    # By hand: the share of the score part's prompts whose number ends below 9.
    right = [int(text.split()[-1]) % 10 < 9 for text in prompts[1]]
    assert result.report["score"]["accuracy"] == pytest.approx(sum(right) / len(right))
    lines = template_comments(result.report, ["some/where/r.jsonl"])
    assert "5 candidates on r.jsonl" not in lines[0] and "6 candidates on r.jsonl" in lines[0]


def test_a_choice_that_does_not_hold_elsewhere_is_told() -> None:
    parts = split_rankings(pool(), seed=1)
    known = {r.prompt.text for r in parts.score}
    template = load_template("pair-brief")
    overfit = Judge(template, Rigged(lambda q: (len(q["second"]) - len(q["first"])) * (q["prompt"] in known or -1)))
    result = search([overfit], parts, Drops())
    assert (result.report["score"]["accuracy"], result.report["confirmation"]["accuracy"]) == (1.0, 0.0)
    assert "0.0 % of pairs" in result.warning and "fits the prompts it was made on" in result.warning
    assert search([pair_judge(lambda q: len(q["second"]) - len(q["first"]))], parts, Drops()).warning == ""


def test_equally_accurate_ones_are_ranked_by_log_loss_then_by_order() -> None:
    parts, template = split_rankings(pool(), 1), load_template("pair-brief")

    def sure(scale: float) -> Judge:
        return Judge(template, Rigged(lambda q: scale * (len(q["second"]) - len(q["first"]))))

    judges = [sure(0.1), sure(0.5), sure(0.5)]
    scores = search(judges, parts, Drops(), limit=9).report["candidates"]
    assert [row["prompts"] for row in scores] == [9, 9, 9]
    judges = [sure(0.1), sure(0.5), sure(0.5)]
    best = search(judges, parts, Drops(), 9).report["score"]
    assert best["log_loss"] == scores[1]["log_loss"] < scores[0]["log_loss"]
    assert judges[2].asked < judges[1].asked  # of the equal ones the first is confirmed


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def rlhf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return the command, run in this process; test_cli.py starts it as a user does."""

    def command(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return command


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranked") / "r.jsonl"
    rows = [{"prompt": r.prompt.text, "responses": r.responses, "ranks": r.ranks} for r in pool(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judge_eval_prints_a_table_and_writes_json(file: Path, tmp_path: Path, rlhf: Callable[..., Done]) -> None:
    out, answers = tmp_path / "found.json", tmp_path / "answers.jsonl"
    line = ["judge-eval", str(file), "--recipe", "tiny", "--limit", "6", "--json", str(out), "--answers", str(answers)]
    line += ["--template", "pair-brief", "--template", "points-zero-shot", "--template", "pair-chain-of-thought"]
    line += ["--set", "judge.reasoning_tokens=4", "--set", "judge.max_tokens=900"]
    done = rlhf(*line)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["template"]: row for row in found["templates"]}
    assert set(rows) == {"pair-brief", "points-zero-shot", "pair-chain-of-thought"}
    for row in rows.values():
        assert (row["prompts"], row["pairs"], row["answers"]) == (6, 6, 12)
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        share = f"{100 * row['accuracy']:.1f} [{100 * row['accuracy_low']:.1f}, {100 * row['accuracy_high']:.1f}]"
        assert share in done.stdout
    assert found["model"] == "tiny" and found["judge"]["reasoning_tokens"] == 4
    assert len(answers.read_text().splitlines()) == 36
    again = rlhf(*line)
    assert again.returncode == 0 and [row["questions"] for row in json.loads(out.read_text())["templates"]] == [0, 0, 0]


def test_judge_search_writes_a_template_that_judge_eval_takes(file: Path, tmp_path: Path, rlhf) -> None:
    out = tmp_path / "best.txt"
    line = ["judge-search", str(file), "--recipe", "tiny", "--out", str(out), "--template", "pair-brief"]
    done = rlhf(*line, "--shots", "2", "--trials", "2", "--set", "judge.max_tokens=900")
    assert done.returncode == 0, done.stderr
    report, template = json.loads(out.with_suffix(".json").read_text()), load_template(str(out))
    assert template.name == report["chosen"] and f"judge.template={out}" in done.stdout
    names = [row["template"] for row in report["candidates"]]
    assert names == ["pair-brief", "pair-brief-2-shots-1", "pair-brief-2-shots-2"]
    assert out.read_text().startswith("# Chosen by rlhf judge-search out of 3 candidates on r.jsonl.\n")
    held = report["score"]["accuracy_low"] <= report["confirmation"]["accuracy"] <= report["score"]["accuracy_high"]
    assert ("warning: on other prompts" in done.stderr) is not held
    assert rlhf("judge-eval", str(file), "--recipe", "tiny", "--limit", "2", "--template", str(out)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--template", "pair-breif"], "did you mean pair-brief?"),
        (["--set", "judge.shotz=2"], "did you mean judge.shots?"),
        (["--endpoint", "host:1/v1", "--model", "m"], "not the URL"),
        (["--set", "judge.max_tokens=20"], "raise judge.max_tokens"),
        (["--set", "judge.calibrate=true", "--template", "pair-chain-of-thought"], "judge.calibrate"),
    ],
)
def test_mistakes_are_told(file: Path, arguments: list[str], words: str, rlhf: Callable[..., Done]) -> None:
    done = rlhf("judge-eval", str(file), "--recipe", "tiny", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
