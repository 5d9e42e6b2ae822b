"""Damage between a stop and a resume: the newest whole checkpoint is used, or one clear error; nothing older is lost.

Where they may, these tests mount small file systems.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compare import differences
from trials import Bench, served

from rlhf.run.sealing import list_checkpoints, verify

pytestmark = pytest.mark.timeout(900)
STAGE = "ppo-ptx"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A run `whole`, a run `stopped` in its third iteration of four, and a run `other` with another learning rate."""
    folder = tmp_path_factory.mktemp("damage")
    with served() as server:
        made = Bench(folder, server)
        made.prepare()
        for run, more in (("stopped", ()), ("other", ("ppo.lr=0.002",))):
            for stage in ("sft", "rank", "reward"):
                shutil.copytree(folder / "whole" / stage, folder / run / stage)
            stop = {"phase": "rollout", "visit": 3, "delay": 0.0, "number": signal.SIGTERM}
            assert server.run(**made.job("ppo", run, *more), kill=stop) == 143
        assert steps(folder / "stopped") == [2, 3]
        yield made


def steps(run: Path) -> list[int]:
    """Numbers of the run's checkpoints."""
    return [int(folder.name[5:]) for folder in list_checkpoints(run / STAGE / "checkpoints")]


def newest(run: Path) -> Path:
    return list_checkpoints(run / STAGE / "checkpoints")[-1]


def shard(run: Path) -> Path:
    return newest(run) / "engine" / "part-0-0.safetensors"


def truncate(run: Path, other: Path) -> None:
    os.truncate(shard(run), shard(run).stat().st_size // 2)


def flip_a_byte(run: Path, other: Path) -> None:
    with shard(run).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def lose_a_shard(run: Path, other: Path) -> None:
    shard(run).unlink()


def empty_the_manifest(run: Path, other: Path) -> None:
    (newest(run) / "manifest.json").write_text("")


def empty_the_manifests_object(run: Path, other: Path) -> None:
    (newest(run) / "manifest.json").write_text("{}")


def take_anothers_manifest(run: Path, other: Path) -> None:
    shutil.copy(newest(other) / "manifest.json", newest(run) / "manifest.json")


def take_anothers_checkpoint(run: Path, other: Path) -> None:
    shutil.rmtree(newest(run))
    shutil.copytree(newest(other), run / STAGE / "checkpoints" / newest(other).name)


def copy_of(bench: Bench, run: str, name: str) -> Path:
    shutil.copytree(bench.folder / run, bench.folder / name, ignore=shutil.ignore_patterns("lock"))
    return bench.folder / name


def goes_on(bench: Bench, job: dict[str, Any]) -> str:
    """Resume a run, see it end as the whole one did, and return what it printed."""
    code, log = bench.server.run(**job), Path(job["log"])
    assert code == 0, log.read_text()[-3000:]
    assert not differences(Path(job["run"]) / STAGE, bench.folder / "whole" / STAGE)
    return log.read_text()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "is damaged and skipped: engine/part-0-0.safetensors has"),
        (flip_a_byte, "is damaged and skipped: engine/part-0-0.safetensors has other content"),
        (lose_a_shard, "is damaged and skipped: engine/part-0-0.safetensors is missing"),
        (empty_the_manifest, "is damaged and skipped: manifest.json cannot be read"),
        (empty_the_manifests_object, "is damaged and skipped: manifest.json cannot be read"),
        (take_anothers_manifest, "is skipped: it belongs to another run"),
        (take_anothers_checkpoint, "is skipped: it belongs to another run"),
    ],
)
def test_the_newest_whole_checkpoint_is_used(bench: Bench, damage: Callable[[Path, Path], None], told: str) -> None:
    run = copy_of(bench, "stopped", damage.__name__)
    damage(run, bench.folder / "other")
    printed = goes_on(bench, bench.job("ppo", run.name))
    assert " ".join(printed.split()).count(told) == 1, printed
    assert "Traceback" not in printed
    if damage is take_anothers_checkpoint:
        assert verify(run / STAGE / "checkpoints" / "step-000003.other-1") == []  # it is somebody's


def test_a_folder_that_cannot_be_read_is_skipped(bench: Bench) -> None:
    run = copy_of(bench, "stopped", "unreadable")
    newest(run).chmod(0)
    printed = goes_on(bench, bench.job("ppo", run.name) | {"mortal": True})
    assert "manifest.json cannot be read (Permission denied)" in " ".join(printed.split())
    assert "Traceback" not in printed


def test_a_clock_that_goes_backwards_changes_nothing(bench: Bench) -> None:
    run = copy_of(bench, "stopped", "clock")
    ahead = newest(run).stat().st_mtime + 3 * 86400
    for path in (run / STAGE / "checkpoints" / "step-000002").rglob("*"):
        os.utime(path, (ahead, ahead))
    kill = {"phase": "train", "visit": 1, "delay": 0.0}
    assert bench.server.run(**bench.job("ppo", run.name), kill=kill, clock=86400) == -9  # leaves its lock behind
    assert (run / "lock").exists()
    goes_on(bench, bench.job("ppo", run.name) | {"clock": -2 * 86400})


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def on(disk: Path, bench: Bench) -> dict[str, Any]:
    """The stopped run on another disk, and the job that goes on with it."""
    shutil.copytree(bench.folder / "stopped", disk / "run", ignore=shutil.ignore_patterns("lock"))
    job = bench.job("ppo", "run", f"run.dir={disk}")
    return job | {"run": disk / "run", "log": bench.folder / f"{disk.name}.txt"}


def test_a_disk_that_is_full_when_a_checkpoint_is_written(bench: Bench) -> None:
    with small_disk(bench.folder / "small", 512) as disk:
        job = on(disk, bench)
        room = sum(p.stat().st_size for p in newest(disk / "run").rglob("*") if p.is_file())
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            while shutil.disk_usage(disk).free > room // 2:
                file.write(bytes(min(1 << 20, shutil.disk_usage(disk).free - room // 2 + 4096)))
                file.flush()
        assert bench.server.run(**job) == 2
        printed = Path(job["log"]).read_text()
        assert "error: the disk is full" in printed and "Traceback" not in printed
        assert steps(disk / "run") == [2, 3]
        assert all(verify(folder) == [] for folder in list_checkpoints(disk / "run" / STAGE / "checkpoints"))
        assert json.loads((disk / "run" / STAGE / "stage.json").read_text())["state"] == "failed"
        ballast.unlink()
        goes_on(bench, job)


def test_a_run_folder_that_is_read_only(bench: Bench) -> None:
    with small_disk(bench.folder / "fixed", 512) as disk:
        job = on(disk, bench)
        before = {path: path.stat().st_mtime_ns for path in (disk / "run").rglob("*")}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert bench.server.run(**job) == 2
        printed = Path(job["log"]).read_text()
        assert printed.count("error:") == 1 and "cannot be written to" in printed and "Traceback" not in printed
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert {path: path.stat().st_mtime_ns for path in (disk / "run").rglob("*")} == before
        goes_on(bench, job)
