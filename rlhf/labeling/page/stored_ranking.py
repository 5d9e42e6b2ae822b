"""One ranking that a person gave on the page, read from labels.sqlite and written as a row of rankings.jsonl."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rlhf.data.records import Message, Prompt, ranking_row
from rlhf.labeling.outputs import Outputs


class StoredRanking(NamedTuple):
    """A ranking that counts. Lists are in the order of the outputs in the file, except `shown`, which maps to it."""

    outputs: Outputs
    ranks: tuple[int, ...]
    labeler: str
    details: dict[str, Any]  # id, quality, flags, shown, seconds, time

    @property
    def extras(self) -> dict[str, Any]:
        """Return the fields that a row of rankings.jsonl has beside the ranking: the labeler and the details."""
        return {"labeler": self.labeler} | self.details


def stored_ranking(row: sqlite3.Row) -> StoredRanking:
    """Return the ranking in a row of the tables submissions, tasks and claims together."""
    prompt = Prompt(tuple(Message(**message) for message in json.loads(row["messages"])), row["use_case"])
    outputs = Outputs(prompt, tuple(json.loads(row["responses"])), tuple(json.loads(row["finished"])))
    answer = json.loads(row["answer"])
    details = {name: answer[name] for name in ("quality", "flags") if answer[name]}
    details |= {
        "shown": json.loads(row["shown"]),
        "seconds": row["seconds"],
        "time": datetime.fromtimestamp(row["at"], UTC).isoformat(timespec="seconds"),
        "id": row["id"],
    }
    return StoredRanking(outputs, tuple(answer["ranks"]), row["labeler"], details)


def labelled_row(item: StoredRanking) -> dict[str, Any]:
    """Return the ranking as a row of rankings.jsonl (rlhf/data/records.py)."""
    return ranking_row(item.outputs.ranked(item.ranks)) | item.extras
