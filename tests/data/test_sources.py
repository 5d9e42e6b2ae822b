"""Sources: kinds of files, where in them a mistake is, the embedded data, and names that lead nowhere."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from rlhf.data.records import Demonstration, Drops, read_demonstrations, read_prompts, read_rankings, read_texts
from rlhf.data.sources import embedded_path, local_path, read_rows
from rlhf.errors import UserError
from support.data_files import error_of, user, write_lines
from support.paths import ROOT


def test_other_kinds_of_files(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "response": "x"}, {"prompt": "b?", "response": "y\u2028z"}]
    expected = [Demonstration(user("a?"), "x"), Demonstration(user("b?"), "y\u2028z")]
    (tmp_path / "array.json").write_text("\n " + json.dumps(rows, indent=1))
    write_lines(tmp_path / "lines.json", *rows)
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "lines.json").read_bytes())
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    for name in ("array.json", "lines.json", "mark.jsonl", "raw.jsonl", "packed.jsonl.gz", "table.parquet"):
        assert read_demonstrations([str(tmp_path / name)], Drops()) == expected, name


def test_parquet_fills_absent_fields_with_null(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1], "chosen": None, "rejected": None},
        {"prompt": "q", "responses": None, "ranks": None, "chosen": "x", "rejected": "y"},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    assert [r.ranks for r in read_rankings([str(tmp_path / "r.parquet")], Drops())] == [(2, 1), (1, 2)]


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "prompts_train.jsonl", {"prompt": "a"})
    write_lines(tmp_path / "corpus.jsonl", {"text": "a"})
    message = str(error_of(read_prompts, str(tmp_path / "prompt_train.jsonl")))
    assert "no such data file" in message and f"where: {tmp_path / 'prompt_train.jsonl'}" in message
    assert f"did you mean {tmp_path / 'prompts_train.jsonl'}?" in message
    (tmp_path / "empty").mkdir()
    assert "there are no data files in" in str(error_of(read_prompts, str(tmp_path / "empty" / "a.jsonl")))
    assert "there is no folder" in str(error_of(read_prompts, str(tmp_path / "nowhere" / "a.jsonl")))


def test_folders_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n")
    (tmp_path / "a.txt").write_text("words")
    assert "a folder is named" in str(error_of(read_prompts, str(tmp_path)))
    message = str(error_of(read_prompts, str(tmp_path / "a.csv")))
    assert "unknown kind of data file" in message and ".jsonl" in message
    assert "plain text is read as pretraining text only" in str(error_of(read_prompts, str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b""), ("a.json", b"[]"), ("a.txt", b" \n")],
)
def test_empty_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = str(error_of(read_texts, str(tmp_path / name)))
    assert "the file has no" in message and f"where: {tmp_path / name}" in message


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-12]], ids=["no gzip", "cut off"]
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="the file cannot be read") as error:
        list(read_rows(str(path)))
    assert error.value.where == str(path)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
        ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]\n'),
        ("a.txt", b"one\ncaf\xe9\n"),
    ):
        (tmp_path / name).write_bytes(content)
        message = str(error_of(read_texts, str(tmp_path / name)))
        assert "not UTF-8" in message and f"where: {tmp_path / name}, line 2\n" in message


def test_items_of_an_array_are_located(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt": "a"},\n {"prompt":\n  "b"}, {"prompt": ""}]')
    assert f"where: {path}, line 4, item 3, field `prompt`" in str(error_of(read_prompts, str(path)))
    path.write_text('[\n {"prompt": "a"},\n {"prompt" "b"}]')
    message = str(error_of(read_prompts, str(path)))
    assert "the file is not JSON: Expecting ':' delimiter" in message and f"where: {path}, line 3\n" in message


def test_a_bad_row_of_a_parquet_file_is_located(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]).to_parquet(path)
    assert f"where: {path}, row 2, field `prompt`" in str(error_of(read_prompts, str(path)))
    path.write_bytes(b"not parquet")
    message = str(error_of(read_prompts, str(path)))
    assert "the data set cannot be read" in message and "a whole parquet file" in message


def test_a_hub_name_that_cannot_be_reached() -> None:
    assert local_path("owner/name:train[:10]") is None
    message = str(error_of(read_prompts, "owner-of-nothing/no-such-set:train"))
    assert "the data set cannot be read" in message and "where: owner-of-nothing/no-such-set:train" in message


def test_a_hub_set_is_read_at_its_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def load(name: str, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((name, split, revision))
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("owner/name", "owner/name@v1.0:test", "owner/name@refs/pr/2"):
        assert [row.place for row in read_rows(source)] == [f"{source}, row 1"]
    assert asked == [
        ("owner/name", "train", None),
        ("owner/name", "test", "v1.0"),
        ("owner/name", "train", "refs/pr/2"),
    ]


def test_embedded_names() -> None:
    names = {path.stem for path in (ROOT / "data").glob("*.jsonl")}
    assert names
    for name in names:
        assert embedded_path(name).samefile(ROOT / "data" / f"{name}.jsonl")
        assert local_path(f"embedded:{name}") == embedded_path(name)
    message = str(error_of(read_prompts, "embedded:nothing"))
    assert "there is no embedded data set 'nothing'" in message and "where: embedded:nothing" in message
    assert ", ".join(sorted(names)) in message


def test_embedded_data_of_an_installed_package(tmp_path: Path) -> None:
    # As a wheel lays it out: rlhf/ without data/ beside it, and rlhf_data/ without a module of its own.
    (tmp_path / "rlhf" / "data").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "data/__init__.py", "data/sources.py"):
        (tmp_path / "rlhf" / name).write_text((ROOT / "rlhf" / name).read_text())
    (tmp_path / "rlhf_data").mkdir()
    write_lines(tmp_path / "rlhf_data" / "mine.jsonl", {"prompt": "a"})
    code = "from rlhf.data.sources import embedded_path; print(embedded_path('mine'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert run.stdout.strip() == str(tmp_path / "rlhf_data" / "mine.jsonl"), run.stderr
