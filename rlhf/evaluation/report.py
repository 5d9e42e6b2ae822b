"""The report of a run: one HTML file without outside assets, and a table for the terminal.

Everything is read from the run folder's own files. Parts that a run does not have yet are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.errors import UserError
from rlhf.evaluation.charts import Series, calibration_chart, frontier_chart, line_chart
from rlhf.evaluation.comparison_page import membership
from rlhf.evaluation.html_page import number, percent, render
from rlhf.functional.statistics import ENOUGH_PROMPTS
from rlhf.recipe import load_recipe
from rlhf.stage_table import PPO_VARIANTS, STAGES
from rlhf.system.files import read_json, read_rows, write_atomic

PROMPTED = {"base": "Base", "sft": "SFT"}  # names of the policies that also answer under templates
SAMPLES_SHOWN = 12  # always the first held-out prompts, so that none are hand-picked

# (title, stages, their metrics as (metric, title, unit)).
CURVES: list[tuple[str, tuple[str, ...], list[tuple[str, str, str]]]] = [
    (
        "PPO",
        PPO_VARIANTS,
        [
            ("ppo/reward_score", "Reward-model score", "normalised"),
            ("ppo/kl", "KL to SFT", "nats per response"),
            ("ppo/ptx_loss", "Pretraining loss", "nats per token"),
            ("ppo/entropy", "Entropy", "nats per token"),
            ("ppo/response_length", "Response length", "tokens"),
            ("ppo/finished_fraction", "Finished responses", "share"),
            ("ppo/policy_loss", "Policy loss", "per token"),
            ("ppo/value_loss", "Value loss", "per token"),
            ("ppo/value_explained_variance", "Explained variance", "of the returns"),
            ("ppo/clip_fraction", "Clipped tokens", "share"),
        ],
    ),
    (
        "Reward model",
        ("reward",),
        [
            ("reward/loss", "Ranking loss", "nats per pair"),
            ("reward/train_accuracy", "Training pairs ordered right", "share"),
            ("reward/accuracy", "Held-out pairs ordered right", "share"),
        ],
    ),
    ("Supervised fine-tuning", ("sft",), [("sft/loss", "Loss", "nats per token")]),
]
STAGE_METRICS = ("sft/loss", "reward/accuracy", "ppo/reward_score", "ppo/kl")


@dataclass
class RunData:
    """The content of a run folder; parts that are missing are empty."""

    name: str
    path: Path
    recipe: str
    stages: dict[str, dict[str, Any]]  # stage.json by stage
    points: dict[str, list[dict[str, Any]]]  # rows of metrics.jsonl by stage
    results: dict[str, Any] | None
    samples: list[dict[str, Any]]
    calibration: list[dict[str, float]]


def read_run(run_dir: Path) -> RunData:
    """Read a run folder; raise UserError if it holds neither a recipe nor a stage."""
    run_dir = Path(run_dir)
    recipe = run_dir / "recipe.yaml"
    stages = {stage: run_dir / stage / "stage.json" for stage in STAGES}
    points = {stage: run_dir / stage / "metrics.jsonl" for stage in STAGES}
    data = RunData(
        name=run_dir.resolve().name,
        path=run_dir,
        recipe=recipe.read_text() if recipe.exists() else "",
        stages={stage: read_json(path) for stage, path in stages.items() if path.exists()},
        points={stage: read_rows(path) for stage, path in points.items() if path.exists()},
        results=read_json(run_dir / "evaluate" / "results.json"),
        samples=read_rows(run_dir / "evaluate" / "samples.jsonl"),
        calibration=read_json(run_dir / "reward" / "calibration.json") or [],
    )
    if not (data.recipe or data.stages or data.points):
        raise UserError("this is not a run folder", where=str(run_dir), fix="name a folder that `rlhf run` has written")
    return data


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html and return its path; raise UserError if run_dir is not a run folder."""
    run_dir = Path(run_dir)
    data = read_run(run_dir)
    html = render(
        "report.html.j2",
        {"label": label},
        run=data,
        verdict=verdict(data.results),
        judged=judged(data),
        policies=policy_rows(data.results),
        reward=reward_card(data),
        curves=curves(data),
        stages=stage_rows(data),
        samples=[row for row in data.samples if row["sample"] == 0][:SAMPLES_SHOWN],
        comparison=membership(run_dir),
    )
    path = run_dir / "report.html"
    write_atomic(path, html)
    return path


def policy_rows(results: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return one row for each policy: its numbers, its comparison with SFT and its changes against SFT."""
    if not results:
        return []
    over_sft = {row["a"]: row for row in results["comparisons"] if row["b"] == "sft"}
    base = results["policies"]["sft"]
    rows = []
    for name, numbers in results["policies"].items():
        row = {"name": name, "versus": over_sft.get(name), "prompted": "", **numbers}
        for key in ("reward_score", "pretraining_loss", "pretraining_tokens", "cloze_accuracy", "cloze_low",
                    "cloze_high", "cloze_accuracy_sum", "cloze_n"):  # fmt: skip
            row.setdefault(key, None)
        for key in ("pretraining_loss", "cloze_accuracy"):
            known = name != "sft" and row[key] is not None and base.get(key) is not None
            row[f"{key}_change"] = row[key] - base[key] if known else None
        rows.append(row)
    return rows


def verdict(results: dict[str, Any] | None) -> str:
    """Return one or two sentences that say what the evaluation found, as far as the interval allows."""
    rows = {row["name"]: row for row in policy_rows(results)}
    name = next((n for n in PPO_VARIANTS if n in rows), None)
    if not results or name is None:
        return ""
    row, versus = rows[name], rows[name]["versus"]
    finding = "no clear difference from SFT"
    if results["prompts"] < ENOUGH_PROMPTS:
        finding = "too few prompts to tell"
    elif versus["low"] > 0.5:
        finding = "preferred over SFT"
    elif versus["high"] < 0.5:
        finding = "SFT is preferred"
    text = (
        f"{label(name)}: {finding}. It wins {percent(versus['win_rate'])} of comparisons on {results['prompts']} "
        f"held-out prompts (95\u00a0% interval {percent(versus['low'])} to {percent(versus['high'])}), "
        f"at {number(row['kl'], 1)} nats of KL per response."
    )
    if row["pretraining_loss_change"] is not None:
        before = rows["sft"]["pretraining_loss"]
        text += f" Pretraining loss {number(before, 3)} before, {number(row['pretraining_loss'], 3)} after."
    return text


def judged(data: RunData) -> str:
    """Return sentences that say who compared the policies, how often, and how that labeler relates to the training."""
    if not data.results:
        return ""
    judgements = data.results["judgements"]
    times = "once" if judgements == 1 else f"{judgements} times"
    labeler = data.results["labeler"].replace("_", " ").replace("judge", "language model")
    text = f"Judged by the {labeler} labeler, {times} in both orders. "
    if data.results["labeler"] == "reward_model":
        return text + "PPO may have been trained on this very model's score: a win here is not independent of it. "
    ranked = load_recipe(str(data.path / "recipe.yaml"), []).rank.labeler if data.recipe else ""
    if ranked == "rubric":
        text += "It is a program with label noise, the same that ranked the training outputs. "
    return text


def reward_card(data: RunData) -> dict[str, Any] | None:
    """Return the reward model's accuracy with its interval, its margin and its calibration chart; None without any."""
    metrics = data.stages.get("reward", {}).get("metrics") or {}
    if "reward/accuracy" not in metrics and not data.calibration:
        return None
    keys = ("accuracy", "accuracy_low", "accuracy_high", "margin")
    return {key: metrics.get(f"reward/{key}") for key in keys} | {
        "chart": Markup(calibration_chart(data.calibration)) if data.calibration else None
    }


def curves(data: RunData) -> list[dict[str, Any]]:
    """Return the charts of each group of stages; metrics logged less than twice are left out."""
    groups = []
    for title, stages, metrics in CURVES:
        charts = []
        for metric, name, unit in metrics:
            series = _series(data, stages, metric)
            if series:
                charts.append({"title": name, "unit": unit, "svg": Markup(line_chart(series, _axis(data, stages)))})
        path = {s: _against(data.points.get(s, []), "ppo/kl", "ppo/reward_score") for s in stages}
        path = {s: xy for s, xy in path.items() if len(xy[0]) > 1}
        if path:
            svg = frontier_chart(path, "KL to SFT", "score")
            charts.insert(2, {"title": "Score bought with KL", "unit": "over training", "svg": Markup(svg)})
        if charts:
            groups.append({"title": title, "stages": [s for s in stages if data.points.get(s)], "charts": charts})
    return groups


def _against(points: list[dict[str, Any]], x: str, y: str) -> Series:
    """Return two metrics of the points that have both."""
    both = [(point[x], point[y]) for point in points if point.get(x) is not None and point.get(y) is not None]
    return [a for a, _ in both], [b for _, b in both]


def _series(data: RunData, stages: tuple[str, ...], metric: str) -> dict[str, Series]:
    found = {stage: _against(data.points.get(stage, []), "step", metric) for stage in stages}
    return {stage: xy for stage, xy in found.items() if len(xy[0]) > 1}


def _axis(data: RunData, stages: tuple[str, ...]) -> str:
    points = [point for stage in stages for point in data.points.get(stage, [])]
    return str(points[0].get("axis", "step"))


def stage_rows(data: RunData) -> list[dict[str, Any]]:
    """Return state, seconds and a few metrics of every stage that has begun."""
    rows = []
    for name, stage in data.stages.items():
        metrics = stage.get("metrics") or {}
        shown = [(key, metrics[key]) for key in STAGE_METRICS if isinstance(metrics.get(key), (int, float))]
        rows.append({"name": name, "state": stage.get("state", ""), "seconds": stage.get("seconds"), "metrics": shown})
    return rows


def label(name: str) -> str:
    """Return the name of a policy or stage on the page."""
    policy, _, template = name.partition("-")
    if template and policy in PROMPTED:
        return f"{PROMPTED[policy]}, {template}"
    stage = name.removesuffix("-ema")
    return (STAGES[stage].label if stage in STAGES else stage) + (" (EMA)" if stage != name else "")


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print one row for each policy, and the path of a written report; raise UserError if this is not a run folder."""
    console = console or Console()
    rows = policy_rows(read_run(run_dir).results)
    if rows:
        title = f"Evaluation of {Path(run_dir).resolve().name}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, show_edge=False)
        table.add_column("policy", no_wrap=True, vertical="bottom")
        for name in ("win rate vs\nSFT [95 %]", "RM\nscore", "KL", "pretraining\nloss", "cloze", "length", "ended"):
            table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            wins: str | Text = "–"
            if versus := row["versus"]:  # Text, since rich would read square brackets in a string as markup
                ends = f"[{100 * versus['low']:.0f}, {100 * versus['high']:.0f}]"
                wins = Text(f"{percent(versus['win_rate'])} {ends}")
            cells = [number(row["reward_score"]), number(row["kl"], 1), number(row["pretraining_loss"], 3)]
            cells += [percent(row["cloze_accuracy"]), number(row["response_length"]["mean"], 1)]
            cells.append(percent(row["finished_fraction"]))
            style = "bold" if row["name"] == "ppo-ptx" else ""
            table.add_row(label(row["name"]), wins, *cells, style=style)
        console.print(table)
    report = Path(run_dir) / "report.html"
    if report.exists():
        # The path is not wrapped, so that terminals keep it clickable.
        console.print(f"\nreport: {report}", soft_wrap=True, markup=False, highlight=False)
