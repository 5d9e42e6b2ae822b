"""Argilla's exports: records and rows as the client and the server write them, read from a file as a user would."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Drops, Message, Prompt, Ranking, read_rankings
from support.data_files import assert_bad_ranking, rankings_in, write_lines

PROMPT = Prompt.from_text("Where does the cuckoo lay its eggs?")
FIELDS = {"prompt": PROMPT.text, "response-1": "In trees.", "response-2": "In other birds' nests.", "response-3": "No."}
TEXTS = ("In trees.", "In other birds' nests.", "No.")
NOON = datetime(2026, 5, 1, 12, 0, 0, 457543, UTC)


def ranks(*given: int, name: str = "response-{}") -> list[dict[str, Any]]:
    return [{"value": name.format(i), "rank": rank} for i, rank in enumerate(given, start=1)]


def response(user: str | None, values: Any, status: str = "submitted", **more: Any) -> dict[str, Any]:
    answers = {} if values is None else {"ranking": {"value": values}, "why": {"value": "clear"}}
    return {"user_id": user, "values": answers, "status": status} | more


def record(*responses: dict[str, Any], fields: dict[str, Any] = FIELDS) -> dict[str, Any]:
    return {
        "id": "3c1f",
        "fields": fields,
        "metadata": {"source": "birds"},
        "responses": list(responses),
        "suggestions": [{"question_name": "ranking", "value": ranks(1, 1, 1)}],
        "external_id": None,
    }


def test_records_of_the_first_client(tmp_path: Path) -> None:
    rows = [
        record(
            response("ann", ranks(2, 1, 2)),  # responses 1 and 3 tie
            response("bob", ranks(3, 1, 2)),
            response("cem", ranks(1, 2, 3), "discarded"),
            response("dia", None, "discarded"),
            response("eva", ranks(1, 2, 3), "draft"),
            response("fay", None),
        ),
        record(),
    ]
    assert rankings_in(tmp_path, *rows) == (
        [Ranking(PROMPT, TEXTS, (2, 1, 2), labeler="ann"), Ranking(PROMPT, TEXTS, (3, 1, 2), labeler="bob")],
        [
            ("Argilla: a discarded response", 2),
            ("Argilla: a draft response", 1),
            ("Argilla: a response that ranks nothing", 1),
            ("Argilla: a record without responses", 1),
        ],
    )


def test_a_page_of_the_server(tmp_path: Path) -> None:
    times = {"inserted_at": "2026-05-01T11:00:00", "updated_at": "2026-05-01T12:00:00.457543"}
    items = [record(response("ann", ranks(1, 2, 3), **times)), record(response(None, ranks(1, 1, 1)))]
    page = {"items": items, "total": 2}
    expected = [Ranking(PROMPT, TEXTS, (1, 2, 3), labeler="ann", time=NOON), Ranking(PROMPT, TEXTS, (1, 1, 1))]
    assert rankings_in(tmp_path, page) == (expected, [])
    path = write_lines(tmp_path / "pages.jsonl", page, {"items": [], "total": 2})
    assert read_rankings([path], Drops()) == expected


@pytest.mark.parametrize("sequence", [True, False])
def test_rows_of_the_first_clients_data_set(tmp_path: Path, sequence: bool) -> None:
    """The value is two columns (a Sequence of `datasets`) or a list of objects, by the version that wrote it."""

    def value(*given: int) -> Any:
        listed = ranks(*given)
        return {name: [item[name] for item in listed] for name in ("rank", "value")} if sequence else listed

    row = FIELDS | {
        "ranking": [
            {"user_id": "ann", "value": value(2, 1, 1), "status": "submitted"},
            {"user_id": "bob", "value": value(1, 2, 3), "status": "discarded"},
        ],
        "ranking-suggestion": None,
        "ranking-suggestion-metadata": {"type": None, "score": None, "agent": None},
        "why": [{"user_id": "ann", "value": "clear", "status": "submitted"}],
        "why-suggestion-metadata": {"type": None, "score": None, "agent": None},
        "external_id": "e1",
        "metadata": '{"source": "birds"}',
    }
    assert rankings_in(tmp_path, row, row | {"ranking": [], "why": []}) == (
        [Ranking(PROMPT, TEXTS, (2, 1, 1), labeler="ann")],
        [("Argilla: a discarded response", 1), ("Argilla: a record without responses", 1)],
    )


def test_rows_from_parquet(tmp_path: Path) -> None:
    """Written by `datasets` with the types that the client gives its columns."""
    datasets = pytest.importorskip("datasets")
    answers = [{"user_id": "ann", "value": ranks(2, 1, 3), "status": "submitted"}]
    value = datasets.List({"rank": datasets.Value("uint8"), "value": datasets.Value("string")})
    text = datasets.Value("string")
    answer = datasets.List({"user_id": text, "value": value, "status": text})
    features = datasets.Features({name: text for name in FIELDS} | {"ranking": answer})
    columns = {name: [words] for name, words in FIELDS.items()} | {"ranking": [answers]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    assert read_rankings([str(tmp_path / "a.parquet")], Drops()) == [Ranking(PROMPT, TEXTS, (2, 1, 3), labeler="ann")]


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["Response 1", "Response 2"], "{}"),
        (["response1", "response2"], "response-{}"),
        (["answer_1", "answer_2"], "Reply {}"),
    ],
)
def test_options_stand_for_fields(tmp_path: Path, names: list[str], options: str) -> None:
    fields = {"instruction": PROMPT.text, "Golden Answer": "y", names[1]: "b", names[0]: "a"}
    row = record(response("ann", ranks(2, 1, name=options)), fields=fields)
    assert rankings_in(tmp_path, row)[0] == [Ranking(PROMPT, ("a", "b"), (2, 1), labeler="ann")]


def test_a_chat_is_a_prompt_of_messages(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Where?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    (found,) = rankings_in(tmp_path, record(response("ann", ranks(1, 2, 3)), fields=FIELDS | {"prompt": chat}))[0]
    assert found.prompt.messages == tuple(Message(*turn) for turn in turns)


def test_an_optional_field_that_is_empty_is_counted(tmp_path: Path) -> None:
    row = record(response("ann", ranks(1, 2, 3)), fields=FIELDS | {"response-3": None})
    assert rankings_in(tmp_path, row) == ([], [("Argilla: an empty response", 1)])


AT = "responses[0].values.ranking.value"
TWICE = {"values": {"a": {"value": ranks(1, 2)}, "b": {"value": ranks(1, 2)}}}
MISTAKES = [
    (record(response("ann", ranks(1, 2, 0))), f"{AT}[2].rank", "the rank 0 is below 1"),
    (record(response("ann", [{"value": "response-1"}])), f"{AT}[0].rank", "is null, not a whole number"),
    (record(response("ann", [{"rank": 1}])), f"{AT}[0].value", "is null, not a string"),
    (record(response("ann", ranks(1, 2, 3, 4))), f"{AT}[3].value", "'response-4' names no field"),
    (record(response("ann", ranks(1) * 2)), f"{AT}[1].value", "'response-1' names no field of its own"),
    (record(response("ann", ranks(1, 2)) | {"user_id": []}), "responses[0].user_id", "is a list, not a string"),
    (record(response("ann", None) | TWICE), "responses[0].values", "2 questions have ranks: a, b"),
    (
        record(response("ann", ranks(1, 2, 3)), fields={"q": "x"}),
        "fields.prompt",
        "none of the fields is the prompt: q",
    ),
    (record(response("ann", ranks(1, 2, 3), updated_at="?")), "responses[0].updated_at", "'?', which is not a time"),
    ({"items": [record(response("ann", ranks(0)))]}, f"items[0].{AT}[0].rank", "below 1"),
    (record() | {"responses": {"ranking": [{"value": ["response-2"], "user_id": "a"}]}}, "responses.ranking", "2.x"),
    (FIELDS | {"ranking.responses": [["response-2"]], "ranking.responses.users": ["a"]}, "ranking.responses", "2.x"),
]


@pytest.mark.parametrize(("row", "field", "part"), MISTAKES)
def test_mistakes_name_the_item_and_the_field(tmp_path: Path, row: dict[str, Any], field: str, part: str) -> None:
    assert_bad_ranking(tmp_path, record(), row, field, part)


def test_records_of_the_second_client_without_responses_are_counted(tmp_path: Path) -> None:
    assert rankings_in(tmp_path, record() | {"responses": {}}) == ([], [("Argilla: a record without responses", 1)])
