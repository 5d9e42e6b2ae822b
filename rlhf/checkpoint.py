"""Checkpoints that are whole or not there: written aside, flushed to disk, sealed by a manifest, then renamed.

    checkpoints/step-000040/manifest.json    {"files": {name: {"bytes": n, "sha256": hex}}}, written last
    checkpoints/.tmp-step-000041/            one that was interrupted; never read, removed by the next

A kill, a power cut or a full disk at any point leaves the checkpoints sealed before as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf.progress import is_main_process, warn
from rlhf.rundir import fsync_dir, hash_path

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def sealed_write(final_dir: Path, write: Callable[[Path], object], barrier: Callable[[], None] | None = None) -> Path:
    """Have `write(folder)` fill a new folder and seal it as `final_dir`; returns that.

    Args:
        final_dir: `.../checkpoints/step-NNNNNN`; one that is there already is replaced.
        write: puts files into the folder it is given.
        barrier: waits for all processes. Given, all of them must call this: each one writes into the same folder, files
            of its own names, and the first process seals. Without it the calling process alone writes.
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
        if leads:
            seal(staged, final_dir)
    except BaseException:
        if leads:
            shutil.rmtree(staged, ignore_errors=True)  # on a full disk this gives back what the attempt took
        raise
    wait()
    return final_dir


def seal(staged: Path, final_dir: Path) -> None:
    """Flush every file of `staged`, write its manifest last and give it its name, in the same parent folder.

    Raises:
        ValueError: when there is nothing to seal, or the two are not in one folder (a rename must be one step).
    """
    if staged.parent.resolve() != final_dir.parent.resolve():
        raise ValueError(f"{staged} and {final_dir} must be in one folder")
    files = sorted(p for p in staged.rglob("*") if p.is_file() and p != staged / MANIFEST)
    if not files:
        raise ValueError(f"there is nothing to seal in {staged}")
    for file in files:
        _fsync(file)
    entries = {
        file.relative_to(staged).as_posix(): {"bytes": file.stat().st_size, "sha256": hash_path(file)} for file in files
    }
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    _fsync(manifest)
    for folder in [staged, *(p for p in staged.rglob("*") if p.is_dir())]:
        fsync_dir(folder)
    if final_dir.exists():
        _remove(final_dir)  # a damaged one: newest_sealed went back past it
    staged.rename(final_dir)
    fsync_dir(final_dir.parent)


def verify(folder: Path, contents: bool = True) -> list[str]:
    """What is wrong with a sealed folder; empty when nothing is. Files that the manifest does not name are ignored.

    Args:
        folder: a checkpoint.
        contents: compare hashes as well as sizes.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]
    if not expected:
        return [f"{MANIFEST} names no file"]
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif contents and hash_path(file) != digest:
            problems.append(f"{name} has other content than was sealed")
    return problems


def newest_sealed(checkpoints: Path) -> Path | None:
    """The newest sound checkpoint, None when there is none; damaged ones are skipped with a warning that says why."""
    for folder in reversed(list_checkpoints(checkpoints)):
        problems = verify(folder)
        if not problems:
            return folder
        warn(f"checkpoint {folder} is damaged and skipped: {'; '.join(problems)}")
    return None


def keep_last(checkpoints: Path, n: int) -> None:
    """Remove checkpoints older than the newest n sound ones (by size), and what interrupted writes have left.

    Damaged ones among the newest are left as they are and do not count. Only the first process does anything.

    Raises:
        ValueError: when n is below 1.
    """
    if n < 1:
        raise ValueError(f"cannot keep {n} checkpoints")
    if not is_main_process() or not checkpoints.is_dir():
        return
    folders = list_checkpoints(checkpoints)
    sound = [folder for folder in folders if not verify(folder, contents=False)]
    if len(sound) > n:
        for folder in folders[: folders.index(sound[-n])]:
            _remove(folder)
    for leftover in checkpoints.glob(f"{TEMPORARY}*"):
        _remove(leftover)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders step-NNNNNN by number, the oldest first, sound or not."""
    found = [p for p in checkpoints.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _remove(folder: Path) -> None:
    """Remove a folder; it loses its name first, so that a half-removed one is never taken for a checkpoint."""
    if not folder.exists():
        return
    if not folder.name.startswith(TEMPORARY):
        doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        folder = folder.rename(doomed)
    shutil.rmtree(folder)


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
