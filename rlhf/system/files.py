"""Hash, measure and read files, write them so that a crash leaves the old or the new one, and check the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf.errors import UserError


def publish(partial: Path, final: Path) -> None:
    """Flush the files in the folder `partial` and rename it to `final`, which replaces an older folder."""
    mode = partial.stat().st_mode & 0o666
    for file in (path for path in partial.rglob("*") if path.is_file()):
        # safetensors makes its files readable by their owner only; whoever may read the folder must read the model.
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def hash_path(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file's content, or of the names and contents of all files below a folder.

    Raises FileNotFoundError if the path does not exist.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{hash_path(file)}\n".encode())
    return digest.hexdigest()


def size_of(path: str | Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def read_json(path: Path) -> Any:
    """Return the content of a stage's JSON file, None if there is none; raise UserError for a file that is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", str(path), "redo the stage with --fresh") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's JSONL file, [] if there is no file; raise UserError for a line that is not JSON.

    A last line without a newline is left out: it is being written, or was cut off when the run was killed.
    """
    if not path.exists():
        return []
    rows = []
    # splitlines() would also split at U+2028 and its like, which JSON leaves as they are in the text of a model.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"not JSON: {error}", f"{path}, line {number}", "redo the stage with --fresh") from None
    return rows


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk and would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: str | Path) -> None:
    """Raise UserError if files cannot be written below a folder, which need not exist yet."""
    folder = _nearest_existing(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        fix = "it is read-only or belongs to another user: change that, or choose another place with run.dir=FOLDER"
        raise UserError("the folder cannot be written to", str(folder), fix)


def require_disk(path: str | Path, need: int, what: str) -> None:
    """Raise UserError if the disk of `path`, which need not exist yet, lacks `need` bytes for `what`."""
    folder = _nearest_existing(path)
    free = shutil.disk_usage(folder).free
    if need > free:
        wrong = f"{what} needs about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        raise UserError(wrong, str(folder), "free some space, or choose another place with run.dir=FOLDER")


def _nearest_existing(path: str | Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
