"""The tables of labels.sqlite.

settings      what outlives the server: its port
tasks         one for each prompt with its outputs, known by the hash of their text; `current` ones are in the last list
labelers      by name; the invited ones are those that the run waits for
tokens        SHA-256 of the secrets in the labelers' links; a labeler may have several
claims        a task given to a labeler under a random id of its own, which is all that their page knows it by, and the
              order in which its outputs are shown there, drawn once
submissions   rankings and skips; what is taken back stays, marked as withdrawn

Write-ahead log with synchronous=FULL: a commit has returned when its data are on disk, and readers do not wait for
writers. The log needs memory that all who have the file open share: serve the page on one machine at a time.
"""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

from rlhf.errors import UserError

VERSION = 2  # 1 had claims without an id
BUSY = 20.0  # seconds to wait for another process that is writing
TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
    key TEXT PRIMARY KEY, place INTEGER NOT NULL, shared INTEGER NOT NULL, current INTEGER NOT NULL,
    messages TEXT NOT NULL, use_case TEXT NOT NULL, responses TEXT NOT NULL, finished TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS labelers (name TEXT PRIMARY KEY, invited INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (hash TEXT PRIMARY KEY, labeler TEXT NOT NULL REFERENCES labelers (name));
CREATE TABLE IF NOT EXISTS claims (
    task TEXT NOT NULL REFERENCES tasks (key), labeler TEXT NOT NULL REFERENCES labelers (name),
    shown TEXT NOT NULL, since REAL NOT NULL, id TEXT, PRIMARY KEY (task, labeler));
CREATE TABLE IF NOT EXISTS submissions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    task TEXT NOT NULL, labeler TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('ranking', 'skip')),
    answer TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL, withdrawn REAL,
    FOREIGN KEY (task, labeler) REFERENCES claims (task, labeler));
CREATE UNIQUE INDEX IF NOT EXISTS standing ON submissions (task, labeler) WHERE withdrawn IS NULL;
CREATE INDEX IF NOT EXISTS by_labeler ON submissions (labeler, number);
CREATE UNIQUE INDEX IF NOT EXISTS claim_ids ON claims (id);
"""
# What has been given for each task: `done` counts the invited labelers that ranked or skipped it.
GIVEN = """
WITH team AS (SELECT count(*) AS size FROM labelers WHERE invited),
given AS (
    SELECT task, sum(kind = 'ranking') AS rankings, sum(invited) AS done
    FROM submissions JOIN labelers ON name = labeler WHERE withdrawn IS NULL GROUP BY task),
need AS (
    SELECT key, place, coalesce(rankings, 0) AS rankings, size - coalesce(done, 0) AS free,
        CASE WHEN shared THEN max(1, min(:opinions, size)) ELSE 1 END AS wanted
    FROM tasks LEFT JOIN given ON task = key JOIN team WHERE current)
"""


def open_labels(path: Path) -> sqlite3.Connection:
    """The file, for any thread, and without transactions of its own accord.

    Its tables are made where it is new; a file of version 1 is brought up to date with all that is in it.

    Raises:
        UserError: when the file is damaged or of another version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        db = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            db.execute(f"PRAGMA {setting}")
        _make_tables(db, path)
    except sqlite3.DatabaseError as error:
        fix = (
            "see that the folder can be written to; if the file is damaged, put it aside: its rankings are in it alone"
        )
        raise UserError(f"the labels cannot be opened: {error}", str(path), fix) from None
    return db


def _make_tables(db: sqlite3.Connection, path: Path) -> None:
    """Make what is missing, in one transaction: another process may be opening the file as well."""
    db.execute("BEGIN IMMEDIATE")
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1, VERSION):
            raise UserError(f"the labels are of version {version}", str(path), f"this version reads 1 and {VERSION}")
        if version == 1:
            db.execute("ALTER TABLE claims ADD COLUMN id TEXT")
            for row in db.execute("SELECT task, labeler FROM claims").fetchall():
                db.execute("UPDATE claims SET id = ? WHERE task = ? AND labeler = ?", (new_id(), *row))
        for statement in TABLES.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise


def new_id() -> str:
    """A random id of a claim: unlike the task's hash it says nothing of the outputs or of their order in the file."""
    return secrets.token_hex(16)
