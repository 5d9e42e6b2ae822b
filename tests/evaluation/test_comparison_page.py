"""The page of a comparison: its content, its plots, and its table in the report of a run."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from rlhf.evaluation.chart_labels import nearest, overlap, place
from rlhf.evaluation.charts import LabelledPoint, named_points_chart
from rlhf.evaluation.comparison import ArmResult, arm_results
from rlhf.evaluation.comparison_file import Comparison
from rlhf.evaluation.comparison_page import membership, print_rows, verdict, write_page
from rlhf.evaluation.html_page import count, share
from rlhf.evaluation.report import write_report
from rlhf.functional.statistics import Interval
from support.comparison_runs import hand_made


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Three finished arms in hand-made run folders."""
    return hand_made(tmp_path)


def test_the_page_is_one_file_with_every_arm(comparison: Comparison) -> None:
    found = arm_results(comparison)
    html = write_page(comparison, found).read_text()
    assert html.count("<svg") == 2 and "<script" not in html and "<link" not in html
    assert "http" not in html.split("<svg")[0]
    for arm in comparison.arms:
        assert f"<td>{arm}" in html
    assert "learned nothing" in html and "83 – 100\u00a0%" not in html and "84 – 100\u00a0%" in html
    assert "var(--ptx)" in html and "#0a0003" not in html and "#0a0005" not in html
    data = json.loads((comparison.folder / "comparison.json").read_text())
    assert data["reference"] == "full" and [row["arm"] for row in data["arms"]] == ["full", "lora", "prompt"]
    assert data["arms"][1]["gain"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert data["arms"][1]["trained"] == 14 and data["arms"][0]["finding"] == "learned nothing"


def test_the_page_of_a_comparison_that_has_only_begun(comparison: Comparison) -> None:
    for arm in ("lora", "prompt"):
        (comparison.folder / arm).rename(comparison.folder / f"{arm}.away")
    (comparison.folder / "full" / "evaluate" / "stage.json").write_text('{"state": "failed", "error": "<b>disk</b>"}')
    html = write_page(comparison, arm_results(comparison)).read_text()
    assert "No arm has been evaluated yet." in html and html.count("not run") >= 2 and "<svg" not in html
    assert "&lt;b&gt;disk&lt;/b&gt;" in html and "<b>disk" not in html


def test_the_verdict_names_the_best_and_who_learned_nothing(comparison: Comparison) -> None:
    found = arm_results(comparison)
    text = verdict(found, "full")
    # All three have the score of `results`: the first is named.
    assert text.startswith("Highest held-out score: full, 0.75 with 100\u00a0% of the weights trained. ")
    assert "PPO raised the score of lora. It lowered that of prompt. Learned nothing: full." in text
    best = [found[0], ArmResult(**vars(found[1]) | {"score": 2.0}), found[2]]
    text = verdict(best, "full")
    assert "lora, 2.00 with 8.5\u00a0% of the weights trained: no clear difference from full (+0.25, −" in text


def test_a_run_of_a_comparison_shows_it_in_its_report(comparison: Comparison) -> None:
    run = comparison.folder / "lora"
    (run / "evaluate" / "results.json").unlink()
    (run / "evaluate" / "samples.jsonl").unlink()
    assert membership(run) is None and "<h2>Comparison</h2>" not in write_report(run).read_text()
    (run / "evaluate" / "stage.json").unlink()
    write_page(comparison, arm_results(comparison))
    html = write_report(run).read_text()
    assert "<h2>Comparison</h2>" in html and 'href="../comparison.html"' in html
    assert re.search(r'<tr class="this">\s*<td>lora</td>', html) and "one of 3 arms" in html
    (comparison.folder / "another").mkdir()
    assert membership(comparison.folder / "another") is None  # beside the arms, but not one of them


def test_the_terminal_table(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(comparison, arm_results(comparison, {"prompt": "sft failed"}))
    shown = capsys.readouterr().out
    assert "+0.50 [0.50, 0.50]" in shown and "70 % [60, 80]".replace(" %", "\u00a0%") in shown and "2:30" in shown
    assert "full: learned nothing that 20 prompts can show" in shown


def test_counts_and_shares() -> None:
    assert [count(n) for n in (None, 9, 9216, 4_884_480, 134_515_008, 6.2e9)] == [
        "–", "9", "9.22\u00a0k", "4.88\u00a0M", "135\u00a0M", "6.2\u00a0B",
    ]  # fmt: skip
    assert [share(x) for x in (None, 0.00007, 0.0363, 1.0)] == ["–", "0.007\u00a0%", "3.6\u00a0%", "100\u00a0%"]


def test_labels_cover_nothing() -> None:
    # Nine points of which five are nearly one, as LoRA and DoRA are, in a chart of 260 x 140 with labels of 50 x 10.
    anchors = [(100.0, 70.0), (102.0, 72.0), (101.0, 69.0), (103.0, 71.0), (99.0, 73.0)]
    anchors += [(10, 5), (250, 5), (10, 135), (250, 70)]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    boxes = place(anchors, [(50.0, 10.0)] * 9, markers, (0, 0, 260, 140))
    for i, box in enumerate(boxes):
        assert (round(box[2] - box[0], 9), round(box[3] - box[1], 9)) == (50, 10)
        assert min(box[:2]) >= 0 and box[2] <= 260 and box[3] <= 140
        assert all(overlap(box, other) == 0 for other in [*markers, *boxes[:i]])
    assert place([(50.0, 50.0)], [(20.0, 8.0)], [], (0, 0, 100, 100)) == [(54.0, 46.0, 74.0, 54.0)]  # right of it
    assert overlap((0, 0, 4, 4), (3, 1, 9, 3)) == 2 and overlap((0, 0, 4, 4), (4, 0, 9, 9)) == 0
    assert nearest((10, 10, 20, 20), (0, 15)) == (10, 15) and nearest((10, 10, 20, 20), (12, 13)) == (12, 13)


def test_a_point_is_hollow_where_its_interval_covers_the_start() -> None:
    points = [LabelledPoint("a", 1e4, 0.5, 0.2, 0.8), LabelledPoint("b", 1e8, 0.1, -0.1, 0.3)]
    svg = named_points_chart(points, 0.0, "trained weights")
    assert svg.count("fill: var(--card)") == 1 and ">a</text>" in svg and ">b</text>" in svg
    assert "fill: var(--card)" not in named_points_chart(points[:1], 0.0, "trained weights")
    assert "%</text>" in named_points_chart(points, 0.5, "trained weights", share=True)


MEASURE = """<!doctype html><iframe style="width: {width}px; height: 4000px; border: 0" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const box = (element) => {{
    const r = element.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom];
  }};
  const svgs = [...page.querySelectorAll("svg")].map((svg) => ({{
    texts: [...svg.querySelectorAll("text")].map((text) => [text.textContent, box(text)]),
    points: [...svg.querySelectorAll("use")].map(box), frame: box(svg)}}));
  const found = {{width: page.documentElement.scrollWidth, svgs}};
  document.body.innerHTML = "<pre>" + btoa(JSON.stringify(found)) + "</pre>";
}};
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium program")
@pytest.mark.parametrize("width", [390, 1440])
def test_names_are_apart_and_nothing_sticks_out_in_a_browser(
    comparison: Comparison, tmp_path: Path, width: int
) -> None:
    """The browser's own fonts have other widths than matplotlib's."""
    names = ["full", "lora", "dora", "adapter", "p_tuning_v2", "p_tuning", "prefix", "prompt", "ia3"]
    sizes = [1.3e8, 4.9e6, 5.0e6, 2.2e6, 2.3e5, 1.8e5, 1.5e6, 1.2e4, 5.8e4]
    base = arm_results(comparison)[1]
    found = [
        ArmResult(**vars(base) | {"arm": name, "trained": int(n), "gain_reference": Interval(0.5 + i / 40, 0.2, 0.9)})
        for i, (name, n) in enumerate(zip(names, sizes, strict=True))
    ]
    many = dataclasses.replace(comparison, arms=dict.fromkeys(names, {}))
    page = write_page(many, found).read_text()
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, page=escape(page)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,900", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'measure.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    measured = json.loads(base64.b64decode(re.findall("<pre>(.*?)</pre>", done.stdout)[0]))
    assert measured["width"] == width and len(measured["svgs"]) == 2
    for svg in measured["svgs"]:
        left, top, right, bottom = svg["frame"]
        labels = [box for text, box in svg["texts"] if text in names]
        assert len(labels) == 9 and len(svg["points"]) >= 9
        for i, box in enumerate(labels):
            assert left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom
            inner = (box[0] + 1, box[1] + 2, box[2] - 1, box[3] - 2)  # a line's box is higher than its letters
            covered = [other for other in [*labels[:i], *svg["points"]] if overlap(inner, other) >= 1]
            assert not covered, (box, covered)
