"""Run jobs on one or more ranks, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import ROOT, TESTS
from support.ports import free_port

SIZES = ["tracking.wandb=disabled", "run.device=cpu", "data.max_response_tokens=32", "rank.prompts=44"]
SIZES += ["sft.batch_size=8", "sft.micro_batch_size=4", "sft.epochs=5.3", "evaluate.prompts=7"]
SIZES += ["ppo.episodes=80", "ppo.micro_batch_size=4", "ppo.ema_decay=0.9"]
SIZES += ["ppo.adam_eps=1e-5"]  # a gradient that is all but zero is not blown up to a whole step by its rounding
Noted = dict[str, list]


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    """Return the command line of a stage of a run; `more` comes after the sizes that all runs have."""
    return ["tiny", f"run.dir={folder}", f"run.name={run}", *SIZES, *more]


def run_ranks(jobs: list[dict[str, Any]], folder: Path, processes: int = 2, timeout: float = 1500) -> list[Noted]:
    """Run the jobs on as many ranks, and return what support/rank_jobs.py noted of every job."""
    port = free_port()
    file = folder / f"jobs{port}.json"
    file.write_text(json.dumps(jobs))
    common = {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"rank{port}-{rank}.txt" for rank in range(processes)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "support.rank_jobs", str(file)],
            env=os.environ | common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * processes, "\n".join(log.read_text()[-4000:] for log in logs)
    made = [json.loads((folder / f"jobs{port}-{rank}.json").read_text()) for rank in range(processes)]
    assert all(each == made[0] for each in made)
    return made[0]
