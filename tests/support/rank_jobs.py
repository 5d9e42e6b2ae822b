"""One rank of a distributed test: runs a list of jobs in one process, which is started once and not once a job.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m support.rank_jobs JOBS.json

Without those variables it is a single process, with no group and no DeepSpeed.

JOBS.json is a list of {"module", "arguments", "stop_after"}: `module.main(arguments)` must return 0, or 143 where
`stop_after` is set: then the last rank gets SIGTERM before that optimiser step. With `spoil_at`, the
loss of its backward of that number is infinite. JOBS-RANK.json gets what was noted of
every job: the class names of the engines it made, with the ZeRO stage, and the token ids of PPO's rollouts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import stages.ppo
from rlhf.training.clipped_adamw import ClippedAdamW
from rlhf.training.sft_trainer import Reporter
from rlhf.training.zero_engine import ZeroEngine

torch.set_num_threads(1)

engines: list[str] = []  # of the job that is running
rollouts: list[list[list[int]]] = []  # of the job that is running: rows of every iteration
steps_left = 0  # until SIGTERM; 0: never
backwards_left = 0  # until an infinite loss; 0: never


def note_engines() -> None:
    """Have DeepSpeed and torch's data parallelism note what they build."""
    initialize, ddp = deepspeed.initialize, torch.nn.parallel.DistributedDataParallel
    build = ddp.__init__

    def noted_initialize(*args: Any, **options: Any) -> Any:
        made = initialize(*args, **options)
        engines.append(f"{type(made[0]).__name__} {made[0].zero_optimization_stage()}")
        return made

    def noted_build(self: Any, *args: Any, **options: Any) -> None:
        engines.append(type(self).__name__)
        build(self, *args, **options)

    deepspeed.initialize, ddp.__init__ = noted_initialize, noted_build


def note_rollouts() -> None:
    """Have PPO's rollouts noted."""
    rollout = stages.ppo.rollout

    def noted(ppo: Any) -> Any:
        episodes = rollout(ppo)
        rollouts.append([episodes.response(i) for i in range(len(episodes))])
        return episodes

    stages.ppo.rollout = noted


def count_steps() -> None:
    """Send SIGTERM to this process before the optimiser step that `steps_left` says."""

    def counted(step: Callable[..., Any]) -> Callable[..., None]:
        def counting(*args: Any, **options: Any) -> None:
            global steps_left
            steps_left -= 1
            if steps_left == 0:
                signal.raise_signal(signal.SIGTERM)
            step(*args, **options)

        return counting

    ClippedAdamW.step = counted(ClippedAdamW.step)
    Reporter.on_step_end = counted(Reporter.on_step_end)  # SFT's trainer has an optimiser of its own


def spoil_losses() -> None:
    """Make a loss infinite, in the call of `backward` that `backwards_left` says."""
    backward = ZeroEngine.backward

    def spoiled(self: ZeroEngine, loss: torch.Tensor) -> None:
        global backwards_left
        backwards_left -= 1
        backward(self, loss * (float("inf") if backwards_left == 0 else 1.0))

    ZeroEngine.backward = spoiled


def main() -> int:
    """Run the jobs of the file that is named on the command line."""
    global steps_left, backwards_left
    note_engines()
    note_rollouts()
    count_steps()
    spoil_losses()
    file, rank, made = Path(sys.argv[1]), int(os.environ.get("RANK", "0")), []
    grouped = "WORLD_SIZE" in os.environ
    if grouped:
        dist.init_process_group("gloo")
    for job in json.loads(file.read_text()):
        engines.clear()
        rollouts.clear()
        last = not grouped or rank == dist.get_world_size() - 1
        steps_left = job.get("stop_after", 0) if last else 0
        backwards_left = job.get("spoil_at", 0) if last else 0
        begin = time.monotonic()
        code = importlib.import_module(job["module"]).main(job["arguments"])
        unset_hf_deepspeed_config()  # SFT's ZeRO-3 would partition whatever a later stage of this process loads
        made.append({"engines": list(engines), "rollouts": list(rollouts)})
        print(f"{job['module']} {job['arguments'][1:3]}: {code} after {time.monotonic() - begin:.1f} s", flush=True)
        if code != (143 if job.get("stop_after") else 0):
            return 1
    file.with_name(f"{file.stem}-{rank}.json").write_text(json.dumps(made))
    if grouped:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
