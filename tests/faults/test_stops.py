"""Three SIGTERMs during one PPO run, each resumed: one run in wandb, and every row once."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path

import pytest
from compare import differences
from trials import Bench, served
from wandb.proto.wandb_internal_pb2 import Record

pytestmark = pytest.mark.timeout(900)


BLOCK, HEAD = 1 << 15, 7  # of a LevelDB log, which an offline file is behind its own head of 7 bytes
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> list[Record]:
    """What an offline file of wandb holds: records in blocks, each piece behind a checksum, its length and its kind."""
    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK  # padding
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        piece = content[at + HEAD : at + HEAD + length]
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
        at += HEAD + length
    return found


def test_three_stops_and_one_wandb_run(tmp_path: Path) -> None:
    with served() as server:
        bench = Bench(tmp_path, server)
        bench.prepare()
        for stage in ("sft", "rank", "reward"):
            (tmp_path / "stopped").mkdir(exist_ok=True)
            (tmp_path / "stopped" / stage).symlink_to(tmp_path / "whole" / stage)
        job = bench.job("ppo", "stopped", "tracking.wandb=offline")
        for phase in ("ptx", "rollout", "train"):
            assert server.run(**job, kill={"phase": phase, "visit": 1, "delay": 0.0, "number": signal.SIGTERM}) == 143
        assert server.run(**job) == 0, Path(job["log"]).read_text()[-3000:]
    stage = tmp_path / "stopped" / "ppo-ptx"
    assert json.loads((stage / "stage.json").read_text())["attempts"] == 4
    files = sorted((tmp_path / "stopped" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    contents = [records(file) for file in files]
    assert len(files) == 4
    ids = {record.run.run_id for each in contents for record in each if record.HasField("run")}
    assert ids == {(stage / "wandb_id.txt").read_text().strip()}
    history = [record.history for each in contents for record in each if record.HasField("history")]
    steps = [row.step.num for row in history if any("ppo/kl" in (i.key, *i.nested_key) for i in row.item)]
    assert steps == [16, 32, 48, 64]  # episodes
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    # wandb draws names from Python's generator, which no stage uses; the run that was not stopped went without it.
    found = differences(stage, tmp_path / "whole" / "ppo-ptx")
    assert [name for name in found if not name.endswith("rng-0.pt")] == []
