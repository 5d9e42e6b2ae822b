"""Every stage on two processes under ZeRO 0 to 3: the same numbers as in one process, from the same inputs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft", "rank", "reward", "ppo", "evaluate")
ZERO = (0, 1, 2, 3)
SIZES = [
    "tracking.wandb=disabled",
    "sft.micro_batch_size=8",
    "rank.prompts=44",
    "reward.micro_batch_size=2",
    "ppo.episodes=80",
    "ppo.micro_batch_size=4",
    "ppo.adam_eps=1e-5",
    "ppo.ema_decay=0.9",
    "evaluate.prompts=7",
]


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    return ["tiny", f"run.dir={folder}", f"run.name={run}", *SIZES, *more]


def run_ranks(jobs: list[tuple[str, list[str]]], folder: Path, processes: int = 2, timeout: float = 600) -> list[str]:
    """Run the jobs on as many ranks; returns their outputs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    file = folder / f"jobs-{port}.json"
    file.write_text(json.dumps(jobs))
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "ranks.py"), str(file)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(o[-4000:] for o in outputs)
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/one of one process, and runs/zeroN-STAGE of two, each from what the one process left before that stage."""
    folder = tmp_path_factory.mktemp("distributed")
    one = [(stage, arguments(folder, "one")) for stage in STAGES]
    for stage, argv in one:
        subprocess.run(
            [sys.executable, "-m", f"stages.{stage}", *argv], cwd=ROOT, check=True, capture_output=True, timeout=300
        )
    jobs = []
    for zero in ZERO:
        for i, stage in enumerate(STAGES):
            name = f"zero{zero}-{stage}"
            for before in STAGES[:i]:
                part = "ppo-ptx" if before == "ppo" else before
                shutil.copytree(folder / "one" / part, folder / name / part)
            jobs.append((stage, arguments(folder, name, "launch.processes=2", f"launch.zero_stage={zero}")))
    run_ranks(jobs, folder)
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(
    ("stage", "folder", "names"),
    [
        ("reward", "reward", ("reward/loss", "reward/grad_norm", "reward/train_accuracy")),
        (
            "ppo",
            "ppo-ptx",
            ("ppo/policy_loss", "ppo/value_loss", "ppo/ptx_loss", "ppo/kl", "ppo/reward_score", "ppo/grad_norm_value"),
        ),
    ],
)
def test_training_gives_the_numbers_of_one_process(
    runs: Path, zero: int, stage: str, folder: str, names: tuple[str, ...]
) -> None:
    ours, theirs = metrics(runs / f"zero{zero}-{stage}" / folder), metrics(runs / "one" / folder)
    assert len(ours) == len(theirs) >= 5
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (name, b["step"])
    for model in ("model", "ema") if stage == "ppo" else ("model",):
        weights = load_file(runs / f"zero{zero}-{stage}" / folder / model / "model.safetensors")
        expected = load_file(runs / "one" / folder / model / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            # By norm: where a gradient is all but zero, Adam makes a step of the whole rate from its rounding.
            assert float((weights[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()) + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_samples_do_not_depend_on_the_number_of_processes(runs: Path, zero: int) -> None:
    def rows(path: Path, *fields: str) -> list[list]:
        return [[row[f] for f in fields] for row in map(json.loads, path.read_text().splitlines())]

    for file, fields in (("rank/samples.jsonl", ("prompt", "responses")), ("rank/rankings.jsonl", ("prompt", "ranks"))):
        stage, name = file.split("/")
        assert rows(runs / f"zero{zero}-{stage}" / file, *fields) == rows(runs / "one" / file, *fields)
    file = "evaluate/samples.jsonl"
    fields = ("prompt", "responses", "wins_over_sft")
    assert rows(runs / f"zero{zero}-evaluate" / file, *fields) == rows(runs / "one" / file, *fields)
