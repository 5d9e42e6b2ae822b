"""Stages started by torchrun, deepspeed and accelerate give the numbers of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.ports import free_port

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
LAUNCHERS = {  # with the options that a port of its own needs here
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
    # On CPUs it starts several processes with this alone; ZeRO stage and precision stay the recipe's.
    "accelerate": ["accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_dir: str) -> Path:
    """Make runs with a tiny SFT model; those of one process have their reward and sft stages done."""
    path = tmp_path_factory.mktemp("launchers")
    for name in ("one", "torchrun", "deepspeed"):
        shutil.copytree(tiny_dir, path / "runs" / name / "sft" / "model")
    for stage, name in (("reward", "one"), ("sft", "one-sft")):
        run([sys.executable], stage, name, path)
    return path


def run(launcher: list[str], stage: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a stage; `launch.processes` stays 1, for the launcher says how many there are."""
    sizes = ["sft.micro_batch_size=8", "reward.batch_size=16", "tracking.wandb=disabled"]
    sizes += ["data.rankings=[embedded:rankings]", "data.max_prompt_tokens=80", "reward.max_tokens=160"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    command = [*launcher, str(ROOT / "stages" / f"{stage}.py"), "tiny", f"run.name={name}", *sizes]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("launcher", "stage"), [("torchrun", "reward"), ("deepspeed", "reward"), ("accelerate", "sft")]
)
def test_a_stage_started_by(launcher: str, stage: str, folder: Path) -> None:
    shown = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"`{' '.join(LAUNCHERS[launcher][:-1])} stages/{stage}.py RECIPE`" in shown
    done = run([*LAUNCHERS[launcher], free_port()], stage, launcher, folder)
    if launcher == "accelerate":
        assert "are the recipe's" in done.stderr
    runs = [folder / "runs" / name / stage for name in (launcher, "one" if stage == "reward" else "one-sft")]
    texts = [(run / "metrics.jsonl").read_text() for run in runs]
    rows, expected = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert len(rows) == len(expected) >= 4
    if stage == "reward":  # each batch and each forward hold the same prompts however many processes there are
        for ours, theirs in zip(rows, expected, strict=True):
            for name in ("reward/loss", "reward/grad_norm", "reward/train_accuracy"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (name, theirs["step"])
    else:  # rows are packed and shuffled by process: the same data and steps, in another order within an epoch
        assert sum("sft/loss" in row for row in rows) == sum("sft/loss" in row for row in expected)
        assert rows[-1]["sft/validation_loss"] == pytest.approx(expected[-1]["sft/validation_loss"], rel=2e-3)
    logs = folder / "runs" / launcher / stage / "logs"
    assert {path.name for path in logs.glob("*.txt")} == {"rank-0.txt", "rank-1.txt"}
    assert f"{stage}: done" in (logs / "rank-0.txt").read_text()
    assert done.stdout.count(f"{stage}: done") == 1
