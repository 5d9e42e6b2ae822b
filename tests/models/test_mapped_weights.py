"""Pages of mapped weights are given back, and never one that was written to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.models.mapped_weights import FileMapping, _mappings, drop_resident_pages
from rlhf.models.placement import Placement, materialized

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 fe:00 1234                       /some where/model.safetensors
Size:               4096 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me
7f0000400000-7f0000500000 rw-p 00000000 fe:00 1235                       /other.safetensors
Anonymous:             8 kB
Swap:                  0 kB
7f0000500000-7f0000600000 rw-p 00100000 fe:00 1235                       /other.safetensors
Anonymous:             0 kB
Swap:                  4 kB
7f0000800000-7f0000c00000 rw-p 00000000 00:00 0
Anonymous:          4096 kB
Swap:                  0 kB
"""


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile:"))


def mapped_layer(folder: Path) -> nn.Linear:
    """64 MB of weights whose memory is a file."""
    save_file({"weight": torch.arange(16 * 2**20, dtype=torch.float32).reshape(4096, 4096)}, folder / "w.safetensors")
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(load_file(folder / "w.safetensors")["weight"], requires_grad=False)
    return layer


def test_regions_of_files_are_read_and_those_of_no_file_left_out() -> None:
    first, second, third = 0x7F0000000000, 0x7F0000400000, 0x7F0000500000
    swapped_out = FileMapping(third, third + 2**20, written=True)
    assert list(_mappings(SMAPS)) == [FileMapping(first, second, False), FileMapping(second, third, True), swapped_out]


def test_frozen_weights_leave_memory_and_come_back(tmp_path: Path) -> None:
    layer = mapped_layer(tmp_path)
    total = float(layer.weight.double().sum())
    before = resident_file_bytes()
    assert drop_resident_pages(layer) >= 64 * 2**20
    assert before - resident_file_bytes() > 60 * 2**20
    assert float(layer.weight.double().sum()) == total


def test_what_was_written_stays(tmp_path: Path) -> None:
    layer = mapped_layer(tmp_path)
    layer.weight[0, 0] = -1.0
    assert drop_resident_pages(layer) == 0
    assert float(layer.weight[0, 0]) == -1.0


def test_weights_that_are_trained_or_lie_in_no_file_stay(tmp_path: Path) -> None:
    layer = mapped_layer(tmp_path)
    layer.weight.requires_grad_(True)
    assert drop_resident_pages(layer) == 0
    assert drop_resident_pages(nn.Linear(4, 4).requires_grad_(False)) == 0


def test_a_pass_drops_the_models_that_are_to_leave_and_no_others(tmp_path: Path) -> None:
    layer = mapped_layer(tmp_path)
    for drop_after_use in (False, True):
        layer.placement = Placement(drop_after_use=drop_after_use)
        with materialized(layer):
            float(layer.weight.sum())
            inside = resident_file_bytes()
        assert (inside - resident_file_bytes() > 60 * 2**20) == drop_after_use
