"""Save training state so that any number of processes can read it: flattened tensors, cut into named fragments.

    part-<process>-<n>.safetensors    keys KIND/PARAMETER@START: elements from START on of a flat tensor, float32

KIND is weight, exp_avg or exp_avg_sq (Adam's moments). Every process writes the fragments that it holds, and reads
those that cover the elements it needs. One process, ZeRO 0 and every partition of ZeRO 1 to 3 thus share a format, and
a run may resume with another number of processes. The files hold no code (DeepSpeed's own checkpoints are pickles).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import UserError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 1 << 30  # about the size of a file, and of what is copied from a GPU at once


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of a flattened parameter, and of its moments if it has any."""

    name: str  # of the parameter
    start: int  # the first of its elements that this process holds
    tensors: dict[str, Tensor]  # by KIND, 1-D views of n float32 elements into the tensors that training works on


def write_fragments(folder: Path, fragments: Iterable[Fragment], process: int) -> None:
    """Write the fragments that a process holds into files of its own."""
    batch: dict[str, Tensor] = {}
    number = size = 0

    def flush() -> None:
        nonlocal number, size
        if batch:
            save_file(batch, folder / f"part-{process}-{number}.safetensors")
            number, size = number + 1, 0
            batch.clear()

    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            batch[f"{kind}/{fragment.name}@{fragment.start}"] = tensor.detach().cpu()
            size += 4 * tensor.numel()
        if size >= FILE_BYTES:
            flush()
    flush()


@dataclass
class FragmentReader:
    """Reads any range of any flat tensor from the files of a folder."""

    folder: Path
    _files: dict[Path, Any] = field(init=False, default_factory=dict)
    _ranges: dict[str, list[tuple[int, int, Path]]] = field(init=False, default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("part-*.safetensors")):
            file = self._files[path] = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                tensor, start = key.rsplit("@", 1)
                stop = int(start) + file.get_slice(key).get_shape()[0]
                self._ranges[tensor].append((int(start), stop, path))

    def has(self, kind: str, name: str) -> bool:
        """Return whether the files hold any part of the tensor."""
        return f"{kind}/{name}" in self._ranges

    def read_into(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fill a 1-D tensor of n elements with elements [start, start + n) of a flat tensor.

        Raises UserError if the files do not hold all of them.
        """
        stop, found = start + target.numel(), 0
        for first, last, path in self._ranges.get(f"{kind}/{name}", ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                values = self._files[path].get_slice(f"{kind}/{name}@{first}")[low - first : high - first]
                with torch.no_grad():
                    target[low - start : high - start].copy_(values)
                found += high - low
        if found != target.numel():
            what = f"the checkpoint holds {found} of {target.numel()} elements of {kind} {name} from {start} on"
            raise UserError(what, str(self.folder), "redo the stage with --fresh")
