"""Label Studio's export: tasks as the tool writes them, read from a file as a user would."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Drops, Prompt, Ranking, ranking_row, read_rankings, write_jsonl
from rlhf.errors import UserError
from support.data_files import assert_bad_ranking, rankings_in

PROMPT = Prompt.from_text("Why do onions make us cry?")
TWO = {"prompt": PROMPT.text, "answer1": "They are sad.", "answer2": "A gas from the cut cells irritates the eye."}
TEXTS = (TWO["answer1"], TWO["answer2"])
ITEMS = [
    {"id": "m1", "title": "Model 1", "body": "Because."},
    {"id": "m2", "title": "Model 2", "body": "A gas."},
    {"id": "m3", "title": "Model 3", "body": "Sulfur compounds from cut cells."},
]
LISTED = {"prompt": PROMPT.text, "items": ITEMS}
EDITED = datetime(2026, 5, 2, 8, 0, 0, 457580, UTC)  # an annotation says what it did when it was last changed


def annotation(*results: dict[str, Any], by: Any = 7, **more: Any) -> dict[str, Any]:
    """One labeler's, with the fields around it that the tool writes."""
    return {
        "id": 68045,
        "completed_by": by,
        "result": list(results),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2026-05-01T12:00:00.457543Z",
        "updated_at": "2026-05-02T08:00:00.457580Z",
        "lead_time": 12.51,
        "prediction": {},
        "parent_annotation": None,
    } | more


def task(data: dict[str, Any], *annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": 401635,
        "annotations": list(annotations),
        "file_upload": "tasks.json",
        "drafts": [],
        "predictions": [{"result": [pairwise("left")]}],
        "data": data,
        "meta": {},
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "project": 183,
    }


def result(kind: str, value: dict[str, Any], name: str = "rank") -> dict[str, Any]:
    return {"value": value, "id": "Sba4F4tuVh", "from_name": name, "to_name": "x", "type": kind, "origin": "manual"}


def pairwise(selected: str) -> dict[str, Any]:
    return result("pairwise", {"selected": selected}, "comparison")


def choices(*chosen: str) -> dict[str, Any]:
    return result("choices", {"choices": list(chosen)}, "better")


def ranker(**columns: list[Any]) -> dict[str, Any]:
    return result("ranker", {"ranker": columns})


def expected(responses: tuple[str, ...], ranks: tuple[int, ...], labeler: str = "7") -> Ranking:
    return Ranking(PROMPT, responses, ranks, labeler=labeler, time=EDITED)


def ranks_of(tmp_path: Path, data: dict[str, Any], *results: dict[str, Any]) -> tuple[int, ...]:
    rankings, drops = rankings_in(tmp_path, task(data, annotation(*results)))
    assert len(rankings) == 1 and drops == []
    return rankings[0].ranks


def test_pairwise_of_two_labelers_with_a_skip(tmp_path: Path) -> None:
    skipped = annotation(was_cancelled=True, by=9)
    rows = [
        task(TWO, annotation(pairwise("right")), annotation(pairwise("left"), by=8), skipped),
        task(TWO, annotation()),
        task(TWO),
    ]
    assert rankings_in(tmp_path, *rows) == (
        [expected(TEXTS, (2, 1)), expected(TEXTS, (1, 2), "8")],
        [
            ("Label Studio: a skipped annotation", 1),
            ("Label Studio: an annotation that ranks nothing", 1),
            ("Label Studio: a task without annotations", 1),
        ],
    )


def test_labelers(tmp_path: Path) -> None:
    people = [{"id": 3, "email": "ann@example.org", "first_name": "Ann"}, {"id": 4, "email": ""}, None, 0]
    rankings, _ = rankings_in(tmp_path, *(task(TWO, annotation(pairwise("left"), by=who)) for who in people))
    assert [r.labeler for r in rankings] == ["ann@example.org", "4", "", "0"]


def test_a_ranker_orders_a_list(tmp_path: Path) -> None:
    # Best first m3, m1, m2; ranks go with the items as the task lists them.
    rankings, _ = rankings_in(tmp_path, task(LISTED, annotation(ranker(rank=["m3", "m1", "m2"]))))
    assert rankings == [expected(("Because.", "A gas.", "Sulfur compounds from cut cells."), (2, 3, 1))]
    numbers = LISTED | {"items": [{"id": i, "title": t} for i, t in enumerate("xyz")], "tags": [{"id": "m1"}]}
    rankings, _ = rankings_in(tmp_path, task(numbers, annotation(ranker(rank=["2", "0", "1"]))))
    assert rankings == [expected(("x", "y", "z"), (2, 3, 1))]


def test_buckets_with_numbers_tie(tmp_path: Path) -> None:
    assert ranks_of(tmp_path, LISTED, ranker(_=[], best_1=["m2"], good_2=["m3", "m1"], bad_3=[])) == (3, 2, 3)
    assert ranks_of(tmp_path, LISTED, ranker(place0=["m1", "m2", "m3"], place1=[])) == (1, 1, 1)


def test_items_left_in_the_list_are_counted(tmp_path: Path) -> None:
    rows = [
        task(LISTED, annotation(ranker(_=["m1"], place1=["m2"], place2=["m3"]))),
        task(LISTED, annotation(ranker(place1=["m2"], place2=["m3"]))),
        task(LISTED, annotation(ranker(_=[], place1=[]))),
    ]
    unranked, empty = ("leaves items unranked", 2), ("ranks nothing", 1)
    drops = [(f"Label Studio: an annotation that {what}", count) for what, count in (unranked, empty)]
    assert rankings_in(tmp_path, *rows) == ([], drops)


@pytest.mark.parametrize(
    ("choice", "ranks"),
    [
        ("answer1", (1, 2)), ("Answer 2", (2, 1)), ("Answer1", (1, 2)), ("Response-2", (2, 1)), ("left", (1, 2)),
        ("Right", (2, 1)), ("Tie", (1, 1)), ("both bad", (1, 1)), ("No preference", (1, 1)),
    ],
)  # fmt: skip
def test_choices_name_an_answer_or_a_tie(tmp_path: Path, choice: str, ranks: tuple[int, ...]) -> None:
    # Other questions of the task are no matter: a rating, a comment, and choices that name no answer.
    others = [result("rating", {"rating": 4}), result("textarea", {"text": ["fine"]}), choices("Harmful", "Rude")]
    assert ranks_of(tmp_path, TWO, *others, choices(choice)) == ranks


@pytest.mark.parametrize(
    ("left", "right"), [("response_a", "response_b"), ("text1", "text2"), ("left", "right"), ("out 0", "out 1")]
)
def test_names_of_the_two_answers(tmp_path: Path, left: str, right: str) -> None:
    data = {right: "second", "id": "a1", "Prompt": PROMPT.text, left: "first", "source": "web"}
    assert rankings_in(tmp_path, task(data, annotation(pairwise("left"))))[0] == [expected(("first", "second"), (1, 2))]


def test_blemishes_are_counted_as_of_published_layouts(tmp_path: Path) -> None:
    empty, same = TWO | {"answer1": ""}, TWO | {"answer1": TWO["answer2"]}
    drops = [("Label Studio: an empty response", 1), ("Label Studio: equal responses ranked apart", 1)]
    tasks = [task(data, annotation(pairwise("left"))) for data in (empty, same)]
    assert rankings_in(tmp_path, *tasks) == ([], drops)


def test_what_was_read_is_written_back(tmp_path: Path) -> None:
    tasks = [task(TWO, annotation(pairwise("left"))), task(LISTED, annotation(ranker(a1=["m1", "m2", "m3"])))]
    rankings, _ = rankings_in(tmp_path, *tasks)
    write_jsonl(tmp_path / "out.jsonl", [ranking_row(r) for r in rankings])
    assert len(rankings) == 2 and read_rankings([str(tmp_path / "out.jsonl")], Drops()) == rankings


MISTAKES = [
    (TWO, pairwise("none"), "annotations[0].result[0].value.selected", "`selected` is 'none'"),
    (TWO, {"type": "pairwise"}, "annotations[0].result[0].value", "is null, not an object"),
    (TWO, choices("Better"), "annotations[0].result[0].value.choices", "names neither of the two answers"),
    (TWO, choices("1"), "annotations[0].result[0].value.choices", "names neither of the two answers"),  # or a grade
    (LISTED | {"context": ITEMS}, ranker(rank=["m1", "m2", "m3"]), "annotations[0].result[0].value.ranker", "several"),
    (TWO, choices("1", "2"), "annotations[0].result[0].value.choices", "names neither of the two answers"),
    (TWO | {"answer1": 3}, pairwise("left"), "data", "not clear which two fields"),
    (TWO | {"reply1": "x", "reply2": "y"}, pairwise("left"), "data", "prompt, answer1, answer2, reply1, reply2"),
    ({"answer1": "x", "answer2": "y"}, pairwise("left"), "data.prompt", "none of the fields is the prompt"),
    (TWO | {"prompt": 3}, pairwise("left"), "data.prompt", "is a number, not a string"),
    (LISTED, ranker(best=["m1"], worst=["m2", "m3"]), "annotations[0].result[0].value.ranker.best", "no place"),
    (LISTED, ranker(rank=["m1", "m1", "m2"]), "annotations[0].result[0].value.ranker.rank[1]", "comes twice"),
    (LISTED, ranker(rank=["m1", "m4"]), "annotations[0].result[0].value.ranker", "items with the ids m1, m4"),
    (LISTED | {"items": [{"id": "m1"}]}, ranker(rank=["m1"]), "data.items[0].title", "is null, not a string"),
]


@pytest.mark.parametrize(("data", "answer", "field", "part"), MISTAKES)
def test_mistakes_name_the_item_and_the_field(
    tmp_path: Path, data: dict[str, Any], answer: dict[str, Any], field: str, part: str
) -> None:
    good, bad = task(TWO, annotation(pairwise("left"))), task(data, annotation(answer))
    assert_bad_ranking(tmp_path, good, bad, field, part)


def test_two_questions_are_one_too_many(tmp_path: Path) -> None:
    for answers in ([pairwise("left"), pairwise("right")], [choices("answer1"), choices("left")]):
        with pytest.raises(UserError, match="2 results of type"):
            rankings_in(tmp_path, task(TWO, annotation(*answers)))


def test_other_mistakes(tmp_path: Path) -> None:
    for bad, field in (
        (annotation(pairwise("left"), updated_at="yesterday"), "annotations[0].updated_at"),
        (annotation(pairwise("left"), updated_at=None, created_at="yesterday"), "annotations[0].created_at"),
        (annotation(pairwise("left"), by=1.5), "annotations[0].completed_by"),
        (annotation(pairwise("left"), by={"id": 1.5}), "annotations[0].completed_by.id"),
        (annotation() | {"result": "x"}, "annotations[0].result"),
    ):
        with pytest.raises(UserError) as caught:
            rankings_in(tmp_path, task(TWO, bad))
        assert (caught.value.where or "").endswith(f"field `{field}`")
