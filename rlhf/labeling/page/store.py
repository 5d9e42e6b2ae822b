"""Store tasks and people's answers in RUN/labels.sqlite, outside the stages' folders so that redoing one keeps them.

A submission is on disk before it is acknowledged (rlhf/labeling/page/tables.py). The page makes its id, so that sending
it again does not store it twice. A labeler has at most one submission that counts for a task. Answers are stored in the
order of the outputs in the file, whatever the order in which they were shown. Several processes may open the file.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import LabelSection
from rlhf.labeling.outputs import Outputs
from rlhf.labeling.page.form import Submission, validation_error
from rlhf.labeling.page.stored_ranking import StoredRanking, stored_ranking
from rlhf.labeling.page.tables import GIVEN, new_id, open_labels

RECENT = 20  # number of latest submissions that give a labeler's pace


class InvalidSubmission(Exception):
    """Raised for a submission that the page would not have made."""


class UnknownTask(Exception):
    """Raised for a submission about a prompt that this labeler never got from this file: it may be of another run."""


class Conflict(Exception):
    """Raised for a submission, or for taking one back, that came too late: another one counts or was made since."""


class Task(NamedTuple):
    """A prompt as one labeler sees it."""

    id: str  # of the claim (`new_id`); pages never get the key, a hash from which the order could be found
    messages: list[dict[str, str]]
    outputs: list[dict[str, Any]]  # {"text", "finished"} in the order shown
    answer: dict[str, Any] | None  # the one that they have taken back, if any


class Counts(NamedTuple):
    """The state of the ranking, over all labelers."""

    rankings: int  # number that are in
    wanted: int  # number that is enough, without prompts that everybody has skipped

    @property
    def complete(self) -> bool:
        """Return whether enough rankings are in."""
        return self.rankings >= self.wanted


class LabelStore:
    """Hold the file open, for any thread; writes are transactions; `progress` reads several times.

    `seed` fixes display orders and shared tasks.
    """

    def __init__(self, path: Path, label: LabelSection, seed: int) -> None:
        self.path, self.label, self.seed = Path(path), label, seed
        self._lock = threading.RLock()
        self._db = open_labels(self.path)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """Run the block as a transaction, which is on disk when the block has ended."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values: Any, **named: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, named or values).fetchall()

    # --- tasks and labelers -------------------------------------------------------------------------------------------

    def set_tasks(self, outputs: Sequence[Outputs]) -> None:
        """Make these the prompts to rank, in this order; rankings of others stay in the file but no longer count."""
        keys = [task_key(each) for each in outputs]
        shared = shared_tasks(keys, self.label.overlap, self.seed)
        rows = []
        for place, (key, each) in enumerate(zip(keys, outputs, strict=True)):
            messages = json.dumps([message._asdict() for message in each.prompt.messages])
            responses, finished = json.dumps(each.responses), json.dumps(each.finished)
            rows.append((key, place, key in shared, messages, each.prompt.use_case, responses, finished))
        with self._write() as db:
            db.execute("UPDATE tasks SET current = 0")
            db.executemany(
                "INSERT INTO tasks (key, place, shared, current, messages, use_case, responses, finished)"
                " VALUES (?, ?, ?, 1, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
                " place = excluded.place, shared = excluded.shared, current = 1, use_case = excluded.use_case",
                rows,
            )

    def has_tasks(self) -> bool:
        """Return whether the file has prompts to rank."""
        return bool(self._read("SELECT 1 FROM tasks WHERE current LIMIT 1"))

    def invite(self, names: Sequence[str], besides: bool = False) -> None:
        """Make these (`besides` those invited already) the labelers that the run waits for; others may still rank."""
        with self._write() as db:
            if not besides:
                db.execute("UPDATE labelers SET invited = 0")
            query = "INSERT INTO labelers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET invited = 1"
            db.executemany(query, [(name,) for name in names])

    def known(self) -> list[str]:
        """Return the names of all labelers, invited or not, in alphabetical order."""
        return [row["name"] for row in self._read("SELECT name FROM labelers ORDER BY name")]

    def new_token(self, labeler: str) -> str:
        """Return a new secret that identifies the labeler; earlier ones stay valid. Only its hash is stored.

        Raises sqlite3.IntegrityError for an unknown labeler.
        """
        token = secrets.token_urlsafe(24)
        with self._write() as db:
            db.execute("INSERT INTO tokens VALUES (?, ?)", (_hash(token), labeler))
        return token

    def revoke(self, names: Sequence[str]) -> None:
        """Make all links of these labelers invalid."""
        with self._write() as db:
            db.executemany("DELETE FROM tokens WHERE labeler = ?", [(name,) for name in names])

    def labeler(self, token: str) -> str | None:
        """Return the labeler of a token, or None when the token is unknown."""
        found = self._read("SELECT labeler FROM tokens WHERE hash = ?", _hash(token))
        return found[0]["labeler"] if found else None

    def setting(self, name: str) -> str | None:
        """Return a stored setting, or None."""
        found = self._read("SELECT value FROM settings WHERE name = ?", name)
        return found[0]["value"] if found else None

    def keep_setting(self, name: str, value: str) -> None:
        """Store a setting in place of its earlier value."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    # --- a labeler's next prompt and their answers --------------------------------------------------------------------

    def next_task(self, labeler: str) -> Task | None:
        """Give the labeler a task and return it: the newest one that they hold, or the first that needs a ranking.

        The claim is renewed, so that others do not get the task meanwhile. Returns None if there is none for them.
        """
        with self._write() as db:
            held = db.execute(
                GIVEN + "SELECT task FROM claims JOIN need ON key = task WHERE labeler = :me AND rankings < wanted"
                " AND NOT EXISTS (SELECT 1 FROM submissions s"
                " WHERE s.task = claims.task AND s.labeler = :me AND withdrawn IS NULL)"
                " ORDER BY since DESC LIMIT 1",
                {"me": labeler, "opinions": self.label.opinions},
            ).fetchone()
            key = held["task"] if held else self._first_free(labeler)
            if key is None:
                return None
            shown = json.dumps(self._draw_order(key, labeler))
            db.execute(
                "INSERT INTO claims (task, labeler, shown, since, id) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (task, labeler) DO UPDATE SET since = excluded.since",
                (key, labeler, shown, time.time(), new_id()),
            )
            return self._task(key, labeler)

    def _first_free(self, labeler: str) -> str | None:
        """Return the key of the first task that needs more rankings than it has and than others are about to give."""
        found = self._read(
            GIVEN + ", held AS ("
            " SELECT task, count(*) AS hands FROM claims c WHERE labeler <> :me AND since > :live AND NOT EXISTS"
            " (SELECT 1 FROM submissions s WHERE s.task = c.task AND s.labeler = c.labeler AND withdrawn IS NULL)"
            " GROUP BY task)"
            " SELECT key FROM need LEFT JOIN held ON task = key WHERE rankings + coalesce(hands, 0) < wanted"
            " AND NOT EXISTS (SELECT 1 FROM submissions WHERE task = key AND labeler = :me AND withdrawn IS NULL)"
            " ORDER BY place LIMIT 1",
            me=labeler,
            live=time.time() - 60 * self.label.claim_minutes,
            opinions=self.label.opinions,
        )
        return found[0]["key"] if found else None

    def _draw_order(self, key: str, labeler: str) -> list[int]:
        """Return the order in which the labeler sees the outputs, as indices into the order of the file."""
        count = len(json.loads(self._read("SELECT responses FROM tasks WHERE key = ?", key)[0]["responses"]))
        order = list(range(count))
        random.Random(f"{self.seed} {labeler} {key}").shuffle(order)
        return order

    def _task(self, key: str, labeler: str) -> Task:
        row = self._read("SELECT * FROM tasks JOIN claims ON task = key WHERE key = ? AND labeler = ?", key, labeler)[0]
        responses, finished, shown = (json.loads(row[name]) for name in ("responses", "finished", "shown"))
        outputs = [{"text": responses[i], "finished": finished[i]} for i in shown]
        query = "SELECT kind, answer FROM submissions WHERE task = ? AND labeler = ? ORDER BY number DESC LIMIT 1"
        before = self._read(query, key, labeler)
        answer = None
        if before and before[0]["kind"] == "ranking":
            kept = json.loads(before[0]["answer"])
            answer = {name: [values[i] for i in shown] for name, values in kept.items() if values}
        return Task(row["id"], json.loads(row["messages"]), outputs, answer)

    def submit(self, labeler: str, given: Submission) -> None:
        """Store a submission, which is on disk when this returns; one that is stored already under its id is accepted.

        Raises InvalidSubmission, UnknownTask, or Conflict: another one counts, or the id was another's or taken back.
        """
        with self._write() as db:
            claim = db.execute("SELECT task, shown FROM claims WHERE id = ? AND labeler = ?", (given.task, labeler))
            if (row := claim.fetchone()) is None:
                what = "this prompt was not given to you here"
                raise UnknownTask(f"{what}; it may be of another run, or of earlier labels")
            key, shown = row["task"], json.loads(row["shown"])
            if wrong := validation_error(given, len(shown), self.label):
                raise InvalidSubmission(wrong)
            fields = (key, labeler, given.kind, _answer(given, shown))
            old = db.execute("SELECT task, labeler, kind, answer, withdrawn FROM submissions WHERE id = ?", (given.id,))
            if (row := old.fetchone()) is not None:
                if tuple(row) == (*fields, None):
                    return
                raise Conflict("this was submitted before, and taken back or changed since")
            counting = "SELECT 1 FROM submissions WHERE task = ? AND labeler = ? AND withdrawn IS NULL"
            if db.execute(counting, (key, labeler)).fetchone():
                raise Conflict("you have submitted this prompt already, in another window")
            db.execute(
                "INSERT INTO submissions (id, task, labeler, kind, answer, seconds, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (given.id, *fields, given.seconds, time.time()),
            )

    def last(self, labeler: str) -> str | None:
        """Return the id of the labeler's newest submission, which they may take back; None if there is none.

        There is none either once they have taken it back, until the next.
        """
        found = self._newest(labeler)
        return found["id"] if found and found["withdrawn"] is None else None

    def _newest(self, labeler: str) -> sqlite3.Row | None:
        query = "SELECT id, task, withdrawn FROM submissions JOIN tasks ON key = task WHERE labeler = ? AND current"
        return next(iter(self._read(f"{query} ORDER BY number DESC LIMIT 1", labeler)), None)

    def take_back(self, labeler: str, submission: str) -> Task:
        """Withdraw the labeler's newest submission (again: no change), return its task; raise Conflict for another."""
        with self._write() as db:
            newest = self._newest(labeler)
            if newest is None or newest["id"] != submission:
                raise Conflict("this is not your last submission any more")
            now = time.time()
            db.execute("UPDATE submissions SET withdrawn = coalesce(withdrawn, ?) WHERE id = ?", (now, submission))
            db.execute("UPDATE claims SET since = ? WHERE task = ? AND labeler = ?", (now, newest["task"], labeler))
            return self._task(newest["task"], labeler)

    # --- state of the ranking -----------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Return how many rankings are in and how many are wanted.

        Wanted is the smaller of label.rankings (0: no limit) and those in plus those that the invited can still give.
        """
        row = self._read(
            GIVEN + "SELECT coalesce(sum(rankings), 0) AS rankings,"
            " coalesce(sum(max(0, min(wanted - rankings, free))), 0) AS missing FROM need",
            opinions=self.label.opinions,
        )[0]
        possible = row["rankings"] + row["missing"]
        return Counts(row["rankings"], min(self.label.rankings, possible) if self.label.rankings else possible)

    def progress(self, labeler: str) -> dict[str, Any]:
        """Return what the labeler's page shows.

        Their own: `labeler`, `mine` (rankings), `seconds_each` (median of their latest submissions, None before one),
        `last` (id). Of all: `rankings`, `wanted`, `complete`, and `seconds_left` at this pace (None without one).
        """
        counts = self.counts()
        mine = self._read(
            "SELECT kind, seconds FROM submissions JOIN tasks ON key = task"
            " WHERE labeler = ? AND withdrawn IS NULL AND current ORDER BY number DESC",
            labeler,
        )
        pace = statistics.median([row["seconds"] for row in mine[:RECENT]]) if mine else None
        since = time.time() - 600
        busy = self._read("SELECT count(DISTINCT labeler) AS n FROM submissions WHERE at > ?", since)[0]["n"]
        return {
            "labeler": labeler,
            "mine": sum(row["kind"] == "ranking" for row in mine),
            "rankings": counts.rankings,
            "wanted": counts.wanted,
            "complete": counts.complete,
            "seconds_each": pace,
            "seconds_left": pace and pace * max(0, counts.wanted - counts.rankings) / max(1, busy),
            "last": self.last(labeler),
        }

    def rankings(self) -> list[StoredRanking]:
        """Return all rankings of the current tasks that count, by task and then in the order in which they came."""
        rows = self._read(
            "SELECT s.*, messages, use_case, responses, finished, shown"
            " FROM submissions s JOIN tasks t ON t.key = s.task JOIN claims c USING (task, labeler)"
            " WHERE kind = 'ranking' AND withdrawn IS NULL AND current ORDER BY place, number"
        )
        return [stored_ranking(row) for row in rows]

    def skips(self) -> dict[str, int]:
        """Return how often current tasks were skipped, by reason."""
        rows = self._read(
            "SELECT json_extract(answer, '$.reason') AS reason, count(*) AS n FROM submissions JOIN tasks ON key = task"
            " WHERE kind = 'skip' AND withdrawn IS NULL AND current GROUP BY reason ORDER BY n DESC"
        )
        return {row["reason"]: row["n"] for row in rows}

    def count_set_aside(self) -> int:
        """Return the number of rankings of outputs that used to be current, without those taken back."""
        query = "SELECT count(*) AS n FROM submissions JOIN tasks ON key = task WHERE kind = 'ranking'"
        return self._read(f"{query} AND withdrawn IS NULL AND NOT current")[0]["n"]


def task_key(outputs: Outputs) -> str:
    """Return the SHA-256 (hex) of a prompt with its outputs."""
    parts = [outputs.prompt.messages, outputs.responses, outputs.finished]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shared_tasks(keys: Sequence[str], share: float, seed: int) -> set[str]:
    """Return the keys of the tasks that several labelers rank: a share of them, rounded, by a seeded hash."""
    ordered = sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return set(ordered[: int(share * len(keys) + 0.5)])


def _hash(token: str) -> str:
    # A token has 192 random bits, so a plain hash cannot be inverted by search.
    return hashlib.sha256(token.encode()).hexdigest()


def _answer(given: Submission, shown: Sequence[int]) -> str:
    """Return the answer as JSON, in the order of the outputs in the file."""
    if given.kind == "skip":
        return json.dumps({"reason": given.reason, "note": given.note})
    position = {output: i for i, output in enumerate(shown)}
    lists = {"ranks": given.ranks, "quality": given.quality, "flags": given.flags}
    order = [position[i] for i in range(len(shown))]
    return json.dumps({name: [values[i] for i in order] if values else [] for name, values in lists.items()})
