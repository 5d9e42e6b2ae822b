"""The report on run folders in several states of completion."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.errors import UserError
from rlhf.evaluation.charts import calibration_chart, line_chart, smooth
from rlhf.evaluation.html_page import number, signed
from rlhf.evaluation.report import policy_rows, print_summary, read_run, verdict, write_report
from support.evaluation_results import policy, results

EVIL = '<script>alert("x")</script> & {{ 7 * 7 }}'


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def sample(i: int, s: int) -> dict[str, Any]:
    names = ("sft", "ppo-ptx")
    return {
        "prompt": f"prompt-{i} {EVIL}",
        "use_case": "open_qa",
        "sample": s,
        "responses": {name: f"answer-{i}-{s} of {name} {EVIL}" for name in names},
        "finished": {"sft": True, "ppo-ptx": False},
        "lengths": dict.fromkeys(names, 9),
        "scores": dict.fromkeys(names, 0.5),
        "kl": dict.fromkeys(names, -0.25),
        "wins_over_sft": {"ppo-ptx": 1.0},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with all files that the report reads."""
    folder = tmp_path / "my-run"
    put(folder / "recipe.yaml", "run:\n  name: my-run\n")
    put(folder / "sft" / "stage.json", {"state": "finished", "seconds": 65, "metrics": {"sft/loss": 1.5}})
    losses = [{"step": 100 * i, "axis": "tokens", "sft/loss": 2 - i / 9} for i in range(9)]
    put(folder / "sft" / "metrics.jsonl", losses)
    metrics = {"reward/accuracy": 0.68, "reward/accuracy_low": 0.62, "reward/accuracy_high": 0.74, "reward/margin": 0.9}
    put(folder / "reward" / "stage.json", {"state": "finished", "seconds": 5000, "metrics": metrics})
    put(folder / "reward" / "calibration.json", [{"confidence": 0.6, "accuracy": 0.4, "n": 9}])
    points = [
        {"step": 64 * i, "axis": "episodes", "ppo/reward_score": i / 40, "ppo/kl": i / 8, "ppo/ptx_loss": 3.4}
        for i in range(40)
    ]
    put(folder / "ppo-ptx" / "metrics.jsonl", points)
    put(folder / "ppo-ptx" / "stage.json", {"state": "running", "seconds": None, "metrics": {}})
    put(folder / "evaluate" / "results.json", results())
    put(folder / "evaluate" / "samples.jsonl", [sample(i, s) for i in range(15) for s in range(2)])
    return folder


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_report_has_every_section_and_no_outside_asset(run: Path) -> None:
    path = write_report(run)
    html = path.read_text()
    assert path == run / "report.html"
    assert headings(html) == [
        "Policies", "Win rates", "Alignment tax", "Reward model", "Training", "Samples", "Stages", "Recipe",
    ]  # fmt: skip
    assert "70\u00a0%" in html and "55 – 85\u00a0%" in html  # win rate and its interval
    assert "+0.025" in html  # pretraining loss against SFT
    assert "−2.0" in html  # cloze points against SFT
    assert "12,345 held-out tokens. 100 questions." in html
    assert "<td>1:05</td>" in html and "<td>1:23:20</td>" in html  # times of SFT and of the reward model
    for attribute, value in re.findall(r'\b(src|href|action|data)="([^"]*)"', html):
        assert value.startswith("#"), f"{attribute}={value}"
    assert "@import" not in html and "<link" not in html and "<script" not in html
    assert "url(" not in re.sub(r"url\(#[a-z0-9]+\)", "", html)


def test_charts_follow_the_page_and_share_no_wrong_id(run: Path) -> None:
    html = write_report(run).read_text()
    assert html.count("<svg") == html.count("</svg>") == 6  # score, KL, frontier, ptx loss, SFT loss, calibration
    assert "var(--ptx)" in html and "#0a0003" not in html and "#010101" not in html
    defined = set(re.findall(r' id="([^"]+)"', html))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= defined
    calibration = [{"confidence": 0.7, "accuracy": 0.7, "n": 3}]
    charts = [line_chart({"ppo": ([0, 1], [1, 2])}, "episodes"), calibration_chart(calibration)]
    for chart in charts:
        assert chart.startswith("<svg") and chart.rstrip().endswith("</svg>")
        assert "width=" not in chart[: chart.index(">")] and "DejaVu" not in chart


def test_model_text_is_escaped(run: Path) -> None:
    html = write_report(run).read_text()
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; {{ 7 * 7 }}" in html

    class Tags(HTMLParser):
        seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

    Tags().feed(html)
    assert "script" not in Tags.seen and "article" in Tags.seen


def test_samples_are_the_first_twelve_prompts(run: Path) -> None:
    html = write_report(run).read_text()
    assert re.findall(r"prompt-(\d+) ", html) == [str(i) for i in range(12)]
    assert html.count("answer-3-0 of") == 2 and "answer-3-1" not in html
    assert html.count("cut at the limit") == 12


def test_report_works_after_any_stage(run: Path) -> None:
    for piece in ("evaluate/samples.jsonl", "evaluate/results.json"):
        (run / piece).unlink()
    html = write_report(run).read_text()
    assert headings(html) == ["Reward model", "Training", "Stages", "Recipe"]
    assert "Not evaluated yet. Stages so far: SFT, reward, PPO-ptx." in html
    for piece in ("reward/stage.json", "reward/calibration.json", "ppo-ptx/metrics.jsonl", "ppo-ptx/stage.json"):
        (run / piece).unlink()
    assert headings(write_report(run).read_text()) == ["Training", "Stages", "Recipe"]
    for piece in ("sft/stage.json", "sft/metrics.jsonl"):
        (run / piece).unlink()
    assert headings(write_report(run).read_text()) == ["Recipe"]
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="not a run folder"):
        write_report(run)


def test_report_without_reward_model_text_or_questions(run: Path) -> None:
    found = results()
    for numbers in found["policies"].values():
        numbers["reward_score"] = None
        for key in [key for key in numbers if key.startswith(("cloze", "pretraining"))]:
            del numbers[key]
    put(run / "evaluate" / "results.json", found)
    assert "Win rates" in headings(write_report(run).read_text())
    assert "Pretraining loss" not in verdict(found)
    only_sft = found | {"policies": {"sft": found["policies"]["sft"]}, "comparisons": []}
    put(run / "evaluate" / "results.json", only_sft)
    assert "Win rates" not in headings(write_report(run).read_text())
    print_summary(run, Console(file=(run / "out").open("w")))


def test_half_written_last_line_is_left_out(run: Path) -> None:
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 900, "sft/lo')
    assert len(read_run(run).points["sft"]) == 9


def test_verdict_claims_no_more_than_the_interval_allows() -> None:
    assert verdict(None) == ""
    assert verdict(results(0.55, 0.85)).startswith("PPO-ptx: preferred over SFT. It wins 70\u00a0%")
    assert verdict(results(0.45, 0.85)).startswith("PPO-ptx: no clear difference from SFT.")
    assert verdict(results(0.2, 0.4)).startswith("PPO-ptx: SFT is preferred.")
    assert verdict(results(0.55, 0.85) | {"prompts": 19}).startswith("PPO-ptx: too few prompts to tell.")
    assert "Pretraining loss 3.400 before, 3.425 after." in verdict(results())


def test_the_report_says_who_judged(run: Path) -> None:
    html = write_report(run).read_text()
    assert "Judged by the rubric labeler, 3 times in both orders." in html
    assert "the same that ranked the training outputs" in html
    put(run / "evaluate" / "results.json", results() | {"labeler": "reward_model", "judgements": 1})
    html = write_report(run).read_text()
    assert "Judged by the reward model labeler, once in both orders." in html
    assert "not independent" in html and "ranked the training outputs" not in html


def test_policy_rows_hold_changes_against_sft() -> None:
    sft, ptx = policy_rows(results())
    assert sft["versus"] is None and sft["pretraining_loss_change"] is None
    assert ptx["versus"]["win_rate"] == 0.7
    assert ptx["pretraining_loss_change"] == pytest.approx(0.025)
    assert ptx["cloze_accuracy_change"] == pytest.approx(-0.02)


def test_print_summary_fits_eighty_columns(run: Path) -> None:
    found = results()
    found["policies"]["ppo-ptx-ema"] = policy(3.421, 0.5, -1.25, 12.5)
    found["comparisons"].append(found["comparisons"][0] | {"a": "ppo-ptx-ema", "win_rate": 1.0, "high": 1.0})
    put(run / "evaluate" / "results.json", found)
    write_report(run)
    with (run / "out.txt").open("w") as file:
        print_summary(run, Console(file=file, width=80))
    lines = (run / "out.txt").read_text().splitlines()
    row = next(line for line in lines if "PPO-ptx" in line)
    assert row.split() == ["PPO-ptx", "70", "%", "[55,", "85]", "0.70", "5.2", "3.425", "48", "%", "31.2", "50", "%"]
    assert lines[-1] == f"report: {run / 'report.html'}"
    assert not any("…" in line for line in lines)


def test_formats() -> None:
    assert [number(x) for x in (None, 1.005, -0.004, -0.5)] == ["–", "1.00", "0.00", "−0.50"]
    assert [signed(x) for x in (None, 0.25, -0.25, 0.0001)] == ["", "+0.250", "−0.250", "0.000"]
    assert smooth([0, 3, 6, 3], 2) == [0, 3, 4, 3]
