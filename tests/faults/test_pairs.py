"""Two processes under ZeRO-2 and ZeRO-3, started by `rlhf`: a random one is killed at a random point, again and again.

Each kill must bring the whole stage down in time with the dead rank named, and the resumed run must end in the bits of
one that was never stopped. `make faults` runs these.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from compare import differences
from trials import SIZES, Bench, served

from support.paths import ROOT

SEED = int(os.environ.get("FAULTS_SEED", "1"))
DOWN = 60.0  # seconds in which a stage must be down
KILLS = 10

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]


@dataclass
class Pair:
    """PPO-ptx on two processes."""

    folder: Path
    zero: int
    kills: Counter[str] = field(default_factory=Counter)  # by rank and phase
    slowest: float = 0.0  # seconds from a kill to the end of `rlhf`

    def attempt(self, run: str, kill: tuple[int, int, float] | None = None) -> int:
        """Run `rlhf ppo` and return its exit code.

        `kill` is a rank, the number of its phase or step, and seconds into that; None lets the run end.
        """
        sizes = [*SIZES, f"run.dir={self.folder}", f"run.name={run}", "ppo.micro_batch_size=4"]
        sizes += ["launch.processes=2", f"launch.zero_stage={self.zero}"]
        log = self.folder / f"{run}.txt"
        before = {self.report(run, rank).get("pid") for rank in (0, 1)}
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "launch.cli", "ppo", *sizes]
        with log.open("w") as output:
            parent = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        if kill is None:
            return parent.wait(timeout=600)
        rank, beat, delay = kill
        while parent.poll() is None:
            report = self.report(run, rank)
            if report.get("pid") not in before and report.get("beat", 0) >= beat:
                time.sleep(delay)
                return self.killed(parent, run, rank, log)
            time.sleep(0.002)
        return parent.returncode

    def killed(self, parent: subprocess.Popen[bytes], run: str, rank: int, log: Path) -> int:
        """Kill the rank, and see the stage go down and say so."""
        report = self.report(run, rank)
        try:
            os.kill(report["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return parent.wait(timeout=120)  # it ended in the meantime
        begin = time.monotonic()
        code = parent.wait(timeout=DOWN)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        if code:
            self.kills[f"rank {rank} in {report['phase']}"] += 1
            # `has ended` where the launcher has taken note of the dead before the others looked
            told = re.search(rf"rank {rank} (died \(signal 9\)|has ended), in phase", log.read_text())
            assert told, log.read_text()[-2000:]
        return code

    def report(self, run: str, rank: int) -> dict:
        """What the rank's watch last wrote; {} while there is nothing."""
        try:
            return json.loads((self.folder / run / "ppo-ptx" / "logs" / f"rank-{rank}.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}


@pytest.mark.parametrize("zero", [2, 3])
def test_kills_of_a_random_rank(tmp_path: Path, zero: int) -> None:
    with served() as server:
        Bench(tmp_path, server).prepare()
    upstream = ("sft", "rank", "reward")
    shutil.rmtree(tmp_path / "whole" / "ppo-ptx")
    pair, draw = Pair(tmp_path, zero), random.Random(SEED)
    assert pair.attempt("whole") == 0, (tmp_path / "whole.txt").read_text()[-3000:]
    beats = pair.report("whole", 0)["beat"]
    runs = identical = 0
    while pair.kills.total() < KILLS:
        run = f"run-{runs}"
        runs += 1
        for stage in upstream:
            shutil.copytree(tmp_path / "whole" / stage, tmp_path / run / stage)
        left = beats
        for _ in range(3):
            beat = draw.randint(1, max(1, left))
            if pair.attempt(run, (draw.randint(0, 1), beat, draw.uniform(0, 0.3))) == 0:
                break
            left -= beat
        assert pair.attempt(run) == 0, (tmp_path / f"{run}.txt").read_text()[-3000:]
        found = differences(tmp_path / run / "ppo-ptx", tmp_path / "whole" / "ppo-ptx")
        assert not found, (run, found)
        identical += 1
    where = ", ".join(f"{place} {n}" for place, n in sorted(pair.kills.items()))
    kills = f"{pair.kills.total()} kills in {runs} runs"
    print(f"\nZeRO {zero}, FAULTS_SEED={SEED}: {kills}, {identical} identical ({where})")
    print(f"down within {pair.slowest:.1f} s of a kill")
