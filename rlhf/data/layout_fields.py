"""Share what the readers of published layouts and of tools' exports need: their result, and checks of nested fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from rlhf.data.sources import SourceRow, check_list, check_object, check_text

PROMPTS = ("prompt", "instruction", "question", "query", "text", "input")
_ENDING = re.compile(r"(\d+|(?<![a-z])[a-z]|left|right)$")


class Counter(Protocol):
    """A counter of dropped rows by reason, such as `rlhf.data.records.Drops`."""

    def add(self, reason: str, n: int = 1) -> None: ...


class RawRanking(NamedTuple):
    """A ranking before it is checked; the other fields are those of `rlhf.data.records.Ranking`."""

    prompt: str | list[dict[str, str]]  # text, or messages
    responses: list[str]
    ranks: list[int]
    labeler: str = ""
    time: datetime | None = None


class Layout(NamedTuple):
    """A layout of files and its reader."""

    name: str
    matches: Callable[[dict[str, Any]], bool]  # whether a row with these fields has the layout
    read: Callable[[SourceRow, Counter], Iterator[RawRanking]]


def has(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test of whether a row has all these fields."""
    return lambda fields: all(name in fields for name in names)


def objects(row: SourceRow, field: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, object) of each item of a list; raise UserError naming the field or item otherwise."""
    items = check_list(row, field, value)
    return [(f"{field}[{i}]", check_object(row, f"{field}[{i}]", item)) for i, item in enumerate(items)]


def column(row: SourceRow, field: str, name: str) -> list[str]:
    """Return the text `name` of every object in the list `field`."""
    items = objects(row, field, row.need(field))
    return [text_or_empty(row, f"{place}.{name}", item.get(name)) for place, item in items]


def text_or_empty(row: SourceRow, field: str, value: Any) -> str:
    """Return `value` if it is text, empty or not; an empty response is dropped and counted later."""
    return "" if isinstance(value, str) and not value.strip() else check_text(row, field, value)


def number(row: SourceRow, field: str, value: Any) -> float:
    """Return `value` if it is a finite number; raise UserError naming `field` otherwise."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise row.fail(field, f"`{field}` is {value!r}, not a number", "write it as a number without quotes")
    return float(value)


def plain(name: str) -> str:
    """Return a name in lower case without blanks and punctuation."""
    return "".join(c for c in name.lower() if c.isalnum())


def ending(name: str) -> str:
    """Return the number, letter or side that a name ends with: "1" of answer-1, "b" of "Response B"; "" if none."""
    found = _ENDING.search(name.lower().rstrip())
    return found[1] if found else ""


def named(option: str, names: Sequence[str]) -> str | None:
    """Return the field that an option of a tool's question names: by the same name, else by the same ending."""
    same = [name for name in names if plain(name) == plain(option)]
    alike = [name for name in names if ending(name) and ending(name) == ending(option)]
    return next((found[0] for found in (same, alike) if len(found) == 1), None)


def find_prompt(row: SourceRow, prefix: str, fields: dict[str, Any]) -> tuple[str, Any]:
    """Return (name, value) of the prompt among a tool's fields: the first of `PROMPTS` that is there.

    An error puts `prefix` ("data." or nothing) before a field's name. Raises UserError if no field is the prompt, or if
    its value is neither text nor a list of messages.
    """
    for wanted in PROMPTS:
        for name, value in fields.items():
            if plain(name) == wanted and value is not None:
                return name, value if isinstance(value, list) else text_or_empty(row, prefix + name, value)
    what = f"none of the fields is the prompt: {', '.join(fields) or 'there are none'}"
    raise row.fail(f"{prefix}prompt", what, f"call it one of {', '.join(PROMPTS)}")
