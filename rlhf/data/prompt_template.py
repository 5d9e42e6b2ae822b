"""Templates of questions to a language model: a header, the text of one question, and worked examples.

    # comments
    kind: pair                  pair: which of two responses is better; points: how good is one; answer: respond to it
    form: few-shot              zero-shot, few-shot, or chain-of-thought (the model reasons before it answers)
    labels: A B                 the answers: the first for "the first one is better"; of points, worst to best
    cue: The better answer is   what the assistant's answer begins with, or what ends its reasoning
    ---
    Request: {{ prompt }}  ..   the user's turn; a pair has {{ first }} and {{ second }}, points have {{ response }}
    --- demonstrations
    {"prompt": "..", "first": "..", "second": "..", "label": "A", "reason": ".."}       one a line

Demonstrations come before the question as turns of their own: the same text filled in, and the answer as it is to be
given. `name` (else the file's) and, for answers, `stop` (text at which a response ends) may be in the header as well.
Fields are put in once: braces inside a response stay what they are, and nothing in a template is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.system.files import write_atomic

Kind = Literal["pair", "points", "answer"]
Form = Literal["zero-shot", "few-shot", "chain-of-thought"]
FOLDER = Path(__file__).parent / "prompt_templates"
FOLDERS = {"judge": FOLDER / "judge", "answer": FOLDER / "generate"}
FIELD_OF = {"judge": "judge.template", "answer": "evaluate.prompted"}  # the recipe's, that name them
FIELDS = {"pair": ("prompt", "first", "second"), "points": ("prompt", "response"), "answer": ("prompt",)}
HEADER = ("name", "kind", "form", "labels", "cue", "stop")
MAX_LABELS = 11
_FIELD = re.compile(r"\{\{\s*(\w*)\s*\}\}")


class Example(NamedTuple):
    """A worked example: what is put into the text, the reasoning, and the answer (a label, or a response)."""

    fields: dict[str, str]
    answer: str
    reason: str = ""


@dataclass(frozen=True)
class Template:
    """See the head of this file."""

    name: str
    kind: Kind
    form: Form
    labels: tuple[str, ...]
    cue: str
    body: str
    examples: tuple[Example, ...] = field(default=())
    stop: str = ""

    @property
    def reasons(self) -> bool:
        """Whether the model writes before it answers."""
        return self.form == "chain-of-thought"

    def question(self, fields: Mapping[str, str]) -> str:
        """The text of the user's turn."""
        return _FIELD.sub(lambda match: fields[match[1]], self.body)

    def shown(self, fields: Mapping[str, str]) -> list[Example]:
        """The examples for a question: all but those about the very prompt that is asked about."""
        asked = _key(fields["prompt"])
        return [example for example in self.examples if _key(example.fields["prompt"]) != asked]

    def messages(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        """The dialogue up to where the assistant speaks."""
        turns = []
        for example in self.shown(fields):
            words = " ".join(filter(None, [self.cue, example.answer]))
            turns += [("user", self.question(example.fields)), ("assistant", assistant_answer(example.reason, words))]
        return tuple(Message(*turn) for turn in [*turns, ("user", self.question(fields))])


def assistant_answer(reasoning: str, words: str) -> str:
    """What the assistant says: its reasoning, where there is any, and on a line of its own the answer."""
    return f"{reasoning.strip()}\n{words}" if reasoning.strip() else words


def with_examples(template: Template, examples: Sequence[Example], name: str = "") -> Template:
    """The template with other examples; without reasons it becomes a few-shot or zero-shot one."""
    form: Form = template.form if template.reasons else "few-shot" if examples else "zero-shot"
    return replace(template, examples=tuple(examples), form=form, name=name or template.name)


def template_names(folder: str) -> list[str]:
    """Names of the templates that are shipped for `judge` or `answer`."""
    return sorted(path.stem for path in FOLDERS[folder].glob("*.txt"))


def find_template(name_or_path: str, folder: str) -> Path:
    """The file of a template that is shipped under that name, or at that path.

    Raises:
        UserError: naming the nearest name when there is neither.
    """
    names = template_names(folder)
    if name_or_path in names:
        return FOLDERS[folder] / f"{name_or_path}.txt"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    near = get_close_matches(name_or_path, names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    fix = f"{guess}templates: {', '.join(names)}; or the path of a file"
    raise UserError(f"there is no template {name_or_path!r}", FIELD_OF[folder], fix)


def load_template(name_or_path: str, folder: str = "judge") -> Template:
    """Read and check a template.

    Raises:
        UserError: no such template, or a mistake in it, with its file and line.
    """
    path = find_template(name_or_path, folder)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template cannot be read: {error}", str(path), "give a readable text file") from None
    template = parse_template(text, str(path), path.stem)
    if (template.kind == "answer") != (folder == "answer"):
        kinds = "answer" if folder == "answer" else "pair or points"
        raise UserError(
            f"the template is of kind {template.kind}", f"{path}, field `kind`", f"{FIELD_OF[folder]} takes {kinds}"
        )
    return template


def parse_template(text: str, path: str, name: str) -> Template:
    """A template from its text; `path` is for errors, `name` is its name where the header has none.

    Raises:
        UserError: with file and line.
    """
    return _Parser(text, path).template(name)


def template_text(template: Template, comments: Sequence[str] = ()) -> str:
    """The template as a file that `parse_template` reads back equal."""
    values = {
        "name": template.name,
        "kind": template.kind,
        "form": template.form,
        "labels": " ".join(template.labels),
        "cue": template.cue,
        "stop": template.stop,
    }
    lines = [f"# {comment}" for comment in comments]
    lines += [f"{key}: {value}" for key, value in values.items() if value]
    lines += ["---", template.body]
    if template.examples:
        lines.append("--- demonstrations")
        lines += [json.dumps(_row(template, example), ensure_ascii=False) for example in template.examples]
    return "\n".join(lines) + "\n"


def write_template(template: Template, path: Path, comments: Sequence[str] = ()) -> None:
    """Write the template whole or not at all."""
    write_atomic(path, template_text(template, comments))


def _row(template: Template, example: Example) -> dict[str, str]:
    row = {**example.fields, _answer_key(template.kind): example.answer}
    return row | {"reason": example.reason} if example.reason else row


def _answer_key(kind: str) -> str:
    return "response" if kind == "answer" else "label"


def _key(text: str) -> str:
    return Prompt((Message("user", text),)).key


class _Parser:
    """One pass over the lines of a template; every error knows its line."""

    def __init__(self, text: str, path: str) -> None:
        self.lines, self.path = text.split("\n"), path

    def template(self, name: str) -> Template:
        marks = self._marks()
        values = self._header(marks[0][0])
        kind = self._one_of(values, "kind", get_args(Kind))
        form = self._one_of(values, "form", get_args(Form))
        begin, end = marks[0][0] + 1, marks[1][0] if len(marks) > 1 else len(self.lines)
        labels = self._labels(values, kind)
        cue = values.get("cue", ("", 0))[0]
        if form == "chain-of-thought" and not cue:
            raise self._fail(
                values["form"][1], "reasoning needs words that end it", "add a line such as `cue: Answer:`"
            )
        if kind == "answer" and form != "chain-of-thought" and cue:
            raise self._fail(values["cue"][1], "only reasoning has a cue here", "delete the line")
        if kind != "answer" and "stop" in values:
            raise self._fail(values["stop"][1], "labels are read, nothing needs to stop", "delete the line")
        template = Template(
            name=values.get("name", (name, 0))[0],
            kind=kind,
            form=form,
            labels=labels,
            cue=cue,
            body=self._body(begin, end, kind),
            stop=values.get("stop", ("", 0))[0],
        )
        examples = tuple(self._examples(end + 1, template)) if len(marks) > 1 else ()
        if form == "zero-shot" and examples:
            raise self._fail(values["form"][1], "a zero-shot template has demonstrations", "write `form: few-shot`")
        return replace(template, examples=examples)

    def _fail(self, line: int, what: str, fix: str) -> UserError:
        """The error for line number `line` (from 0), to be raised by the caller."""
        return UserError(what, f"{self.path}, line {line + 1}", fix)

    def _marks(self) -> list[tuple[int, str]]:
        """Lines that begin a part, with its name; the text has none."""
        marks = [(i, line[3:].strip()) for i, line in enumerate(self.lines) if re.match(r"---(\s|$)", line)]
        if not marks:
            raise self._fail(len(self.lines) - 1, "no line `---` ends the header", "put one before the text")
        for place, (line, part) in enumerate(marks):
            if part != ("", "demonstrations")[min(place, 1)] or place > 1:
                fix = "a template has `---` before the text and `--- demonstrations` after it, each once"
                raise self._fail(line, f"the line `{self.lines[line].strip()}` begins no part here", fix)
        return marks

    def _header(self, end: int) -> dict[str, tuple[str, int]]:
        """Value and line of every key."""
        values: dict[str, tuple[str, int]] = {}
        for i, line in enumerate(self.lines[:end]):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, colon, value = (part.strip() for part in line.partition(":"))
            if not colon or key not in HEADER:
                near = get_close_matches(key, HEADER, n=1)
                guess = f"did you mean `{near[0]}:`? " if near and colon else ""
                raise self._fail(i, f"`{line.strip()}` is no line of the header", f"{guess}keys: {', '.join(HEADER)}")
            if key in values:
                raise self._fail(i, f"`{key}` is given twice", "keep one of the lines")
            if not value:
                raise self._fail(i, f"`{key}` is empty", "fill it in or delete the line")
            values[key] = value, i
        return values

    def _one_of(self, values: Mapping[str, tuple[str, int]], key: str, choices: Sequence[str]) -> Any:
        fix = f"{key}: {' or '.join(choices)}"
        if key not in values:
            raise self._fail(0, f"the header has no `{key}`", f"add a line: {fix}")
        value, line = values[key]
        if value not in choices:
            raise self._fail(line, f"the {key} {value!r} is unknown", fix)
        return value

    def _labels(self, values: Mapping[str, tuple[str, int]], kind: str) -> tuple[str, ...]:
        if kind == "answer":
            if "labels" in values:
                raise self._fail(values["labels"][1], "a response is not chosen from labels", "delete the line")
            return ()
        if "labels" not in values:
            raise self._fail(0, "the header has no `labels`", "add a line such as `labels: A B` or `labels: 1 2 3 4 5`")
        text, line = values["labels"]
        labels = tuple(text.split())
        if len(labels) != 2 and kind == "pair" or not 2 <= len(labels) <= MAX_LABELS:
            count = "two labels" if kind == "pair" else f"2 to {MAX_LABELS} labels"
            raise self._fail(line, f"there are {len(labels)} labels", f"{kind} has {count}, with blanks between them")
        for i, a in enumerate(labels):
            if any(b.startswith(a) for j, b in enumerate(labels) if j != i):
                # The probability of the shorter one would hold that of the longer one.
                raise self._fail(line, f"another label begins with {a!r}", "choose words that do not begin alike")
        return labels

    def _body(self, begin: int, end: int, kind: str) -> str:
        text = "\n".join(self.lines[begin:end])
        if not text.strip():
            raise self._fail(begin - 1, "there is no text after the header", "write the question")
        fields, found = FIELDS[kind], set()
        names = " ".join(f"{{{{ {name} }}}}" for name in fields)
        for i, line in enumerate(self.lines[begin:end], begin):
            for match in _FIELD.finditer(line):
                if match[1] not in fields:
                    raise self._fail(i, f"`{match[0]}` is no field of kind {kind}", f"fields: {names}")
                found.add(match[1])
            if re.search(r"\{\{|\}\}|\{%|%\}", _FIELD.sub("", line)):
                raise self._fail(i, "braces that hold no field", f"write fields as {names}; there are no statements")
        if missing := [name for name in fields if name not in found]:
            fix = f"put {{{{ {missing[0]} }}}} where it belongs"
            raise self._fail(begin, f"the text never uses {{{{ {missing[0]} }}}}", fix)
        return text.strip("\n").rstrip()

    def _examples(self, begin: int, template: Template) -> Iterator[Example]:
        answer = _answer_key(template.kind)
        needed = (*FIELDS[template.kind], answer, *(("reason",) if template.reasons else ()))
        for i, line in enumerate(self.lines[begin:], begin):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise self._fail(i, f"the demonstration is not JSON: {error}", "write one object a line") from None
            if not isinstance(row, dict) or not all(isinstance(v, str) and v.strip() for v in row.values()):
                raise self._fail(i, "a demonstration is an object of texts", f"give it {', '.join(needed)}")
            if set(row) != set(needed):
                odd = sorted(set(row) ^ set(needed))[0]
                what = f"`{odd}` is {'missing' if odd in needed else 'no field here'}"
                raise self._fail(i, what, f"a demonstration of this template has {', '.join(needed)}")
            if template.labels and row[answer] not in template.labels:
                raise self._fail(i, f"{row[answer]!r} is none of the labels", f"one of {', '.join(template.labels)}")
            yield Example({name: row[name] for name in FIELDS[template.kind]}, row[answer], row.get("reason", ""))
