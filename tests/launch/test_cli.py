"""The command line: help, plans, refusals, and how stage programs are started and stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import launcher, pipeline
from launch.supervisor import ranks_below, supervise
from rlhf.costs import disk
from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from support.command import rlhf
from support.paths import ROOT


def test_help_names_every_command_and_shows_examples() -> None:
    text = rlhf("--help").stdout
    names = "run sft rank reward ppo evaluate compare status profile report chat plan export peft"
    for command in (*names.split(), "judge-eval", "judge-search", "recipes"):
        assert f" {command} " in text
    assert "rlhf run demo" in text
    assert "--variant" in rlhf("ppo", "--help").stdout


def test_what_loads_no_model_starts_without_torch() -> None:
    names = "launch.cli, launch.pipeline, launch.commands." + ", launch.commands.".join(
        ("status", "label", "profile", "agreement", "compare")
    )
    check = f"import sys, {names}; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_run_refuses_questions_that_a_judge_cannot_take_before_any_stage(tmp_path: Path) -> None:
    judge = ("evaluate.labeler=judge", "judge.template=pair-few-shot", "judge.max_tokens=300")
    done = rlhf("run", "tiny", *judge, cwd=tmp_path)
    assert done.returncode == 2 and "where: judge.max_tokens" in done.stderr
    assert not list(tmp_path.glob("runs/*/sft"))


def test_plan_refuses_an_unreadable_model_with_its_file(tiny_dir: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    done = rlhf("plan", "tiny", f"model.name={folder}", cwd=tmp_path)
    assert done.returncode == 2 and f"where: {folder / 'tokenizer.json'}" in done.stderr


def test_recipes_lists_names_with_descriptions(tmp_path: Path) -> None:
    done = rlhf("recipes", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("demo", "tiny", "instructgpt-1.3b", "tldr-pythia-1b"):
        assert f"\n{name} " in f"\n{done.stdout}"
    assert done.stdout.count("\npeft ") == 2  # a recipe and a comparison


def test_agreement_of_the_embedded_passes() -> None:
    """The figures that data/README.md gives for the two passes."""
    done = rlhf("agreement", "embedded:rankings", "embedded:rankings_second")
    assert done.returncode == 0, done.stderr
    assert "48 of 156 sets of outputs" in done.stdout
    assert "92.9%" in done.stdout and "411 pairs" in done.stdout
    found = json.loads(rlhf("agreement", "embedded:rankings", "embedded:rankings_second", "--json").stdout)
    assert found["outputs_shared"] == 48 and found["pairwise"]["untied"]["counted"] == 411


def test_convert_writes_plain_rankings_once(tmp_path: Path) -> None:
    one = {"prompt": "q", "chosen": "x", "rejected": "y", "labeler": "ann"}
    (tmp_path / "a.jsonl").write_text(json.dumps(one) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([one, one | {"labeler": "bob", "time": 0}]))
    done = rlhf("convert", "a.jsonl", "b.json", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dropped 1: exact duplicate of a ranking" in done.stdout
    assert "out.jsonl: 2 rankings of 1 prompts, 2 labelers" in done.stdout
    row = {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2], "finished": [True, True]}
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [row | {"labeler": "ann"}, row | {"labeler": "bob", "time": "1970-01-01T00:00:00+00:00"}]
    before = (tmp_path / "a.jsonl").read_bytes()
    for files, words in ((["b.json", "a.jsonl"], "not overwritten"), (["a.jsonl", "b.json"], "ends in .jsonl")):
        done = rlhf("convert", *files, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_plan_prints_derived_numbers_and_writes_nothing(tmp_path: Path) -> None:
    done = rlhf("plan", "instructgpt-1.3b", "ppo.episodes=2560", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2560 episodes = 5 iterations x 512" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "demos"], "did you mean demo?"),
        (["run", "tiny", "ppo.lrr=1"], "did you mean ppo.lr?"),
        (["run", "tiny", "rank.labeler=human", "label.labelers=[anna,anna]"], "anna is listed twice"),
        (["label", "nowhere"], "no outputs to rank"),
        (["plan", "tiny", "ppo.episodes=100"], "does not divide"),
        (["ppo", "tiny", "sft.lr=fast"], "sft.lr is 'fast'"),
        (["report", "nowhere"], "no such run folder"),
        (["chat", "nowhere"], "recipe.yaml"),
        (["profile", "nowhere"], "recipe.yaml"),
        (["compare", "pefft"], "did you mean peft?"),
        (["compare", "peft", "--arm", "lorra"], "there is no arm 'lorra'"),
        (["compare", "peft", "sft.lr=1"], "what the arms differ in"),
        (["agreement", "nowhere.jsonl"], "no such data file"),
        (["agreement", "embedded:rankings"], "nothing was ranked twice"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []  # refused before anything is written


def test_one_process_runs_the_stage_program_itself() -> None:
    recipe = load_recipe("tiny")
    line = launcher.command("sft", recipe, "tiny", ["sft.lr=1"])
    assert line == [sys.executable, "-m", "stages.sft", "tiny", "sft.lr=1"]
    assert launcher.command("ppo-ptx", recipe, "tiny", [])[-4:] == ["stages.ppo", "tiny", "--variant", "ppo-ptx"]


def test_more_processes_go_through_deepspeed_in_every_stage() -> None:
    recipe = load_recipe("tiny", ["launch.processes=2"])
    line = shlex.join(launcher.command("ppo", recipe, "tiny", []))
    assert "-m deepspeed.launcher.runner" in line
    assert line.endswith("--num_gpus 2 --module --no_local_rank stages.ppo tiny --variant ppo")
    assert "-m deepspeed.launcher.runner" in shlex.join(launcher.command("rank", recipe, "tiny", []))


def test_hostfile_reaches_the_launcher_and_quotes_do_not_reach_its_shells(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n", encoding="utf-8")
    recipe = load_recipe("tiny", [f"launch.hostfile={hosts}"])
    line = launcher.command("sft", recipe, "tiny", [])
    assert line[line.index("--hostfile") + 1] == str(hosts)
    with pytest.raises(UserError, match="quote"):
        launcher.command("sft", recipe, "tiny", ["data.prompts=['a; rm b']"])


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    env = launcher.environment(load_recipe("tiny"), launched=False)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["MKL_NUM_THREADS"] == "3"
    assert env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert "HF_HUB_OFFLINE" not in env


def test_disk_need_counts_models_of_unfinished_stages(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    overrides = [f"model.name={model}", f"run.dir={tmp_path}", "run.name=r", "run.stages=[sft,rank,ppo]"]
    full = load_recipe("tiny", overrides)
    # A model and one checkpoint of weights and two moments; policy, average and three checkpoints of two networks.
    assert disk.disk_need(full) == (1 + 3) * 1000 + (2 + 18) * 1000
    often = load_recipe("tiny", [*overrides, "sft.save_every=2"])
    assert disk.disk_need(often) == (1 + 9) * 1000 + (2 + 18) * 1000
    lora = load_recipe("tiny", [*overrides, "model.peft.method=lora"])
    assert disk.disk_need(lora) == 0  # adapters alone are written, and they are small
    spread = load_recipe("tiny", [*overrides, "model.peft.method=lora", "launch.processes=2", "launch.zero_stage=2"])
    assert disk.disk_need(spread) == 1000  # DeepSpeed's checkpoint of SFT holds the base
    judge = [*overrides, "model.peft.method=lora", "reward.peft.method=none", "run.stages=[sft,rank,reward,ppo]"]
    # All weights of the reward model, and in PPO's checkpoints of the value model.
    assert disk.disk_need(load_recipe("tiny", judge)) == (1 + 3) * 1000 + 9 * 1000
    (tmp_path / "r" / "sft" / "model").mkdir(parents=True)
    assert disk.disk_need(full) == (2 + 18) * 1000


def test_a_full_disk_is_refused_before_the_start(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no space
    recipe = load_recipe("tiny", [f"model.name={model}", f"run.dir={tmp_path / 'new' / 'runs'}"])
    with pytest.raises(UserError, match="GB are free"):
        pipeline.check_disk(recipe)


CHILD = """
import signal, sys, time
def stop(signum, frame):
    print("got", signum, flush=True)
    sys.exit({code})
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, sys
from launch.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", {child!r}], dict(os.environ)))
"""


@pytest.mark.parametrize(
    ("sent", "arrives", "code"),
    [(signal.SIGINT, 2, 130), (signal.SIGTERM, 15, 143), (signal.SIGUSR1, 10, 138), (signal.SIGHUP, 15, 143)],
)
def test_signals_reach_the_stage_once_and_its_end_is_waited_for(sent: signal.Signals, arrives: int, code: int) -> None:
    command = [sys.executable, "-c", PARENT.format(child=CHILD.format(code=code))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(sent)
    assert parent.stdout.read() == f"got {arrives}\n"
    assert parent.wait(timeout=30) == code


@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_exit_codes_are_passed_on(body: str, code: int) -> None:
    assert supervise([sys.executable, "-c", body], dict(os.environ)) == code


def test_ranks_are_the_grandchildren_of_the_launcher() -> None:
    """runner -> launch -> rank, as DeepSpeed starts them."""
    sleep = "import time; time.sleep(60)"
    spawn = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    runner = subprocess.Popen([sys.executable, "-c", spawn.format(spawn.format(sleep))], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while (ranks := ranks_below(runner.pid)) == [runner.pid] and time.monotonic() < deadline:
            time.sleep(0.1)
        (rank,) = ranks
        assert Path(f"/proc/{rank}/cmdline").read_text().split("\0")[2] == sleep
    finally:
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
