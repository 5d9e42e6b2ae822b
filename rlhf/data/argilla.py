"""Read Argilla's exports of a RankingQuestion: records with responses of labelers, each of which is a ranking.

    {"fields": {..}, "responses": [{"user_id", "status", "values": {QUESTION: {"value": [{"value", "rank"}]}}}]}
                a record of the 1.x client, or of a server of any version (GET /api/v1/datasets/ID/records
                ?include=responses), alone or in a page {"items": [..]}
    {"prompt", .., QUESTION: [{"user_id", "status", "value": {"value": [..], "rank": [..]}}]}
                a row of the data set that the 1.x client makes (`format_as("datasets")`, also on the Hub)

Rank 1 is best and equal ranks tie. An option names the field of the same name, or of the same number or letter at
the end: "1", "Response 1" or "response-1" for `response1`. The prompt is one of the fields that
rlhf/data/layout_fields.py lists. Discarded responses, drafts and responses without ranks are dropped and counted.

The 2.x client (`to_json`, `to_datasets`) writes the options in the question's order and leaves out the ranks
(argilla-io/argilla issues 5677 and 5712). Such a file is refused, since it does not contain the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf.data.layout_fields import Counter, Layout, RawRanking, find_prompt, named, objects, text_or_empty
from rlhf.data.ranks import check_rank
from rlhf.data.sources import SourceRow, check_list, check_object, check_text, check_time

NAME = "Argilla"
USERS = ".responses.users"  # end of the name of a column that the 2.x client writes


class _Response(NamedTuple):
    """One labeler's response to a record."""

    place: str  # path of the response in the row, for errors
    about: dict[str, Any]  # user_id, status, times
    values_at: str  # path of the values
    values: Any  # options and ranks; None if there are none


def _record(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    yield from _of_record(row, "", row.fields, drops)


def _page(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    for place, record in objects(row, "items", row.fields["items"]):
        yield from _of_record(row, f"{place}.", record, drops)


def _of_record(row: SourceRow, prefix: str, record: dict[str, Any], drops: Counter) -> Iterator[RawRanking]:
    fields = check_object(row, f"{prefix}fields", record.get("fields"))
    responses = objects(row, f"{prefix}responses", record.get("responses") or [])
    if not responses:
        drops.add(f"{NAME}: a record without responses")
    for place, about in responses:
        answers = check_object(row, f"{place}.values", about.get("values") or {})
        given = {name: check_object(row, f"{place}.values.{name}", v).get("value") for name, v in answers.items()}
        ranked = [name for name, value in given.items() if _has_ranks(value)]
        if len(ranked) > 1:
            what = f"{len(ranked)} questions have ranks: {', '.join(ranked)}"
            raise row.fail(f"{place}.values", what, "leave one of them in the file")
        values_at, values = (f"{place}.values.{ranked[0]}.value", given[ranked[0]]) if ranked else ("", None)
        yield from _ranking(row, f"{prefix}fields.", fields, _Response(place, about, values_at, values), drops)


def _columns(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    questions = [name for name in row.fields if _is_question(row.fields, name)]
    fields = {name: value for name, value in row.fields.items() if isinstance(value, str)}
    responses = [response for name in questions for response in objects(row, name, row.fields[name])]
    ranked = [(place, about) for place, about in responses if _has_ranks(about.get("value"))]
    if not ranked:
        drops.add(f"{NAME}: a record without responses")
    for place, about in ranked:
        response = _Response(place, about, f"{place}.value", about["value"])
        yield from _ranking(row, "", fields, response, drops)


def _ranking(
    row: SourceRow, prefix: str, fields: dict[str, Any], response: _Response, drops: Counter
) -> Iterator[RawRanking]:
    about, status = response.about, response.about.get("status") or "submitted"
    if status != "submitted" or response.values is None:
        drops.add(f"{NAME}: a response that ranks nothing" if status == "submitted" else f"{NAME}: a {status} response")
        return
    prompt, words = find_prompt(row, prefix, fields)
    names = [name for name in fields if name != prompt]
    ranks: dict[str, int] = {}
    for place, option, rank in _options(row, response):
        name = named(check_text(row, f"{place}.value", option), names)
        if name is None or name in ranks:
            what = f"the option {option!r} names no field of its own among {', '.join(names) or 'none'}"
            raise row.fail(f"{place}.value", what, "call the options after the fields")
        ranks[name] = check_rank(row, f"{place}.rank", rank)
    texts = [text_or_empty(row, prefix + name, fields[name] or "") for name in ranks]
    user = about.get("user_id")
    labeler = "" if user is None else check_text(row, f"{response.place}.user_id", user)
    # A draft is stored first, and updated when it is submitted.
    stamp = next((name for name in ("updated_at", "inserted_at") if about.get(name) is not None), None)
    time = check_time(row, f"{response.place}.{stamp}", about[stamp]) if stamp else None
    yield RawRanking(words, texts, list(ranks.values()), labeler, time)


def _options(row: SourceRow, response: _Response) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, option, rank) from a list of {value, rank}, or from the two columns that `datasets` makes of it."""
    place, values = response.values_at, response.values
    if not isinstance(values, dict):
        yield from ((where, item.get("value"), item.get("rank")) for where, item in objects(row, place, values))
        return
    options, ranks = (check_list(row, f"{place}.{name}", values[name]) for name in ("value", "rank"))
    if len(options) != len(ranks):
        raise row.fail(place, f"there are {len(ranks)} ranks for {len(options)} options", "export the data again")
    for i, (option, rank) in enumerate(zip(options, ranks, strict=True)):
        yield f"{place}[{i}]", option, rank


def _has_ranks(value: Any) -> bool:
    """Return whether this is the value of a RankingQuestion; no other type of question lists objects with ranks."""
    if isinstance(value, dict):
        return "rank" in value and "value" in value
    items = value if isinstance(value, list) else []
    return any(isinstance(item, dict) and ("rank" in item or "value" in item) for item in items)


def _is_question(fields: dict[str, Any], name: str) -> bool:
    """Return whether a column has responses of labelers."""
    column = fields[name]
    if not isinstance(column, list) or not all(isinstance(item, dict) for item in column):
        return False
    # A question that nobody has answered yet is recognised by the column beside it.
    answered = bool(column) and all({"user_id", "value", "status"} <= item.keys() for item in column)
    return answered or (not column and f"{name}-suggestion-metadata" in fields)


def _is_record(fields: dict[str, Any], responses: type) -> bool:
    return isinstance(fields.get("fields"), dict) and isinstance(fields.get("responses"), responses)


def _is_page(fields: dict[str, Any]) -> bool:
    items = fields.get("items")
    return isinstance(items, list) and all(isinstance(item, dict) and "fields" in item for item in items)


def _without_ranks(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    """Refuse a record or row of the 2.x client, or count it if it has no responses."""
    fields = row.fields
    if fields.get("responses") == {}:
        drops.add(f"{NAME}: a record without responses")
        return iter(())
    column = next((name.removesuffix(".users") for name in fields if name.endswith(USERS)), None)
    field = column or f"responses.{next(iter(fields['responses']))}"
    what = f"`{field}` was written by Argilla's 2.x client, which leaves out the ranks"
    fix = "save what the server answers to GET /api/v1/datasets/ID/records?include=responses, which has them"
    raise row.fail(field, what, fix)


LAYOUTS = (
    Layout(NAME, lambda fields: _is_record(fields, list), _record),
    Layout(NAME, _is_page, _page),
    Layout(
        NAME, lambda fields: _is_record(fields, dict) or any(name.endswith(USERS) for name in fields), _without_ranks
    ),
    Layout(NAME, lambda fields: any(_is_question(fields, name) for name in fields), _columns),
)
