"""Trials of one process: a stage is killed at points drawn at random over its life, and goes on until it ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import differences

from support.paths import ROOT, TESTS

STAGES = {"sft": "sft", "rank": "rank", "reward": "reward", "ppo": "ppo-ptx"}  # module: folder
# Many steps and a checkpoint after each; dropout, an average and a moving KL coefficient, so that all state matters.
SIZES = [
    *("tiny", "tracking.wandb=disabled", "run.device=cpu"),
    *("data.max_response_tokens=24", "data.validation_fraction=0.3"),
    *("sft.save_every=1", "sft.dropout=0.1", "sft.batch_size=8", "sft.micro_batch_size=4", "sft.epochs=1"),
    *("rank.prompts=24", "rank.outputs_per_prompt=3", "rank.batch_size=6"),
    *("reward.save_every=1", "reward.batch_size=2"),
    *("ppo.save_every=1", "ppo.episodes=64", "ppo.ema_decay=0.9", "ppo.kl_control=adaptive", "ppo.kl_target=1"),
]
PHASES = ("rollout", "score", "train", "ptx", "save")  # of PPO, that it must be killed in


@dataclass
class Outcome:
    """What came of a trial: kills by the phase that they hit, and what differs at the end."""

    stage: str
    kills: Counter[str]
    differences: list[str]
    plans: list[dict[str, Any]] = field(default_factory=list)


class Server:
    """tests/faults/attempts.py, to run attempts one after the other."""

    def __init__(self) -> None:
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(TESTS / "faults" / "attempts.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=os.environ | env, text=True, **pipes)

    def run(self, **job: Any) -> int:
        """The exit code of an attempt, -9 for one that was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        line = next(line for line in self.process.stdout if line.startswith('{"status"'))
        return int(json.loads(line)["status"])


@contextmanager
def served() -> Iterator[Server]:
    """A server while the block lasts."""
    server = Server()
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@dataclass
class Bench:
    """A folder with a run `whole` that was never stopped, what its stages did, and the trials of others."""

    folder: Path
    server: Server
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)  # by module

    def prepare(self) -> None:
        """Run all stages without a stop."""
        for stage, name in STAGES.items():
            profile = self.folder / f"{stage}.json"
            code = self.server.run(**self.job(stage, "whole"), profile=profile)
            assert code == 0, (self.folder / "whole.txt").read_text()[-3000:]
            self.profiles[stage] = json.loads(profile.read_text())
            assert (self.folder / "whole" / name / "stage.json").exists()

    def job(self, stage: str, run: str, *more: str) -> dict[str, Any]:
        """An attempt at a stage in a run."""
        return {
            "module": f"stages.{stage}",
            "arguments": [*SIZES, f"run.dir={self.folder}", f"run.name={run}", *more],
            "run": self.folder / run,
            "log": self.folder / f"{run}.txt",
        }

    def trial(self, stage: str, name: str, plans: list[dict[str, Any]]) -> Outcome:
        """Kill a stage by each of the plans in turn, then let it end; the run is removed when all is well."""
        run = self.folder / name
        for before in list(STAGES)[: list(STAGES).index(stage)]:
            shutil.copytree(self.folder / "whole" / STAGES[before], run / STAGES[before])
        kills: Counter[str] = Counter()
        for plan in plans:
            code = self.server.run(**self.job(stage, name), kill=plan)
            if code == 0:
                break  # it had less left to do than the point was drawn for
            assert code == -9, f"{plan}: exit code {code}\n{(self.folder / f'{name}.txt').read_text()[-3000:]}"
            kills[plan["in"]] += 1
        code = self.server.run(**self.job(stage, name))
        assert code == 0, f"{plans}: exit code {code}\n{(self.folder / f'{name}.txt').read_text()[-3000:]}"
        found = differences(run / STAGES[stage], self.folder / "whole" / STAGES[stage])
        if not found:
            shutil.rmtree(run)
        return Outcome(stage, kills, found, plans)

    def at_time(self, stage: str, draw: random.Random, phase: str = "") -> dict[str, Any]:
        """A point drawn over the life of a stage, or over all it does in one phase."""
        visits: Counter[str] = Counter()
        spans = []
        for name, seconds in self.profiles[stage]["phases"]:
            visits[name] += 1
            spans.append((name, visits[name], seconds))
        spans = [span for span in spans if phase in ("", span[0])]
        name, visit, seconds = draw.choices(spans, weights=[seconds for _, _, seconds in spans])[0]
        return {"phase": name, "visit": visit, "delay": draw.uniform(0, seconds), "in": name}

    def at_event(self, stage: str, draw: random.Random, phase: str = "") -> dict[str, Any]:
        """A change to a file, of all or of those in one phase."""
        events = [(n, name) for n, name in enumerate(self.profiles[stage]["events"], 1) if phase in ("", name)]
        number, name = draw.choice(events)
        return {"event": number, "in": name}


def plans(bench: Bench, stage: str, count: int, draw: random.Random) -> list[list[dict[str, Any]]]:
    """Plans for at least `count` trials: half of them by time, half by changes to files, every third one twice.

    Those of PPO by time are spread evenly over its phases.
    """
    drawn = []
    for i in range(count):
        phase = PHASES[i // 2 % len(PHASES)] if stage == "ppo" else ""
        first = bench.at_event(stage, draw) if i % 2 else bench.at_time(stage, draw, phase)
        again = [bench.at_time(stage, draw)] if i % 3 == 2 else []
        drawn.append([first, *again])
    return drawn


def table(outcomes: list[Outcome]) -> str:
    """Kills and identical ends, by stage and by phase."""
    lines = []
    for stage in dict.fromkeys(o.stage for o in outcomes):
        ours = [o for o in outcomes if o.stage == stage]
        kills = sum((o.kills for o in ours), Counter())
        same = sum(not o.differences for o in ours)
        where = ", ".join(f"{phase} {n}" for phase, n in sorted(kills.items()))
        lines.append(f"{stage}: {kills.total()} kills in {len(ours)} runs, {same} identical ({where})")
    return "\n".join(lines)
