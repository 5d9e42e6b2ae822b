"""Files: hashes, sizes, reading JSON, writing so that a crash leaves the old file or the new one, checks of space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf.errors import UserError


def publish(partial: Path, final: Path) -> None:
    """Flush the files of `partial` and rename it to `final`, in whose place nothing or an older folder is."""
    mode = partial.stat().st_mode & 0o666
    for file in (path for path in partial.rglob("*") if path.is_file()):
        # safetensors writes its files readable by their owner only; a model folder is for whoever reads the folder.
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def hash_path(path: str | Path) -> str:
    """SHA-256 (hex) of a file's content, or of the names and contents of all files below a folder.

    Raises:
        FileNotFoundError: when there is nothing.
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
    """Bytes of a file, or of all files below a folder."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def read_json(path: Path) -> Any:
    """What a JSON file of a stage holds; None when it is not there.

    Raises:
        UserError: for a file that is no JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", str(path), "redo the stage with --fresh") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of a stage; [] when it is not there.

    A last line without its newline is left out: it is being written, or was cut off when the run was killed.

    Raises:
        UserError: naming the line that is no JSON.
    """
    if not path.exists():
        return []
    rows = []
    # Not splitlines(): model text may hold U+2028 and its like, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"not JSON: {error}", f"{path}, line {number}", "redo the stage with --fresh") from None
    return rows


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk: to last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: str | Path) -> None:
    """Refuse to start where nothing can be written.

    Raises:
        UserError: for a folder, there or to be made, that is read-only or somebody else's.
    """
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            "the folder cannot be written to",
            str(folder),
            "it is read-only or another user's: mend that, or choose another place with run.dir=FOLDER",
        )


def require_disk(path: str | Path, need: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        path: where it will be written; it need not exist yet.
        need: bytes.
        what: what they are for, as in "a checkpoint".

    Raises:
        UserError: when fewer bytes are free.
    """
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{what} needs about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            str(folder),
            "free some space, or choose another place with run.dir=FOLDER",
        )
