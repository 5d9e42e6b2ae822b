"""Ours and the peers' on the same work, one after the other in alternation: `make bench` or `make bench-quick`.

Every measurement is a program in a process of its own, so that memory and caches of one side are not the other's. Sides
of a case alternate within a repeat, since a machine's speed drifts. Prints the table with medians and writes everything
to OUT/bench.json, after every program anew. A side that fails has a row that says why; the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.jobs import HERE, PARTS, Job, peers
from benchmarks.table import OURS, Line, as_json, render
from benchmarks.workload import FULL, QUICK, Workload
from support.paths import ROOT, TESTS

BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # what oneDNN needs for products of bfloat16 at more than emulated speed
NO_BF16 = "not run: this CPU has no bf16 instructions"
LONGEST_S = 7200.0


def bf16_missing() -> str:
    """Why bfloat16 is not measured here; empty where it is."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return NO_BF16
    return "" if any(flag in flags for flag in BF16_FLAGS) else NO_BF16


def run(job: Job, folder: Path, limit: float) -> str:
    """Run a job's program once and keep its result; returns why there is none."""
    if not Path(job.python).exists():
        return "not run: its environment is missing (make bench builds it)"
    order = folder / "orders" / f"{job.part}-{job.case}-{job.module}.json".replace(" ", "_")
    order.parent.mkdir(parents=True, exist_ok=True)
    order.write_text(json.dumps(job.order))
    paths = [str(TESTS)] + ([str(ROOT)] if job.side == OURS else [])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    log = order.with_suffix(".log")
    command = [job.python, "-m", f"benchmarks.{job.module}", str(order)]
    try:
        with log.open("w") as errors:
            done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        said = [line.strip() for line in (done.stdout.decode() + log.read_text()).splitlines() if line.strip()]
        return f"failed ({done.returncode}): {said[-1][:120] if said else 'without a word'}"
    job.results.append(json.loads(done.stdout.decode().splitlines()[-1]))
    return ""


def lines_of(job: Job, why: str) -> list[Line]:
    """The table's lines of a job."""
    found = []
    for (case, unit), read in job.reads.items():
        line = Line(job.part, case, job.side, unit, details=job.results, note=why)
        line.values = [read(result) for result in job.results]
        line.peak_gb = [result["peak_gb"] for result in job.results if result["peak_gb"]]
        found.append(line)
    return found


def compare_losses(jobs: Sequence[Job]) -> dict[str, str]:
    """By case of the reward part: how far the losses per prompt of the two sides are apart."""
    notes = {}
    for mine in jobs:
        for other in jobs:
            same = mine.part == other.part == "reward" and mine.case == other.case
            if same and mine.side == OURS != other.side and mine.results and other.results:
                both = zip(mine.results[0]["losses"], other.results[0]["losses"], strict=True)
                notes[mine.case] = f"loss per prompt within {max(abs(a - b) for a, b in both):.1e}"
    return notes


def relative_growth(lines: Sequence[Line]) -> None:
    """Note on every growth line how its cost per work compares with the smallest size of its kind."""
    first: dict[str, float] = {}
    for line in lines:
        if line.part == "growth" and line.median:
            phase, size = line.case.split(", ")
            kind = phase + "".join(c for c in size if not c.isdigit())
            line.note = f"x{line.median / first.setdefault(kind, line.median):.2f} of the smallest"


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def run_all(
    jobs: Sequence[Job], repeats: int, folder: Path, deadline: float, keep: Callable[[dict[int, str]], object] = len
) -> dict[int, str]:
    """All repeats of all jobs, alternating; by position of a job, why it failed. `keep` gets that after every run."""
    rounds = [(r, i) for r in range(repeats) for i, job in enumerate(jobs) if not job.skip and not (r and job.once)]
    took: dict[int, float] = {}
    why = {i: job.skip for i, job in enumerate(jobs) if job.skip}
    for n, (_, i) in enumerate(rounds):
        job, begin = jobs[i], time.monotonic()
        if i in why:
            continue
        left = deadline - begin
        if left <= 0:
            if not job.results:
                why[i] = "not run: no time was left"
            continue
        typical = sum(took.values()) / len(took) if took else 0.0
        rest = sum(took.get(j, typical) for _, j in rounds[n:] if j not in why)
        about = f", about {min(rest, left) / 60:.0f} min left" if took else ""
        progress(f"[{n + 1}/{len(rounds)}] {job.part}: {job.case}, {job.side}{about}")
        failed = run(job, folder, min(left, LONGEST_S))
        took[i] = time.monotonic() - begin
        if failed:
            # Not again; what was measured before stays in the table.
            why[i] = failed if not job.results else f"a later repeat {failed}"
        progress(f"    {failed or f'{took[i]:.0f} s'}")
        keep(why)
    return why


def all_lines(jobs: Sequence[Job], why: dict[int, str]) -> list[Line]:
    """The table's lines of what has been measured so far."""
    losses, lines = compare_losses(jobs), []
    for i, job in enumerate(jobs):
        note = why.get(i, "") or ("" if job.side == OURS else losses.get(job.case, "") if job.part == "reward" else "")
        lines += lines_of(job, note)
    relative_growth(lines)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="a part to run; may be repeated")
    parser.add_argument("--repeats", type=int, help="of every program (default: 3, quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, ended after --minutes")
    parser.add_argument("--minutes", type=float, help="start nothing after that (default: no limit, quick: 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder of models and results")
    parser.add_argument("--model", default="smollm2-135m", help="a model that the recipes can name (tiny: a dry run)")
    chosen = parser.parse_args(argv)
    begin = time.monotonic()
    minutes = chosen.minutes or (9 if chosen.quick else None)
    deadline = begin + minutes * 60 if minutes else float("inf")
    repeats = chosen.repeats or (1 if chosen.quick else 3)

    progress("preparing models and data")
    work = Workload(chosen.out.resolve(), QUICK if chosen.quick else FULL, chosen.model)
    jobs = [job for part in chosen.only or PARTS for job in PARTS[part](work, peers(ROOT), bf16_missing())]
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": HERE}
    result = {"quick": chosen.quick, "repeats": repeats, "machine": machine}

    def keep(why: dict[int, str]) -> list[Line]:
        lines = all_lines(jobs, why)
        (chosen.out / "bench.json").write_text(json.dumps(result | {"lines": as_json(lines)}, indent=1))
        return lines

    print(render(keep(run_all(jobs, repeats, chosen.out.resolve(), deadline, keep))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
