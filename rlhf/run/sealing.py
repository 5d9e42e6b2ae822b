"""Sealed checkpoints: written aside, flushed to disk, sealed by a manifest, then renamed, so that none is half there.

    checkpoints/step-000040/manifest.json    {"of": ..., "files": {name: {"bytes": n, "sha256": hex}}}, written last
    checkpoints/.tmp-step-000041/            an interrupted one; never read, removed by the next

`of` is the identity of the stage with its recipe and inputs (`identity` in rlhf/run/fingerprints.py). A kill, a power
cut or a full disk at any point leaves earlier checkpoints as they are. rlhf/run/checkpoints.py manages the checkpoints
of a stage.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf.system.console import warn
from rlhf.system.files import fsync, hash_path
from rlhf.system.ranks import is_main_process

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
OF_ANOTHER_RUN = "it belongs to another run, recipe or input"


@dataclass(frozen=True)
class Sealed:
    """Size of a sealed checkpoint in bytes, and the seconds of sealing, in all and for hashing."""

    bytes: int
    seconds: float
    hash_seconds: float


def write_aside(final_dir: Path, write: Callable[[Path], object], barrier: Callable[[], None] | None = None) -> Path:
    """Have `write(folder)` fill a new folder beside `final_dir`, .../checkpoints/step-NNNNNN, and return it for `seal`.

    With `barrier`, which waits for all processes, all must call this, and each writes files of its own names into the
    same folder. Without it, the calling process alone writes.
    """
    staged = final_dir.with_name(f"{TEMPORARY}{final_dir.name}")
    wait = barrier or (lambda: None)
    leads = barrier is None or is_main_process()
    try:
        if leads:
            _remove(staged)
            staged.mkdir(parents=True)
        wait()
        write(staged)
        wait()
    except BaseException:
        if leads:
            shutil.rmtree(staged, ignore_errors=True)  # on a full disk this frees the space of the attempt
        raise
    return staged


def seal(staged: Path, final_dir: Path, identity: str = "") -> Sealed:
    """Flush every file of `staged`, write its manifest last and rename it to `final_dir`.

    A damaged checkpoint of that name is replaced, and one of another run is moved aside. Raises ValueError if there is
    nothing to seal, or the two are not in one folder (the rename must be a single step).
    """
    begin = time.perf_counter()
    if staged.parent.resolve() != final_dir.parent.resolve():
        raise ValueError(f"{staged} and {final_dir} must be in one folder")
    files = sorted(p for p in staged.rglob("*") if p.is_file() and p != staged / MANIFEST)
    if not files:
        raise ValueError(f"there is nothing to seal in {staged}")
    for file in files:
        fsync(file)
    hashing = time.perf_counter()
    names = [file.relative_to(staged).as_posix() for file in files]
    entries = {n: {"bytes": p.stat().st_size, "sha256": hash_path(p)} for n, p in zip(names, files, strict=True)}
    hash_seconds = time.perf_counter() - hashing
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"of": identity, "files": entries}, indent=1) + "\n", encoding="utf-8")
    fsync(manifest)
    for folder in [staged, *(p for p in staged.rglob("*") if p.is_dir())]:
        fsync(folder)
    if final_dir.exists():
        if verify(final_dir, contents=False, identity=identity) == [OF_ANOTHER_RUN]:
            _move_aside(final_dir)
        else:
            _try_to_remove(final_dir)  # damaged: newest_sealed has skipped it
    staged.rename(final_dir)
    fsync(final_dir.parent)
    total = sum(entry["bytes"] for entry in entries.values())
    return Sealed(int(total), time.perf_counter() - begin, hash_seconds)


def verify(folder: Path, contents: bool = True, identity: str = "") -> list[str]:
    """Return the problems of a sealed folder, empty if it is sound; files that its manifest does not name are ignored.

    With `contents` hashes are compared as well as sizes. It must carry the hash `identity`; empty: any.
    """
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():
            return [f"{MANIFEST} is missing"]
        found = json.loads(manifest.read_text(encoding="utf-8"))
        files, owner = found["files"], found.get("of", "")
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    if not expected:
        return [f"{MANIFEST} names no file"]
    if identity and owner != identity:
        return [OF_ANOTHER_RUN]
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        try:
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != size:
                problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
            elif contents and hash_path(file) != digest:
                problems.append(f"{name} has other content than was sealed")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest_sealed(checkpoints: Path, identity: str = "") -> Path | None:
    """Return the newest sound checkpoint that carries the hash `identity` (empty: any), None if there is none.

    Others are skipped with a warning that says why.
    """
    for folder in reversed(list_checkpoints(checkpoints)):
        problems = verify(folder, identity=identity)
        if not problems:
            return folder
        what = "skipped" if problems == [OF_ANOTHER_RUN] else "damaged and skipped"
        warn(f"checkpoint {folder} is {what}: {'; '.join(problems)}")
    return None


def keep_last(checkpoints: Path, n: int, identity: str = "") -> None:
    """Remove checkpoints older than the newest n sound ones (by size), and the leftovers of interrupted writes.

    Damaged ones among the newest stay and do not count; those of another run are never touched. Only the first process
    does anything. Raises ValueError if n is below 1.
    """
    if n < 1:
        raise ValueError(f"cannot keep {n} checkpoints")
    if not is_main_process() or not checkpoints.is_dir():
        return
    found = {folder: verify(folder, contents=False, identity=identity) for folder in list_checkpoints(checkpoints)}
    folders = [folder for folder, problems in found.items() if problems != [OF_ANOTHER_RUN]]
    sound = [folder for folder in folders if not found[folder]]
    if len(sound) > n:
        for folder in folders[: folders.index(sound[-n])]:
            _try_to_remove(folder)
    for leftover in checkpoints.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # `_try_to_remove` has already warned about one that cannot be removed
            _remove(leftover)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders step-NNNNNN by number, the oldest first, sound or not."""
    found = [p for p in checkpoints.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _remove(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that a half-removed one is never taken for a checkpoint."""
    if not folder.exists():
        return
    if not folder.name.startswith(TEMPORARY):
        doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        folder = folder.rename(doomed)
    shutil.rmtree(folder)


def _try_to_remove(folder: Path) -> None:
    """Remove a folder that is not needed; if that fails, only warn, since it costs no more than space."""
    try:
        _remove(folder)
    except OSError as error:
        warn(f"{folder} could not be removed: {error}")


def _move_aside(folder: Path) -> None:
    """Rename another run's checkpoint to step-NNNNNN.other-N, which nothing reads or removes."""
    number = 1
    while (other := folder.with_name(f"{folder.name}.other-{number}")).exists():
        number += 1
    folder.rename(other)
