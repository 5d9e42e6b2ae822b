"""Reward and PPO stages stopped by a signal and taken up again end as if they had never been stopped; and what the
evaluate stage holds back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Drops
from rlhf.evaluation.heldout import unseen_prompts, unseen_texts
from rlhf.recipe import load_recipe
from rlhf.run.stage import StageContext
from stages import ppo, rank, reward, sft

SMALL = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "rank.prompts=16", "rank.outputs_per_prompt=3"]
SMALL += ["data.max_response_tokens=24", "data.validation_fraction=0.3", "ppo.save_every=0", "ppo.episodes=48"]
SMALL += ["reward.save_every=0", "reward.batch_size=2"]
TIMES = ("time", "perf/", "memory/")


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


def stop_at(monkeypatch: pytest.MonkeyPatch, ask: int) -> None:
    """A real SIGTERM just before the stage asks for the `ask`-th time whether to stop."""
    asked = 0

    def stop_requested(self: StageContext) -> bool:
        nonlocal asked
        asked += 1
        if asked == ask:
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(self.signals.agreed())

    monkeypatch.setattr(StageContext, "stop_requested", property(stop_requested))


def rows(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


def assert_same(whole: Path, resumed: Path) -> None:
    weights = [path.relative_to(whole) for path in whole.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert weights
    for path in weights:
        assert (whole / path).read_bytes() == (resumed / path).read_bytes(), path
    assert rows(whole / "metrics.jsonl") == rows(resumed / "metrics.jsonl")
    for table in (whole / "tables").glob("*.jsonl"):
        assert table.read_text() == (resumed / "tables" / table.name).read_text()
    ours, theirs = (json.loads((folder / "stage.json").read_text())["metrics"] for folder in (whole, resumed))
    assert ours == theirs


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


def test_held_out_means_held_out(tmp_path: Path) -> None:
    def write(name: str, *lines: dict[str, Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"data.{name.removesuffix('.jsonl')}=[{path}]"

    recipe = load_recipe(
        "tiny",
        [
            write("prompts.jsonl", {"prompt": "Name a river."}),
            write("demonstrations.jsonl", {"prompt": "Name a hill.", "response": "Arthur's Seat."}),
            write("rankings.jsonl", {"prompt": "Name a bay.", "responses": ["Baffin Bay.", "No."], "ranks": [1, 2]}),
            write(
                "prompts_heldout.jsonl", *({"prompt": f"Name a {what}."} for what in ("river", "hill", "bay", "sea"))
            ),
            write("pretraining.jsonl", {"text": "Tea is a drink."}),
            write("pretraining_heldout.jsonl", {"text": "Tea is a drink."}, {"text": "Bread is a food."}),
        ],
    )
    drops = Drops()
    assert [prompt.text for prompt in unseen_prompts(recipe, drops)] == ["Name a sea."]
    assert unseen_texts(recipe, drops) == ["Bread is a food."]
    assert dict(drops.table()) == {
        "held-out prompt that is also in the training data": 3,
        "held-out text that is also in the training data": 1,
    }


def test_the_scale_is_measured_on_whole_prompts() -> None:
    """Chosen first in every row, as in files of pairs: a stride over outputs would take the chosen ones only."""
    groups = [reward.Group([([1], [10 * i]), ([1], [10 * i + 1])], (1, 2)) for i in range(8)]
    drawn = [response[0] for _, response in reward.sample_outputs(groups, 8, seed=1)]
    assert len(drawn) == len(set(drawn)) == 8
    assert sorted(value % 10 for value in drawn) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(reward.sample_outputs(groups, 100, seed=1)) == 16
