"""Write data files, read rankings from them, and look at what a mistake in one says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Drops, Message, Prompt, Ranking, read_rankings
from rlhf.errors import UserError

Read = Callable[[list[str], Drops], Any]


def user(text: str, use_case: str = "") -> Prompt:
    """Return a prompt of one user message."""
    return Prompt((Message("user", text),), use_case)


def write_lines(path: Path, *rows: Any) -> str:
    """Write rows as JSON lines and return the path; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rankings_in(folder: Path, *rows: dict[str, Any]) -> tuple[list[Ranking], list[tuple[str, int]]]:
    """Write rows as a JSON array, and return the rankings that are read from it and what is dropped."""
    drops = Drops()
    return read_rankings([write_lines(folder / "export.json", list(rows))], drops), drops.table()


def error_of(read: Read, source: str) -> UserError:
    """Return the error that reading a source raises; it names a remedy."""
    with pytest.raises(UserError) as caught:
        read([source], Drops())
    assert caught.value.fix
    return caught.value


def assert_bad_ranking(folder: Path, good: dict[str, Any], bad: dict[str, Any], field: str, part: str) -> None:
    """Check that reading rankings stops at the second of two rows of an array and names the item and the field."""
    error = error_of(read_rankings, write_lines(folder / "export.json", [good, bad]))
    assert error.where == f"{folder / 'export.json'}, line 1, item 2, field `{field}`"
    assert part in error.what
