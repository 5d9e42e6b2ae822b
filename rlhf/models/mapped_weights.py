"""Drop the memory of weights that are mapped from a file, as safetensors loads them, between passes.

The kernel fills such pages from the file when they are touched, and keeps the file in its cache as long as nothing else
needs the memory. A frozen model of a CPU run thus costs memory only while it is used. Its next use copies the cached
pages again, which takes 0.1 s for 540 MB.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

SMAPS = Path("/proc/self/smaps")


class FileMapping(NamedTuple):
    """A range of addresses [start, end) into which a file is mapped.

    `written` says whether this process has copies of some of its pages.
    """

    start: int
    end: int
    written: bool


def drop_resident_pages(model: nn.Module) -> int:
    """Drop the resident pages of a frozen model's mapped weights; return the bytes of the mappings dropped.

    Returns 0, and drops nothing, if any parameter is trainable or on a GPU, or if /proc cannot be read. A mapping with
    a page that was ever written to stays, since the file does not have that page's content. So do weights that are not
    mapped from a file, and locked pages.
    """
    if any(p.requires_grad or p.device.type != "cpu" for p in model.parameters()):
        return 0
    try:
        regions = list(_mappings(SMAPS.read_text()))
    except OSError:
        return 0
    addresses = [p.data_ptr() for p in model.parameters()]
    dropped = 0
    for region in regions:
        if not region.written and any(region.start <= address < region.end for address in addresses):
            size = region.end - region.start
            start, length = ctypes.c_void_p(region.start), ctypes.c_size_t(size)
            refused = ctypes.CDLL(None).madvise(start, length, mmap.MADV_DONTNEED)
            dropped += 0 if refused else size
    return dropped


def _mappings(smaps: str) -> Iterator[FileMapping]:
    """Yield the regions of files in the text of /proc/PID/smaps (proc_pid_smaps(5))."""
    start = end = inode = written = 0
    for line in smaps.splitlines():
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            inode = int(rest[3])
        elif name == "Anonymous:":
            written = int(rest[0])  # kB of this process's own copies in memory; the swapped-out ones follow
        elif name == "Swap:" and inode:
            yield FileMapping(start, end, written=bool(written + int(rest[0])))
