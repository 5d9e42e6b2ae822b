"""Start one stage program, alone or under the DeepSpeed launcher."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.supervisor import ErrorFile, supervise
from rlhf.config import LaunchSection, Recipe
from rlhf.errors import UserError
from rlhf.plan import read_hosts, recipe_processes
from rlhf.recipe import recipe_names
from rlhf.run.fingerprints import check_recipe, is_up_to_date, skip_message
from rlhf.run.folder import LOGS, RunFolder
from rlhf.stage_table import STAGES, is_ppo
from rlhf.system.console import console
from rlhf.system.signals import STOPPED
from rlhf.system.watchdog import last_phases

ROOT = Path(__file__).resolve().parent.parent  # holds rlhf/, stages/ and launch/, in a checkout and when installed
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, Windows' subsystem


@dataclass(frozen=True)
class Redo:
    """Work that is done again, and work that is kept although the recipe has changed."""

    begin: str = ""  # stage that is done from scratch with all after it; those before it are kept
    fresh: bool = False  # all stages are done from scratch
    accept: tuple[str, ...] = ()  # recipe fields that may have changed

    def options(self) -> list[str]:
        """Return the options of a stage program."""
        fresh = ["--fresh"] if self.fresh or self.begin else []
        return fresh + [word for key in self.accept for word in ("--accept-change", key)]


NO_REDO = Redo()
REFUSED = 2  # exit code of a stage that a UserError ended


def how_ended(code: int, launched: bool) -> str:
    """Describe how a stage ended."""
    if code in STOPPED:
        return "stopped"
    if code > 128 and not launched:  # of several processes the watchdog names the one that died
        out_of_memory = ", as the system does when memory runs out" if code == 128 + signal.SIGKILL else ""
        return f"was killed (signal {code - 128}{out_of_memory})"
    return f"failed (exit code {code}): the cause is named above"


def start(stage: str, recipe: Recipe, name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> int:
    """Run a stage program to its end and return its exit code, 128 + N when signal N ended it."""
    if redo == NO_REDO and is_skipped(stage, recipe):
        return 0
    processes, logs = recipe_processes(recipe), Path(recipe.run.dir) / recipe.run.name / stage / LOGS
    line = command(stage, recipe, name_or_path, overrides, redo)
    if processes == 1:
        return supervise(line, environment(recipe, launched=False))
    by_ssh = bool(recipe.launch.hostfile) and recipe.launch.node_rank < 0  # its runner passes signals on itself
    errors = ErrorFile(logs)
    code = supervise(line, environment(recipe, launched=True), local_ranks=not by_ssh, errors=errors)
    if code not in (0, REFUSED, *STOPPED) and not errors.is_new():
        for text in last_phases(logs, processes):
            console.print(text, markup=False, soft_wrap=True)
    return code


def is_skipped(stage: str, recipe: Recipe) -> bool:
    """Return whether a stage is finished and unchanged, and say so: its program would need seconds to find that out.

    Whatever stands against it, such as a changed recipe or another writer, is for the program to report. Of machines
    that are given the same command each starts its programs, which decide together.
    """
    run = RunFolder(Path(recipe.run.dir) / recipe.run.name)
    try:
        if recipe.launch.node_rank >= 0 or not run.is_done(stage):
            return False
        with run.lock():
            if not is_up_to_date(recipe, run, stage):
                return False
            check_recipe(recipe, run, redo=None)
    except (UserError, OSError):
        return False
    console.print(skip_message(run, stage), markup=False)
    return True


def command(stage: str, recipe: Recipe, name_or_path: str, overrides: Sequence[str], redo: Redo = NO_REDO) -> list[str]:
    """Return the command line of a stage: the program itself, or DeepSpeed's launcher around it.

    Raises UserError for a quote in an argument, which DeepSpeed cannot pass to other machines.
    """
    program, *options = stage_program(stage)
    where = name_or_path if name_or_path in recipe_names() else str(Path(name_or_path).expanduser().resolve())
    arguments = [program, where, *overrides, *options, *redo.options()]
    if recipe_processes(recipe) == 1:
        return [sys.executable, "-m", *arguments]
    if recipe.launch.hostfile and recipe.launch.node_rank < 0 and any("'" in argument for argument in arguments):
        # The launcher quotes arguments for the remote shells with single quotes and does not escape them.
        raise UserError("a quote cannot be passed to other machines", "the command line", "put it in a recipe file")
    # It logs how its processes end, which the supervisor and the watchdog describe better.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    launcher += _machines(recipe.launch, list(STAGES).index(stage))
    return [*launcher, "--num_gpus", str(recipe.launch.processes), "--module", "--no_local_rank", *arguments]


def _machines(launch: LaunchSection, number: int) -> list[str]:
    """Return the launcher's options about machines and ports; `number` is the stage's."""
    if not launch.hostfile:
        return ["--master_port", str(_free_port())]  # so that two runs on one machine do not meet
    options = ["--hostfile", str(Path(launch.hostfile).expanduser().resolve())]
    # Each stage has a port of its own, so that it does not meet the one before it.
    options += ["--master_port", str(launch.master_port + number)]
    address = launch.master_addr
    if launch.node_rank >= 0:
        options += ["--no_ssh", "--node_rank", str(launch.node_rank)]
        address = address or read_hosts(launch.hostfile)[0]  # by ssh the runner asks the machine for its address
    return [*options, "--master_addr", address] if address else options


def stage_program(stage: str) -> list[str]:
    """Return the module of a stage and the options that select its variant."""
    return [f"stages.{STAGES[stage].program}", *(["--variant", stage] if is_ppo(stage) else [])]


def environment(recipe: Recipe, launched: bool) -> dict[str, str]:
    """Return the variables of a stage program: this installation's code, quiet libraries, threads that share cores."""
    env = dict(os.environ)
    env["PYTHONSAFEPATH"] = "1"  # a folder called stages or launch in the working folder is not ours
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])  # ninja, for DeepSpeed
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "false"
    threads = max(1, (os.cpu_count() or 1) // (recipe.launch.processes if launched else 1))
    env.setdefault("MKL_NUM_THREADS", env.setdefault("OMP_NUM_THREADS", str(threads)))  # two numbers cost a third more
    if recipe.run.device == "cpu" or not any(Path(device).exists() for device in GPU_DEVICES):
        env["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns in each of its programs that it found no GPU
    if launched:
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return env


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
