"""Templates: those that are shipped, what they make, and the line that every mistake names."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import JudgeSection
from rlhf.data import prompt_template
from rlhf.data.few_shot import check_judge, examples_from, judge_template
from rlhf.data.prompt_template import FOLDERS, load_template, parse_template, template_names
from rlhf.data.records import Prompt, Ranking
from rlhf.errors import UserError

PAIR = """# a comment
kind: pair
form: few-shot
labels: A B
cue: Better:
---
Q {{ prompt }}
1 {{first}}
2 {{ second }}

--- demonstrations
{"prompt": "p", "first": "f", "second": "s", "label": "B"}
"""


def fields(**more: str) -> dict[str, str]:
    return {"prompt": "ask", "first": "one", "second": "two"} | more


def test_messages_are_the_demonstrations_and_then_the_question() -> None:
    template = parse_template(PAIR, "t.txt", "mine")
    assert template.name == "mine"
    turns = (("user", "Q p\n1 f\n2 s"), ("assistant", "Better: B"), ("user", "Q ask\n1 one\n2 two"))
    assert template.messages(fields()) == turns


def test_reasoning_is_on_lines_of_its_own_before_the_cue() -> None:
    text = PAIR.replace("few-shot", "chain-of-thought").replace('"label"', '"reason": "because", "label"')
    assert parse_template(text, "t", "t").messages(fields())[1] == ("assistant", "because\nBetter: B")


def test_fields_are_put_in_once_and_nothing_is_executed() -> None:
    template = parse_template(PAIR, "t", "t")
    sly = fields(first="{{ second }} {% raise %}", second=r"\1 {{ prompt }}")
    assert template.question(sly) == "Q ask\n1 {{ second }} {% raise %}\n2 \\1 {{ prompt }}"


def test_a_demonstration_about_the_prompt_that_is_asked_about_is_left_out() -> None:
    template = parse_template(PAIR, "t", "t")
    assert len(template.messages(fields(prompt=" p\n"))) == 1
    assert len(template.messages(fields(prompt="p?"))) == 3


@pytest.mark.parametrize(("folder", "name"), [(f, name) for f in FOLDERS for name in template_names(f)])
def test_what_is_shipped_is_read_and_written_back_equal(folder: str, name: str, tmp_path: Path) -> None:
    template = load_template(name, folder)
    assert template.name == name
    prompt_template.write_template(template, tmp_path / "copy.txt", ["chosen by a test"])
    assert load_template(str(tmp_path / "copy.txt"), folder) == template
    assert prompt_template.template_text(template, ["x"]).startswith("# x\nname: ")
    if template.kind == "pair" and template.examples:
        answers = [example.answer for example in template.examples]
        assert answers.count("A") == answers.count("B")


def test_every_form_of_both_kinds_is_shipped() -> None:
    found = {(t.kind, t.form) for t in (load_template(name) for name in template_names("judge"))}
    assert found == {(k, f) for k in ("pair", "points") for f in ("zero-shot", "few-shot", "chain-of-thought")}
    assert {load_template(name, "answer").form for name in template_names("answer")} == {"few-shot", "chain-of-thought"}


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("kind: pair", "kind: pairs", 2, "'pairs' is unknown"),
        ("kind: pair\n", "", 1, "no `kind`"),
        ("kind: pair", "kinds: pair", 2, "did you mean `kind:`?"),
        ("kind: pair", "pair", 2, "not a line of the header"),
        ("cue: Better:", "cue:", 5, "`cue` is empty"),
        ("cue: Better:", "kind: pair", 5, "given twice"),
        ("labels: A B", "labels: A B C", 4, "there are 3 labels"),
        ("labels: A B", "labels: A AB", 4, "another label begins with 'A'"),
        ("labels: A B", "labels: A A", 4, "another label begins with 'A'"),
        ("labels: A B\n", "", 1, "no `labels`"),
        ("cue: Better:", "stop: x", 5, "nothing needs to stop"),
        ("form: few-shot", "form: zero-shot", 3, "zero-shot template has demonstrations"),
        ("---\nQ", "Q", 10, "begins no part"),
        ("--- demonstrations", "--- examples", 11, "begins no part"),
        ("{{first}}", "{{ fist }}", 8, "`{{ fist }}` is not a field"),
        ("{{first}}", "{{ first", 8, "braces without a field"),
        ("{{first}}", "{% if first %}", 8, "templates have no statements"),
        ("1 {{first}}\n", "", 7, "never uses {{ first }}"),
        ("Q {{ prompt }}\n1 {{first}}\n2 {{ second }}\n", "", 6, "no text"),
        ('"label": "B"', '"label": "C"', 12, "'C' is none of the labels"),
        ('"label": "B"', '"label": "B", "why": "x"', 12, "`why` is not a field here"),
        ('"first": "f", ', "", 12, "`first` is missing"),
        ('"label": "B"', '"label": 2', 12, "object of texts"),
        ('"label": "B"}', '"label": "B"', 12, "not JSON"),
    ],
)
def test_a_mistake_names_file_and_line(old: str, new: str, line: int, words: str) -> None:
    assert PAIR.count(old) == 1
    with pytest.raises(UserError) as caught:
        parse_template(PAIR.replace(old, new), "t.txt", "t")
    text = str(caught.value)
    assert words in text and f"t.txt, line {line}\n" in text and caught.value.fix, text


def test_reasoning_needs_a_cue_and_reasons() -> None:
    with pytest.raises(UserError, match="reasoning needs words that end it"):
        parse_template("kind: pair\nform: chain-of-thought\nlabels: A B\n---\nx", "t", "t")
    with pytest.raises(UserError, match="`reason` is missing"):
        parse_template(PAIR.replace("few-shot", "chain-of-thought"), "t", "t")


def test_names_and_kinds_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean pair-zero-shot?"):
        load_template("pair-zeroshot")
    (tmp_path / "t.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(str(tmp_path / "t.txt"))
    with pytest.raises(UserError, match="of kind pair"):
        load_template(str(FOLDERS["judge"] / "pair-brief.txt"), "answer")


def ranking(name: str, responses: str, ranks: tuple[int, ...]) -> Ranking:
    return Ranking(Prompt.from_text(name), tuple(responses), ranks)


def test_examples_of_pairs_by_hand() -> None:
    template = load_template("pair-zero-shot")
    rankings = [ranking(f"p{i}", "xyz", (2, 1, 3)) for i in range(4)]
    # Best is y, worst is z; which comes first follows A B B A.
    found = [(e.fields["first"], e.fields["second"], e.answer) for e in examples_from(rankings, template)]
    assert found == [("y", "z", "A"), ("z", "y", "B"), ("z", "y", "B"), ("y", "z", "A")]
    assert prompt_template.with_examples(template, examples_from(rankings, template)).form == "few-shot"
    assert prompt_template.with_examples(load_template("pair-few-shot"), []).form == "zero-shot"


def test_examples_of_points_by_hand() -> None:
    template = load_template("points-zero-shot")
    # Places 1, 4, 9 are best, middle, worst of 7 points: 7, 4, 1; by turns the best, the worst, the middle.
    rankings = [ranking(f"p{i}", "xyz", (9, 1, 4)) for i in range(3)] + [ranking("q", "xy", (5, 5 - 1))]
    found = [(e.fields["response"], e.answer) for e in examples_from(rankings, template)]
    assert found == [("y", "7"), ("x", "1"), ("z", "4"), ("y", "7")]
    # Of four ranks the second is a third of the way down: 6 x 1/3 = 2 below 7.
    four = [ranking("p", "wxyz", (1, 2, 3, 4))] * 3
    assert examples_from(four, template)[2] == prompt_template.Example({"prompt": "p", "response": "y"}, "3")


def test_the_recipe_s_section_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    rows = tmp_path / "r.jsonl"
    tied = '{"prompt": "tied", "responses": ["x", "y"], "ranks": [1, 1]}\n'
    rows.write_text(tied + "".join(f'{{"prompt": "p{i}", "chosen": "c", "rejected": "r"}}\n' for i in range(5)))
    taken = judge_template(JudgeSection(template="pair-few-shot", demonstrations=str(rows), shots=2))
    assert [example.fields["prompt"] for example in taken.examples] == ["p0", "p1"]
    for section, words in [
        ({"template": "pair-zero-shot", "demonstrations": str(rows)}, "takes no demonstrations"),
        ({"template": "pair-chain-of-thought", "calibrate": True}, "nothing to reason about"),
        ({"endpoint": "localhost:8000", "model": "m"}, "not the URL"),
        ({"endpoint": "http://me:secret@host/v1", "model": "m"}, "OPENAI_API_KEY"),
        ({"endpoint": "http://host/v1?key=secret", "model": "m"}, "OPENAI_API_KEY"),
        ({"endpoint": "http://host/v1"}, "asked for a model by name"),
        ({"demonstrations": "nowhere.jsonl", "template": "pair-few-shot"}, "nowhere.jsonl"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            check_judge(JudgeSection(**section))
        assert "secret" not in str(caught.value)
    bare = tmp_path / "bare.txt"
    bare.write_text(PAIR.split("--- demo")[0])
    with pytest.raises(UserError, match="without demonstrations"):
        judge_template(JudgeSection(template=str(bare)))
