"""`rlhf profile RUN`: the time and memory of a PPO iteration, beside the least it could take. Only reads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import Recipe
from rlhf.costs.roofline import MetricsRow, PhaseCost, mean_row, phase_costs, worst_phase
from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from rlhf.run.folder import RunFolder
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.console import console, table
from rlhf.system.files import read_rows

# Components of rlhf/costs/stage_memory.py that stay, or come with every update; others come and go within a phase.
LASTING = ("weights", "gradients", "optimiser state", "averaged policy", "Python and libraries")


@dataclass(frozen=True)
class Profile:
    """Figures of a run."""

    stage: str
    iterations: int  # after the first one, or 1 if there is only one
    first: list[PhaseCost]  # of the first iteration; empty if there is only one
    costs: list[PhaseCost]  # means over those iterations
    row: dict[str, float]  # means of all their metrics
    memory: dict[str, float]  # bytes by component; "rest" is the remainder of the measured peak
    rates: dict[str, float]  # tokens per second of the stages before


def show_profile(path: Path, variant: str = "", as_json: bool = False) -> None:
    """Print the profile of a run, or write it as JSON to standard output.

    Raises UserError if the folder is not a run, or has no finished iteration of PPO.
    """
    found = profile(path, variant)
    if as_json:
        print(json.dumps(as_dict(found), indent=1))
        return
    row, title = found.row, f"{path}: {found.stage}, seconds of an iteration"
    more = f", means of {found.iterations} after the first" if found.iterations and len(found.first) else ""
    columns = ["phase", "seconds", "share", "first", "tokens/s", "floor", "x floor", "bound by", "padding", "peak GB"]
    table(title + more, columns, _time_rows(found))
    if row.get("perf/peak_flops"):
        console.print(
            f"Floor: FLOPs at {row['perf/peak_flops'] / 1e9:,.4g} GFLOP/s, bytes at "
            f"{row.get('perf/bandwidth', 0) / 1e9:,.3g} GB/s, both measured by the run. "
            f"Training reached {row.get('perf/mfu', 0):.0%} of the arithmetic.",
            markup=False,
            soft_wrap=True,
        )
    if found.memory:
        rows = [[name, f"{size / 1e9:.3f}"] for name, size in found.memory.items()]
        table("Memory at its peak, GB", ["component", "GB"], rows)
    for stage, rate in found.rates.items():
        console.print(f"{stage}: {rate:,.0f} tokens/s from row to row of its log", markup=False)
    console.print(_verdict(found), markup=False, soft_wrap=True)


def profile(path: Path, variant: str = "") -> Profile:
    """Return the profile of a run from its recipe and logs; see `show_profile`."""
    file = RunFolder(path).recipe_file()
    logs = {stage: _iterations(path / stage / "metrics.jsonl") for stage in ([variant] if variant else PPO_VARIANTS)}
    stage = next((stage for stage, rows in logs.items() if rows), "")
    if not stage:
        what = f"no iteration of {' or '.join(logs)} is finished, so there is nothing to show"
        raise UserError(what, str(path), f"continue with `rlhf run {file}`, or name the other variant")
    rows = logs[stage]
    later = rows[1:] or rows
    mean = mean_row(later)
    return Profile(
        stage,
        len(later),
        phase_costs(mean_row(rows[:1])) if len(rows) > 1 else [],
        phase_costs(mean),
        mean,
        _memory(path, load_recipe(str(file)), stage, mean_row(rows)),
        {name: rate for name in ("sft", "reward") if (rate := _rate(read_rows(path / name / "metrics.jsonl")))},
    )


def as_dict(found: Profile) -> dict[str, Any]:
    """Return the profile for a program to read: seconds, FLOP/s, bytes."""

    def phase(cost: PhaseCost) -> dict[str, Any]:
        floors = [vars(floor) | {"seconds": floor.seconds, "bound": floor.limited_by} for floor in cost.floors]
        return vars(cost) | {"floors": floors, "floor": cost.floor, "times_floor": cost.times_floor}

    worst = worst_phase(found.costs)
    return {
        "stage": found.stage,
        "iterations": found.iterations,
        "phases": [phase(cost) for cost in found.costs],
        "first": [phase(cost) for cost in found.first],
        "metrics": {name: value for name, value in found.row.items() if name.startswith(("perf/", "memory/"))},
        "memory_bytes": found.memory,
        "tokens_per_s": found.rates,
        "furthest": worst and worst.name,
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def _time_rows(found: Profile) -> list[list[Any]]:
    first = {cost.name: cost.seconds for cost in found.first}
    rows: list[list[Any]] = []
    for cost in found.costs:
        limited_by = cost.floors[0].limited_by if len(cost.floors) == 1 else ""
        padding = "" if cost.padding is None else f"{cost.padding:.0%}"
        numbers = [cost.tokens_per_s, cost.floor, cost.times_floor]
        rows.append(
            [cost.name, cost.seconds, f"{cost.share:.0%}", first.get(cost.name), *numbers, limited_by, padding]
            + [cost.peak_gb]
        )
        if len(cost.floors) > 1:
            rows += [
                [f"  {f.part}", None, "", None, None, f.seconds, None, f.limited_by, "", None] for f in cost.floors
            ]
    floors = [cost.floor for cost in found.costs if cost.floor is not None]
    total = sum(cost.seconds for cost in found.costs)
    rows.append(["all", total, "", sum(first.values()) or None, None, sum(floors) or None, None, "", "",
                 found.row.get("memory/peak_gb")])  # fmt: skip
    if floors and sum(floors):
        rows[-1][6] = total / sum(floors)
    return rows


def _verdict(found: Profile) -> str:
    worst = worst_phase(found.costs)
    if worst is None or not worst.floor:
        return "This run was made before floors were logged: seconds alone are known."
    lost = worst.seconds - worst.floor
    text = (
        f"Furthest from its floor: {worst.name}, {lost:.3g} s of an iteration above it "
        f"({worst.seconds / worst.floor:.3g} times the floor of {worst.floor:.3g} s)."
    )
    if any(cost.times_floor is not None and cost.times_floor < 1 for cost in found.costs):
        text += " A phase is below its floor: the machine was busy with something else when its peak was measured."
    return text


def _iterations(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(path) if row.get("perf/seconds_rollout") is not None]


def _rate(rows: Sequence[MetricsRow]) -> float | None:
    """Return the median of the tokens per second from one row to the next; a stop between two rows hardly counts."""
    points = [(row["step"], row["time"]) for row in rows if row.get("step") is not None and row.get("time") is not None]
    pairs = zip(points, points[1:], strict=False)
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs if b[0] > a[0] and b[1] > a[1]]
    return statistics.median(rates) if rates else None


def _memory(path: Path, recipe: Recipe, stage: str, largest: MetricsRow) -> dict[str, float]:
    """Return bytes by component as in the plan, and the remainder of the measured peak; {} where none was logged."""
    peak = (largest.get("memory/peak_gb") or 0.0) * 1e9
    if not peak:
        return {}
    from rlhf.costs.cards import Card
    from rlhf.costs.model_shapes import Shapes, model_config, shapes_of
    from rlhf.costs.stage_memory import stage_memory
    from rlhf.plan import as_launched
    from rlhf.system.quiet import quiet_libraries

    quiet_libraries()
    folders = [path / before / "model" for before in ("sft", "reward")]
    if all((folder / "config.json").is_file() for folder in folders):
        shapes = Shapes(*(model_config(str(folder)) for folder in folders))
    else:
        shapes = shapes_of(recipe)
    on_gpu = bool(largest.get("perf/gpu"))
    recipe = as_launched(recipe, int(largest.get("perf/processes") or 1))
    planned = stage_memory(recipe, stage, shapes, Card("gpu" if on_gpu else "cpu", 0.0, {}, 0.0, base=0.0))
    on_device: dict[str, float] = {}
    for part in (*planned.always, *(part for parts in planned.phases.values() for part in parts)):
        if part.name.startswith(LASTING) and part.bytes and not (on_gpu and part.host):
            on_device[part.name] = max(on_device.get(part.name, 0.0), part.bytes)
    rest = peak - sum(on_device.values())
    return on_device | {"rest: activations, KV cache, buffers": rest, "measured peak": peak}
