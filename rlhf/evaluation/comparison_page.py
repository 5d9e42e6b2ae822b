"""The page of a comparison: an HTML file with a table and plots of all arms, the same as JSON, and a terminal table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf.evaluation.charts import LabelledPoint, named_points_chart
from rlhf.evaluation.comparison import ArmResult, as_dicts
from rlhf.evaluation.comparison_file import FILE, Comparison
from rlhf.evaluation.html_page import count, number, percent, render, share, signed
from rlhf.recipe import recipe_to_yaml
from rlhf.system.console import console, duration, table
from rlhf.system.files import read_json, write_atomic

PAGE, DATA = "comparison.html", "comparison.json"
METHODS = {
    "none": "all weights",
    "lora": "LoRA",
    "dora": "DoRA",
    "prefix": "prefix tuning",
    "p_tuning": "p-tuning",
    "p_tuning_v2": "p-tuning v2",
    "prompt": "prompt tuning",
    "adapter": "bottleneck adapter",
    "ia3": "(IA)³",
    "bitfit": "BitFit",
}


def write_page(comparison: Comparison, rows: Sequence[ArmResult]) -> Path:
    """Write comparison.html and comparison.json into the comparison's folder; return the path of comparison.html."""
    folder, reference = comparison.folder, comparison.reference
    base = comparison.load(reference)
    data = {"name": folder.name, "reference": reference, "variant": comparison.variant, "arms": as_dicts(rows)}
    write_atomic(folder / DATA, json.dumps(data, indent=1) + "\n")
    html = render(
        "comparison.html.j2",
        {},
        name=folder.name,
        reference=reference,
        verdict=verdict(rows, reference),
        basis=basis(comparison, rows),
        notes=NOTES,
        rows=[_shown(comparison, row) for row in rows],
        charts=charts(rows, reference),
        definition=(folder / FILE).read_text(encoding="utf-8"),
        recipe=recipe_to_yaml(base),
    )
    write_atomic(folder / PAGE, html)
    return folder / PAGE


NOTES = (
    "The small print gives the trained share of the policy’s weights and the size of the files that SFT and PPO write; "
    "the validation loss in nats per token; the score of the arm’s own SFT policy and of the last PPO "
    "iteration’s samples; and 95 % bootstrap intervals over the prompts, of differences prompt by prompt. “Learned "
    "nothing” means that the gain’s interval covers 0. KL is in nats per response. Time is that of SFT and PPO, memory "
    "the peak in PPO. All numbers are of one seed: another seed would move every row, and each method’s learning rate "
    "was chosen separately."
)


def verdict(rows: Sequence[ArmResult], reference: str) -> str:
    """Return sentences that say what the comparison found, claiming no more than the intervals allow."""
    evaluated = [row for row in rows if row.gain is not None and row.score is not None]
    if not evaluated:
        return "No arm has been evaluated yet."
    best = max(evaluated, key=lambda row: row.score)
    text = f"Highest held-out score: {best.arm}, {number(best.score)}"
    text += f" with {share(best.share)} of the weights trained" if best.share else ""
    if best.versus_reference is not None:
        words = {"above": f"above {reference}", "below": f"below {reference}"}
        words["no clear difference"] = f"no clear difference from {reference}"
        interval = best.versus_reference
        text += f": {words.get(best.standing, best.standing)} ({signed(interval.mean, 2)}, {_range(interval)})"
    findings = ("learned", "got worse", "learned nothing")
    groups = [[row.arm for row in evaluated if row.finding == word] for word in findings]
    groups.append([row.arm for row in rows if row.state == "failed"])
    sayings = ("PPO raised the score of", "It lowered that of", "Learned nothing:", "Failed:")
    for names, said in zip(groups, sayings, strict=True):
        text += f". {said} {', '.join(names)}" if names else ""
    return text + "."


def basis(comparison: Comparison, rows: Sequence[ArmResult]) -> str:
    """Return sentences that say what all arms share, and who judged them."""
    recipe = comparison.load(comparison.reference)
    prompts = max((row.prompts for row in rows), default=0)
    text = (
        f"The same data, steps and samples in every arm, {recipe.ppo.episodes} episodes of PPO. {comparison.reference} "
        "ranked the outputs of its own SFT policy and trained one reward model on them. It scores every arm and has "
        "not seen the other arms’ outputs. All weights of every arm’s value model are trained. "
    )
    labeler = recipe.evaluate.labeler.replace("_", " ")
    return text + (f"Judged by the {labeler} labeler on {prompts} held-out prompts." if prompts else "")


def charts(rows: Sequence[ArmResult], reference: str) -> list[dict[str, Any]]:
    """Return the charts of reward and of win rate over the number of trained weights, for the arms that have both."""
    found = []
    for title, unit, key, start in (
        ("Reward", f"held-out score, difference to SFT of {reference}", "gain_reference", 0.0),
        ("Win rate", f"over SFT of {reference}", "win_rate_reference", 0.5),
    ):
        known = [row for row in rows if row.trained and getattr(row, key) is not None]
        if points := [LabelledPoint(row.arm, row.trained, *getattr(row, key)) for row in known]:
            svg = named_points_chart(points, start, "trained weights", share=start == 0.5)
            found.append({"title": title, "unit": unit, "svg": Markup(svg)})
    return found


def membership(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of comparison.json (name, reference, arms) if the run is an arm of a comparison, else None."""
    run_dir = run_dir.resolve()
    data = read_json(run_dir.parent / DATA)
    return data if data and any(row["arm"] == run_dir.name for row in data.get("arms", ())) else None


def print_rows(comparison: Comparison, rows: Sequence[ArmResult]) -> None:
    """Print the table, and for each arm that is not done the reason."""
    cells = []
    for row in rows:
        gain = row.gain
        gained = f"{signed(gain.mean, 2)} [{number(gain.low)}, {number(gain.high)}]" if gain else row.state
        wins = [_percents(row.win_rate), _percents(row.win_rate_reference)]
        cost = [number(row.kl, 1), duration(_seconds(row))]
        loss, score = number(row.sft_loss, 3), number(row.score)
        cells.append([row.arm, count(row.trained), loss, score, gained, *wins, *cost])
    columns = ["arm", "trained", "SFT loss", "score", "gain over own SFT", "wins over it"]
    columns += [f"over {comparison.reference}'s SFT", "KL", "time"]
    table(f"Comparison {comparison.folder.name}", columns, cells)
    for row in rows:
        if row.state != "done":
            why = f": {row.reason}" if row.reason else ""
            console.print(f"{row.arm}: {row.state}{why}", markup=False, soft_wrap=True)
        elif row.finding != "learned":
            shown = f" that {row.prompts} prompts can show" if row.finding == "learned nothing" else ""
            console.print(f"{row.arm}: {row.finding}{shown}", markup=False)


# --- parts -----------------------------------------------------------------------------------------------------------


def _shown(comparison: Comparison, row: ArmResult) -> dict[str, Any]:
    """Return a row's fields with those that only the page shows."""
    sizes = dict.fromkeys(_bytes(size) for size in (row.sft_bytes, row.ppo_bytes) if size)
    return asdict(row) | {
        "finding": row.finding,
        "preference": row.preference,
        "standing": row.standing,
        "method_name": METHODS[row.method] if METHODS[row.method] != row.arm else "",
        "stored": " and ".join(sizes) or "–",
        "seconds": _seconds(row),
        "report": f"{row.arm}/report.html" if row.score is not None else "",
        "fields": ", ".join(f"{key}={value}" for key, value in comparison.arms[row.arm].items()),
    }


def _seconds(row: ArmResult) -> float | None:
    known = [seconds for seconds in (row.sft_seconds, row.ppo_seconds) if seconds is not None]
    return sum(known) if known else None


def _bytes(size: float) -> str:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    return next(f"{size / unit:.3g}\u00a0{name}" for unit, name in units if size >= unit)


def _range(interval: Any) -> str:
    return f"{number(interval.low)} to {number(interval.high)}"


def _percents(interval: Any) -> str:
    if interval is None:
        return "–"
    return f"{percent(interval.mean)} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
