"""Published layouts: one realistic row of each, read from a file as a user would, with the ranking worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.layout_fields import ending, named
from rlhf.data.layouts import split_transcript
from rlhf.data.ranks import ranks_of_scores
from rlhf.data.records import Message, Prompt, Ranking
from support.data_files import assert_bad_ranking, rankings_in, user

HEAD = "\n\nHuman: My bike chain keeps slipping.\n\nAssistant: In which gear?\n\nHuman: The third."
HH = {
    "chosen": f"{HEAD}\n\nAssistant: Then the derailleur needs a small turn.\n\nTry a quarter.",
    "rejected": f"{HEAD}\n\nAssistant: Buy a new bike.",
}
SUMMARY = {
    "info": {
        "id": "t3_x1",
        "post": "My flatmate leaves the tap running.\nI pay the bill.",
        "title": "Tap wars",
        "subreddit": "relationships",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " Flatmate wastes water.", "policy": "sup1", "note": None},
        {"text": " Flatmate lets the tap run and I pay for it.", "policy": "ref", "note": "clear"},
    ],
    "choice": 1,
    "worker": "w1",
    "batch": "batch4",
    "split": "train",
    "extra": {"confidence": 7},
}
ARTICLE = {"id": "n1", "post": None, "title": "Bridge shut", "article": "The bridge is shut."}
NEWS = SUMMARY | {"info": ARTICLE, "choice": 0}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "q9", "full_text": "Why is the sea salty?"},
    "quotes_0": {"title": ["Sea"], "extract": ["Rivers carry salt."]},
    "answer_0": "Rivers carry salt into it [1].",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "quotes_1": {"title": [], "extract": []},
    "answer_1": "Rain dissolves rock, rivers carry the salt [1], and only water evaporates [2].",
    "tokens_1": {"prefix": [1], "completion": [3]},
    "score_1": 0.5,
}
ULTRA = {
    "source": "evol_instruct",
    "instruction": "Name a prime above 10.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"model": "a", "response": "11", "overall_score": 7.0, "fine-grained_score": 4.5},
        {"model": "b", "response": "12", "overall_score": 10.0, "fine-grained_score": 1.25},
        {"model": "c", "response": "13", "overall_score": 8, "fine-grained_score": 4.5},
        {"model": "d", "response": "17 is one.", "overall_score": 8.5, "fine-grained_score": 5.0},
    ],
    "correct_answers": ["None"],
}
NECTAR = {
    "prompt": "\n\nHuman: Hi \n\nAssistant: Hello! \n\nHuman: A joke, please. \n\nAssistant: ",
    "answers": [
        {"answer": f"joke {i}", "model": f"m{i}", "rank": rank} for i, rank in enumerate((3.0, 1, 2, 7, 5, 5, 4))
    ],
    "turns": 2,
    "num_responses": 7,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
SHP = {
    "post_id": "p1",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "How do I keep basil green in pesto?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "score_A": 340,
    "score_B": 57,
    "human_ref_A": "Blanch it for ten seconds first.",
    "human_ref_B": "Add lemon.",
    "labels": 1,
}


def reply(text: str, role: str, rank: int | None = None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    ranked = {} if rank is None else {"rank": rank}
    return {"message_id": text, "text": text, "role": role, "replies": list(replies)} | ranked | more


OASST = {
    "message_tree_id": "t1",
    "tree_state": "ready_for_export",
    "prompt": reply(
        "What is a fugue?",
        "prompter",
        None,
        reply("A song.", "assistant", 2),
        reply(
            "Voices that take up one theme in turn.",
            "assistant",
            0,
            reply(
                "And a canon?",
                "prompter",
                0,
                reply("Strict imitation.", "assistant", 1),
                reply("The same theme, note for note.", "assistant", 0),
            ),
            reply("Thanks.", "prompter", 1, reply("Welcome.", "assistant")),
        ),
        reply("Music.", "assistant", 1),
        reply("spam", "assistant", 3, deleted=True),
        reply("unranked", "assistant"),
    ),
}


def test_hh_rlhf(tmp_path: Path) -> None:
    first, last = Message("user", "My bike chain keeps slipping."), Message("user", "The third.")
    prompt = (first, Message("assistant", "In which gear?"), last)
    chosen, rejected = "Then the derailleur needs a small turn.\n\nTry a quarter.", "Buy a new bike."
    assert rankings_in(tmp_path, HH) == ([Ranking(Prompt(prompt), (chosen, rejected), (1, 2))], [])


def test_hh_rlhf_blemishes_are_counted(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi"
    rows = [
        {"chosen": f"{start}\n\nAssistant: ", "rejected": f"{start}\n\nAssistant: a"},
        {"chosen": f"{start}\n\nAssistant: a", "rejected": f"{start}\n\nAssistant: a"},
        {"chosen": f"{start}\n\nAssistant: a", "rejected": f"{start} there\n\nAssistant: b"},
        {"chosen": f"{start}\n\nAssistant: a\n\nHuman: b", "rejected": f"{start}\n\nAssistant: b"},
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        HH,
    ]
    rankings, drops = rankings_in(tmp_path, *rows)
    assert len(rankings) == 1
    assert drops == [
        ("HH-RLHF: an empty response", 1),
        ("HH-RLHF: equal responses ranked apart", 1),
        ("HH-RLHF: the dialogues part before the last answer", 1),
        ("HH-RLHF: the dialogue does not end with the assistant", 1),
        ("HH-RLHF: an empty prompt or turn", 1),
    ]


def test_summarize_from_feedback(tmp_path: Path) -> None:
    post = (
        "SUBREDDIT: r/relationships\n\nTITLE: Tap wars\n\n"
        "POST: My flatmate leaves the tap running.\nI pay the bill.\n\nTL;DR:"
    )
    texts = ("Flatmate wastes water.", "Flatmate lets the tap run and I pay for it.")
    first = Ranking(user(post), texts, (2, 1), labeler="w1")
    second = Ranking(user("Article:\nThe bridge is shut.\n\nTL;DR:"), texts, (1, 2), labeler="w1")
    assert rankings_in(tmp_path, SUMMARY, NEWS) == ([first, second], [])


def test_webgpt(tmp_path: Path) -> None:
    tie = WEBGPT | {"score_0": 0.0, "score_1": 0.0}
    texts = (WEBGPT["answer_0"], WEBGPT["answer_1"])
    question = user("Why is the sea salty?")
    expected = [Ranking(question, texts, (2, 1)), Ranking(question, texts, (1, 1))]
    assert rankings_in(tmp_path, WEBGPT, tie) == (expected, [])


def test_ultrafeedback(tmp_path: Path) -> None:
    texts = ("11", "12", "13", "17 is one.")
    coarse = json.loads(json.dumps(ULTRA))
    coarse["completions"][0]["fine-grained_score"] = None
    none = ULTRA | {"completions": []}
    question = user("Name a prime above 10.")
    # fine-grained 4.5, 1.25, 4.5, 5.0; without one of them all go by overall 7, 10, 8, 8.5
    rankings = [Ranking(question, texts, (2, 3, 2, 1)), Ranking(question, texts, (4, 1, 3, 2))]
    drops = [("UltraFeedback: fewer than 2 ranked responses", 1)]
    assert rankings_in(tmp_path, ULTRA, coarse, none) == (rankings, drops)


def test_nectar(tmp_path: Path) -> None:
    prompt = Prompt((Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "A joke, please.")))
    expected = Ranking(prompt, tuple(f"joke {i}" for i in range(7)), (3, 1, 2, 6, 5, 5, 4))
    assert rankings_in(tmp_path, NECTAR) == ([expected], [])


def test_shp(tmp_path: Path) -> None:
    texts, question = ("Blanch it for ten seconds first.", "Add lemon."), user("How do I keep basil green in pesto?")
    rows = [SHP, SHP | {"labels": 0}]
    assert rankings_in(tmp_path, *rows) == ([Ranking(question, texts, (1, 2)), Ranking(question, texts, (2, 1))], [])


def test_openassistant_trees(tmp_path: Path) -> None:
    first = Message("user", "What is a fugue?")
    best = "Voices that take up one theme in turn."
    nested = Prompt((first, Message("assistant", best), Message("user", "And a canon?")))
    outer = Ranking(Prompt((first,)), ("A song.", best, "Music."), (3, 1, 2))
    inner = Ranking(nested, ("Strict imitation.", "The same theme, note for note."), (2, 1))
    assert rankings_in(tmp_path, OASST) == ([outer, inner], [])


def test_openassistant_trees_may_be_deep(tmp_path: Path) -> None:
    node = reply("end", "prompter", 0, reply("x", "assistant", 0), reply("y", "assistant", 1))
    for i in range(100):
        node = reply(f"p{i}", "prompter", 0, reply(f"a{i}", "assistant", 0, node), reply("no", "assistant", 1))
    rankings, drops = rankings_in(tmp_path, {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": node})
    assert len(rankings) == 101 and len(rankings[-1].prompt.messages) == 201 and drops == []


NUMBER = {"text": 3, "role": "assistant", "rank": 1}
BAD_TREE = {"prompt": reply("x", "prompter", None, reply("y", "assistant", 0), NUMBER)}
MISTAKES = [
    ({"chosen": "hello", "rejected": "bye"}, "chosen", "there is no `prompt`, and `chosen` is not a dialogue"),
    ({k: v for k, v in HH.items() if k != "rejected"}, "rejected", "the field `rejected` is missing"),
    (SUMMARY | {"choice": 2}, "choice", "`choice` is 2, and there are 2 summaries"),
    (SUMMARY | {"worker": 5}, "worker", "`worker` is a number, not a string"),
    (SUMMARY | {"choice": None}, "choice", "the field `choice` is missing"),
    (SUMMARY | {"info": {"post": "x", "title": "y"}}, "info.subreddit", "`info.subreddit` is null, not a string"),
    (SUMMARY | {"summaries": [{"text": 1}]}, "summaries[0].text", "is a number, not a string"),
    (WEBGPT | {"question": "Why?"}, "question", "`question` is a string, not an object"),
    (WEBGPT | {"score_1": "0.5"}, "score_1", "`score_1` is '0.5', not a number"),
    (ULTRA | {"completions": [{"response": "x"}]}, "completions[0].overall_score", "is None, not a number"),
    (ULTRA | {"completions": ["x"]}, "completions[0]", "is a string, not an object"),
    (NECTAR | {"answers": [{"answer": "x"}]}, "answers[0].rank", "is None, not a number"),
    (SHP | {"labels": 2}, "labels", "`labels` is 2"),
    ({k: v for k, v in SHP.items() if k != "labels"}, "labels", "the field `labels` is missing"),
    ({"prompt": reply("x", "user")}, "prompt.role", "the role is 'user'"),
    (BAD_TREE, "prompt.replies[1].text", "is a number, not a string"),
]


@pytest.mark.parametrize(("row", "field", "part"), MISTAKES)
def test_mistakes_name_the_published_field(tmp_path: Path, row: dict[str, Any], field: str, part: str) -> None:
    assert_bad_ranking(tmp_path, HH, row, field, part)


def test_own_ranks_go_before_published_keys(tmp_path: Path) -> None:
    own, published = {"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1]}, {"answers": [], "instruction": "i"}
    assert rankings_in(tmp_path, own | published | {"completions": []}) == (
        [Ranking(user("q"), ("x", "y"), (2, 1))],
        [],
    )


def test_scores_to_ranks() -> None:
    assert ranks_of_scores([7, 9, 7, 1]) == [2, 1, 2, 3]
    assert ranks_of_scores([]) == []


ENDINGS = {"answer12": "12", "Response B ": "b", "b": "b", "text_left": "left", "prompt": "", "id-x": "x", "": ""}


@pytest.mark.parametrize(("name", "end"), ENDINGS.items())
def test_endings_of_names(name: str, end: str) -> None:
    assert ending(name) == end


def test_an_option_names_a_field_by_its_whole_name_before_its_ending() -> None:
    names = ["reply 1", "answer1", "answer2"]
    assert named("Answer-1", names) == "answer1"
    assert named("x2", names) == "answer2"
    assert named("x1", names) is None and named("x3", names) is None and named("x", ["y", "z"]) is None


def test_split_transcript() -> None:
    turns = [("Human", "a"), ("Assistant", "b"), ("Human", "c")]
    assert split_transcript("Human: a\n\nAssistant: b \n\nHuman:c") == turns
    assert split_transcript("Human: a\nAssistant: b") == [("Human", "a\nAssistant: b")]
    for text in ("", "a", "Assistant: a\n\nHuman: b", "a\n\nHuman: b"):
        assert split_transcript(text) is None
