"""metrics.jsonl, and real wandb: offline, without the package, without a usable folder, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config import TrackingSection
from rlhf.run import tracking
from rlhf.run.tracking import Tracker, wandb_mode
from support.paths import ROOT


def make(stage_dir: Path, wandb: str = "disabled") -> Tracker:
    return Tracker(stage_dir, "demo", "ppo", TrackingSection(wandb=wandb), {"ppo": {"lr": 0.5}}, "episodes")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_hold_step_axis_time_and_values(tmp_path: Path) -> None:
    tracker = make(tmp_path / "ppo")
    tracker.log({"ppo/kl": 0.25, "ppo/entropy": torch.tensor(2.0), "ppo/skipped_steps": 0}, 64)
    (row,) = rows(tmp_path / "ppo" / "metrics.jsonl")  # there before close: a kill loses nothing
    assert abs(row.pop("time") - (tmp_path / "ppo" / "metrics.jsonl").stat().st_mtime) < 60
    assert row == {"step": 64, "axis": "episodes", "ppo/kl": 0.25, "ppo/entropy": 2.0, "ppo/skipped_steps": 0}


def test_a_reopened_tracker_appends_and_cuts_rows_after_its_resume_point(tmp_path: Path) -> None:
    first = make(tmp_path)
    for step in (64, 128, 192):
        first.log({"ppo/kl": step / 64}, step)
        first.table("samples", ["prompt", "score"], [["a", 1.0], ["b", None]], step)
    first.close()
    second = make(tmp_path)
    second.truncate_after(128)
    second.log({"ppo/kl": 3.5}, 192)
    found = [(r["step"], r["ppo/kl"]) for r in rows(tmp_path / "metrics.jsonl")]
    assert found == [(64, 1), (128, 2), (192, 3.5)]
    samples = rows(tmp_path / "tables" / "samples.jsonl")
    assert [r["step"] for r in samples] == [64, 64, 128, 128]
    assert samples[1] == {"step": 64, "axis": "episodes", "prompt": "b", "score": None}
    second.log({"ppo/last": 1.0}, 192)
    second.table("ending", ["x"], [[1]], 192)
    second.truncate_after(192, again=("ppo/last", "ending"))
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [64, 128, 192]
    assert "ppo/last" not in rows(tmp_path / "metrics.jsonl")[-1]
    assert rows(tmp_path / "tables" / "ending.jsonl") == []
    second.truncate_after(-1)
    assert rows(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_by_a_kill_is_dropped_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "axis": "episodes", "time": 0}\n{"step": 2, "ax')
    tracker = make(tmp_path)
    tracker.log({}, 2)
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "was cut off" in capsys.readouterr().err


def test_values_that_are_not_finite_are_null_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make(tmp_path)
    tracker.log({"ppo/policy_loss": float("nan"), "ppo/kl": float("inf"), "ppo/entropy": 1.0}, 1)
    tracker.table("samples", ["score"], [[torch.tensor(float("-inf"))]], 1)
    tracker.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["ppo/policy_loss"] is None and row["ppo/kl"] is None and row["ppo/entropy"] == 1.0
    assert rows(tmp_path / "tables" / "samples.jsonl")[0]["score"] is None
    told = capsys.readouterr().err
    assert "ppo/policy_loss is nan" in told and "3 logged values were not finite" in told


def test_only_the_first_process_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    tracker = make(tmp_path / "ppo", wandb="offline")
    tracker.log({"ppo/kl": 1.0}, 1)
    tracker.table("samples", ["a"], [[1]], 1)
    tracker.truncate_after(0)
    tracker.close()
    assert not (tmp_path / "ppo").exists() and not (tmp_path / "wandb").exists()


def test_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(keys))
    auto = TrackingSection(wandb="auto")
    assert wandb_mode(auto) == "offline"
    keys.write_text("machine elsewhere.org login user password secret\n")
    assert wandb_mode(auto) == "offline"
    keys.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # the key is for another server
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    assert wandb_mode(TrackingSection(wandb="online")) == "online"


def test_a_netrc_that_cannot_be_parsed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("nonsense here\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(TrackingSection()) == "offline"
    assert "wandb stays offline" in capsys.readouterr().err


def test_offline_wandb_keeps_one_id_across_attempts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "demo" / "ppo"
    for step in (64, 128):
        tracker = make(stage, wandb="offline")
        tracker.log({"ppo/kl": 0.125}, step)
        tracker.table("samples", ["prompt", "score"], [["where?", 1.5]], step)
        tracker.close()
    name = (stage / "wandb_id.txt").read_text().strip()
    found = sorted((tmp_path / "demo" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 2 and {file.name for file in found} == {f"run-{name}.wandb"}
    text = b"".join(file.read_bytes() for file in found)
    for word in (b"ppo/kl", b"episodes", b"0.125", b"demo", b"samples"):
        assert word in text
    captured = capfd.readouterr()
    assert "wandb" not in captured.out + captured.err  # no chatter


def test_without_the_package_a_warning_and_the_file(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["wandb"] = None  # what an import of a missing package comes to
from pathlib import Path
from rlhf.config import TrackingSection
from rlhf.run.tracking import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), "demo", "sft", TrackingSection(wandb="offline"), {{}})
tracker.log({{"sft/loss": 1.0}}, 10)
tracker.log({{"sft/loss": 0.5}}, 20)
tracker.close()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("warning") == 1 and "ModuleNotFoundError" in done.stderr
    assert [r["sft/loss"] for r in rows(tmp_path / "metrics.jsonl")] == [1.0, 0.5]


def test_a_wandb_folder_that_cannot_be_used_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").write_text("a file in the way")
    tracker = make(tmp_path / "ppo", wandb="offline")
    tracker.log({"ppo/kl": 1.0}, 1)
    tracker.close()
    assert len(rows(tmp_path / "ppo" / "metrics.jsonl")) == 1
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "metrics.jsonl alone" in told


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2)
    tracker = make(tmp_path / "ppo", wandb="online")
    tracker.log({"ppo/kl": 1.0}, 1)
    tracker.close()
    assert "tracked offline" in capsys.readouterr().err
    assert len(rows(tmp_path / "ppo" / "metrics.jsonl")) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_wandb_that_fails_later_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make(tmp_path / "ppo", wandb="offline")
    tracker._run.finish()  # a finished run refuses metrics: a real failure of a real run
    for step in (1, 2, 3):
        tracker.log({"ppo/kl": 1.0}, step)
    tracker.close()
    assert len(rows(tmp_path / "ppo" / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.count("warning") == 1
