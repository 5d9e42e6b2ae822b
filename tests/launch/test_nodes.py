"""Two machines on one: two `rlhf` with a node_rank each, in network namespaces, and under a stand-in Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT
from support.ports import free_port, wait_for

pytestmark = pytest.mark.distributed

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["tracking.wandb=disabled", "sft.micro_batch_size=8", "rank.prompts=8", "ppo.episodes=16"]
SMALL += ["ppo.micro_batch_size=4", "evaluate.prompts=4", "evaluate.bootstrap=100", "evaluate.cloze_questions=4"]
_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Kill the processes that a failed test has left behind, with all that they started."""
    yield
    for child in _started:
        if child.poll() is None:
            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                process.kill()
    _started.clear()


def started(*command: str, folder: Path, output: str, **env: str) -> subprocess.Popen[str]:
    """Start a command in `folder` with its output in the file `output` there."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | env
    file = (folder / output).open("w")
    child = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, text=True)
    _started.append(child)
    return child


def start_node(
    folder: Path, node: int, hosts: list[str], *arguments: str, namespace: tuple[str, ...] = (), **env: str
) -> subprocess.Popen[str]:
    """Start `rlhf run tiny` as machine `node` of `hosts`, with one process and its output in node-N.txt."""
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    assert "`launch.hostfile=hosts\nlaunch.node_rank=0`" in README
    options = ["launch.hostfile=hosts", f"launch.node_rank={node}", *SMALL, *arguments]
    command = [*namespace, sys.executable, "-m", "launch.cli", "run", "tiny", "run.name=nodes", *options]
    return started(*command, folder=folder, output=f"node-{node}.txt", **env)


def record(folder: Path, stage: str) -> dict[str, object]:
    return json.loads((folder / "runs" / "nodes" / stage / "stage.json").read_text())


def phase(folder: Path, rank: int, stage: str = "sft") -> str:
    path = folder / "runs" / "nodes" / stage / "logs" / f"rank-{rank}.json"
    return json.loads(path.read_text())["phase"] if path.exists() else ""


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """Yield (name, address, interface) of two network namespaces joined by a cable; skip if that is not permitted."""
    names = [f"rlhf-{os.getpid()}-{n}" for n in (0, 1)]

    def ip(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)

    try:
        made = [ip(f"netns add {name}") for name in names]
    except FileNotFoundError:
        pytest.skip("there is no `ip` command")
    try:
        if failed := [done.stderr for done in made if done.returncode]:
            pytest.skip(f"network namespaces are not permitted: {failed[0].strip()}")
        ip(f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        found = []
        for n, name in enumerate(names):
            ip(f"-n {name} addr add 10.77.0.{n + 1}/24 dev cable{n}")
            ip(f"-n {name} link set lo up")
            up = ip(f"-n {name} link set cable{n} up")
            assert up.returncode == 0, up.stderr
            found.append((name, f"10.77.0.{n + 1}", f"cable{n}"))
        yield found
    finally:
        for name in names:
            ip(f"netns del {name}")


@pytest.mark.timeout(1300)
def test_the_chain_completes_over_two_network_namespaces(tmp_path: Path, namespaces) -> None:
    hosts = [address for _, address, _ in namespaces]
    stages = ["sft", "rank", "reward", "ppo-ptx", "evaluate"]
    options, nodes = (f"run.stages=[{','.join(stages)}]", "launch.zero_stage=2"), []
    for n, (name, _, interface) in enumerate(namespaces):
        where = {"namespace": ("ip", "netns", "exec", name), "GLOO_SOCKET_IFNAME": interface}
        nodes.append(start_node(tmp_path, n, hosts, *options, **where))
    codes = [node.wait(timeout=1200) for node in nodes]
    first, second = ((tmp_path / f"node-{n}.txt").read_text() for n in (0, 1))
    assert codes == [0, 0], first + second
    for stage in stages:
        assert record(tmp_path, stage)["state"] == "done"
        logs = (tmp_path / "runs/nodes" / stage / "logs").glob("*.txt")
        assert {path.name for path in logs} == {"rank-0.txt", "rank-1.txt"}
    assert "stage 5 of 5: evaluate" in first and "report.html" in first
    assert second == ""  # one voice
    assert (tmp_path / "runs/nodes/report.html").exists()


def test_killing_one_node_ends_the_other(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["run.stages=[sft]", "sft.epochs=1000", "launch.master_addr=127.0.0.1", f"launch.master_port={port}"]
    nodes = [start_node(tmp_path, n, ["a", "b"], *arguments, "launch.timeout_s=20") for n in (0, 1)]
    wait_for(lambda: phase(tmp_path, 0) == phase(tmp_path, 1) == "train", *nodes, seconds=300)
    survivors = psutil.Process(nodes[0].pid).children(recursive=True)
    for process in [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]:
        process.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert nodes[0].wait(timeout=120) not in (0, 2)
    assert time.monotonic() - begin < 60
    output = (tmp_path / "node-0.txt").read_text()
    assert "in phase train, step" in output and output.count("rank 1 ") == 1 and "Traceback" not in output
    assert record(tmp_path, "sft")["state"] == "failed"
    nodes[1].wait()
    wait_for(lambda: not psutil.wait_procs(survivors, timeout=0)[1])


FAKES = {
    "scontrol": 'printf "127.0.0.1\\nlocalhost\\n"\n',
    "srun": """
while [[ $1 == -* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n; code=$?
wait; exit $code
""",
}


def start_slurm(folder: Path, *settings: str) -> subprocess.Popen[str]:
    """Start launch/slurm.sbatch, edited as a user does, with two stand-ins for Slurm's commands."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    edits = {
        "RECIPE=instructgpt-1.3b": "RECIPE=tiny",
        "SETTINGS=(launch.zero_stage=2)": f"SETTINGS=({' '.join(settings)})",
        "PROCESSES=8": "PROCESSES=1",
        "VENV=.venv": f"VENV={sys.prefix}",
    }
    for before, after in edits.items():
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    (folder / "slurm.sbatch").write_text(script)
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": free_port(), "SLURM_JOB_NODELIST": "node[1-2]"}
    return started("bash", "slurm.sbatch", folder=folder, output="slurm.txt", **env)


@pytest.mark.timeout(1300)
def test_the_slurm_script_stops_at_a_signal_and_goes_on_to_the_end(tmp_path: Path) -> None:
    common = ("run.name=nodes", "'run.stages=[sft]'", "tracking.wandb=disabled", "sft.micro_batch_size=8")
    job = start_slurm(tmp_path, *common, "sft.epochs=2")
    wait_for(lambda: phase(tmp_path, 1) == "train", job, seconds=300)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=200) == 138, (tmp_path / "slurm.txt").read_text()
    assert record(tmp_path, "sft")["state"] == "stopped"
    assert list((tmp_path / "runs/nodes/sft/checkpoints").glob("step-*"))
    job = start_slurm(tmp_path, *common, "sft.epochs=2")
    code, output = job.wait(timeout=500), (tmp_path / "slurm.txt").read_text()
    assert code == 0, output
    assert record(tmp_path, "sft")["state"] == "done" and record(tmp_path, "sft")["attempts"] == 2
    assert output.count("sft: done") == 1
    assert not list(tmp_path.glob("rlhf-*"))  # hostfile and process number
