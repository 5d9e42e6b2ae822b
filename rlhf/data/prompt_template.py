"""Read, check, fill in and write templates of questions to a language model. A template is a text file:

    # comments
    kind: pair
    form: few-shot
    labels: A B
    cue: The better answer is
    ---
    Request: {{ prompt }}
    One: {{ first }}
    Two: {{ second }}
    --- demonstrations
    {"prompt": "..", "first": "..", "second": "..", "label": "A"}

kind     pair: which of two responses is better; points: how good is one; answer: respond to it
form     zero-shot, few-shot, or chain-of-thought (the model reasons before it answers)
labels   the answers of a pair, A for the first response; the points of one response, worst first; none for answer
cue      beginning of the assistant's answer, after its reasoning if there is any
name     by default the file's name
stop     for kind answer, text at which a response ends

The text is the user's turn; every field of the kind must occur in it: `first` and `second` of a pair, `response` of
points, and always `prompt`. Demonstrations, one a line, come before the question as turns of their own: the same text
filled in, and the expected answer. With chain-of-thought they also need "reason"; those of kind answer have `response`
in place of `label`. Fields are filled in once: braces inside a response are kept, and nothing is executed.
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
Use = Literal["judge", "answer"]  # a template asks a judge, or a policy for an answer
FOLDER = Path(__file__).parent / "prompt_templates"
FOLDERS = {"judge": FOLDER / "judge", "answer": FOLDER / "generate"}
FIELD_OF = {"judge": "judge.template", "answer": "evaluate.prompted"}  # fields of the recipe that name a template
FIELDS = {"pair": ("prompt", "first", "second"), "points": ("prompt", "response"), "answer": ("prompt",)}
HEADER = ("name", "kind", "form", "labels", "cue", "stop")
MAX_LABELS = 11  # as many as the points from 0 to 10
_FIELD = re.compile(r"\{\{\s*(\w*)\s*\}\}")


class Example(NamedTuple):
    """A worked example."""

    fields: dict[str, str]  # filled into the text
    answer: str  # a label, or a response
    reason: str = ""


@dataclass(frozen=True)
class Template:
    """A template; the fields are those of the file."""

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
        """Return whether the model reasons before it answers."""
        return self.form == "chain-of-thought"

    def question(self, fields: Mapping[str, str]) -> str:
        """Return the text of the user's turn."""
        return _FIELD.sub(lambda match: fields[match[1]], self.body)

    def shown(self, fields: Mapping[str, str]) -> list[Example]:
        """Return the examples for a question: all but those about the prompt of the question."""
        asked = _key(fields["prompt"])
        return [example for example in self.examples if _key(example.fields["prompt"]) != asked]

    def messages(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        """Return the dialogue up to the assistant's answer."""
        turns = []
        for example in self.shown(fields):
            words = " ".join(filter(None, [self.cue, example.answer]))
            turns += [("user", self.question(example.fields)), ("assistant", assistant_answer(example.reason, words))]
        return tuple(Message(*turn) for turn in [*turns, ("user", self.question(fields))])


def assistant_answer(reasoning: str, words: str) -> str:
    """Return the assistant's turn: its reasoning, if any, and the answer on a line of its own."""
    return f"{reasoning.strip()}\n{words}" if reasoning.strip() else words


def with_examples(template: Template, examples: Sequence[Example], name: str = "") -> Template:
    """Return the template with other examples; its form follows from them, unless it reasons."""
    form: Form = template.form if template.reasons else "few-shot" if examples else "zero-shot"
    return replace(template, examples=tuple(examples), form=form, name=name or template.name)


def template_names(use: Use) -> list[str]:
    """Return the names of the templates that are shipped for `judge` or `answer`."""
    return sorted(path.stem for path in FOLDERS[use].glob("*.txt"))


def find_template(name_or_path: str, use: Use) -> Path:
    """Return the file of a shipped template, or the one at this path; else raise UserError with the nearest name."""
    names = template_names(use)
    if name_or_path in names:
        return FOLDERS[use] / f"{name_or_path}.txt"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    near = get_close_matches(name_or_path, names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    fix = f"{guess}templates: {', '.join(names)}; or the path of a file"
    raise UserError(f"there is no template {name_or_path!r}", FIELD_OF[use], fix)


def load_template(name_or_path: str, use: Use = "judge") -> Template:
    """Read and check a template; raise UserError, with file and line, if there is none or a mistake in it."""
    path = find_template(name_or_path, use)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template cannot be read: {error}", str(path), "give a readable text file") from None
    template = parse_template(text, str(path), path.stem)
    if (template.kind == "answer") != (use == "answer"):
        kinds = "answer" if use == "answer" else "pair or points"
        fix = f"{FIELD_OF[use]} takes {kinds}"
        raise UserError(f"the template is of kind {template.kind}", f"{path}, field `kind`", fix)
    return template


def parse_template(text: str, path: str, name: str) -> Template:
    """Return a text's template, by default called `name`; raise UserError with `path` and line of a mistake."""
    return _Parser(text, path).template(name)


def template_text(template: Template, comments: Sequence[str] = ()) -> str:
    """Return the text of a template; parse_template reads one that it could have made back equal.

    A comment must be one line.
    """
    values = {key: getattr(template, key) for key in HEADER} | {"labels": " ".join(template.labels)}
    lines = [f"# {comment}" for comment in comments]
    lines += [f"{key}: {value}" for key, value in values.items() if value]
    lines += ["---", template.body]
    if template.examples:
        lines.append("--- demonstrations")
        lines += [json.dumps(_row(template, example), ensure_ascii=False) for example in template.examples]
    return "\n".join(lines) + "\n"


def write_template(template: Template, path: Path, comments: Sequence[str] = ()) -> None:
    """Write the template; a kill leaves the old file or the new one, never a part."""
    write_atomic(path, template_text(template, comments))


def _row(template: Template, example: Example) -> dict[str, str]:
    row = {**example.fields, _answer_key(template.kind): example.answer}
    return row | {"reason": example.reason} if example.reason else row


def _answer_key(kind: str) -> str:
    return "response" if kind == "answer" else "label"


def _key(text: str) -> str:
    return Prompt((Message("user", text),)).key


class _Parser:
    """A parser of the lines of a template, whose errors name the line."""

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
            fix = "add a line such as `cue: Answer:`"
            raise self._fail(values["form"][1], "reasoning needs words that end it", fix)
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
        """Return the error for line number `line` (from 0), for the caller to raise."""
        return UserError(what, f"{self.path}, line {line + 1}", fix)

    def _marks(self) -> list[tuple[int, str]]:
        """Return (line number, name) of the lines that begin a part; the part with the text has an empty name."""
        marks = [(i, line[3:].strip()) for i, line in enumerate(self.lines) if re.match(r"---(\s|$)", line)]
        if not marks:
            raise self._fail(len(self.lines) - 1, "no line `---` ends the header", "put one before the text")
        for i, (line, part) in enumerate(marks):
            if part != ("", "demonstrations")[min(i, 1)] or i > 1:
                fix = "a template has `---` before the text and `--- demonstrations` after it, each once"
                raise self._fail(line, f"the line `{self.lines[line].strip()}` begins no part here", fix)
        return marks

    def _header(self, end: int) -> dict[str, tuple[str, int]]:
        """Return value and line number of every key."""
        values: dict[str, tuple[str, int]] = {}
        for i, line in enumerate(self.lines[:end]):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, colon, value = (part.strip() for part in line.partition(":"))
            if not colon or key not in HEADER:
                near = get_close_matches(key, HEADER, n=1)
                guess = f"did you mean `{near[0]}:`? " if near and colon else ""
                fix = f"{guess}keys: {', '.join(HEADER)}"
                raise self._fail(i, f"`{line.strip()}` is not a line of the header", fix)
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
            raise self._fail(line, f"there are {len(labels)} labels", f"{kind} has {count}, separated by blanks")
        for i, a in enumerate(labels):
            if any(b.startswith(a) for j, b in enumerate(labels) if j != i):
                # The probability of the shorter label would include that of the longer one.
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
                    raise self._fail(i, f"`{match[0]}` is not a field of kind {kind}", f"fields: {names}")
                found.add(match[1])
            if re.search(r"\{\{|\}\}|\{%|%\}", _FIELD.sub("", line)):
                fix = f"write fields as {names}; templates have no statements"
                raise self._fail(i, "braces without a field in them", fix)
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
                what = f"`{odd}` is {'missing' if odd in needed else 'not a field here'}"
                raise self._fail(i, what, f"a demonstration of this template has {', '.join(needed)}")
            if template.labels and row[answer] not in template.labels:
                raise self._fail(i, f"{row[answer]!r} is none of the labels", f"one of {', '.join(template.labels)}")
            yield Example({name: row[name] for name in FIELDS[template.kind]}, row[answer], row.get("reason", ""))
