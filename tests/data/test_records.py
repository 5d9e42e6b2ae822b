"""Records: what each form of row becomes, and what each mistake says."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import records
from rlhf.data.records import Cloze, Demonstration, Drops, Message, Prompt, Ranking, ranking_row, write_jsonl
from rlhf.errors import UserError
from support.data_files import Read, error_of, user, write_lines
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/data with public data is not there")

TURNS = "Human: hi\n\nAssistant: hello\n\nHuman: who are you?\n\nAssistant:"


# Prompts


def test_a_transcript_becomes_turns_and_other_text_one_message() -> None:
    turns = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "who are you?"))
    assert Prompt.from_text(TURNS).messages == turns
    assert Prompt.from_text(f"\n\n{TURNS} ").messages == turns
    assert Prompt.from_text(TURNS).text == TURNS
    for text in ("Why?", " Why? \n", "Human: no end", "Say Human: x\n\nAssistant:", "Human: a\n\nAssistant: b"):
        assert Prompt.from_text(text, "chat") == user(text, "chat")
        assert Prompt.from_text(text).text == text
    # A second "Human:" in a row is part of what the human says.
    twice = Prompt.from_text("Human: a\n\nHuman: b\n\nAssistant:")
    assert twice.messages == (Message("user", "a\n\nHuman: b"),)


def test_text_shows_the_system_message() -> None:
    prompt = Prompt((Message("system", "Be brief."), Message("user", "Hi")))
    assert prompt.text == "System: Be brief.\n\nHuman: Hi\n\nAssistant:"


def test_key_ignores_white_space_and_composition_but_not_words() -> None:
    assert user("why not?").key == hashlib.sha256(b"why not?").hexdigest()
    assert user(" why\n  not? ", "chat").key == user("why not?").key
    assert user("caf\u00e9").key == user("cafe\u0301").key
    assert user("Why not?").key != user("why not?").key


@pytest.mark.parametrize("text", ["", " \n", "Human: \n\nAssistant: x\n\nHuman: y\n\nAssistant:"])
def test_empty_prompts_and_turns_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="empty"):
        Prompt.from_text(text)


# Forms of rows


def test_demonstrations_as_prompt_and_completion(tmp_path: Path) -> None:
    """TRL's two forms of its prompt-completion format, one of them that of its TL;DR set."""
    said = [{"role": "user", "content": "The sky is"}]
    path = write_lines(
        tmp_path / "d.jsonl",
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": said, "completion": [{"role": "assistant", "content": "It is grey."}]},
    )
    expected = [Demonstration(user("The sky is"), " blue."), Demonstration(user("The sky is"), "It is grey.")]
    assert records.read_demonstrations([str(path)], Drops()) == expected


def test_demonstrations(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        {"prompt": "a?", "response": " yes ", "use_case": "chat", "source": "x"},
        "",
        {"messages": [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "no"}]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "c?"}], "response": "so"},
        {"prompt": TURNS, "response": "me"},
        {"prompt": "a?", "response": " yes "},
        {"prompt": "a?", "response": "yes"},
    )
    drops = Drops()
    assert records.read_demonstrations([path], drops) == [
        Demonstration(user("a?", "chat"), " yes "),
        Demonstration(user("b?"), "no"),
        Demonstration(Prompt((Message("system", "s"), Message("user", "c?"))), "so"),
        Demonstration(Prompt.from_text(TURNS), "me"),
        Demonstration(user("a?"), "yes"),
    ]
    assert drops.table() == [("exact duplicate of a demonstration", 1)] and drops.total == 1


def test_rankings(tmp_path: Path) -> None:
    four = ["w", "x", "y", "z"]
    path = write_lines(
        tmp_path / "r.jsonl",
        {"prompt": "q", "responses": four, "ranks": [4, 1, 1, 9], "finished": [True, False, True, True]},
        {"prompt": "q", "responses": four, "ranking": "D > C>A=B"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
        {"chosen": said(("user", "q"), ("assistant", "aye")), "rejected": said(("user", "q"), ("assistant", "nay"))},
        {"prompt": "q", "responses": ["same", "same"], "ranks": [1, 1]},
    )
    drops = Drops()
    true = (True,) * 4
    assert records.read_rankings([path], drops) == [
        Ranking(user("q"), tuple(four), (4, 1, 1, 9), (True, False, True, True)),
        Ranking(user("q"), tuple(four), (3, 3, 2, 1), true),
        Ranking(user("q"), ("good", "bad"), (1, 2), (True, True)),
        Ranking(user("q"), ("aye", "nay"), (1, 2)),
        Ranking(user("q"), ("same", "same"), (1, 1)),
    ]
    assert drops.table() == [("exact duplicate of a ranking", 1)]


def test_labelers_and_times_are_kept(tmp_path: Path) -> None:
    noon = datetime(2026, 5, 1, 12, 0, 0, 250000, UTC)
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    listed = {"prompt": "q", "responses": ["x", "y"]}
    rows: list[dict[str, Any]] = [
        pair | {"labeler": "ann", "time": "2026-05-01T12:00:00.25Z"},
        pair | {"labeler": "bob", "time": noon.timestamp()},
        listed | {"ranking": "A>B", "labeler": "cem", "time": "2026-05-01T14:00:00.25+02:00"},
        listed | {"ranks": [1, 2], "labeler": "dia", "time": "2026-05-01 12:00:00.250"},
        listed | {"ranks": [1, 2], "labeler": "dia", "time": "2026-05-01T12:00:00.25Z"},
        pair,
        pair | {"labeler": "ann"},
    ]
    drops = Drops()
    rankings = records.read_rankings([write_lines(tmp_path / "r.jsonl", *rows)], drops)
    # Labelers who say the same are no duplicates of each other; the fifth row is one of the fourth.
    assert [(r.labeler, r.time) for r in rankings] == [
        ("ann", noon), ("bob", noon), ("cem", noon), ("dia", noon), ("", None), ("ann", None),
    ]  # fmt: skip
    assert {(r.responses, r.ranks) for r in rankings} == {(("x", "y"), (1, 2))}
    assert drops.table() == [("exact duplicate of a ranking", 1)]
    write_jsonl(tmp_path / "again.jsonl", [ranking_row(r) for r in rankings])
    assert records.read_rankings([str(tmp_path / "again.jsonl")], Drops()) == rankings
    first = json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])
    assert (first["labeler"], first["time"]) == ("ann", "2026-05-01T12:00:00.250000+00:00")


def test_sixteen_outputs_are_the_most(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(16)]
    row = {"prompt": "q", "responses": texts, "ranking": "P=O>N>M>L>K>J>I>H>G>F>E>D>C>B>A"}
    path = write_lines(tmp_path / "r.jsonl", row)
    (ranking,) = records.read_rankings([path], Drops())
    assert ranking.ranks == (15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1)


def test_prompts_are_read_once(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", {"prompt": "a?", "use_case": "chat"}, {"prompt": "b?"})
    two = write_lines(tmp_path / "b.jsonl", {"prompt": " a?", "use_case": "qa"}, {"prompt": "c?"}, {"prompt": "b?"})
    drops = Drops()
    assert records.read_prompts([one, two], drops) == [user("a?", "chat"), user("b?"), user("c?")]
    assert drops.table() == [("prompt seen before", 2)]


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffOne.\n\nTwo.\n".encode())
    path = write_lines(tmp_path / "t.jsonl", {"text": "three"}, {"text": "One.\n\nTwo.\n"}, {"text": "three"})
    drops = Drops()
    assert records.read_texts([str(tmp_path / "book.txt"), path], drops) == ["One.\n\nTwo.\n", "three"]
    assert drops.table() == [("exact duplicate of a text", 2)]


def test_cloze(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "c.jsonl",
        {"context": "a", "choices": ["x", "y"], "answer": 1},
        {"context": "b", "choices": ["x", "y", "z"], "label": 0},
    )
    assert records.read_cloze([path]) == [Cloze("a", ("x", "y"), 1), Cloze("b", ("x", "y", "z"), 0)]


def test_rows_read_back_equal(tmp_path: Path) -> None:
    prompts = [user("a?", "chat"), Prompt.from_text(TURNS), Prompt((Message("system", "s"), Message("user", "u")))]
    prompts += [user("Human: not a turn\n\nAssistant:"), user("Human:\n\nAssistant:")]
    rankings = [Ranking(p, ("x", "y\nz"), (1, 1), (True, False)) for p in prompts]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, [ranking_row(r) for r in rankings])
    assert records.read_rankings([str(path)], Drops()) == rankings
    row = {"prompt": "a?", "use_case": "chat", "responses": ["x", "y"], "ranks": [1, 2], "finished": [True, True]}
    assert ranking_row(Ranking(user("a?", "chat"), ("x", "y"), (1, 2))) == row
    with pytest.raises(ValueError):
        write_jsonl(path, [{"x": float("nan")}])
    assert records.read_rankings([str(path)], Drops()) == rankings
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_drops_add_up() -> None:
    drops = Drops()
    drops.add("b")
    drops.add("a", 2)
    drops.add("b", 3)
    assert drops.table() == [("b", 4), ("a", 2)] and drops.total == 6


# Mistakes

GOOD = {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [1, 2, 3]}


def cloze(paths: list[str], drops: Drops) -> list[Cloze]:
    return records.read_cloze(paths)


def without(row: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names} | changes


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


MISTAKES = {
    records.read_prompts: [
        ('{"prompt": "a"', None, ["the line is not JSON: Expecting ',' delimiter at column 15", "one object"]),
        ("[1]", None, ["the line is a list, not an object"]),
        ({"text": "a"}, "prompt", ["the field `prompt` is missing", "add `prompt`"]),
        ({"promt": "a"}, "prompt", ["the field `prompt` is missing", "rename `promt` to `prompt`"]),
        ({"prompt": None}, "prompt", ["the field `prompt` is missing"]),
        ({"prompt": 5}, "prompt", ["`prompt` is a number, not a string"]),
        ({"prompt": True}, "prompt", ["`prompt` is true or false, not a string"]),
        ({"prompt": {"a": 1}}, "prompt", ["`prompt` is an object, not a string"]),
        ({"prompt": " \n"}, "prompt", ["`prompt` is empty", "delete the line"]),
        ('{"prompt": "a \\ud83d b"}', "prompt", ["half of a character"]),
        ({"prompt": "Human: \n\nAssistant:"}, "prompt", ["a turn of the transcript is empty"]),
        ({"prompt": []}, "prompt", ["`prompt` has no messages"]),
        ({"prompt": said(("assistant", "a"))}, "prompt", ["the last message of the prompt is the assistant's"]),
        ({"prompt": ["a"]}, "prompt[0]", ["`prompt[0]` is a string, not an object"]),
        ({"prompt": said(("human", "a"))}, "prompt[0].role", ["'human' is unknown", "system, developer, user"]),
        ({"prompt": said(("user", ""))}, "prompt[0].content", ["`prompt[0].content` is empty"]),
        ({"prompt": said(("user", "a"), ("system", "b"))}, "prompt[1].role", ["a system message comes first"]),
        ({"prompt": "a", "use_case": 3}, "use_case", ["`use_case` is a number, not a string"]),
    ],
    records.read_demonstrations: [
        ({"prompt": "a"}, "response", ["the field `response` is missing"]),
        ({"prompt": "a", "response": ""}, "response", ["`response` is empty"]),
        ({"prompt": "a", "completion": ""}, "completion", ["`completion` is empty"]),
        (
            {"prompt": "a", "completion": [{"role": "user", "content": "b"}]},
            "completion",
            ["message of `completion` is"],
        ),
        (
            {
                "prompt": "a",
                "completion": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
            },
            "completion",
            ["`completion` has 2 messages"],
        ),
        ({"messages": "a"}, "messages", ["`messages` is a string, not a list"]),
        ({"messages": said(("user", "a"))}, "messages", ["last message of `messages` is the user's"]),
        ({"messages": said(("assistant", "a"))}, "messages", ["no user message comes before"]),
    ],
    records.read_rankings: [
        (without(GOOD, "ranks"), "ranks", ["the field `ranks` is missing"]),
        (without(GOOD, "responses"), "responses", ["the field `responses` is missing"]),
        (without(GOOD, "prompt"), "prompt", ["the field `prompt` is missing"]),
        (GOOD | {"responses": "x"}, "responses", ["`responses` is a string, not a list"]),
        (GOOD | {"responses": ["x", " ", "z"]}, "responses[1]", ["`responses[1]` is empty"]),
        (GOOD | {"responses": ["x"], "ranks": [1]}, "responses", ["there are 1 responses; a ranking has 2 to"]),
        (GOOD | {"responses": list("abcdefghijklmnopq")}, "responses", ["there are 17 responses", "2 to 16"]),
        (GOOD | {"ranks": [1, 2]}, "ranks", ["there are 2 ranks for 3 responses"]),
        (GOOD | {"ranks": [1, 0, 2]}, "ranks[1]", ["the rank 0 is below 1", "count from 1"]),
        (GOOD | {"ranks": [1, 1.5, 2]}, "ranks[1]", ["is a number, not a whole number"]),
        (GOOD | {"ranks": [1, 2, True]}, "ranks[2]", ["is true or false, not a whole number"]),
        (GOOD | {"responses": ["x", "y", "x"]}, "ranks", ["responses 0 and 2", "same text with ranks 1 and 3"]),
        (GOOD | {"labeler": 3}, "labeler", ["`labeler` is a number, not a string"]),
        (GOOD | {"labeler": ""}, "labeler", ["`labeler` is empty"]),
        (GOOD | {"time": "noon"}, "time", ["`time` is 'noon', which is not a time", "2026-05-01T09:30:00Z"]),
        (GOOD | {"time": 1777636800000}, "time", ["1777636800000, which is not a time", "seconds since 1970"]),
        (GOOD | {"time": True}, "time", ["is true or false, not a time"]),
        (GOOD | {"time": [1]}, "time", ["is a list, not a time"]),
        (GOOD | {"ranking": "A>B>C"}, "ranking", ["both `ranks` and `ranking`"]),
        (without(GOOD, "ranks", ranking="A>B>E"), "ranking", ["'E' names none of the 3", "A B C"]),
        (without(GOOD, "ranks", ranking="A>B>"), "ranking", ["'' names none"]),
        (without(GOOD, "ranks", ranking="A>B=A"), "ranking", ["the letter A comes twice"]),
        (without(GOOD, "ranks", ranking="B"), "ranking", ["leaves out A, C"]),
        (without(GOOD, "ranks", ranking=[1]), "ranking", ["`ranking` is a list, not a string"]),
        (GOOD | {"finished": [True]}, "finished", ["not 3 times true or false"]),
        (GOOD | {"finished": [1, 1, 1]}, "finished", ["not 3 times true or false"]),
        ({"prompt": "q", "chosen": "x"}, "rejected", ["the field `rejected` is missing"]),
        ({"prompt": "q", "chosen": "x", "rejected": 1}, "rejected", ["`rejected` is a number"]),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "ranks", ["are the same text"]),
        ({"chosen": said(("assistant", "x")), "rejected": "y"}, "prompt", ["the field `prompt` is missing"]),
        (
            {"prompt": "q", "chosen": "x", "rejected": said(("user", "other"), ("assistant", "y"))},
            "rejected",
            ["`rejected` carries another prompt"],
        ),
    ],
    cloze: [
        ({"choices": ["x", "y"], "answer": 0}, "context", ["the field `context` is missing"]),
        ({"context": "a", "choices": ["x"], "answer": 0}, "choices", ["there are 1 choices"]),
        ({"context": "a", "choices": ["x", ""], "answer": 0}, "choices[1]", ["`choices[1]` is empty"]),
        ({"context": "a", "choices": ["x", "y"], "label": 2}, "label", ["`label` is 2, and there are 2 choices"]),
        ({"context": "a", "choices": ["x", "y"], "answer": "1"}, "answer", ["is a string, not a whole number"]),
        ({"context": "a", "choices": ["x", "y"]}, "answer", ["the field `answer` is missing"]),
    ],
    records.read_texts: [
        ({"content": "a"}, "text", ["the field `text` is missing"]),
        ({"text": ""}, "text", ["`text` is empty"]),
    ],
}


@pytest.mark.parametrize(
    ("read", "row", "field", "parts"), [(read, *case) for read, cases in MISTAKES.items() for case in cases]
)
def test_a_bad_line_names_file_line_field_and_remedy(
    tmp_path: Path, read: Read, row: Any, field: str | None, parts: list[str]
) -> None:
    # The bad line is line 3, after a good one and a blank one.
    good = {"prompt": "p", "response": "r", "text": "t", "context": "c", "choices": ["x", "y"], "answer": 0}
    if read is records.read_rankings:
        good = GOOD
    source = write_lines(tmp_path / "data.jsonl", good, "", row)
    message = str(error_of(read, source))
    where = f"{source}, line 3" + (f", field `{field}`" if field else "")
    assert f"  where: {where}\n" in message
    for part in parts:
        assert part in message


# The shared public data


@needs_shared
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("rankings_hh_helpful_base_test", 1700, 2), ("rankings_oasst_en", 200, 9), ("rankings_vicuna80_gpt4", 50, 5)],
)
def test_shared_rankings(name: str, least: int, most: int) -> None:
    drops = Drops()
    rankings = records.read_rankings([str(SHARED / f"{name}.jsonl")], drops)
    assert len(rankings) >= least and drops.total == 0
    assert max(len(r.ranks) for r in rankings) <= most and min(min(r.ranks) for r in rankings) == 1
    if name == "rankings_hh_helpful_base_test":
        assert all(r.prompt.messages[-1].role == "user" for r in rankings)
        assert any(len(r.prompt.messages) > 1 for r in rankings)


@needs_shared
def test_shared_demonstrations_texts_and_questions() -> None:
    drops = Drops()
    for name, least in (("demos_oasst_en", 250), ("demos_selfinstruct_seed", 100), ("demos_dolly", 3000)):
        assert len(records.read_demonstrations([str(SHARED / f"{name}.jsonl")], drops)) >= least
    assert drops.total == 0
    texts = records.read_texts(
        [str(SHARED / "text_gutenberg_scifi.jsonl"), str(SHARED / "text_wizard_of_oz.txt")], drops
    )
    assert len(texts) == 61 and texts[-1].startswith("Dorothy lived in the midst")
    for name, choices in (("hellaswag_500", 4), ("piqa_500", 2)):
        questions = records.read_cloze([str(SHARED / "evals" / f"{name}.jsonl")])
        assert len(questions) == 500 and {len(q.choices) for q in questions} == {choices}
