"""The run folder: its paths, records and lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.run.folder import RunFolder, is_alive
from support.paths import ROOT
from support.ports import wait_for


def test_paths_and_records(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "demo")
    assert run.stage_dir("sft") == tmp_path / "demo" / "sft"
    assert run.model_dir("sft") == tmp_path / "demo" / "sft" / "model"
    assert run.read_stage("sft") is None and not run.is_done("sft")
    assert not run.path.exists()  # looking creates nothing
    run.write_stage("sft", {"state": "done", "metrics": {"sft/loss": 1.5}})
    assert run.read_stage("sft") == {"state": "done", "metrics": {"sft/loss": 1.5}} and run.is_done("sft")
    (run.stage_dir("sft") / "stage.json").write_text('{"state": ')
    with pytest.raises(UserError, match=r"stage.json cannot be read[\s\S]*sft/stage.json[\s\S]*--fresh"):
        run.read_stage("sft")


def test_require_names_the_stage_to_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="run the sft stage first"):
        run.require("sft", "model")
    run.model_dir("sft").mkdir(parents=True)
    assert run.require("sft", "model") == run.model_dir("sft")  # put there by hand
    run.write_stage("sft", {"state": "stopped"})
    with pytest.raises(UserError, match=r"has not finished \(state: stopped\)[\s\S]*run the sft stage again"):
        run.require("sft", "model")
    run.write_stage("sft", {"state": "done"})
    assert run.require("sft", "model") == run.model_dir("sft")
    with pytest.raises(UserError, match="no sft/ema in this run"):
        run.require("sft", "ema")


def test_set_aside_keeps_one_earlier_result_without_checkpoints(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.set_aside("sft") is None
    for attempt in ("first", "second"):
        (run.stage_dir("sft") / "checkpoints" / "step-000001").mkdir(parents=True)
        (run.stage_dir("sft") / "result").write_text(attempt)
        assert run.set_aside("sft") == tmp_path / "sft.old"
        assert not run.stage_dir("sft").exists()
        assert [p.name for p in (tmp_path / "sft.old").iterdir()] == ["result"]
        assert (tmp_path / "sft.old" / "result").read_text() == attempt


def test_keys_are_relative_inside_the_run_and_absolute_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder("runs/demo")
    assert run.key(Path("runs/demo/sft/model")) == "sft/model"
    assert run.key("data.jsonl") == str(tmp_path / "data.jsonl")
    for path in ("runs/demo/sft/model", "data.jsonl"):
        assert run.from_key(run.key(path)).resolve() == (tmp_path / path).resolve()


# --- lock ------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from rlhf.run.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def hold(run: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_lock_names_its_holder_and_goes_away_afterwards(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "demo")
    with run.lock():
        owner = json.loads((tmp_path / "demo" / "lock").read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    assert not (tmp_path / "demo" / "lock").exists()
    with pytest.raises(ValueError), run.lock():
        raise ValueError
    assert not (tmp_path / "demo" / "lock").exists()


def test_a_live_owner_is_an_error_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    child = hold(tmp_path)
    in_use = rf"in use by process {child.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=in_use), RunFolder(tmp_path).lock():
        raise AssertionError("two writers")
    assert json.loads((tmp_path / "lock").read_text())["pid"] == child.pid  # still theirs
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "lock").exists()
    with RunFolder(tmp_path).lock():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_process_number_used_again_is_not_the_owner(tmp_path: Path) -> None:
    # man 5 proc: field 22 of /proc/PID/stat, in clock ticks since boot; the second field is a name in brackets
    started = int(Path(f"/proc/{os.getppid()}/stat").read_text().split(") ")[-1].split()[19])
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "started": started}
    (tmp_path / "lock").write_text(json.dumps(owner))
    with pytest.raises(UserError), RunFolder(tmp_path).lock():
        pass
    (tmp_path / "lock").write_text(json.dumps(owner | {"started": started - 3600}))
    with RunFolder(tmp_path).lock():
        pass


def test_a_clock_that_jumps_does_not_free_a_live_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = hold(tmp_path)
    owner = json.loads((tmp_path / "lock").read_text())
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 0.0)
    monkeypatch.setattr("psutil._pslinux.BOOT_TIME", 0.0, raising=False)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert is_alive(owner)
    child.kill()
    child.wait()
    assert not is_alive(owner)


def test_a_held_file_is_believed_whatever_it_says(tmp_path: Path) -> None:
    """A process in another container, whose number means nothing here; and one that is just about to write its name."""
    child = hold(tmp_path)
    for content in (json.dumps({"pid": 999999999, "host": socket.gethostname(), "started": 0.0}), ""):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(UserError, match="the run is in use by"), RunFolder(tmp_path).lock():
            pass
    child.kill()
    child.wait()


def test_an_owner_on_another_machine_is_believed(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0.0}))
    with pytest.raises(UserError, match=r"on elsewhere[\s\S]*delete the lock file"), RunFolder(tmp_path).lock():
        pass


@pytest.mark.parametrize("content", ["", '{"pid": 12', "[]", "{}"])
def test_a_lock_that_was_cut_off_in_writing_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with RunFolder(tmp_path).lock():
        pass


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    child = hold(tmp_path / "run")
    child.send_signal(signal.SIGKILL)
    child.wait()
    code = """
import sys, time
from pathlib import Path
from rlhf.errors import UserError
from rlhf.run.folder import RunFolder
root = Path(sys.argv[1])
(root / f"ready-{sys.argv[2]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
try:
    with RunFolder(root / "run").lock():
        time.sleep(5)
except UserError:
    sys.exit(2)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], env=env) for i in range(6)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 6, *children)
    (tmp_path / "go").touch()
    assert sorted(child.wait(timeout=60) for child in children) == [0, 2, 2, 2, 2, 2]
