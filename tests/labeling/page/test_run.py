"""`rlhf run tiny rank.labeler=human`, ranked in a browser: the run waits, is killed, and goes on by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import LabelSection
from rlhf.data.records import Drops, read_rankings
from rlhf.labeling.page.store import LabelStore
from support.browser import started
from support.label_stores import rank_one
from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]
SIZES = ["run.stages=[sft,rank,reward,ppo-ptx,evaluate]", "sft.epochs=0.25"]
SIZES += ["rank.prompts=6", "rank.outputs_per_prompt=3", "reward.batch_size=2", "ppo.episodes=16"]
SIZES += ["evaluate.prompts=4", "evaluate.cloze_questions=2"]  # seconds for each stage
PEOPLE = ["rank.labeler=human", "label.labelers=[anna,ben]", "label.overlap=0.34", "tracking.wandb=disabled"]
WANTED = 8  # six prompts, two of them by both


class Run:
    """The pipeline as a program, in a folder of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.dir = folder, folder / "runs" / "people"
        self.log = folder / "log.txt"
        self.arguments = ["run", "tiny", "run.name=people", *SIZES, *PEOPLE, *more]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "launch.cli", *self.arguments]
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def links(self, seconds: float = 600) -> dict[str, str]:
        """Return the links that it prints when it serves the page."""
        deadline = time.monotonic() + seconds
        while True:
            found = dict(re.findall(r"^  (\w+)  (http://\S+)$", self.log.read_text(), flags=re.MULTILINE))
            if {"anna", "ben"} <= found.keys():
                return found
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Send SIGKILL to the pipeline and to the stage, which is in a session of its own."""
        stage = json.loads((self.dir / "lock").read_text())["pid"]
        os.kill(stage, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    if run.process is not None and run.process.poll() is None:
        run.process.terminate()
        run.process.wait()


def rank(page: Any, n: int) -> int:
    """Rank up to n prompts by a labeler who prefers the longest output and ties the others; return how many it were."""
    for done in range(n):
        page.wait_for_selector("#work:not([hidden]) .card, #end:not([hidden])")
        if page.locator("#work").is_hidden():
            return done
        key = page.inner_text("#messages")
        texts = [card.inner_text() for card in page.locator(".card > .text").all()]
        longest = max(range(len(texts)), key=lambda i: len(texts[i]))
        for i in range(len(texts)):
            page.keyboard.press("j")
            page.keyboard.press("1" if i == longest else "2")
        before = page.inner_text("#pace")
        page.keyboard.press("Control+Enter")
        page.wait_for_function(
            "([key, pace]) => !document.getElementById('end').hidden"
            " || document.getElementById('messages').innerText !== key"
            " || document.getElementById('pace').innerText !== pace",
            arg=[key, before],
        )
        page.wait_for_function("() => !document.getElementById('submit').disabled")
    return n


def test_the_run_waits_for_people_and_goes_on_by_itself(run: Run, tmp_path: Path) -> None:
    with started() as browser:
        run.start()
        links = run.links()
        assert all(link.startswith("http://127.0.0.1:") for link in links.values())
        outputs = (run.dir / "rank" / "outputs.jsonl").read_text()
        pages = {name: browser.new_context().new_page() for name in links}
        for name, page in pages.items():
            page.set_default_timeout(30000)
            page.goto(links[name])
        assert rank(pages["anna"], 2) == 2

        # Killed while Ben is at it. The same command goes on with what is there, and his open page finds it again.
        pages["ben"].wait_for_selector(".card")
        run.kill()
        assert not (run.dir / "rank" / "rankings.jsonl").exists()
        run.start()
        again = run.links()
        assert again["anna"].split("#")[0] == links["anna"].split("#")[0]
        assert (run.dir / "rank" / "outputs.jsonl").read_text() == outputs
        ranked = 2
        while ranked < WANTED:
            for page in pages.values():
                ranked += rank(page, 1)
        for page in pages.values():
            page.wait_for_selector("#end:not([hidden])", timeout=120000)
        assert run.process.wait(timeout=1200) == 0, run.log.read_text()[-3000:]

    folder = run.dir / "rank"
    rows = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == WANTED
    for row in rows:
        assert row["labeler"] in ("anna", "ben") and row["seconds"] > 0
        longest = max(len(text.strip()) for text in row["responses"])
        best = [text for text, each in zip(row["responses"], row["ranks"], strict=True) if each == 1]
        assert [len(text.strip()) for text in best] == [longest]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["labeler"] == "human" and sum(summary["labelers"].values()) == WANTED
    assert summary["agreement"] == 1.0 and summary["skips"] == {}  # both rank by the same rule
    assert summary["correlation_rank_length"] < 0
    stages = json.loads((run.dir / "reward" / "stage.json").read_text())
    assert stages["state"] == "done" and (run.dir / "report.html").exists()
    assert read_rankings([str(folder / "rankings.jsonl")], Drops())


def test_the_recipe_says_what_is_enough_and_nothing_is_asked_twice(tmp_path: Path, tiny_dir: str) -> None:
    """label.rankings=3; the labels of an earlier attempt are enough, and no page is served."""
    run = Run(tmp_path, "run.stages=[rank]", "label.rankings=3")
    shutil.copytree(tiny_dir, run.dir / "sft" / "model")
    run.start()
    run.links()
    store = LabelStore(run.dir / "labels.sqlite", LabelSection(), 1)
    for _ in range(2):
        rank_one(store, "anna")
    time.sleep(2)
    assert run.process.poll() is None  # two are not enough
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 143
    assert "rank: stopped" in run.log.read_text()
    rank_one(store, "ben")
    store.close()
    run.start()
    assert run.process.wait(timeout=400) == 0, run.log.read_text()[-3000:]
    assert "http://" not in run.log.read_text()
    assert len((run.dir / "rank" / "rankings.jsonl").read_text().splitlines()) == 3


@pytest.mark.distributed
def test_two_processes_wait_for_people_longer_than_for_each_other(tmp_path: Path, tiny_dir: str) -> None:
    """The main process serves; the watchdog, which ends a stage whose processes hang, does not end the wait."""
    run = Run(tmp_path, "launch.processes=2", "launch.timeout_s=15", "label.rankings=2")
    shutil.copytree(tiny_dir, run.dir / "sft" / "model")
    run.arguments = ["rank", *run.arguments[1:]]
    run.start()
    run.links()
    assert (run.dir / "rank" / "outputs.jsonl").exists()
    store = LabelStore(run.dir / "labels.sqlite", LabelSection(), 1)
    time.sleep(25)
    assert run.process.poll() is None, run.log.read_text()[-3000:]
    rank_one(store, "anna")
    rank_one(store, "ben")
    store.close()
    assert run.process.wait(timeout=300) == 0, run.log.read_text()[-3000:]
    rows = [json.loads(line) for line in (run.dir / "rank" / "rankings.jsonl").read_text().splitlines()]
    assert sorted(row["labeler"] for row in rows) == ["anna", "ben"]
