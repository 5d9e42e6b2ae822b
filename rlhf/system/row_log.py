"""Logs of expensive results, one JSON row each: every row is on disk at once, and is read again after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.system.console import console
from rlhf.system.ranks import is_main_process


def complete_rows(path: Path, fields: Collection[str], lost: str) -> list[dict[str, Any]]:
    """Return the rows of a log, [] if there is no file; report a last line that a kill cut off, and remove it.

    Every row has `fields`, by which a file of other rows is recognised: it is left as it is, and UserError raised.
    `lost` says in words what happens to the work of a line that was cut off.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [_row(line, path, number, fields) for number, line in enumerate(lines, 1)]
    if last:
        if not last.startswith(b'{"'):  # as every row begins
            raise _foreign_line(path, len(lines) + 1)
        console.print(f"{path.name}: a line was cut off by an interruption; {lost}")
        if is_main_process():
            os.truncate(path, path.stat().st_size - len(last))
    return rows


def _row(line: bytes, path: Path, number: int, fields: Collection[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise _foreign_line(path, number) from None
    if not isinstance(row, dict) or not all(field in row for field in fields):
        raise _foreign_line(path, number)
    return row


def _foreign_line(path: Path, number: int) -> UserError:
    what = "this line was not written by this work, and nothing is added to a file of another kind"
    return UserError(what, f"{path}, line {number}", "name another file, or move this one away")


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a log and wait until they are on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
