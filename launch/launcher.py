"""Start one stage program, alone or under the DeepSpeed launcher, and watch over its processes until they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.plan import read_hosts, recipe_processes
from rlhf.recipe import recipe_names
from rlhf.run.folder import LOGS
from rlhf.stage_table import STAGES, is_ppo
from rlhf.system.console import console
from rlhf.system.rank_logs import ERROR
from rlhf.system.signals import STOPPED, STOPPING
from rlhf.system.watchdog import last_phases

ROOT = Path(__file__).resolve().parent.parent  # holds rlhf/, stages/ and launch/, in a checkout and when installed
GRACE = 25.0  # seconds that the launcher gets to end the others once a process has told an error
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, Windows' subsystem


@dataclass(frozen=True)
class Redo:
    """What is done again, and what is kept although the recipe has changed.

    Attributes:
        begin: stage that is done from scratch with all after it; those before it are left as they are.
        fresh: all stages are done from scratch.
        accept: recipe fields that may have changed.
    """

    begin: str = ""
    fresh: bool = False
    accept: Sequence[str] = ()

    def options(self) -> list[str]:
        """Of a stage program."""
        fresh = ["--fresh"] if self.fresh or self.begin else []
        return fresh + [word for key in self.accept for word in ("--accept-change", key)]


NO_REDO = Redo()
REFUSED = 2  # exit code of a stage that a UserError ended


def how_ended(code: int, launched: bool) -> str:
    """What became of a stage, in words."""
    if code in STOPPED:
        return "stopped"
    if code > 128 and not launched:  # of several processes the watch tells which one died
        out_of_memory = ", as the system does when memory runs out" if code == 128 + signal.SIGKILL else ""
        return f"was killed (signal {code - 128}{out_of_memory})"
    return f"failed (exit code {code}): the cause is named above"


def start(stage: str, recipe: Recipe, name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> int:
    """Run a stage program to its end; returns its exit code, 128 + N when signal N ended it."""
    launched, logs = recipe_processes(recipe) > 1, Path(recipe.run.dir) / recipe.run.name / stage / LOGS
    by_ssh = bool(recipe.launch.hostfile) and recipe.launch.node_rank < 0  # its runner passes signals on itself
    line = command(stage, recipe, name_or_path, overrides, redo)
    before = _error_time(logs)
    code = _supervise(line, environment(recipe, launched), launched and not by_ssh, logs if launched else None)
    if launched and code not in (0, 2, *STOPPED) and not _error_reported(logs, before):
        for text in last_phases(logs, recipe_processes(recipe)):
            console.print(text, markup=False, soft_wrap=True)
    return code


def command(stage: str, recipe: Recipe, name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> list[str]:
    """The command line of a stage: the program itself, or DeepSpeed's launcher around it."""
    program, *options = stage_program(stage)
    where = name_or_path if name_or_path in recipe_names() else str(Path(name_or_path).expanduser().resolve())
    arguments = [program, where, *overrides, *options, *redo.options()]
    if recipe_processes(recipe) == 1:
        return [sys.executable, "-m", *arguments]
    # It logs how its processes end, which is told better here, as errors.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    launch = recipe.launch
    if launch.hostfile:
        if launch.node_rank < 0 and any("'" in argument for argument in arguments):
            # The launcher quotes arguments for the remote shells with single quotes and does not escape them.
            raise UserError("a quote cannot be passed to other machines", "the command line", "put it in a recipe file")
        launcher += ["--hostfile", str(Path(launch.hostfile).expanduser().resolve())]
        # Each stage has a port of its own, so that it does not meet the one before it.
        launcher += ["--master_port", str(launch.master_port + list(STAGES).index(stage))]
        address = launch.master_addr
        if launch.node_rank >= 0:
            launcher += ["--no_ssh", "--node_rank", str(launch.node_rank)]
            address = address or read_hosts(launch.hostfile)[0]  # by ssh the runner asks the machine for its address
        if address:
            launcher += ["--master_addr", address]
    else:
        launcher += ["--master_port", str(_free_port())]  # so that two runs on one machine do not meet
    return [*launcher, "--num_gpus", str(launch.processes), "--module", "--no_local_rank", *arguments]


def stage_program(stage: str) -> list[str]:
    """Module of a stage and the options that select its variant."""
    return [f"stages.{STAGES[stage].program}", *(["--variant", stage] if is_ppo(stage) else [])]


def environment(recipe: Recipe, launched: bool) -> dict[str, str]:
    """Variables of a stage program: this installation's code, quiet libraries, threads that share the cores."""
    env = dict(os.environ)
    env["PYTHONSAFEPATH"] = "1"  # a folder called stages or launch where the user stands is not ours
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])  # ninja, for DeepSpeed
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "false"
    threads = max(1, (os.cpu_count() or 1) // (recipe.launch.processes if launched else 1))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env.setdefault(name, str(threads))
    if recipe.run.device == "cpu" or not any(Path(device).exists() for device in GPU_DEVICES):
        env["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns in each of its programs that it found no GPU
    if launched:
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return env


def _supervise(arguments: list[str], env: dict[str, str], local_ranks: bool, logs: Path | None = None) -> int:
    """Run a command in a session of its own and hand the first Ctrl-C, SIGTERM, SIGUSR1 or closed terminal on to it.

    The stage seals a checkpoint and ends; a second Ctrl-C kills it. Once a process has told an error in `logs`, the
    launcher and what it started end within GRACE, stopped processes too.

    Args:
        local_ranks: signals are for the processes below the launcher, which would leave them behind.
        logs: of a launched stage.
    """
    told_before = _error_time(logs) if logs else 0.0
    # Slurm signals every process of a step: the launcher is to outlive that, its processes have handlers of their own.
    deaf = (lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)) if logs else None
    process = subprocess.Popen(arguments, env=env, start_new_session=True, preexec_fn=deaf)
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        if received and signum == signal.SIGINT:
            os.killpg(process.pid, signal.SIGKILL)
        elif not received:
            targets = _ranks(process.pid) if local_ranks else [process.pid]
            known = signum in STOPPING and not (signum == signal.SIGUSR1 and logs and targets == [process.pid])
            for target in targets:  # DeepSpeed's launcher knows the other two
                os.kill(target, signum if known else signal.SIGTERM)
        received.append(signum)

    before = {s: signal.signal(s, forward) for s in (*STOPPING, signal.SIGHUP)}
    try:
        code = _wait(process, logs, told_before)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if logs:
        _kill_group(process)  # what a launcher that was killed itself has left behind
        if code > 192:  # DeepSpeed's launcher gives -N for signal N, of which the system keeps a byte
            code -= 256
    if received:
        return 128 + (received[0] if received[0] in STOPPING else signal.SIGTERM)
    return code if code >= 0 else 128 - code


def _wait(process: subprocess.Popen[bytes], logs: Path | None, before: float) -> int:
    """The exit code of the launcher; `before` is what `_error_time` gave before it was started."""
    told_at = 0.0
    while True:
        try:
            return process.wait(timeout=1.0 if logs else None)
        except subprocess.TimeoutExpired:
            if logs and not told_at and _error_reported(logs, before):
                told_at = time.monotonic()
            if told_at and time.monotonic() - told_at > GRACE:
                _kill_group(process)


def _error_time(logs: Path) -> float:
    """When a process told the error that is in error.txt, 0 when there is none."""
    try:
        return (logs / ERROR).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _error_reported(logs: Path, before: float) -> bool:
    """Whether an error was told since; one of an earlier attempt is there at first, and then removed."""
    return _error_time(logs) not in (0.0, before)


def _kill_group(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(leader.pid, signal.SIGKILL)


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks under DeepSpeed's launcher (runner, then launch, then they); itself while it has none.

    They seal a checkpoint and end when signalled; the launcher would be gone at once and leave them behind.
    """
    ranks = [rank.pid for child in psutil.Process(launcher).children() for rank in child.children()]
    return ranks or [launcher]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
