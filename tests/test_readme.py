"""Every command of the README runs as written, in order: which is the whole recipe on the tiny model, end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.data.records import Drops, read_demonstrations, read_prompts, read_rankings, read_texts
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Lines of the sh blocks without comments; make's own targets are what runs this test and the demo."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty working folder that sees the stage programs where the README says they are."""
    path = tmp_path_factory.mktemp("readme")
    (path / "stages").symlink_to(ROOT / "stages")
    return path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *rest = shlex.split(command)
    known = {"python": sys.executable, "rlhf": shutil.which("rlhf", path=str(Path(sys.executable).parent))}
    assert known.get(program), f"{program} is not installed"
    env = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [str(known[program]), *rest], cwd=folder, env=env, capture_output=True, text=True, timeout=540, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [c for c in commands() if "mutate.py" not in c])
def test_command(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_what_the_pipeline_left(folder: Path) -> None:
    """Runs after the commands: each stage is done, its files are in the contracts, the report is one file."""
    run_dir = folder / "runs" / "tiny"
    for stage in ("sft", "rank", "reward", "ppo-ptx", "ppo", "evaluate"):
        record = json.loads((run_dir / stage / "stage.json").read_text())
        assert record["state"] == "done" and record["metrics"], stage
        if stage != "evaluate":
            assert (run_dir / stage / "metrics.jsonl").exists() or stage == "rank", stage
    for model in ("sft/model", "reward/model", "ppo-ptx/model", "ppo-ptx/ema", "ppo/model"):
        assert (run_dir / model / "model.safetensors").exists(), model
    rankings = read_rankings([str(run_dir / "rank" / "rankings.jsonl")], Drops())
    assert all(len(r.responses) >= 2 for r in rankings) and any(not all(r.finished) for r in rankings)
    rows = [json.loads(line) for line in (run_dir / "ppo-ptx" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [16, 32] and all(row["axis"] == "episodes" for row in rows)
    assert rows[0]["ppo/kl"] == pytest.approx(0, abs=1e-3) and rows[0]["ppo/grad_norm_ptx"] > 0
    plain = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert "ppo/ptx_loss" not in plain[0]
    # Both variants start from one model and sample with the same seeds: the first rollout is the same.
    assert plain[0]["ppo/reward_score"] == pytest.approx(rows[0]["ppo/reward_score"], abs=1e-5)
    report = (run_dir / "report.html").read_text()
    assert "<script src" not in report and 'href="http' not in report and "</html>" in report


@pytest.mark.slow
def test_a_second_run_skips_what_is_done(folder: Path) -> None:
    before = (folder / "runs" / "tiny" / "ppo-ptx" / "stage.json").read_text()
    done = run("rlhf run tiny", folder)
    assert done.returncode == 0 and done.stdout.count("skipped") == 6
    assert (folder / "runs" / "tiny" / "ppo-ptx" / "stage.json").read_text() == before


@pytest.mark.slow
def test_a_changed_recipe_names_the_key(folder: Path) -> None:
    done = run("rlhf run tiny ppo.kl_coef=0.5", folder)
    assert done.returncode == 2
    assert "ppo.kl_coef: 0.02 -> 0.5" in done.stderr and "run.name" in done.stderr


def test_the_readme_shows_commands() -> None:
    assert any(c.startswith("rlhf run tiny") for c in commands()) and any("stages/ppo.py" in c for c in commands())


def test_the_data_formats_shown_are_read(tmp_path: Path) -> None:
    block = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)[0].strip().splitlines()
    readers = (read_demonstrations, read_rankings, read_prompts, read_texts)
    for number, (line, reader) in enumerate(zip(block, readers, strict=True)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n")
        assert len(reader([str(path)], Drops())) == 1
