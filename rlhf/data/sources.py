"""Read rows from local files, the embedded data sets or the Hub, each with its place for error messages.

    NAME.jsonl  NAME.json       one object a line; .json may be one array of objects instead; either may end in .gz
    NAME.parquet                read by `datasets`
    NAME.txt                    one document (read_documents only)
    embedded:NAME               the data set shipped with the project
    owner/name, name:split      a Hub data set; the split is `train` by default, and may be a slice: name:train[:100];
                                name@revision:split is its state at a branch, tag or commit

JSON is read here and not by `datasets`, so that an error can name the line.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")
EMBEDDED = "embedded:"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?(:[\w\[\]:%+.-]+)?")


@dataclass(frozen=True)
class SourceRow:
    """One object of a data file and its place; fields whose value is null are left out."""

    fields: dict[str, Any]
    place: str  # "rankings.jsonl, line 3"

    def fail(self, field: str, what: str, fix: str) -> UserError:
        """Return the error for a bad field, for the caller to raise."""
        return UserError(what, where=f"{self.place}, field `{field}`", fix=fix)

    def need(self, field: str) -> Any:
        """Return the field's value; if it is missing or null, raise UserError that names the most similar field."""
        if field in self.fields:
            return self.fields[field]
        close = difflib.get_close_matches(field, self.fields, n=1)
        fix = f"rename `{close[0]}` to `{field}`" if close else f"add `{field}` to the line"
        if field == "responses" and "response" in self.fields:
            fix = "a ranking has `prompt`, `responses` and `ranks`; this line is a demonstration"
        raise self.fail(field, f"the field `{field}` is missing", fix)


def check_text(row: SourceRow, field: str, value: Any) -> str:
    """Return `value` if it is text, not blank and encodable as UTF-8; raise UserError naming `field` otherwise."""
    if not isinstance(value, str):
        raise row.fail(field, f"`{field}` is {kind(value)}, not a string", "put the text in quotes")
    if not value.strip():
        raise row.fail(field, f"`{field}` is empty", "fill it in or delete the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        what = f"`{field}` holds half of a character (a lone surrogate such as \\ud83d)"
        raise row.fail(field, what, "write the whole character, or delete the half") from None
    return value


def check_list(row: SourceRow, field: str, value: Any) -> list[Any]:
    """Return `value` if it is a list; raise UserError naming `field` otherwise."""
    if not isinstance(value, list):
        raise row.fail(field, f"`{field}` is {kind(value)}, not a list", "write it as [..., ...]")
    return value


def check_object(row: SourceRow, field: str, value: Any) -> dict[str, Any]:
    """Return `value` if it is an object; raise UserError naming `field` otherwise."""
    if not isinstance(value, dict):
        raise row.fail(field, f"`{field}` is {kind(value)}, not an object", "write it as {...}")
    return value


def check_whole(row: SourceRow, field: str, value: Any) -> int:
    """Return `value` if it is a whole number, not true or false; raise UserError naming `field` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise row.fail(field, f"`{field}` is {kind(value)}, not a whole number", "write it as a number without quotes")
    return value


def check_time(row: SourceRow, field: str, value: Any) -> datetime:
    """Return a UTC time from ISO 8601 (UTC if without a zone) or seconds since 1970; raise UserError otherwise."""
    what = f"`{field}` is {kind(value)}, not a time"
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        what = f"`{field}` is {value!r}, which is not a time"
    raise row.fail(field, what, "write it as 2026-05-01T09:30:00Z, or as seconds since 1970")


def kind(value: Any) -> str:
    """Return JSON's name for the type of a value, with its article."""
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def embedded_path(name: str) -> Path:
    """Return the file of an embedded data set, data/NAME.jsonl; raise UserError, with their names, if there is none."""
    # Paths, not importlib.resources: in an editable install that cannot list a package whose folder has another name.
    beside = Path(__file__).resolve().parents[2]
    folders = (beside / "rlhf_data", beside / "data")  # installed, and in a checkout
    files = {path.stem: path for folder in folders for path in folder.glob("*.jsonl")}
    if name not in files:
        fix = f"one of: {', '.join(sorted(files))}" if files else "install the project with its data"
        raise UserError(f"there is no embedded data set {name!r}", where=f"{EMBEDDED}{name}", fix=fix)
    return files[name]


def local_path(source: str) -> Path | None:
    """Return the file that a source names, or None for a Hub name.

    Raises UserError for a missing file (names the nearest one), an unknown embedded name, a folder, an unknown suffix.
    """
    if source.startswith(EMBEDDED):
        return embedded_path(source.removeprefix(EMBEDDED))
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError("a folder is named where a file is wanted", where=source, fix="name the files in it")
    if path.is_file():
        if not source.endswith(SUFFIXES):
            fix = f"give one that ends in {', '.join(SUFFIXES)}"
            raise UserError("unknown kind of data file", where=source, fix=fix)
        return path
    if not source.endswith(SUFFIXES) and _HUB_NAME.fullmatch(source):
        return None
    raise UserError("no such data file", where=source, fix=_nearest(path))


def read_rows(source: str) -> Iterator[SourceRow]:
    """Yield the rows of a JSON file, a parquet file, an embedded data set or a Hub data set.

    Raises UserError if the source cannot be found or read, if a line is not a JSON object, or if there are no rows.
    """
    path = local_path(source)
    if path is not None and path.suffix == ".txt":
        what = "plain text is read as pretraining text only"
        raise UserError(what, where=source, fix="give .jsonl, .json or .parquet")
    if path is None:
        rows = _tabular(source, source)
    elif path.suffix == ".parquet":
        rows = _tabular(source, str(path))
    else:
        rows = _json_rows(source, path)
    empty = True
    for place, value in rows:
        empty = False
        if not isinstance(value, dict):
            raise UserError(f"the line is {kind(value)}, not an object", where=place, fix='write it as {"field": ...}')
        yield SourceRow({name: item for name, item in value.items() if item is not None}, place)
    if empty:
        raise UserError("the file has no rows", where=source, fix="fill it or take it out of the recipe")


def read_documents(source: str) -> Iterator[str]:
    """Yield documents of pretraining text: a whole .txt file, or the field `text` of every row."""
    path = local_path(source)
    if path is None or path.suffix != ".txt":
        for row in read_rows(source):
            yield check_text(row, "text", row.need("text"))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _not_utf8(f"{source}, line {line}") from None
    if not text.strip():
        raise UserError("the file has no text", where=source, fix="fill it or take it out of the recipe")
    yield text


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; check the path"
    files = sorted(entry.name for entry in path.parent.iterdir() if entry.name.endswith(SUFFIXES))
    if not files:
        return f"there are no data files in {path.parent}"
    close = difflib.get_close_matches(path.name, files, n=1, cutoff=0.6)
    return f"did you mean {path.parent / close[0]}?" if close else f"data files there: {', '.join(files[:5])}"


def _not_utf8(place: str) -> UserError:
    return UserError("the text is not UTF-8", where=place, fix="save the file as UTF-8")


def _json_rows(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            # Published .json files are as often one object a line as one array: the first character decides.
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            file.seek(0)
            if path.name.endswith((".json", ".json.gz")) and start == b"[":
                yield from _json_array(source, file.read())
                return
            for number, line in enumerate(file, start=1):
                place = f"{source}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise _not_utf8(place) from None
                if text.strip():
                    yield place, _parse(text, place)
    except (OSError, EOFError, zlib.error) as error:  # no permission; not a gzip file, or a truncated one
        raise UserError(f"the file cannot be read: {error}", where=source, fix="check it, or fetch it again") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        what = f"the line is not JSON: {error.msg} at column {error.colno}"
        raise UserError(what, where=place, fix='write one object a line, such as {"prompt": "..."}') from None


def _json_array(source: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of an array; the place has line and item number, since a whole array may be on one line."""
    try:
        text = content.decode("utf-8-sig")
        json.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{source}, line {line}") from None
    except json.JSONDecodeError as error:
        what = f"the file is not JSON: {error.msg}"
        fix = "correct the array, or write one object a line"
        raise UserError(what, where=f"{source}, line {error.lineno}", fix=fix) from None
    # The array is valid JSON; a second pass, item by item, finds the line numbers.
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, position, seen, number = 1, text.index("[") + 1, 0, 0
    while text[position := between.match(text, position).end()] != "]":
        line, seen = line + text.count("\n", seen, position), position
        value, position = decoder.raw_decode(text, position)
        number += 1
        yield f"{source}, line {line}, item {number}", value


def _tabular(source: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a parquet file or of a Hub data set."""
    import datasets

    try:
        if name.endswith(".parquet"):
            # Streamed, so that `datasets` puts no second copy of the file into its cache.
            table = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
        else:
            named, _, split = name.partition(":")
            hub_name, _, revision = named.partition("@")
            table = datasets.load_dataset(hub_name, split=split or "train", revision=revision or None)
        for number, row in enumerate(table, start=1):
            yield f"{source}, row {number}", row
    except (OSError, ValueError) as error:
        fix = "check the name and the split, or the path if it is a file; without a network only cached sets are found"
        if name.endswith(".parquet"):
            fix = "check that the file is a whole parquet file"
        raise UserError(f"the data set cannot be read: {error}", where=source, fix=fix) from error
