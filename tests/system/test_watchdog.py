"""A process that dies or hangs ends its stage in time and is named with its last phase; an error is told once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch import supervisor
from launch.supervisor import ErrorFile, supervise
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.rank_logs import current
from rlhf.system.watchdog import Watchdog
from support.paths import ROOT
from support.ports import wait_for
from support.stage_runs import RECIPE, stage_json, start_pair

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("stage_folder")]

LOGS = Path("runs/demo/sft/logs")

WORK = """
import os, sys, time
import torch, torch.distributed as dist
from rlhf.system.phases import phase
from rlhf.run.stage import run_stage
def work(ctx):
    for step in range(1000):
        phase("train", step)
        if os.environ["RANK"] == "1" and step == 3 and os.environ.get("DO") == "raise":
            print("written by rank 1")
            raise ValueError("boom")
        if os.environ["RANK"] == "1" and step == 3 and os.environ.get("DO") == "sleep":
            time.sleep(600)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.02)
sys.exit(run_stage("sft", work, sys.argv[1:]))
"""


def report(rank: int) -> dict[str, object]:
    path = LOGS / f"rank-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def in_update() -> bool:
    return report(1).get("phase") == "train"


def test_an_error_of_one_rank_is_told_once_and_its_traceback_is_in_its_log() -> None:
    children = start_pair(WORK, DO="raise")
    (out0, err0), (out1, err1) = (child.communicate(timeout=120) for child in children)
    assert [child.returncode for child in children] == [1, 1]
    told = "error on rank 1 in phase train, step 3: ValueError: boom\n  traceback: runs/demo/sft/logs/rank-1.txt\n"
    assert err0 + err1 == told and out1 == ""
    assert (LOGS / "error.txt").read_text() == told
    log = (LOGS / "rank-1.txt").read_text()
    assert "written by rank 1\n" in log and "Traceback" in log and ", in work" in log
    assert "Traceback" not in out0
    record = stage_json()
    assert record["state"] == "failed" and "ValueError: boom" in record["error"]


def test_a_killed_rank_is_named_with_its_phase_by_the_other() -> None:
    children = start_pair(WORK)
    wait_for(in_update, *children)
    children[1].kill()  # and not waited for, so that its end can be looked up as under a launcher that has not yet
    _, err = children[0].communicate(timeout=60)
    assert children[0].returncode == 1
    died = r"rank 1 died \(signal 9\), in phase train, step \d+, of sft\n  log: runs/demo/sft/logs/rank-1.txt\n"
    assert re.fullmatch(died, err), err
    children[1].communicate()


@pytest.mark.parametrize(
    ("how", "words"), [("stop", "rank 1 gives no sign of life for 3 s"), ("sleep", "rank 1 makes no progress for 3 s")]
)
def test_a_hanging_rank_ends_the_stage_in_time(how: str, words: str) -> None:
    children = start_pair(WORK, "launch.timeout_s=3", DO=how)
    wait_for(in_update, *children)
    if how == "stop":
        children[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    _, err = children[0].communicate(timeout=60)
    assert 2 < time.monotonic() - begin < 15
    assert err.count("\n") <= 2
    if how == "sleep":  # both see it, and one tells; the end of the first may reach the other in its collective
        err += children[1].communicate(timeout=60)[1]
        assert sorted(child.returncode for child in children) in ([1, 124], [124, 124])
    else:
        assert children[0].returncode == 124
    assert re.fullmatch(rf"{words}, in phase train, step \d+, of sft\n  log: \S+rank-1.txt\n", err)
    assert "in all_reduce" in (LOGS / "rank-0.txt").read_text()  # where it waited
    children[1].kill()
    children[1].communicate()


def test_in_time_is_when_nothing_has_to_be_said(tmp_path: Path) -> None:
    """The reports of four processes, read by rank 0; the clock is set back by hand."""
    watch = Watchdog(tmp_path, "ppo", 0, 4, timeout=10, reads=True)

    def write(beats: list[int], waits: list[bool], tick: int) -> None:
        for rank, (beat, wait) in enumerate(zip(beats, waits, strict=True)):
            report = {"rank": rank, "machine": "a", "pid": 1, "phase": "train", "step": beat, "beat": beat}
            report |= {"activity": beat, "waits": wait, "tick": tick}
            (tmp_path / f"rank-{rank}.json").write_text(json.dumps(report))

    def age(seconds: float, *ranks: int, what: str = "moved") -> None:
        for rank in ranks:
            setattr(watch._peers[rank], what, time.monotonic() - seconds)

    write([5, 5, 4, 5], [True, True, False, True], 1)
    watch.read_reports()
    assert watch.stuck() == ""
    age(11, 0, 1, 2)
    assert watch.stuck() == ""  # rank 3 goes on
    age(11, 3)
    assert watch.stuck().startswith("rank 2 makes no progress for 10 s, in phase train, step 4, of ppo")
    assert watch.stuck().count("rank ") == 1
    write([5, 5, 5, 5], [True, True, False, True], 2)
    watch.read_reports()
    assert watch.stuck() == ""  # rank 2 has gone on
    age(11, 0, 1, 2, 3)
    assert "rank 2 makes" in watch.stuck() and watch.stuck().count("log:") == 1  # the others wait in a collective
    write([5, 5, 5, 5], [True] * 4, 3)
    watch.read_reports()
    age(11, 0, 1, 2, 3)
    assert watch.stuck().count("log:") == 4  # nobody can tell who is to blame
    age(11, 1, what="alive")
    assert watch.stuck().startswith("rank 1 gives no sign of life for 10 s")


def test_one_process_keeps_no_logs_and_no_watch() -> None:
    def work(ctx: StageContext) -> dict[str, float]:
        assert current() is None and threading.active_count() == before
        return {}

    before = threading.active_count()
    assert run_stage("sft", work, RECIPE) == 0
    assert not LOGS.exists() and threading.active_count() == before


def test_the_error_of_an_earlier_attempt_does_not_end_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.1)
    error = tmp_path / "error.txt"
    error.write_text("of before")
    os.utime(error, (1, 1))
    remove = f"import os, time; os.remove({str(error)!r}); time.sleep(3)"

    def run(program: str) -> int:
        return supervise([sys.executable, "-c", program], dict(os.environ), True, ErrorFile(tmp_path))

    assert run(remove) == 0
    tell = f"import time; open({str(error)!r}, 'w').write('now'); time.sleep(60)"
    begin = time.monotonic()
    assert run(tell) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 30


# --- under `rlhf` and DeepSpeed's launcher ----------------------------------------------------------------------------


def start_rlhf(*arguments: str) -> subprocess.Popen[str]:
    """`rlhf sft` on two processes with far more to do than the test waits for."""
    long = ["launch.processes=2", "sft.micro_batch_size=8", "sft.epochs=1000", "tracking.wandb=disabled"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "sft", "tiny", "run.name=demo", *long, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tree(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def ended(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: not psutil.wait_procs(processes, timeout=0)[1]


@pytest.mark.parametrize(
    ("sent", "words", "codes"),
    [
        # DeepSpeed's launcher may collect the process before another looks it up; then nobody knows the signal.
        (signal.SIGKILL, r"rank 1 (?:died \(signal 9\)|has ended), in phase train, step \d+, of sft", (1, 137)),
        (signal.SIGSTOP, r"rank 1 gives no sign of life for 5 s, in phase train, step \d+, of sft", (124, 137)),
    ],
)
def test_rlhf_ends_with_one_message_and_no_orphans(sent: signal.Signals, words: str, codes: tuple[int, ...]) -> None:
    parent = start_rlhf("launch.timeout_s=5")
    wait_for(in_update, parent, seconds=300)
    below = tree(parent.pid)
    assert len(below) >= 4  # runner, launcher, two ranks
    os.kill(int(str(report(1)["pid"])), sent)
    begin = time.monotonic()
    output, _ = parent.communicate(timeout=120)
    assert time.monotonic() - begin < 60
    assert parent.returncode in codes
    assert len(re.findall(words, output)) == 1, output
    assert "Traceback" not in output and "return code" not in output
    assert output.rstrip().splitlines()[-1].startswith("stage sft failed") or "log: runs/demo" in output
    wait_for(ended(below))
