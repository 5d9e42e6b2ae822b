"""The labelling page's server over real HTTP: who may ask what, and that killing it loses and doubles nothing."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.data.records import Drops, read_rankings, write_jsonl
from rlhf.errors import UserError
from rlhf.labeling.outputs import outputs_row
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.server import FILES, MAX_BODY, Guard, is_loopback, serving
from rlhf.labeling.page.store import LabelStore, task_key
from support import label_stores
from support.paths import ROOT
from support.ports import free_port

SCRIPT = "<script>window.hacked = true</script>"


outputs = partial(label_stores.outputs, text=SCRIPT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    """Yield a store with three prompts for Anna and Ben."""
    store = label_stores.opened(tmp_path, names=("anna", "ben"), items=outputs(3), overlap=0)
    yield store
    store.close()


@pytest.fixture
def address(store: LabelStore) -> Iterator[str]:
    with serving(store, "demo", "127.0.0.1") as address:
        yield address


def client(address: str, token: str) -> httpx.Client:
    return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)


def submission(task: dict[str, Any], ranks: list[int] | None = None) -> dict[str, Any]:
    ranks = ranks or list(range(1, len(task["outputs"]) + 1))
    return {"id": str(uuid.uuid4()), "task": task["id"], "kind": "ranking", "ranks": ranks}


# --- who may ask what ------------------------------------------------------------------------------------------------


def test_a_turn_over_http(store: LabelStore, address: str) -> None:
    with client(address, store.new_token("anna")) as anna:
        form = anna.get("api/form").json()
        assert (form["title"], form["labeler"], form["network"]) == ("demo", "anna", False)
        first = anna.get("api/next").json()
        assert first["progress"]["rankings"] == 0 and first["progress"]["wanted"] == 3
        given = submission(first["task"])
        stored = anna.post("api/submit", json=given)
        assert stored.status_code == 200 and stored.json()["rankings"] == 1 and stored.json()["last"] == given["id"]
        assert anna.post("api/submit", json=given).json()["rankings"] == 1  # again
        conflict = anna.post("api/submit", json=submission(first["task"]))
        assert conflict.status_code == 409 and "another window" in conflict.json()["detail"]
        back = anna.post("api/take-back", json={"id": given["id"]}).json()
        assert back["task"]["id"] == first["task"]["id"] and back["task"]["answer"]["ranks"] == given["ranks"]
        assert anna.get("api/progress").json()["rankings"] == 0


@pytest.mark.parametrize("path", ["api/form", "api/next", "api/progress"])
def test_nothing_is_told_without_a_token(store: LabelStore, address: str, path: str) -> None:
    store.new_token("anna")
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer guess"}, {"Cookie": "token=guess"}):
        answer = httpx.get(address + path, headers=headers, trust_env=False)
        assert answer.status_code == 401 and SCRIPT not in answer.text


def test_nothing_is_written_without_a_token(store: LabelStore, address: str) -> None:
    with client(address, store.new_token("anna")) as anna:
        given = submission(anna.get("api/next").json()["task"])
    with client(address, "guess") as nobody:
        assert nobody.post("api/submit", json=given).status_code == 401
        assert nobody.post("api/take-back", json={"id": given["id"]}).status_code == 401
    # As a form of another site would send it: without the header, and not as JSON.
    form = httpx.post(address + "api/submit", data={"id": given["id"]}, trust_env=False)
    assert form.status_code in (401, 422) and store.rankings() == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "10.0.0.7"])
def test_other_hosts_are_refused(store: LabelStore, address: str, host: str) -> None:
    headers = {"Host": host, "Authorization": f"Bearer {store.new_token('anna')}"}
    for path in ("", "api/next"):
        answer = httpx.get(address + path, headers=headers, trust_env=False)
        assert answer.status_code == 403 and "<html" not in answer.text


def test_names_of_this_machine_are_served(store: LabelStore, address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost:9999", "[::1]:9999"):  # as through a tunnel
        assert httpx.get(address, headers={"Host": host}, trust_env=False).status_code == 200


def test_on_a_network_addresses_and_this_machines_name_are_hosts() -> None:
    guard = Guard(lambda *_: None, "0.0.0.0")
    name = socket.gethostname().lower()
    for host in ("192.168.1.7:8000", "[fe80::1]:8000", f"{name}:1"):
        assert guard._refusal("GET", {"host": host}) is None, host
    assert guard._refusal("GET", {"host": "evil.example"}) is not None
    assert Guard(lambda *_: None, "127.0.0.1")._refusal("GET", {"host": "192.168.1.7"}) is not None


def test_the_page_may_load_nothing_from_elsewhere(address: str) -> None:
    for path, (_, kind) in FILES.items():
        answer = httpx.get(address + path.lstrip("/"), trust_env=False)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(src|href)=\"(?!data:,)(https?:|//)", answer.text) and "innerHTML" not in answer.text
    page = httpx.get(address, trust_env=False).text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page)
    for path in ("docs", "openapi.json", "page.html", "../labels.sqlite", "label_store.py"):
        assert httpx.get(address + path, trust_env=False).status_code == 404


def test_large_and_bad_requests_are_refused(store: LabelStore, address: str) -> None:
    with client(address, store.new_token("anna")) as anna:
        task = anna.get("api/next").json()["task"]
        assert anna.post("api/submit", content=b" " * (MAX_BODY + 1)).status_code == 413
        assert anna.post("api/submit", content=iter([b"{}"])).status_code == 411  # in chunks: of any length
        cases = [{"ranks": [1, 2]}, {"ranks": [1, 2, "x"]}, {"id": "short"}, {"seconds": -1}, {"seconds": 1e9}]
        for bad in (*cases, {"surprise": 1}):
            answer = anna.post("api/submit", json=submission(task) | bad)
            assert answer.status_code == 422, bad
    assert store.rankings() == []


@pytest.mark.parametrize(
    "more",
    [
        b'"seconds": NaN}', b'"seconds": 1e400}', b'"quality": [NaN, 1, 2]}', b'"note": "\\ud800"}',
        b'"note": "\xff"}', b'"seconds": ' + b"9" * 5000 + b"}", b'"x": ' + b"[" * 60000,
    ],
)  # fmt: skip
def test_what_json_cannot_say_is_refused_in_plain_words(store: LabelStore, address: str, more: bytes) -> None:
    with client(address, store.new_token("anna")) as anna:
        given = json.dumps(submission(anna.get("api/next").json()["task"])).encode()
        body = given[:-1] + b", " + more
        answer = anna.post("api/submit", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and answer.json()["detail"].startswith("the request ")
        assert anna.post("api/take-back", content=b'{"id": NaN}').status_code == 422
    assert store.rankings() == []


def test_a_prompt_of_other_labels_is_told_from_a_bad_ranking(store: LabelStore, address: str) -> None:
    """The page keeps a prompt of another run (404), and lets the person correct a bad ranking (422)."""
    with client(address, store.new_token("anna")) as anna:
        task = anna.get("api/next").json()["task"]
        assert set(task) == {"id", "messages", "outputs", "answer"}
        for other in ("0" * 32, task_key(outputs(1)[0])):
            answer = anna.post("api/submit", json=submission(task) | {"task": other})
            assert answer.status_code == 404 and "another run" in answer.json()["detail"]
        assert anna.post("api/submit", json=submission(task, [1, 1])).status_code == 422


def test_who_is_at_the_page_and_does_not_know_that_all_is_in(store: LabelStore) -> None:
    presence = Presence()
    store.set_tasks(outputs(2))
    with serving(store, "demo", "127.0.0.1", presence=presence) as address:
        assert presence.not_notified() == set()
        with client(address, store.new_token("anna")) as anna, client(address, store.new_token("ben")) as ben:
            first, second = anna.get("api/next").json()["task"], ben.get("api/next").json()["task"]
            anna.post("api/submit", json=submission(first))
            assert presence.not_notified() == {"anna", "ben"}
            given = submission(second)
            assert ben.post("api/submit", json=given).json()["complete"]
            assert presence.not_notified() == {"anna"}
            assert anna.get("api/progress").json()["complete"] and presence.not_notified() == {"anna"}  # has a prompt
            assert anna.get("api/next").json()["progress"]["complete"] and presence.not_notified() == set()
            ben.post("api/take-back", json={"id": given["id"]})
            assert presence.not_notified() == {"ben"}


def test_a_disk_that_is_full_is_no_acknowledgement(store: LabelStore, address: str) -> None:
    store.set_tasks(outputs(30))
    with client(address, store.new_token("anna")) as anna:
        tasks = [store.next_task("anna")]
        store._read(f"PRAGMA max_page_count = {store._read('PRAGMA page_count')[0][0]}")
        stored = 0
        while True:
            given = {"id": str(uuid.uuid4()), "task": tasks[-1].id, "kind": "skip", "reason": "other"}
            answer = anna.post("api/submit", json=given | {"note": "x" * 1000})
            if answer.status_code != 200:  # the page that was open had room for a few
                break
            stored += 1
            tasks.append(store.next_task("anna"))
        assert answer.status_code == 503 and "full" in answer.json()["detail"]
        assert sum(store.skips().values()) == stored
        store._read("PRAGMA max_page_count = 1000000")
        assert anna.post("api/submit", json=given).status_code == 200


def test_addresses() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "localhost", "::1", "127.9.9.9")] == [True] * 4
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.org", "localhost.evil.example")))


def test_the_port_is_kept_and_a_taken_one_is_told(store: LabelStore) -> None:
    with serving(store, "demo", "127.0.0.1") as first:
        port = int(first.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match="cannot be served"), serving(store, "demo", "127.0.0.1", port):
            pass
    with serving(store, "demo", "127.0.0.1") as again:
        assert again == first  # open pages find it
        with serving(store, "demo", "127.0.0.1") as other:
            assert other != first
    with serving(store, "demo", "127.0.0.1") as again:
        assert again == first  # the port of the one that came second is not kept
        with serving(store, "demo", "127.0.0.1", 0):
            free = int(free_port())
            with serving(store, "demo", "127.0.0.1", free):  # asked for by its number, beside one that is up
                assert store.setting("port") == str(port)
    with serving(store, "demo", "127.0.0.1", free):
        assert store.setting("port") == str(free)  # the last one is nobody's
    with pytest.raises(UserError, match="not an address"), serving(store, "demo", "no.such.host.invalid"):
        pass


# --- killing it ------------------------------------------------------------------------------------------------------


class Server:
    """`rlhf label` as a program, on a port of its own."""

    def __init__(self, run: Path, names: list[str]) -> None:
        self.port = free_port()
        self.command = [sys.executable, "-m", "launch.cli", "label", str(run)]
        self.options = ["--labelers", ",".join(names), "--port", self.port]
        self.log, self.process = run / "server.txt", None

    def start(self) -> str:
        """Start it and wait until it serves; return what it has printed."""
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command + self.options, stdout=log, stderr=log, env=env)
        deadline = time.monotonic() + 60
        while "rank: people" not in self.log.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return self.log.read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def labour(address: str, token: str, seed: int, acknowledged: dict[str, dict[str, Any]]) -> None:
    """Rank until nothing is left. Like the page, send the same submission until it is acknowledged."""
    rng = random.Random(seed)

    def ask(call: Any) -> httpx.Response:
        while True:
            try:
                answer = call()
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code < 500:
                return answer

    with client(address, token) as http:
        while (task := ask(lambda: http.get("api/next")).json()["task"]) is not None:
            given = submission(task, rng.choice([[1, 2, 3], [2, 1, 1], [1, 1, 1], [3, 2, 1], [1, 2, 2]]))
            for _ in range(rng.choice([1, 1, 1, 2])):  # an answer that got lost is asked for again
                answer = ask(lambda sent=given: http.post("api/submit", json=sent))
                assert answer.status_code == 200, answer.text
            shown = [output["text"] for output in task["outputs"]]
            acknowledged[given["id"]] = given | {"shown": shown, "prompt": task["messages"][0]["content"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_kills_under_eight_labelers_export_every_ranking_once(tmp_path: Path) -> None:
    """2,000 rankings: 250 prompts, each ranked by all eight."""
    run, names = tmp_path / "run", [f"labeler{i}" for i in range(8)]
    items = outputs(250)
    (run / "rank").mkdir(parents=True)
    write_jsonl(run / "rank" / "outputs.jsonl", [outputs_row(item) for item in items])
    (run / "recipe.yaml").write_text("label: {overlap: 1.0, opinions: 8}\n")
    server = Server(run, names)
    printed = server.start()
    tokens = dict(re.findall(r"^  (\w+)  http://127\.0\.0\.1:\d+/#(\S+)$", printed, flags=re.MULTILINE))
    assert sorted(tokens) == names
    acknowledged: list[dict[str, dict[str, Any]]] = [{} for _ in names]
    address = f"http://127.0.0.1:{server.port}/"
    given = [(address, tokens[name], i, acknowledged[i]) for i, name in enumerate(names)]
    threads = [threading.Thread(target=labour, args=args) for args in given]
    for thread in threads:
        thread.start()
    kills = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        if kills < 10 and sum(map(len, acknowledged)) >= 180 * (kills + 1):
            server.kill()  # in the middle of whatever eight requests are doing
            kills += 1
            server.start()
    assert kills == 10
    server.kill()

    file = tmp_path / "export.jsonl"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([*server.command, "--export", str(file)], env=env, check=False).returncode == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = {key: (names[i], given) for i, part in enumerate(acknowledged) for key, given in part.items()}
    assert len(expected) == 2000 and sorted(row["id"] for row in rows) == sorted(expected)
    places = {item.prompt.text: item for item in items}
    for row in rows:
        name, given = expected[row["id"]]
        assert row["labeler"] == name and tuple(row["responses"]) == places[given["prompt"]].responses
        by_text = dict(zip(given["shown"], given["ranks"], strict=True))
        assert row["ranks"] == [by_text[text] for text in row["responses"]]
    assert len({(row["prompt"], row["labeler"]) for row in rows}) == 2000
    drops = Drops()
    assert len(read_rankings([str(file)], drops)) + drops.total == 2000
