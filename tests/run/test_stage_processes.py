"""Stage programs as real processes: killed and taken up again, and two of them that must agree."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from rlhf.run.stage import run_stage
from support.ports import wait_for
from support.stage_runs import RECIPE, never, stage_json, start, start_pair, train

pytestmark = pytest.mark.usefixtures("stage_folder")


def test_a_killed_stage_is_taken_up_again_and_a_live_one_is_not_disturbed(capsys: pytest.CaptureFixture[str]) -> None:
    child = start("""
import sys, time
from rlhf.run.stage import run_stage
def work(ctx):
    ctx.tracker.log({"sft/loss": 1.0}, 10)
    time.sleep(600)
sys.exit(run_stage("sft", work, sys.argv[1:]))
""")
    wait_for(Path("runs/demo/sft/metrics.jsonl").exists, child)
    assert run_stage("sft", never, RECIPE) == 2
    assert f"in use by process {child.pid}" in capsys.readouterr().err
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert stage_json()["state"] == "running"
    assert run_stage("sft", train, RECIPE) == 0
    assert stage_json()["attempts"] == 2
    steps = [json.loads(line)["step"] for line in Path("runs/demo/sft/metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 10]


PAIR = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from rlhf.errors import UserError
from rlhf.run.stage import run_stage
def work(ctx):
    total = torch.tensor(float(os.environ["RANK"]) + 1)
    dist.all_reduce(total)
    if os.environ.get("STEPS"):
        for step in range(10000):
            Path(f"at-{os.environ['RANK']}").write_text(str(step))
            if ctx.stop_requested:
                Path(f"stopped-{os.environ['RANK']}").write_text(str(step))
                return {}
            time.sleep(0.01)
    if os.environ["RANK"] == "0":
        (ctx.dir / "model").mkdir()
    ctx.tracker.log({"sft/loss": float(total)}, 1)
    return {"total": float(total)}
sys.exit(run_stage("sft", work, sys.argv[1:]))
"""


def finish(children: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Wait for the processes and return their exit codes, standard outputs and standard errors."""
    texts = [child.communicate(timeout=180) for child in children]
    return [child.returncode for child in children], [out for out, _ in texts], [err for _, err in texts]


def test_two_processes_write_one_record_skip_together_and_fail_together() -> None:
    codes, outputs, errors = finish(start_pair(PAIR))
    assert codes == [0, 0], errors
    assert stage_json()["metrics"] == {"total": 3.0}
    assert len(Path("runs/demo/sft/metrics.jsonl").read_text().splitlines()) == 1
    assert "sft: done" in outputs[0] and outputs[1] == ""
    codes, outputs, errors = finish(start_pair(PAIR))
    assert codes == [0, 0] and "skipped" in outputs[0] and outputs[1] == ""
    codes, _, errors = finish(start_pair(PAIR, "sft.lr=0.5"))
    assert codes == [2, 2]
    assert "sft.lr: 0.001 -> 0.5" in errors[0] and "recipe has changed" not in errors[1]


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(signalled: int) -> None:
    children = start_pair(PAIR, STEPS="1")
    wait_for(lambda: Path("at-0").exists() and Path("at-1").exists(), *children)
    children[signalled].send_signal(signal.SIGTERM)
    codes, _, errors = finish(children)
    assert codes == [143, 143], errors
    assert Path("stopped-0").read_text() == Path("stopped-1").read_text()
    assert stage_json()["state"] == "stopped"


def test_another_number_of_processes_than_the_recipes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", never, [*RECIPE, "launch.processes=2", "sft.micro_batch_size=8"]) == 2
    assert "launch.processes" in capsys.readouterr().err
