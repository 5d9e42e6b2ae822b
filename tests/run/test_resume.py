"""Reward and PPO stages stopped by a signal and taken up again end as if they had never been stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stages import ppo, rank, reward, sft
from support.stage_runs import assert_same, stop_at

SMALL = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "rank.prompts=16", "rank.outputs_per_prompt=3"]
SMALL += ["data.max_response_tokens=24", "data.validation_fraction=0.3", "ppo.save_every=0", "ppo.episodes=48"]
SMALL += ["reward.save_every=0", "reward.batch_size=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder whose run `whole` went through SFT, rank, reward and both variants of PPO without a stop."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [*SMALL, f"run.dir={folder}", "run.name=whole"]
    for stage in (sft, rank, reward):
        assert stage.main(arguments) == 0
    for variant in ("ppo-ptx", "ppo"):
        assert ppo.main([*arguments, "--variant", variant]) == 0
    return folder


def copy_of_run(trained: Path, tmp_path: Path, *redo: str) -> list[str]:
    """A copy of the run without some stages; returns the arguments that go with it."""
    shutil.copytree(trained / "whole", tmp_path / "whole")
    for stage in redo:
        shutil.rmtree(tmp_path / "whole" / stage)
    return [*SMALL, f"run.dir={tmp_path}", "run.name=whole"]


@pytest.mark.parametrize(("stage", "variant"), [("reward", None), ("ppo-ptx", "ppo-ptx"), ("ppo", "ppo")])
def test_a_stopped_stage_resumes_exactly(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, variant: str | None
) -> None:
    arguments = copy_of_run(trained, tmp_path, stage)
    program = reward if variant is None else ppo
    arguments += ["--variant", variant] if variant else []
    for ask in (2, 2):  # the first is before any work: one step or iteration, then the signal; and that twice
        with monkeypatch.context() as patch:
            stop_at(patch, ask)
            assert program.main(arguments) == 143
        assert len(list((tmp_path / "whole" / stage / "checkpoints").iterdir())) >= 1
        assert not (tmp_path / "whole" / stage / "model").exists()
    assert program.main(arguments) == 0
    assert_same(trained / "whole" / stage, tmp_path / "whole" / stage)


def test_a_stage_killed_behind_its_last_checkpoint_ends_the_same(trained: Path, tmp_path: Path) -> None:
    """Nothing is left to train, what comes after it is done again, and no row is logged twice."""
    arguments = copy_of_run(trained, tmp_path)
    for stage, main in (("reward", reward.main), ("ppo-ptx", ppo.main)):
        folder = tmp_path / "whole" / stage
        shutil.rmtree(folder / "model")
        record = json.loads((folder / "stage.json").read_text()) | {"state": "running", "metrics": {}}
        (folder / "stage.json").write_text(json.dumps(record))
        assert main(arguments) == 0
        assert_same(trained / "whole" / stage, folder)


def test_a_run_beyond_its_kl_limit_cannot_be_resumed_past_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*copy_of_run(trained, tmp_path, "ppo"), "ppo.lr=0.05", "ppo.max_kl=0.001", "--variant", "ppo"]
    shutil.rmtree(tmp_path / "whole" / "ppo-ptx")  # or its recipe would have changed
    for _ in range(2):
        assert ppo.main(arguments) == 2
        assert "KL to the reference reached" in capsys.readouterr().err
    assert not (tmp_path / "whole" / "ppo" / "model").exists()
