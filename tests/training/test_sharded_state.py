"""Training state in fragments: every cut reads back, any range of it, and what is missing is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.training import sharded_state
from rlhf.training.sharded_state import Fragment, FragmentReader, write_fragments


def write(folder: Path, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A tensor of ten elements written by as many processes as there are cuts; files of at most two elements."""
    monkeypatch.setattr(sharded_state, "FILE_BYTES", 8)
    whole = torch.arange(10.0)
    for process, (start, stop) in enumerate(zip(cuts, [*cuts[1:], 10], strict=True)):
        pieces = [
            Fragment("w", i, {"weight": whole[i : i + 1], "exp_avg": -whole[i : i + 1]}) for i in range(start, stop)
        ]
        write_fragments(folder, pieces, process)
    return whole


@pytest.mark.parametrize("cuts", [[0], [0, 5], [0, 1, 9], [0, 4, 4, 8]])
def test_any_range_reads_back_from_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: list[int]) -> None:
    whole = write(tmp_path, cuts, monkeypatch)
    reader = FragmentReader(tmp_path)
    assert reader.has("exp_avg", "w") and not reader.has("exp_avg_sq", "w")
    for start in range(10):
        for stop in range(start, 11):
            target = torch.full((stop - start,), -1.0)
            reader.read_into(target, "weight", "w", start)
            assert target.tolist() == whole[start:stop].tolist()
    target = torch.empty(3)
    reader.read_into(target, "exp_avg", "w", 4)
    assert target.tolist() == [-4.0, -5.0, -6.0]


def test_a_missing_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [0, 5], monkeypatch)
    (tmp_path / "part-1-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds 9 of 10 elements of weight w from 0 on"):
        FragmentReader(tmp_path).read_into(torch.empty(10), "weight", "w", 0)
