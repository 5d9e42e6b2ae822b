"""Read Label Studio's JSON export: tasks with the annotations of labelers, each of which becomes a ranking.

    {"data": {"prompt", ..}, "annotations": [{"result": [..], "completed_by", "created_at", "was_cancelled"}]}

    ranker      value.ranker: {NAME OF THE TAG: [ids, best first]}; or buckets whose names end in a number, which is the
                rank of all items in the bucket, so that they tie. `data` has a list of {"id", "body" or "title"}
    pairwise    value.selected: left or right, of two fields of `data` called answer1 and answer2 or the like
    choices     value.choices: one that names one of the two fields (by its number, letter or side), or a tie

The first of these types that an annotation has is read, other results are ignored. The prompt is one of the fields
that rlhf/data/layout_fields.py lists. Skipped annotations, and those that rank nothing or leave items unranked, are
dropped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.layout_fields import (
    Counter,
    Layout,
    RawRanking,
    ending,
    find_prompt,
    has,
    named,
    objects,
    plain,
    text_or_empty,
)
from rlhf.data.sources import SourceRow, check_list, check_object, check_text, check_time, check_whole

NAME = "Label Studio"
SIDES = (("1", "2"), ("0", "1"), ("a", "b"), ("left", "right"))
TIES = {"tie", "tied", "draw", "equal", "same", "both", "neither", "bothgood", "bothbad"}
TIES |= {"aboutthesame", "nopreference"}
UNUSED = "_"  # the bucket of items that nobody moved

Answer = tuple[list[str], list[int]]  # responses, ranks
Result = tuple[str, dict[str, Any]]  # path, one result of an annotation


def _read(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    data = check_object(row, "data", row.need("data"))
    annotations = objects(row, "annotations", row.need("annotations"))
    if not annotations:
        drops.add(f"{NAME}: a task without annotations")
    for place, annotation in annotations:
        if annotation.get("was_cancelled"):
            drops.add(f"{NAME}: a skipped annotation")
            continue
        answer = _answer(row, data, objects(row, f"{place}.result", annotation.get("result") or []))
        if isinstance(answer, str):
            drops.add(f"{NAME}: {answer}")
            continue
        labeler = _user(row, f"{place}.completed_by", annotation.get("completed_by"))
        key = next((key for key in ("updated_at", "created_at") if annotation.get(key) is not None), "")
        when = check_time(row, f"{place}.{key}", annotation[key]) if key else None
        yield RawRanking(find_prompt(row, "data.", data)[1], *answer, labeler, when)


def _user(row: SourceRow, field: str, user: Any) -> str:
    """Return the name of a labeler: an id, or the email address or id of an object; "" if there is none."""
    if isinstance(user, dict):
        field, user = next(((f"{field}.{k}", user[k]) for k in ("email", "id") if user.get(k)), (field, None))
    return user or "" if user is None or isinstance(user, str) else str(check_whole(row, field, user))


def _answer(row: SourceRow, data: dict[str, Any], results: Sequence[Result]) -> Answer | str:
    """Return the ranking of an annotation, or the reason to drop it."""
    by_type = {name: [result for result in results if result[1].get("type") == name] for name in READERS}
    kind = next((name for name, found in by_type.items() if found), None)
    if kind is None:
        return "an annotation that ranks nothing"
    answers = [(place, READERS[kind](row, data, place, result)) for place, result in by_type[kind]]
    understood = [(place, answer) for place, answer in answers if answer is not None]
    if len(understood) > 1:
        what = f"{len(understood)} results of type {kind} rank the answers"
        raise row.fail(understood[1][0], what, "leave one question in the file")
    if not understood:
        what = "the choice names neither of the two answers, nor a tie"
        raise row.fail(f"{answers[0][0]}.value.choices", what, "call the choices after the fields, and Tie")
    return understood[0][1]


def _ranker(row: SourceRow, data: dict[str, Any], place: str, result: dict[str, Any]) -> Answer | str:
    value = check_object(row, f"{place}.value", result.get("value"))
    field = f"{place}.value.ranker"
    ranks: dict[str, int | None] = {}
    for bucket, ids in check_object(row, field, value.get("ranker")).items():
        number = re.search(r"\d+$", bucket)
        one_list = bucket == result.get("from_name")  # a Ranker without buckets has one column, of its own name
        if ids and not (one_list or number or bucket == UNUSED):
            what = f"the bucket {bucket!r} has no place in an order"
            raise row.fail(f"{field}.{bucket}", what, "end the buckets' names with their rank: best1, middle2, worst3")
        for i, item in enumerate(check_list(row, f"{field}.{bucket}", ids)):
            if str(item) in ranks:
                raise row.fail(f"{field}.{bucket}[{i}]", f"the item {item!r} comes twice", "leave it in one place")
            # Buckets may be counted from 0, ranks are not.
            ranks[str(item)] = i + 1 if one_list else int(number[0]) + 1 if number else None
    if not ranks:
        return "an annotation that ranks nothing"
    texts = _items(row, data, field, set(ranks))
    order = [ranks.get(item) for item in texts]
    if None in order:
        return "an annotation that leaves items unranked"
    return list(texts.values()), [rank for rank in order if rank is not None]


def _items(row: SourceRow, data: dict[str, Any], field: str, ids: set[str]) -> dict[str, str]:
    """Return the texts by id of the list in `data` that has these ids."""
    found: list[tuple[str, dict[str, str]]] = []
    for name, value in data.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            continue
        items = {str(item.get("id")): (i, item) for i, item in enumerate(value)}
        if ids <= items.keys():
            parts = {key: "title" if item.get("body") is None else "body" for key, (_, item) in items.items()}
            texts = {}
            for key, (i, item) in items.items():
                texts[key] = text_or_empty(row, f"data.{name}[{i}].{parts[key]}", item.get(parts[key]))
            found.append((name, texts))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise row.fail(field, f"several lists in `data` have items with these ids: {names}", "keep one in the file")
    if found:
        return found[0][1]
    what = f"no list in `data` has items with the ids {', '.join(sorted(ids))}"
    raise row.fail(field, what, 'give the task a list of {"id": ..., "body": ...}')


def _pairwise(row: SourceRow, data: dict[str, Any], place: str, result: dict[str, Any]) -> Answer:
    selected = check_object(row, f"{place}.value", result.get("value")).get("selected")
    if selected not in ("left", "right"):
        raise row.fail(f"{place}.value.selected", f"`selected` is {selected!r}", "it is left or right")
    return _texts(row, data, _two(row, data)), [1, 2] if selected == "left" else [2, 1]


def _choices(row: SourceRow, data: dict[str, Any], place: str, result: dict[str, Any]) -> Answer | None:
    value = check_object(row, f"{place}.value", result.get("value"))
    chosen = check_list(row, f"{place}.value.choices", value.get("choices"))
    if len(chosen) != 1:
        return None
    choice, names = check_text(row, f"{place}.value.choices[0]", chosen[0]), _two(row, data)
    if plain(choice) in TIES:
        return _texts(row, data, names), [1, 1]
    # A bare digit is as likely an answer to another question, such as how good something is.
    by_name = None if plain(choice).isdigit() else named(choice, names)
    best = {"left": names[0], "right": names[1]}.get(plain(choice)) or by_name
    return best and (_texts(row, data, names), [1 if name == best else 2 for name in names])


READERS = {"ranker": _ranker, "pairwise": _pairwise, "choices": _choices}


def _texts(row: SourceRow, data: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [text_or_empty(row, f"data.{name}", data[name]) for name in names]


def _two(row: SourceRow, data: dict[str, Any]) -> list[str]:
    """Find the two fields of a task that are compared, left before right; the export does not name them."""
    prompt, _ = find_prompt(row, "data.", data)
    by_name = {
        (plain(name).removesuffix(ending(name)), ending(name)): name
        for name, value in data.items()
        if isinstance(value, str) and name != prompt
    }
    pairs = [
        [by_name[stem, first], by_name[stem, second]]
        for stem, end in by_name
        for first, second in SIDES
        if end == first and (stem, second) in by_name
    ]
    if len(pairs) != 1:
        what = f"it is not clear which two fields are compared: {', '.join(data)}"
        raise row.fail("data", what, "call them answer1 and answer2, or left and right, and no others in this way")
    return pairs[0]


LAYOUTS = (Layout(NAME, has("annotations", "data"), _read),)
