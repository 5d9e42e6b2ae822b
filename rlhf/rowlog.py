"""Rows of work that is paid for as it comes: appended and on disk at once, read again after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.progress import console


def whole_rows(path: Path, lost: str) -> list[dict[str, Any]]:
    """The rows of a log, [] when it is not there; a line that a kill has cut off is told and left out.

    Args:
        lost: what becomes of the work of such a line, in words.
    """
    rows = []
    for line in filter(None, path.read_bytes().split(b"\n") if path.exists() else []):
        try:
            rows.append(json.loads(line))
        except ValueError:
            console.print(f"{path.name}: a line was cut off by an interruption; {lost}")
    return rows


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a log and wait until they are on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
