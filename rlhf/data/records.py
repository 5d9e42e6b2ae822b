"""Define and read prompts, demonstrations, rankings, pretraining text and cloze questions. The forms of a row:

    demonstration   {"prompt", "response"}, or {"messages": [..]} whose last message is the assistant's,
                    or {"prompt", "completion"}: texts, or a completion that is a list of one assistant's message
    ranking         {"prompt", "responses": [K texts], "ranks": [K numbers]}: 1 is best, equal ranks are a tie
                    {"prompt", "responses", "ranking": "D>C>A=B"}: the letters name the responses in order
                    {"prompt", "chosen", "rejected"}: texts, or message lists that may include the prompt
                    or a published layout, or an export of Label Studio or Argilla (rlhf/data/layouts.py)
                    K is 2 to 16. Optional: "finished": [K true or false], "labeler": who ranked, "time": when, in
                    ISO 8601 or in seconds since 1970
    prompt          {"prompt"}
    text            {"text"}, or a .txt file, which is one document
    cloze           {"context", "choices": [..], "answer"}: the index of the right choice from 0, or "label" for it

A "prompt" is text, a transcript "Human: .. Assistant: .. Assistant:", or a list of {"role", "content"}. "use_case"
labels the prompt; other fields are ignored. Ranks are kept as given: [1, 4, 4] and [1, 2, 2] mean the same, since only
order and equality count. A bad line raises UserError with its file, line, field and remedy. Exact duplicates and
rankings with known blemishes of published layouts are dropped and counted; no other row is.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.layouts import find_layout, read_published, split_transcript
from rlhf.data.ranks import MAX_K, MIN_K, check_equal_texts, read_ranks
from rlhf.data.sources import (
    SourceRow,
    check_list,
    check_object,
    check_text,
    check_time,
    check_whole,
    kind,
    read_documents,
    read_rows,
)
from rlhf.errors import UserError
from rlhf.system.files import write_atomic

SPEAKERS = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
FIRST = ("system", "developer")  # roles of a first message alone


class Message(NamedTuple):
    """One turn of a dialogue; the role is system, developer, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to the assistant's answer; `use_case` is a label for reports and has no effect on `key`."""

    messages: tuple[Message, ...]
    use_case: str = ""
    place: str = field(default="", compare=False)  # where it was read, for error messages

    @classmethod
    def from_text(cls, text: str, use_case: str = "", place: str = "") -> Prompt:
        """Make turns of a transcript "Human: .. Assistant:", else one user message; raise UserError if one is empty."""
        if not text.strip():
            raise UserError("the prompt is empty", fix="write a prompt")
        messages = _parse(text)
        if not all(message.content for message in messages):
            raise UserError("a turn of the transcript is empty", fix="fill it in or delete the prompt")
        return cls(messages, use_case, place)

    @property
    def text(self) -> str:
        """Return the words of a single user message, else a transcript that ends with "Assistant:"."""
        if len(self.messages) == 1 and self.messages[0].role == "user":
            return self.messages[0].content
        return "\n\n".join([*(f"{SPEAKERS[m.role]}: {m.content}" for m in self.messages), "Assistant:"])

    @property
    def key(self) -> str:
        """Return the SHA-256 (hex) of the text in Unicode's NFC form, with each run of white space as one blank."""
        return hashlib.sha256(" ".join(unicodedata.normalize("NFC", self.text).split()).encode()).hexdigest()


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that a person wrote."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Ranking:
    """K outputs for one prompt and their ranks. Training does not use `labeler` and `time`."""

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]  # 1 is best, equal ranks are a tie
    finished: tuple[bool, ...] = ()  # False: ended at the length limit without EOS; empty: all are finished
    labeler: str = ""
    time: datetime | None = None  # UTC

    def __post_init__(self) -> None:
        if not self.finished:
            object.__setattr__(self, "finished", (True,) * len(self.responses))
        if not len(self.responses) == len(self.ranks) == len(self.finished):
            raise ValueError("responses, ranks and finished differ in length")


@dataclass(frozen=True)
class Cloze:
    """A context, possible continuations, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass
class Drops:
    """Counts of dropped rows by reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, n: int = 1) -> None:
        """Count `n` more rows dropped for `reason`."""
        self.counts[reason] = self.counts.get(reason, 0) + n

    @property
    def total(self) -> int:
        """Return the number of all dropped rows."""
        return sum(self.counts.values())

    def table(self) -> list[tuple[str, int]]:
        """Return (reason, count), in the order in which the reasons first occurred."""
        return list(self.counts.items())


def read_demonstrations(paths: Sequence[str], drops: Drops) -> list[Demonstration]:
    """Return the demonstrations of all `paths` in order; raise UserError for a bad line."""
    found: dict[tuple[Any, ...], Demonstration] = {}
    for row in _rows(paths):
        item = _demonstration(row)
        if found.setdefault((item.prompt.messages, item.response), item) is not item:
            drops.add("exact duplicate of a demonstration")
    return list(found.values())


def read_rankings(paths: Sequence[str], drops: Drops) -> list[Ranking]:
    """Return the rankings of all `paths` in order; raise UserError for a bad line."""
    found: dict[tuple[Any, ...], Ranking] = {}
    for row in _rows(paths):
        for item in rankings_of(row, drops):
            # Equal rankings of two labelers are kept: they show that the labelers agree.
            key = (item.prompt.messages, item.responses, item.ranks, item.finished, item.labeler, item.time)
            if found.setdefault(key, item) is not item:
                drops.add("exact duplicate of a ranking")
    return list(found.values())


def read_prompts(paths: Sequence[str], drops: Drops) -> list[Prompt]:
    """Return the prompts of all `paths` in order, each `key` once; raise UserError for a bad line."""
    found: dict[str, Prompt] = {}
    for row in _rows(paths):
        item = _prompt(row)
        if found.setdefault(item.key, item) is not item:
            drops.add("prompt seen before")
    return list(found.values())


def read_texts(paths: Sequence[str], drops: Drops) -> list[str]:
    """Return the documents of pretraining text in order; raise UserError for a bad line."""
    found: dict[str, None] = {}
    for text in (text for path in paths for text in read_documents(path)):
        if text in found:
            drops.add("exact duplicate of a text")
        found[text] = None
    return list(found)


def read_cloze(paths: Sequence[str]) -> list[Cloze]:
    """Return the cloze questions of all `paths` in order; raise UserError for a bad line."""
    return [_cloze(row) for row in _rows(paths)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line; a kill or a full disk leaves the old file or the new one, never a part."""
    write_atomic(Path(path), "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def ranking_row(ranking: Ranking) -> dict[str, Any]:
    """Return the ranking as a row that `read_rankings` reads back equal."""
    row = _prompt_row(ranking.prompt) | {
        "responses": list(ranking.responses),
        "ranks": list(ranking.ranks),
        "finished": list(ranking.finished),
    }
    row |= {"labeler": ranking.labeler} if ranking.labeler else {}
    return row | ({"time": ranking.time.isoformat()} if ranking.time else {})


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    # Text is not enough for a system message, or for words that look like a transcript.
    says_all = _parse(prompt.text) == prompt.messages
    row: dict[str, Any] = {"prompt": prompt.text if says_all else [m._asdict() for m in prompt.messages]}
    return row | {"use_case": prompt.use_case} if prompt.use_case else row


def _parse(text: str) -> tuple[Message, ...]:
    turns = split_transcript(text)
    if not turns or len(turns) < 2 or turns[-1] != ("Assistant", ""):
        return (Message("user", text),)
    return tuple(Message("user" if speaker == "Human" else "assistant", words) for speaker, words in turns[:-1])


def _rows(paths: Sequence[str]) -> Iterator[SourceRow]:
    return (row for path in paths for row in read_rows(path))


def _prompt(row: SourceRow, value: Any = None) -> Prompt:
    """Return the prompt of a row: its field `prompt`, or `value` in its place."""
    value = row.need("prompt") if value is None else value
    use_case = row.fields.get("use_case", "")
    if not isinstance(use_case, str):
        raise row.fail("use_case", f"`use_case` is {kind(use_case)}, not a string", "put it in quotes, or delete it")
    if isinstance(value, list):
        messages = _messages(row, "prompt", value)
        if messages[-1].role not in ("user", "tool"):
            what = f"the last message of the prompt is the {messages[-1].role}'s"
            raise row.fail("prompt", what, "end the prompt with a user message")
        return Prompt(messages, use_case, row.place)
    try:
        return Prompt.from_text(check_text(row, "prompt", value), use_case, row.place)
    except UserError as error:
        if error.where:
            raise
        raise row.fail("prompt", error.what, error.fix or "") from None


def _messages(row: SourceRow, name: str, value: Any) -> tuple[Message, ...]:
    messages = []
    for i, item in enumerate(check_list(row, name, value)):
        item = check_object(row, f"{name}[{i}]", item)
        role = check_text(row, f"{name}[{i}].role", item.get("role"))
        if role not in SPEAKERS or (role in FIRST and i > 0):
            what = f"a {role} message comes first" if role in FIRST else f"the role {role!r} is unknown"
            raise row.fail(f"{name}[{i}].role", what, f"one of {', '.join(SPEAKERS)}, system only at the start")
        messages.append(Message(role, _content(row, f"{name}[{i}].content", item.get("content"))))
    if not messages:
        raise row.fail(name, f"`{name}` has no messages", "fill it in or delete the line")
    return tuple(messages)


def _content(row: SourceRow, name: str, value: Any) -> str:
    """Return the text of a message: a string, or a list of parts {"type": "text", "text": ..}."""
    if not isinstance(value, list):
        return check_text(row, name, value)
    texts = []
    for i, part in enumerate(value):
        part = check_object(row, f"{name}[{i}]", part)
        if part.get("type") != "text":
            what = f"a part of the message is of type {part.get('type')!r}"
            raise row.fail(f"{name}[{i}].type", what, "only text is read: leave the line out")
        texts.append(check_text(row, f"{name}[{i}].text", part.get("text")))
    return check_text(row, name, "".join(texts))


def _answered(row: SourceRow, name: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """Return the messages before the last, which must be the assistant's, and the words of the last."""
    *before, last = _messages(row, name, value)
    if last.role != "assistant":
        raise row.fail(name, f"the last message of `{name}` is the {last.role}'s", "end it with an assistant message")
    return tuple(before), last.content


def _response(row: SourceRow, name: str, value: Any) -> str:
    """Return the words of a response: a text, or a list of one message of the assistant."""
    if not isinstance(value, list):
        return check_text(row, name, value)
    before, response = _answered(row, name, value)
    if before:
        what = f"`{name}` has {len(before) + 1} messages"
        raise row.fail(name, what, "put all messages but the assistant's last into `prompt`")
    return response


def _demonstration(row: SourceRow) -> Demonstration:
    if "messages" not in row.fields:
        name = "completion" if "completion" in row.fields and "response" not in row.fields else "response"
        return Demonstration(_prompt(row), _response(row, name, row.need(name)))
    before, response = _answered(row, "messages", row.fields["messages"])
    if not before or before[-1].role not in ("user", "tool"):
        raise row.fail("messages", "no user message comes before the response", "put the prompt before it")
    return Demonstration(_prompt(row, [m._asdict() for m in before]), response)


def rankings_of(row: SourceRow, drops: Drops) -> Iterator[Ranking]:
    """Yield the rankings of a row, one in most layouts; raise UserError for a bad row."""
    fields = row.fields
    own = "ranks" in fields or isinstance(fields.get("ranking"), str)  # a tool may call its question `ranking`
    layout = None if own else find_layout(fields)
    if layout:
        for prompt, responses, ranks, labeler, time in read_published(layout, row, drops):
            yield Ranking(_prompt(row, prompt), tuple(responses), tuple(ranks), labeler=labeler, time=time)
        return
    ranking = _pair(row) if {"chosen", "rejected"} & fields.keys() else _ranking(row)
    labeler = check_text(row, "labeler", fields["labeler"]) if "labeler" in fields else ""
    yield replace(ranking, labeler=labeler, time=check_time(row, "time", fields["time"]) if "time" in fields else None)


def _ranking(row: SourceRow) -> Ranking:
    prompt = _prompt(row)
    listed = check_list(row, "responses", row.need("responses"))
    responses = tuple(check_text(row, f"responses[{i}]", text) for i, text in enumerate(listed))
    k = len(responses)
    if not MIN_K <= k <= MAX_K:
        what = f"there are {k} responses; a ranking has {MIN_K} to {MAX_K}"
        raise row.fail("responses", what, "add responses" if k < MIN_K else "leave some out, or make two rankings")
    ranks = read_ranks(row, k)
    check_equal_texts(row, responses, ranks)
    return Ranking(prompt, responses, ranks, _finished(row, k))


def _finished(row: SourceRow, k: int) -> tuple[bool, ...]:
    listed = check_list(row, "finished", row.fields.get("finished", [True] * k))
    if len(listed) != k or not all(isinstance(flag, bool) for flag in listed):
        raise row.fail("finished", f"`finished` is not {k} times true or false", "give one for each response, or none")
    return tuple(listed)


def _pair(row: SourceRow) -> Ranking:
    """Read {"prompt", "chosen", "rejected"}; each side is a text, or messages that may begin with the prompt."""
    prompt = _prompt(row) if "prompt" in row.fields else None
    answers = []
    for name in ("chosen", "rejected"):
        value = row.need(name)
        before, answer = _answered(row, name, value) if isinstance(value, list) else ((), check_text(row, name, value))
        if before and before[-1].role != "user":
            raise row.fail(name, "no user message comes before the answer", "put the prompt before it")
        if prompt is None and before:
            prompt = _prompt(row, [m._asdict() for m in before])
        elif before and prompt is not None and before != prompt.messages:
            raise row.fail(name, f"`{name}` carries another prompt", "give both sides one prompt")
        answers.append(answer)
    if prompt is None:
        row.need("prompt")
    check_equal_texts(row, answers, (1, 2))
    return Ranking(prompt, tuple(answers), (1, 2))


def _cloze(row: SourceRow) -> Cloze:
    context = check_text(row, "context", row.need("context"))
    listed = check_list(row, "choices", row.need("choices"))
    choices = tuple(check_text(row, f"choices[{i}]", choice) for i, choice in enumerate(listed))
    if len(choices) < 2:
        raise row.fail("choices", f"there are {len(choices)} choices", "give at least 2")
    name = "label" if "label" in row.fields and "answer" not in row.fields else "answer"
    answer = check_whole(row, name, row.need(name))
    if not 0 <= answer < len(choices):
        raise row.fail(name, f"`{name}` is {answer}, and there are {len(choices)} choices", "count from 0")
    return Cloze(context, choices, answer)
