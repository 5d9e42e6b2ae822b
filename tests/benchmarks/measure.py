"""What every measuring program needs: its work order, its peak memory, its result. Standard library only, for the
peers' environments use it too.

A program is started as `python -m benchmarks.NAME ORDER.json` with tests/ on the path and prints its result as one line
of JSON, the last line of its standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Order = dict[str, Any]  # what to do, as JSON: model folder, token ids, sizes, rates


def read_order() -> Order:
    """The work order named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text())


def report(**result: Any) -> None:
    """Print the result as the last line, with the peak memory of this process where it does not say it itself."""
    print(json.dumps({"peak_gb": peak_gb()} | result), flush=True)


def peak_gb() -> float | None:
    """Largest resident set of this process so far, in GB; None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
