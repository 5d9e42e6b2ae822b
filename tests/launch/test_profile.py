"""`rlhf profile` over a real run, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.commands import profile
from rlhf.errors import UserError
from stages import ppo, rank, reward, sft


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a tiny run with two iterations of PPO-ptx."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "rank.prompts=8", "rank.outputs_per_prompt=3"]
    small += ["data.max_response_tokens=16", "data.validation_fraction=0.3", "ppo.episodes=16", "ppo.batch_size=8"]
    small += ["reward.batch_size=2", f"run.dir={folder}", "run.name=small"]
    for stage in (sft, rank, reward):
        assert stage.main(small) == 0
    assert ppo.main([*small, "--variant", "ppo-ptx"]) == 0
    yield folder / "small"


def test_the_profile_of_a_run(run: Path) -> None:
    found = profile.profile(run)
    assert (found.stage, found.iterations) == ("ppo-ptx", 1)
    names = ["rollout", "score", "train", "ptx", "optimizer", "save", "other"]
    assert [cost.name for cost in found.costs] == names
    assert all(cost.floor and cost.floor > 0 for cost in found.costs[:5])
    rows = [json.loads(line) for line in (run / "ppo-ptx" / "metrics.jsonl").read_text().splitlines()]
    design = {"rollout_tokens_per_s", "train_tokens_per_s", "mfu", *(f"seconds_{name}" for name in names)}
    assert {f"perf/{name}" for name in design} | {"memory/peak_gb"} <= rows[1].keys()
    # What a row accounts for is the time since the row before.
    passed = rows[1]["time"] - rows[0]["time"]
    assert sum(cost.seconds for cost in found.costs) == pytest.approx(passed, rel=0.05, abs=0.2)
    first = {cost.name: cost.seconds for cost in found.first}
    assert first["rollout"] == rows[0]["perf/seconds_rollout"] and "save" not in first
    mean_length = rows[1]["ppo/response_length"]
    assert rows[1]["perf/rollout_tokens_per_s"] == pytest.approx(8 * mean_length / rows[1]["perf/seconds_rollout"])
    assert rows[1]["perf/decode_rows"] == pytest.approx(8 * (mean_length - 1))
    assert 0 <= rows[1]["perf/padding_train"] < 1 and rows[1]["perf/padding_ptx"] == 0
    assert rows[1]["perf/mfu"] > 0 and rows[1]["memory/peak_gb"] >= rows[1].get("memory/train_gb", 0)
    # Policy, value, reference and reward model; AdamW's two moments of the first two.
    assert found.memory["optimiser state"] == 2 * (found.memory["weights: policy"] + found.memory["weights: value"])
    assert found.memory["measured peak"] == pytest.approx(rows[1]["memory/peak_gb"] * 1e9)
    parts = sum(size for name, size in found.memory.items() if name != "measured peak")
    assert parts == pytest.approx(found.memory["measured peak"])
    assert all(rate > 0 for rate in found.rates.values())


def test_the_rate_of_a_stage_passes_over_a_stop() -> None:
    """100 tokens a second, an hour of rest between the second row and the third, and a second row at one place."""
    points = [(1000, 10.0), (1200, 12.0), (1400, 3612.0), (1600, 3614.0), (1600, 3615.0)]
    assert profile._rate([{"step": step, "time": when} for step, when in points]) == 100.0
    assert profile._rate([{"step": 5, "time": 1.0}]) is None


def test_the_command_shows_a_table_and_json(run: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(run)])
    assert done.exit_code == 0, done.output
    for words in ("rollout", "  decode", "bound by", "optimiser state", "measured peak", "Furthest from its floor: "):
        assert words in done.output
    found = json.loads(CliRunner().invoke(app, ["profile", str(run), "--variant", "ppo-ptx", "--json"]).output)
    assert found["stage"] == "ppo-ptx" and found["phases"][0]["name"] == "rollout" and found["furthest"]


def test_what_has_no_profile_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        profile.profile(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="no iteration of ppo-ptx or ppo is finished"):
        profile.profile(tmp_path)
    with pytest.raises(UserError, match="no iteration of ppo is finished"):
        profile.profile(run, "ppo")


def test_a_log_from_before_floors_shows_its_seconds(tmp_path: Path, run: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    row = {"step": 16, "axis": "episodes", "time": 1.0, "perf/seconds_rollout": 3.0, "perf/seconds_train": 1.0}
    cut_off = '{"step": 32, "perf/sec'  # killed while writing
    (tmp_path / "ppo" / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{cut_off}")
    found = profile.profile(tmp_path)
    costs = [(cost.name, cost.share, cost.floor) for cost in found.costs]
    assert costs == [("rollout", 0.75, None), ("train", 0.25, None)]
    assert found.first == [] and found.memory == {}
    profile.show_profile(tmp_path)
