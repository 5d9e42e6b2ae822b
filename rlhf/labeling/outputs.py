"""Outputs that wait to be ranked: {"prompt", "responses"}, and perhaps "finished", as in a ranking without its ranks.

The rank stage writes them to rank/outputs.jsonl for the people who rank; a file made elsewhere serves as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.encoding import Encoded
from rlhf.data.ranks import equal_texts_ranked_apart
from rlhf.data.records import Drops, Prompt, Ranking, ranking_row, rankings_of, write_jsonl
from rlhf.data.sources import SourceRow, read_rows
from rlhf.labeling.base import Output
from rlhf.system.distributed import is_main_process
from rlhf.system.row_log import append_rows, complete_rows

FIELDS = ("prompt", "use_case", "responses", "finished")  # others are ignored, ranks too


@dataclass(frozen=True)
class Outputs:
    """K different outputs for one prompt; `finished` as in Ranking."""

    prompt: Prompt
    responses: tuple[str, ...]
    finished: tuple[bool, ...]

    def ranked(self, ranks: Sequence[int]) -> Ranking:
        """The ranking that gives these ranks."""
        return Ranking(self.prompt, self.responses, tuple(ranks), self.finished)


def read_outputs(paths: Sequence[str], drops: Drops) -> list[Outputs]:
    """Outputs of all `paths` in order. Raises UserError for a bad line."""
    found: dict[Any, Outputs] = {}
    for path in paths:
        for row in read_rows(path):
            item = _outputs(row, drops)
            if found.setdefault((item.prompt.messages, item.responses, item.finished), item) is not item:
                drops.add("exact duplicate of outputs")
    return list(found.values())


def outputs_row(outputs: Outputs) -> dict[str, Any]:
    """The outputs as a row that `read_outputs` reads back equal."""
    row = ranking_row(outputs.ranked([1] * len(outputs.responses)))
    return {name: row[name] for name in FIELDS if name in row}


def _outputs(row: SourceRow, drops: Drops) -> Outputs:
    responses = row.need("responses")
    fields = {name: row.fields[name] for name in FIELDS if name in row.fields}
    # Read as a ranking in which all are tied, so that both are checked alike.
    tied = [1] * len(responses) if isinstance(responses, list) else []
    (item,) = rankings_of(SourceRow(fields | {"ranks": tied}, row.place), drops)
    if pair := equal_texts_ranked_apart(item.responses, range(len(item.responses))):  # equal texts have one rank
        what = f"responses {pair[0]} and {pair[1]} (from 0) are the same text"
        raise row.fail("responses", what, "keep one of them: nobody can tell them apart")
    return Outputs(item.prompt, item.responses, item.finished)


class SampledOutputs:
    """rank/samples.jsonl: one row per prompt, appended chunk by chunk; rows of another policy or setting are left out.

    Args:
        fingerprint: of everything that the samples depend on besides the prompt.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        known = complete_rows(path, ("key", "fingerprint"), "its chunk is sampled again")
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in known if row["fingerprint"] == fingerprint}
        if is_main_process():
            write_jsonl(path, list(self.rows.values()))

    def tokens(self, prompts: Sequence[Encoded[Prompt]]) -> int:
        """Tokens sampled for these prompts."""
        return sum(sum(self.rows[encoded.item.key]["lengths"]) for encoded in prompts)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and wait until they are on disk; the first process writes for all."""
        whole = [row | {"fingerprint": self.fingerprint} for row in rows]
        self.rows |= {row["key"]: row for row in whole}
        if is_main_process():
            append_rows(self.path, whole)


@dataclass
class Candidate:
    """One prompt with the outputs that a labeler is to rank."""

    prompt: Prompt
    outputs: list[Output]
    lengths: list[int]  # tokens of each output, EOS included; empty when the outputs come from a file
