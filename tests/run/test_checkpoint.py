"""Sealing: whatever is interrupted or damaged, the newest whole checkpoint is found and nothing else."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.run.checkpoints import Checkpoints
from rlhf.run.sealing import OF_ANOTHER_RUN, keep_last, list_checkpoints, newest_sealed, seal, verify, write_aside
from support.paths import ROOT


def write_step(folder: Path, step: int, content: str = "weights", identity: str = "") -> Path:
    def write(staged: Path) -> None:
        (staged / "engine").mkdir()
        (staged / "engine" / "trainable.bin").write_text(f"{content} {step}")
        (staged / "state.json").write_text(json.dumps({"step": step}))

    final = folder / f"step-{step:06d}"
    seal(write_aside(final, write), final, identity)
    return final


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_sealed_folder_has_every_file_with_size_and_hash(tmp_path: Path) -> None:
    final = write_step(tmp_path, 40)
    assert final == tmp_path / "step-000040" and names(tmp_path) == ["step-000040"]
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["files"].keys() == {"engine/trainable.bin", "state.json"}
    # echo -n "weights 40" | sha256sum
    command = ["sha256sum", final / "engine" / "trainable.bin"]
    digest = subprocess.run(command, capture_output=True, text=True, check=True)
    assert manifest["files"]["engine/trainable.bin"] == {"bytes": 10, "sha256": digest.stdout.split()[0]}
    assert verify(final) == []
    assert newest_sealed(tmp_path) == final


def truncate(folder: Path) -> None:
    os.truncate(folder / "engine" / "trainable.bin", 4)


def flip_a_byte(folder: Path) -> None:
    path = folder / "engine" / "trainable.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "engine/trainable.bin has 4 bytes instead of 10"),
        (flip_a_byte, "engine/trainable.bin has other content than was sealed"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "manifest.json names no file"),
        (lambda folder: (folder / "manifest.json").write_text('["step"]'), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], why: str
) -> None:
    before, newest = write_step(tmp_path, 20), write_step(tmp_path, 40)
    damage(newest)
    assert verify(newest) == [why]
    assert newest_sealed(tmp_path) == before
    told = capsys.readouterr().err
    assert str(newest) in told and why in told and told.count("warning") == 1
    # The resumed run comes to the same step again and replaces it.
    write_step(tmp_path, 40)
    assert newest_sealed(tmp_path) == newest and names(tmp_path) == ["step-000020", "step-000040"]


def test_nothing_sealed_is_none(tmp_path: Path) -> None:
    assert newest_sealed(tmp_path / "checkpoints") is None
    (tmp_path / "step-000001").mkdir()
    assert newest_sealed(tmp_path) is None


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999999, 1000000):
        write_step(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    assert newest_sealed(tmp_path) == tmp_path / "step-1000000"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_half_written_leftover_is_never_read_and_the_next_removes_it(tmp_path: Path) -> None:
    write_step(tmp_path, 20)
    leftover = tmp_path / ".tmp-step-000040"
    leftover.mkdir()
    (leftover / "stale.bin").write_text("from before")
    assert newest_sealed(tmp_path) == tmp_path / "step-000020"
    final = write_step(tmp_path, 40)
    assert not (final / "stale.bin").exists() and names(tmp_path) == ["step-000020", "step-000040"]


def test_a_full_disk_leaves_the_last_one_whole_and_gives_the_space_back(tmp_path: Path) -> None:
    before = write_step(tmp_path, 20)

    def write(staged: Path) -> None:
        (staged / "half.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_aside(tmp_path / "step-000040", write)
    assert newest_sealed(tmp_path) == before and names(tmp_path) == ["step-000020"]


def test_sigkill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from rlhf.run.sealing import write_aside
def write(staged):
    with (staged / "weights.bin").open("wb") as file:
        while True:
            file.write(b"x" * 65536)
            file.flush()
            time.sleep(0.01)
write_aside(Path({str(tmp_path)!r}) / "step-000040", write)
"""
    before = write_step(tmp_path, 20)
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    partial = tmp_path / ".tmp-step-000040" / "weights.bin"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 65536):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert partial.exists()  # it was in the middle
    assert newest_sealed(tmp_path) == before
    assert newest_sealed(tmp_path) == before  # looking changes nothing
    after = write_step(tmp_path, 40)
    assert verify(after) == [] and names(tmp_path) == ["step-000020", "step-000040"]


def test_keep_last_counts_sound_ones_only(tmp_path: Path) -> None:
    folders = {step: write_step(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    truncate(folders[50])
    truncate(folders[10])
    (tmp_path / ".tmp-step-000060").mkdir()
    (tmp_path / "notes.txt").write_text("not ours")
    keep_last(tmp_path, 2)
    assert names(tmp_path) == ["notes.txt", "step-000030", "step-000040", "step-000050"]
    keep_last(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 3
    with pytest.raises(ValueError, match="cannot keep 0"):
        keep_last(tmp_path, 0)
    keep_last(tmp_path / "missing", 1)


def test_seal_refuses_what_cannot_be_one_rename_and_what_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="nothing to seal"):
        seal(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "file").write_text("x")
    with pytest.raises(ValueError, match="must be in one folder"):
        seal(tmp_path / "a", tmp_path / "other" / "b")


def test_with_a_barrier_every_process_writes_and_the_first_seals(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from rlhf.run.checkpoints import Checkpoints
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=int(os.environ["RANK"]), world_size=2)
checkpoints = Checkpoints(Path(sys.argv[1]) / "checkpoints")
name = f"rng-{os.environ['RANK']}.bin"
for step in (1, 2, 3):
    checkpoints.save(step, lambda staged: (staged / name).write_text("state"), barrier=dist.barrier)
checkpoints.wait()
dist.barrier()
assert checkpoints.newest().name == "step-000003"
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen(command, env=env | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert names(tmp_path / "checkpoints") == ["step-000002", "step-000003"]
    assert names(tmp_path / "checkpoints" / "step-000003") == ["manifest.json", "rng-0.bin", "rng-1.bin"]


def test_another_runs_checkpoint_is_neither_used_nor_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = write_step(tmp_path, 10, identity="ours"), write_step(tmp_path, 30, identity="theirs")
    assert verify(theirs, identity="ours") == [OF_ANOTHER_RUN]
    assert verify(theirs, identity="theirs") == verify(theirs) == []
    assert newest_sealed(tmp_path, "ours") == ours
    assert OF_ANOTHER_RUN in capsys.readouterr().err
    for step in (20, 30, 40):
        write_step(tmp_path, step, identity="ours")
        keep_last(tmp_path, 2, "ours")
    assert names(tmp_path) == ["step-000030", "step-000030.other-1", "step-000040"]
    assert newest_sealed(tmp_path, "ours") == tmp_path / "step-000040"
    assert verify(tmp_path / "step-000030.other-1", identity="theirs") == []


def test_a_checkpoint_is_sealed_behind_the_loop_after_its_rows_are_on_disk(tmp_path: Path) -> None:
    order: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", "ours", before=lambda: order.append("rows"))
    for step in (1, 2, 3):
        checkpoints.save(step, lambda staged: (staged / "state").write_bytes(b"x" * 1000))
    checkpoints.wait()
    assert order == ["rows"] * 3 and names(tmp_path / "checkpoints") == ["step-000002", "step-000003"]
    metrics = checkpoints.metrics()
    assert metrics["perf/checkpoint_gb"] == 1e-6
    assert 0 < metrics["perf/seconds_hash"] < metrics["perf/seconds_seal"]


def test_what_went_wrong_behind_the_loop_is_raised_at_the_next_save(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path / "checkpoints", before=fail)
    checkpoints.save(1, lambda staged: (staged / "state").write_text("x"))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, lambda staged: (staged / "state").write_text("x"))
    assert names(tmp_path / "checkpoints") == []
    checkpoints.wait()  # told once
