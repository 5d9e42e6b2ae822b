"""The rank stage that waits for people, `rlhf label` beside it, and the page that stays until all know of the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from launch.commands.label import export_rankings, prepare, revoke_links, settings
from rlhf.config import LabelSection
from rlhf.data.records import write_jsonl
from rlhf.errors import UserError
from rlhf.labeling.outputs import outputs_row
from rlhf.labeling.page import collect
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.store import Counts, LabelStore
from rlhf.run.folder import RunFolder
from support.label_stores import opened, outputs, rank_one, ranking


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run of four prompts that two labelers share."""
    folder = tmp_path / "run"
    write_jsonl(folder / collect.OUTPUTS, [outputs_row(item) for item in outputs(4)])
    (folder / "recipe.yaml").write_text("label: {overlap: 1.0, labelers: [anna, ben]}\n")
    return folder


def joined(run: Path, names: str) -> None:
    """Prepare the labels as `rlhf label RUN --labelers NAMES` does before it serves."""
    recipe = settings(run, names)
    with collect.open_store(run, recipe.label, recipe.run.seed) as store:
        prepare(run, store)


# --- beside a run that waits -----------------------------------------------------------------------------------------


def test_labelers_who_join_and_links_that_end_leave_what_the_run_waits_for(run: Path, tmp_path: Path, capsys) -> None:
    waiting = opened(run, 4, ("anna", "ben"), overlap=1.0)
    link = {name: waiting.new_token(name) for name in ("anna", "ben")}
    while rank_one(waiting, "anna"):
        pass
    assert waiting.counts() == Counts(4, 8)
    with RunFolder(run).lock():
        write_jsonl(run / collect.OUTPUTS, [outputs_row(item) for item in outputs(1)])  # not what it waits for
        joined(run, "carl")
        assert waiting.counts() == Counts(4, 8) and waiting.count_set_aside() == 0
        assert waiting.next_task("carl") is not None
        export_rankings(run, settings(run), tmp_path / "out.jsonl")
        assert waiting.counts() == Counts(4, 8) and len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
        capsys.readouterr()
        revoke_links(run, settings(run), "anna, carl")
        assert "http" not in capsys.readouterr().out
        assert waiting.counts() == Counts(4, 8) and waiting.known() == ["anna", "ben", "carl"]
        assert [waiting.labeler(link[name]) for name in ("anna", "ben")] == [None, "ben"]
    joined(run, "carl")  # no stage runs: the outputs are the file's
    assert waiting.counts() == Counts(1, 2) and waiting.count_set_aside() == 3


def test_without_labels_nothing_is_exported_or_revoked_and_no_file_made(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody has ranked"):
        export_rankings(run, settings(run), tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="nobody has ranked"):
        revoke_links(run, settings(run), "anna")
    assert not (run / collect.LABELS).exists()


def test_links_of_nobody_are_not_revoked(run: Path) -> None:
    opened(run, 4, ("anna", "ben")).close()
    with pytest.raises(UserError, match="'bne'") as caught:
        revoke_links(run, settings(run), "anna,bne")
    assert "anna, ben" in str(caught.value)
    with pytest.raises(UserError):
        revoke_links(run, settings(run), ",")


def test_an_export_that_cannot_be_written_is_told(run: Path, tmp_path: Path) -> None:
    opened(run).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_rankings(run, settings(run), tmp_path / "file" / "out.jsonl")


def test_outputs_that_are_left_out_are_told(run: Path, capsys) -> None:
    write_jsonl(run / collect.OUTPUTS, [outputs_row(item) for item in [*outputs(2), *outputs(1)]])
    joined(run, "anna")
    assert "dropped 1: exact duplicate of outputs" in capsys.readouterr().out


# --- until all know that it is over ----------------------------------------------------------------------------------


class Stage:
    """`rankings_by_people` in a thread, as the rank stage calls it."""

    def __init__(self, folder: Path, monkeypatch, grace: float) -> None:
        monkeypatch.setattr(collect, "POLL_SECONDS", 0.02)
        self.printed: list[str] = []
        monkeypatch.setattr(collect.console, "print", lambda *text, **_: self.printed.extend(map(str, text)))
        label = LabelSection(labelers=["anna", "ben"], overlap=0)
        recipe = SimpleNamespace(label=label, run=SimpleNamespace(name="demo", seed=1))
        ctx: Any = SimpleNamespace(recipe=recipe, run=RunFolder(folder), stop_requested=False)
        self.found: Any = None

        def work() -> None:
            self.found = collect.rankings_by_people(ctx, outputs(2), grace)

        self.ctx, self.thread = ctx, threading.Thread(target=work, daemon=True)
        self.thread.start()

    def client(self, name: str) -> httpx.Client:
        """Return a client with the link of a labeler."""
        link = wait_for(lambda: next((line for line in self.printed if line.startswith(f"  {name}  ")), None))
        address, token = link.split()[1].split("#")
        return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, trust_env=False)


def wait_for(look: Callable[[], Any], seconds: float = 20) -> Any:
    """Return the first value of `look` that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def sent(page: httpx.Client, task: dict[str, Any]) -> dict[str, Any]:
    """Submit a ranking of the task; return the answer."""
    given = json.loads(ranking(task["id"], [1, 2, 3]).model_dump_json(exclude_defaults=True))
    answer = page.post("api/submit", json=given)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_stays_until_who_is_at_it_knows_and_takes_what_comes_late(tmp_path: Path, monkeypatch) -> None:
    stage = Stage(tmp_path, monkeypatch, grace=60)
    with stage.client("anna") as anna, stage.client("ben") as ben:
        first, second = anna.get("api/next").json()["task"], ben.get("api/next").json()["task"]
        sent(anna, first)
        with LabelStore(tmp_path / "labels.sqlite", stage.ctx.recipe.label, 1)._write() as db:
            db.execute("UPDATE claims SET since = 0")  # Ben has had it for hours, so that Anna gets it as well
        late = anna.get("api/next").json()["task"]
        assert sent(ben, second)["complete"]
        time.sleep(0.3)
        assert stage.thread.is_alive()  # Anna is at a prompt
        assert anna.get("api/progress").json()["complete"]
        sent(anna, late)
        stage.thread.join(10)  # she knows, and it does not wait for the minute
    assert not stage.thread.is_alive() and stage.found.label_summary["labelers"] == {"anna": 2, "ben": 1}
    assert len(stage.found.rankings) == 3


def test_the_page_ends_at_once_when_nobody_else_was_there(tmp_path: Path, monkeypatch) -> None:
    stage = Stage(tmp_path, monkeypatch, grace=60)
    with stage.client("anna") as anna:
        for _ in range(2):
            sent(anna, anna.get("api/next").json()["task"])
        stage.thread.join(10)
    assert not stage.thread.is_alive() and len(stage.found.rankings) == 2


def test_the_page_waits_no_longer_than_its_grace_and_not_after_a_stop(tmp_path: Path, monkeypatch) -> None:
    for name, grace, stop in (("a", 0.5, False), ("b", 60.0, True)):
        stage = Stage(tmp_path / name, monkeypatch, grace)
        with stage.client("anna") as anna, stage.client("ben") as ben:
            ben.get("api/form")  # and is not heard of again
            for _ in range(2):
                sent(anna, anna.get("api/next").json()["task"])
            stage.ctx.stop_requested = stop
            stage.thread.join(10)
        assert not stage.thread.is_alive() and (stage.found is None) is stop


def test_what_is_taken_back_when_all_was_in_is_waited_for_on_the_same_page(tmp_path: Path, monkeypatch) -> None:
    stage = Stage(tmp_path, monkeypatch, grace=60)
    with stage.client("anna") as anna, stage.client("ben") as ben:
        ben.get("api/next")
        tasks = [anna.get("api/next").json()["task"]]
        sent(anna, tasks[0])
        with LabelStore(tmp_path / "labels.sqlite", stage.ctx.recipe.label, 1)._write() as db:
            db.execute("UPDATE claims SET since = 0")
        last = sent(anna, anna.get("api/next").json()["task"])
        assert last["complete"]
        back = anna.post("api/take-back", json={"id": last["last"]}).json()
        assert ben.get("api/next").json()["progress"]["complete"] is False
        time.sleep(0.3)
        assert stage.thread.is_alive()
        assert sent(anna, back["task"])["complete"]
        ben.get("api/next")
        stage.thread.join(10)
    assert not stage.thread.is_alive() and len(stage.found.rankings) == 2
    assert sum(line.startswith("  anna  ") for line in stage.printed) == 1


def test_who_was_seen_long_ago_is_not_waited_for(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlhf.labeling.page.presence.time.monotonic", lambda: now[0])
    presence = Presence()
    presence.seen("anna")
    now[0] += 59
    presence.seen("ben")
    assert presence.not_notified() == {"anna", "ben"}
    now[0] += 2
    assert presence.not_notified() == {"ben"}
