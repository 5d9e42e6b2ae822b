"""The K outputs of a prompt, the two files that hold them before they are ranked, and the result of ranking them.

rank/samples.jsonl   every output that the rank stage has sampled, with its length: `SampledOutputs`
rank/outputs.jsonl   the distinct outputs for people to rank: {"prompt", "responses"} and perhaps "finished", as in
                     a ranking without its ranks. A file made elsewhere serves as well: `read_outputs`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.ranks import equal_texts_ranked_apart
from rlhf.data.records import Drops, Prompt, Ranking, ranking_row, rankings_of, write_jsonl
from rlhf.data.sources import SourceRow, read_rows
from rlhf.labeling.base import Output
from rlhf.system.ranks import is_main_process
from rlhf.system.row_log import append_rows, complete_rows

FIELDS = ("prompt", "use_case", "responses", "finished")  # others are ignored, ranks too


@dataclass(frozen=True)
class Outputs:
    """K outputs for one prompt. `responses` and `finished` are those of a Ranking."""

    prompt: Prompt
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    lengths: tuple[int, ...] = field(default=(), compare=False)  # tokens with EOS; empty when read from a file

    @property
    def outputs(self) -> list[Output]:
        """Return the outputs as a labeler takes them."""
        return [Output(*output) for output in zip(self.responses, self.finished, strict=True)]

    def ranked(self, ranks: Sequence[int]) -> Ranking:
        """Return the ranking of these outputs that has these ranks."""
        return Ranking(self.prompt, self.responses, tuple(ranks), self.finished)

    def distinct(self, drops: Drops) -> Outputs:
        """Return the first output of each text, ends stripped, and no empty one; `drops` counts the others."""
        first: dict[str, int] = {}  # index of each text
        for i, text in enumerate(map(str.strip, self.responses)):
            if not text:
                drops.add("empty output")
            elif text in first:
                drops.add("output identical to another of its prompt")
            else:
                first[text] = i
        columns = (self.responses, self.finished, self.lengths)
        return Outputs(self.prompt, *(tuple(column[i] for i in first.values()) for column in columns))


class RankResult(NamedTuple):
    """The rankings of a rank stage, with statistics about the labels."""

    rankings: list[Ranking]
    lengths: Sequence[Sequence[int]]  # tokens of each output of each ranking; empty for rankings from files
    label_summary: dict[str, Any]
    row_extras: Sequence[dict[str, Any]] = ()  # more fields of each row: what people said, and the order shown


def read_outputs(paths: Sequence[str], drops: Drops) -> list[Outputs]:
    """Return the outputs of all `paths` in order; `drops` counts exact duplicates. Raises UserError for a bad line."""
    found: dict[Any, Outputs] = {}
    for path in paths:
        for row in read_rows(path):
            item = _outputs(row, drops)
            if found.setdefault((item.prompt.messages, item.responses, item.finished), item) is not item:
                drops.add("exact duplicate of outputs")
    return list(found.values())


def outputs_row(outputs: Outputs) -> dict[str, Any]:
    """Return the outputs as a row that `read_outputs` reads back equal."""
    row = ranking_row(outputs.ranked([1] * len(outputs.responses)))
    return {name: row[name] for name in FIELDS if name in row}


def _outputs(row: SourceRow, drops: Drops) -> Outputs:
    responses = row.need("responses")
    fields = {name: row.fields[name] for name in FIELDS if name in row.fields}
    # The row is read as a ranking in which all outputs tie, so that the checks of rankings apply to it.
    tied = [1] * len(responses) if isinstance(responses, list) else []
    (item,) = rankings_of(SourceRow(fields | {"ranks": tied}, row.place), drops)
    # With K different ranks every two equal responses contradict each other.
    if pair := equal_texts_ranked_apart(item.responses, range(len(item.responses))):
        what = f"responses {pair[0]} and {pair[1]} (from 0) are the same text"
        raise row.fail("responses", what, "keep one of them: nobody can tell them apart")
    return Outputs(item.prompt, item.responses, item.finished)


class SampledOutputs:
    """The file rank/samples.jsonl: one row for each prompt, appended chunk by chunk.

    `fingerprint` is a hash of all that the samples depend on besides the prompt. Rows with another one are dropped.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        known = complete_rows(path, ("key", "fingerprint"), "its chunk is sampled again")
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in known if row["fingerprint"] == fingerprint}
        if is_main_process():
            write_jsonl(path, list(self.rows.values()))

    def has_all(self, prompts: Sequence[Prompt]) -> bool:
        """Return whether every one of these prompts has been sampled."""
        return all(prompt.key in self.rows for prompt in prompts)

    def of(self, prompt: Prompt) -> Outputs:
        """Return all outputs that were sampled for a prompt."""
        row = self.rows[prompt.key]
        return Outputs(prompt, tuple(row["responses"]), tuple(row["finished"]), tuple(row["lengths"]))

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Return the number of tokens sampled for these prompts."""
        return sum(sum(self.rows[prompt.key]["lengths"]) for prompt in prompts)

    def add(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool], lengths: Sequence[int]
    ) -> None:
        """Append outputs, [prompts * K] with a prompt's K in a row, and wait until they are on disk."""
        k, rows = len(responses) // len(prompts), []
        for i, prompt in enumerate(prompts):
            own = slice(i * k, (i + 1) * k)
            row = {"key": prompt.key, "prompt": prompt.text, "responses": list(responses[own])}
            row |= {"finished": list(finished[own]), "lengths": list(lengths[own]), "fingerprint": self.fingerprint}
            rows.append(row)
        self.rows |= {row["key"]: row for row in rows}
        if is_main_process():
            append_rows(self.path, rows)
