"""Files: hashes, sizes, atomic writes and free space."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.system.files import hash_path, require_disk, size_of, write_atomic


def test_hash_of_a_file_is_sha256_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    # FIPS 180-2, appendix B.1
    assert hash_path(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileNotFoundError):
        hash_path(tmp_path / "missing")


def test_hash_of_a_folder_sees_names_and_contents_at_any_depth(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"\0" * 100)
    seen = {hash_path(folder)}
    assert size_of(folder) == 102
    os.utime(folder / "config.json", (1, 1))
    assert hash_path(folder) in seen  # times do not matter
    for change in (
        lambda: (folder / "sub" / "weights").write_bytes(b"\0" * 99 + b"\1"),
        lambda: (folder / "config.json").rename(folder / "sub" / "config.json"),
        lambda: (folder / "extra").write_text(""),
    ):
        change()
        assert hash_path(folder) not in seen
        seen.add(hash_path(folder))


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert path.read_text() == "two" and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_require_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1, "a checkpoint")
    with pytest.raises(UserError, match=r"a checkpoint needs about 1000000000.00 GB[\s\S]*run.dir=FOLDER"):
        require_disk(tmp_path / "not" / "yet", 10**18, "a checkpoint")
