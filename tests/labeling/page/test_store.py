"""What labelers are given, what is kept of what they say, and when it is enough: on a real SQLite file."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import LabelSection
from rlhf.data.records import Drops, Message, Prompt, read_rankings, write_jsonl
from rlhf.errors import UserError
from rlhf.labeling.outputs import Outputs, outputs_row, read_outputs
from rlhf.labeling.page import store as label_store
from rlhf.labeling.page.form import FLAGS, SKIPS, validation_error
from rlhf.labeling.page.store import Conflict, Counts, LabelStore, UnknownTask, shared_tasks, task_key
from rlhf.labeling.page.stored_ranking import labelled_row
from support.label_stores import opened, outputs, rank_one, ranking, skip

# --- who gets what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "share", "expected"), [(20, 0.1, 2), (5, 0.1, 1), (4, 0.1, 0), (7, 1.0, 7), (7, 0.0, 0)])
def test_the_share_of_shared_prompts_is_exact(n: int, share: float, expected: int) -> None:
    keys = [task_key(each) for each in outputs(n)]
    assert len(shared_tasks(keys, share, 3)) == expected
    assert shared_tasks(keys, share, 3) == shared_tasks(keys[::-1], share, 3)  # whatever the order of the file


def test_another_seed_shares_other_prompts() -> None:
    keys = [task_key(each) for each in outputs(40)]
    assert shared_tasks(keys, 0.25, 1) != shared_tasks(keys, 0.25, 2)


def test_labelers_who_take_turns_rank_the_share_twice_and_the_rest_once(tmp_path: Path) -> None:
    store = opened(tmp_path, 20, ("anna", "ben", "cleo"), overlap=0.2)
    assert store.counts() == Counts(0, 24)  # 16 once, 4 twice
    while any([rank_one(store, name) for name in ("anna", "ben", "cleo")]):
        pass
    by_task = Counter(task_key(item.outputs) for item in store.rankings())
    keys = [task_key(each) for each in outputs(20)]
    shared = shared_tasks(keys, 0.2, 1)
    assert by_task == {key: 2 if key in shared else 1 for key in keys}
    assert store.counts() == Counts(24, 24) and store.counts().complete
    each = {(task_key(item.outputs), item.labeler) for item in store.rankings()}
    assert len(each) == 24  # nobody ranks a prompt twice


def test_one_labeler_alone_ranks_everything_once(tmp_path: Path) -> None:
    store = opened(tmp_path, 5, overlap=1.0)
    assert store.counts() == Counts(0, 5)


def test_a_prompt_in_hand_is_given_to_nobody_else_until_it_has_been_left(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(label_store.time, "time", lambda: now[0])
    store = opened(tmp_path, 1, ("anna", "ben"), overlap=0, claim_minutes=10)
    held = store.next_task("anna")
    assert held is not None and store.next_task("anna") == held  # a reload
    assert store.next_task("ben") is None and not store.counts().complete
    now[0] += 599
    assert store.next_task("ben") is None
    now[0] += 2
    bens = store.next_task("ben")
    assert bens.messages == held.messages and bens.id != held.id
    # Anna comes back and submits: her work is kept although Ben has ranked it meanwhile.
    store.submit("ben", ranking(bens.id, [1, 2, 3]))
    store.submit("anna", ranking(held.id, [3, 2, 1]))
    assert [item.labeler for item in store.rankings()] == ["ben", "anna"]


def test_eight_threads_get_different_prompts(tmp_path: Path) -> None:
    store = opened(tmp_path, 40, tuple(f"l{i}" for i in range(8)), overlap=0)
    threads = [
        threading.Thread(target=lambda name: [rank_one(store, name) for _ in range(5)], args=(f"l{i}",))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Counter(task_key(item.outputs) for item in store.rankings()).values()) == {1}
    assert store.counts() == Counts(40, 40)


def test_the_order_shown_is_drawn_per_labeler_and_kept(tmp_path: Path) -> None:
    names = ("anna", "ben", "cleo", "dan")
    store = opened(tmp_path, 6, names, overlap=1, opinions=4)
    orders: dict[str, list[list[str]]] = {}
    for name in names:
        while (task := store.next_task(name)) is not None:
            orders.setdefault(name, []).append([output["text"] for output in task.outputs])
            assert set(task.outputs[0]) == {"text", "finished"}  # nothing tells where an output is from
            store.submit(name, ranking(task.id, [1, 2, 3]))
    assert all(orders[a] != orders[b] for a in names for b in names if a < b)
    firsts = Counter(texts[0].split()[1] for shown in orders.values() for texts in shown)
    assert set(firsts) == {"0", "1", "2"}  # each output comes first somewhere
    shown = [item.details["shown"] for item in store.rankings() if item.labeler == "ben"]
    for order, texts, each in zip(shown, orders["ben"], outputs(6), strict=True):
        assert [each.responses[i] for i in order] == texts


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_answers_are_kept_in_the_order_of_the_file_by_hand(tmp_path: Path) -> None:
    store = opened(tmp_path, 1)
    task = store.next_task("anna")
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE claims SET shown = '[2, 0, 1]'")
    said = {"quality": [7, None, 3], "flags": [[], ["opinion"], ["hallucination"]]}
    store.submit("anna", ranking(task.id, [1, 2, 2], seconds=4.5, **said))
    (item,) = store.rankings()
    # Output 2 was shown first and ranked 1; outputs 0 and 1 tie behind it.
    assert item.ranks == (2, 2, 1)
    assert item.details["quality"] == [None, 3, 7] and item.details["flags"] == [["opinion"], ["hallucination"], []]
    assert item.details["shown"] == [2, 0, 1] and item.details["seconds"] == 4.5
    again = store.take_back("anna", store.last("anna"))
    assert [output["text"][7] for output in again.outputs] == ["2", "0", "1"]
    assert again.answer == {"ranks": [1, 2, 2]} | said


def test_rows_are_of_the_ranking_contract(tmp_path: Path) -> None:
    store = opened(tmp_path, 2)
    prompt = Prompt((Message("system", "Be brief."), Message("user", "Hi")), "chat")
    store.set_tasks([Outputs(prompt, ("x", "y"), (True, False))])
    task = store.next_task("anna")
    assert task.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    store.submit("anna", ranking(task.id, [1, 1]))
    (row,) = map(labelled_row, store.rankings())
    assert row["labeler"] == "anna" and row["use_case"] == "chat" and row["time"].startswith("20")
    file = tmp_path / "rankings.jsonl"
    write_jsonl(file, [row])
    (read,) = read_rankings([str(file)], Drops())
    assert (read.prompt, read.responses, read.ranks, read.finished) == (prompt, ("x", "y"), (1, 1), (True, False))


def test_sent_twice_is_stored_once_and_another_ranking_of_it_is_a_conflict(tmp_path: Path) -> None:
    store = opened(tmp_path, 2, ("anna", "ben"), overlap=1)
    task = store.next_task("anna")
    given = ranking(task.id, [1, 2, 3])
    store.submit("anna", given)
    store.submit("anna", given)
    assert len(store.rankings()) == 1
    with pytest.raises(Conflict, match="another window"):
        store.submit("anna", ranking(task.id, [3, 2, 1]))
    with pytest.raises(Conflict):
        store.submit("anna", given.model_copy(update={"ranks": (3, 2, 1)}))
    bens = store.next_task("ben")
    with pytest.raises(Conflict):
        store.submit("ben", given.model_copy(update={"task": bens.id}))  # somebody else's id
    with pytest.raises(UnknownTask):
        store.submit("ben", given)  # somebody else's claim
    (item,) = store.rankings()
    assert [item.ranks[i] for i in item.details["shown"]] == [1, 2, 3]


def test_what_was_not_given_to_a_labeler_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path, 2, ("anna", "ben"), overlap=0)
    task = store.next_task("anna")
    with pytest.raises(UnknownTask, match="not given"):
        store.submit("ben", ranking(task.id, [1, 2, 3]))
    with pytest.raises(label_store.InvalidSubmission, match="ranks"):
        store.submit("anna", ranking(task.id, [1, 2]))
    assert store.rankings() == []


def test_everything_outlives_the_process(tmp_path: Path) -> None:
    store = opened(tmp_path, 3)
    token = store.new_token("anna")
    given = rank_one(store, "anna")
    held = store.next_task("anna")
    # Not closed: a second process opens the file as a killed one has left it.
    other = LabelStore(store.path, store.label, 1)
    assert other.labeler(token) == "anna" and other.labeler("no" + token) is None
    assert [item.details["id"] for item in other.rankings()] == [given.id]
    assert other.next_task("anna") == held
    raw = store.path.read_bytes() + Path(f"{store.path}-wal").read_bytes()
    assert token.encode() not in raw
    with sqlite3.connect(store.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._read("PRAGMA synchronous")[0][0] == 2  # FULL


def test_revoked_links_end_and_new_ones_begin(tmp_path: Path) -> None:
    store = opened(tmp_path, 1, ("anna", "ben"))
    old, bens, second = store.new_token("anna"), store.new_token("ben"), store.new_token("anna")
    assert store.labeler(old) == store.labeler(second) == "anna"
    store.revoke(["anna"])
    assert [store.labeler(token) for token in (old, second, bens)] == [None, None, "ben"]


def test_rankings_of_other_outputs_stay_and_do_not_count(tmp_path: Path) -> None:
    store = opened(tmp_path, 2)
    rank_one(store, "anna")
    rank_one(store, "anna")
    store.set_tasks(outputs(3)[1:])  # the first prompt is gone, another one has come
    assert store.counts() == Counts(1, 2) and store.count_set_aside() == 1
    assert [item.outputs.prompt.text for item in store.rankings()] == ["prompt 1"]
    store.set_tasks(outputs(2))
    assert store.counts() == Counts(2, 2) and store.count_set_aside() == 0


def test_a_prompt_in_other_labels_has_its_own_id_and_takes_no_answers(tmp_path: Path) -> None:
    """The other file may show another order, in which the ranks would belong to other outputs."""
    (tmp_path / "new").mkdir()
    old, new = opened(tmp_path, 1, seed=1), opened(tmp_path / "new", 1, seed=2)
    given, again = old.next_task("anna"), new.next_task("anna")
    assert given.messages == again.messages and given.id != again.id
    assert given.id != task_key(outputs(1)[0]) and "key" not in given._fields  # from which the order could be found
    with pytest.raises(UnknownTask, match="another run"):
        new.submit("anna", ranking(given.id, [1, 2, 3]))
    with pytest.raises(UnknownTask):
        new.submit("anna", ranking(task_key(outputs(1)[0]), [1, 2, 3]))  # as pages once named it
    assert new.rankings() == []
    old.submit("anna", ranking(given.id, [1, 2, 3]))
    assert len(old.rankings()) == 1


VERSION_1 = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (
    key TEXT PRIMARY KEY, place INTEGER NOT NULL, shared INTEGER NOT NULL, current INTEGER NOT NULL,
    messages TEXT NOT NULL, use_case TEXT NOT NULL, responses TEXT NOT NULL, finished TEXT NOT NULL);
CREATE TABLE labelers (name TEXT PRIMARY KEY, invited INTEGER NOT NULL);
CREATE TABLE tokens (hash TEXT PRIMARY KEY, labeler TEXT NOT NULL REFERENCES labelers (name));
CREATE TABLE claims (
    task TEXT NOT NULL REFERENCES tasks (key), labeler TEXT NOT NULL REFERENCES labelers (name),
    shown TEXT NOT NULL, since REAL NOT NULL, PRIMARY KEY (task, labeler));
CREATE TABLE submissions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    task TEXT NOT NULL, labeler TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('ranking', 'skip')),
    answer TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL, withdrawn REAL,
    FOREIGN KEY (task, labeler) REFERENCES claims (task, labeler));
INSERT INTO tasks VALUES
    ('a', 0, 0, 1, '[{"role": "user", "content": "p"}]', '', '["x", "y"]', '[true, true]'),
    ('b', 1, 0, 1, '[{"role": "user", "content": "q"}]', '', '["x", "y"]', '[true, true]');
INSERT INTO labelers VALUES ('anna', 1);
INSERT INTO claims VALUES ('a', 'anna', '[1, 0]', 5), ('b', 'anna', '[1, 0]', 6);
INSERT INTO submissions VALUES
    (1, 'one', 'a', 'anna', 'ranking', '{"ranks": [2, 1], "quality": [], "flags": []}', 3, 5, NULL);
PRAGMA user_version = 1;
"""


def test_a_file_of_version_1_is_brought_up_to_date_with_all_that_is_in_it(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "labels.sqlite") as db:
        db.executescript(VERSION_1)
    for _ in range(2):  # the second finds it up to date
        store = LabelStore(tmp_path / "labels.sqlite", LabelSection(), 1)
        (item,) = store.rankings()
        assert (item.ranks, item.details["id"], item.details["shown"]) == ((2, 1), "one", [1, 0])
        assert store.counts() == Counts(1, 2)
        held = store.next_task("anna")
        assert held.messages[0]["content"] == "q" and [output["text"] for output in held.outputs] == ["y", "x"]
    store.submit("anna", ranking(held.id, [1, 2]))
    assert [each.ranks for each in store.rankings()] == [(2, 1), (2, 1)]  # y, shown first, is best


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        LabelStore(bad, LabelSection(), 1)
    with sqlite3.connect(tmp_path / "new.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="version 9"):
        LabelStore(tmp_path / "new.sqlite", LabelSection(), 1)


# --- taking back, skipping, and enough -------------------------------------------------------------------------------


def test_the_last_submission_may_be_taken_back_until_the_next(tmp_path: Path) -> None:
    store = opened(tmp_path, 3)
    first, second = rank_one(store, "anna"), rank_one(store, "anna")
    third = store.next_task("anna").id
    assert store.last("anna") == second.id
    with pytest.raises(Conflict, match="not your last"):
        store.take_back("anna", first.id)
    assert store.take_back("anna", second.id).id == second.task
    assert store.take_back("anna", second.id).id == second.task  # sent again
    assert [item.details["id"] for item in store.rankings()] == [first.id] and store.last("anna") is None
    with pytest.raises(Conflict, match="not your last"):
        store.take_back("anna", first.id)  # the one before it is not the last either
    with pytest.raises(Conflict, match="taken back"):
        store.submit("anna", second)  # a copy that was late
    assert store.next_task("anna").id == second.task  # before the one that was begun
    store.submit("anna", ranking(second.task, [1, 1, 1]))
    assert store.next_task("anna").id == third
    assert [item.ranks for item in store.rankings()][1] == (1, 1, 1)


def test_what_is_set_aside_is_not_offered_to_be_taken_back(tmp_path: Path) -> None:
    store = opened(tmp_path, 2)
    first, second = rank_one(store, "anna"), rank_one(store, "anna")
    store.set_tasks(outputs(1))  # the second prompt is gone
    assert store.last("anna") == store.progress("anna")["last"] == first.id
    with pytest.raises(Conflict, match="not your last"):
        store.take_back("anna", second.id)
    store.set_tasks(outputs(3)[2:])
    assert store.last("anna") is None
    store.set_tasks(outputs(2))
    assert store.last("anna") == second.id


def test_nobody_takes_back_anothers(tmp_path: Path) -> None:
    store = opened(tmp_path, 2, ("anna", "ben"))
    given = rank_one(store, "anna")
    with pytest.raises(Conflict):
        store.take_back("ben", given.id)
    assert len(store.rankings()) == 1


def test_a_skipped_prompt_goes_to_others_until_all_have_skipped_it(tmp_path: Path) -> None:
    store = opened(tmp_path, 1, ("anna", "ben"), overlap=0)
    task = store.next_task("anna")
    store.submit("anna", skip(task.id, "expertise"))
    assert store.next_task("anna") is None and store.counts() == Counts(0, 1)
    bens = store.next_task("ben")
    assert bens.messages == task.messages
    store.submit("ben", skip(bens.id))
    assert store.counts() == Counts(0, 0) and store.skips() == {"expertise": 1, "unclear": 1}
    store.take_back("ben", store.last("ben"))
    assert store.counts() == Counts(0, 1)
    rank_one(store, "ben")
    assert store.counts() == Counts(1, 1) and store.skips() == {"expertise": 1}


@pytest.mark.parametrize(("wanted", "expected"), [(0, 6), (2, 2), (6, 6), (99, 6)])
def test_how_many_rankings_are_wanted(tmp_path: Path, wanted: int, expected: int) -> None:
    store = opened(tmp_path, 5, ("anna", "ben"), overlap=0.2, rankings=wanted)
    assert store.counts().wanted == expected
    for _ in range(2):
        rank_one(store, "anna")
    assert store.counts() == Counts(2, expected) and store.counts().complete == (wanted == 2)


def test_a_labeler_who_is_not_waited_for_may_still_rank(tmp_path: Path) -> None:
    store = opened(tmp_path, 2, ("anna", "ben"), overlap=1)
    store.invite(["anna"])
    assert store.counts() == Counts(0, 2)
    rank_one(store, "ben")
    assert store.counts() == Counts(1, 2)


def test_who_is_invited_besides_takes_nobody_from_those_waited_for(tmp_path: Path) -> None:
    store = opened(tmp_path, 4, ("anna", "ben"), overlap=1)
    while rank_one(store, "anna"):
        pass
    assert store.counts() == Counts(4, 8)  # four prompts, each by two
    store.invite(["carl", "anna"], besides=True)
    assert store.counts() == Counts(4, 8) and store.known() == ["anna", "ben", "carl"]
    store.invite(["carl"])
    assert store.counts() == Counts(4, 4)  # as the rank stage may say


def test_progress_by_hand(tmp_path: Path) -> None:
    store = opened(tmp_path, 10, ("anna", "ben"), overlap=0)
    for name, seconds in (("anna", 10), ("anna", 50), ("anna", 20), ("ben", 500)):
        store.submit(name, ranking(store.next_task(name).id, [1, 2, 3], seconds=seconds))
    shown = store.progress("anna")
    assert (shown["mine"], shown["rankings"], shown["wanted"], shown["complete"]) == (3, 4, 10, False)
    assert shown["seconds_each"] == 20  # the median of her own
    assert shown["seconds_left"] == 60  # six are left, and two are at it
    assert opened(tmp_path, 10).progress("cleo")["seconds_left"] is None
    assert opened(tmp_path, 10, rankings=2).progress("anna")["seconds_left"] == 0  # fewer are wanted than are in


# --- the form, and the files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ranks": [1, 2]}, "ranks"),
        ({"ranks": [1, 3, 3]}, "ranks"),  # leaves out 2
        ({"ranks": [0, 1, 2]}, "ranks"),
        ({"ranks": [2, 3, 4]}, "ranks"),
        ({"ranks": [1, 2, 2], "quality": [1, 2]}, "quality has 2"),
        ({"ranks": [1, 2, 2], "quality": [1, 2, 8]}, "quality is"),
        ({"ranks": [1, 2, 2], "quality": [0, 2, 7]}, "quality is"),
        ({"ranks": [1, 2, 2], "flags": [[], [], ["rude"]]}, "unknown flag"),
        ({"ranks": [1, 2, 2], "flags": [[], [], ["opinion", "opinion"]]}, "flag"),
        ({"ranks": [1, 2, 2], "reason": "unclear"}, "no reason"),
    ],
)
def test_what_makes_no_sense_is_complained_about(given: dict[str, Any], words: str) -> None:
    assert words in validation_error(ranking("0" * 64, **given), 3, LabelSection())


def test_what_is_asked_for_is_the_recipes(tmp_path: Path) -> None:
    plain = ranking("0" * 64, [1, 1, 2])
    rated = ranking("0" * 64, [1, 1, 2], quality=[1, None, 7])
    flagged = ranking("0" * 64, [1, 1, 2], flags=[["opinion"], [], list(FLAGS)])
    for given, quality, flags, well in [
        (plain, "optional", True, True),
        (plain, "required", True, False),
        (rated, "optional", True, True),
        (rated, "required", True, False),
        (rated, "off", True, False),
        (flagged, "optional", True, True),
        (flagged, "optional", False, False),
    ]:
        assert (validation_error(given, 3, LabelSection(quality=quality, flags=flags)) == "") is well
    assert validation_error(skip("0" * 64), 3, LabelSection()) == "" and len(SKIPS) >= 5
    assert validation_error(skip("0" * 64, "boredom"), 3, LabelSection()) != ""
    assert len(FLAGS) == 11  # the binary rows of the paper's Table 3


@pytest.mark.parametrize("names", [["anna", "anna"], ["an na"], [""], ["a/b"], []])
def test_names_of_labelers(names: list[str]) -> None:
    with pytest.raises(ValueError):
        LabelSection(labelers=names)


def test_outputs_are_read_back_equal(tmp_path: Path) -> None:
    prompt = Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "chat")
    items = [Outputs(prompt, ("x", "y"), (True, False)), *outputs(2)]
    file = tmp_path / "outputs.jsonl"
    write_jsonl(file, [outputs_row(item) for item in [*items, items[0]]])
    drops = Drops()
    assert read_outputs([str(file)], drops) == items and drops.total == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "responses": ["x"]}', "a ranking has 2 to 16"),
        ('{"prompt": "a", "responses": ["x", "y", "x"]}', "responses 0 and 2"),
        ('{"prompt": "a", "responses": "x"}', "responses"),
        ('{"prompt": "a"}', "responses"),
        ('{"responses": ["x", "y"]}', "prompt"),
        ('{"prompt": "a", "responses": ["x", "y"], "finished": [true]}', "finished"),
    ],
)
def test_bad_outputs_are_told_with_their_line(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "outputs.jsonl"
    file.write_text('{"prompt": "ok", "responses": ["x", "y"]}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_outputs([str(file)], Drops())
    assert words in str(caught.value) and "line 2" in str(caught.value)
