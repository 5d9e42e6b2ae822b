"""The tables of labels.sqlite.

settings      values that are kept between servers: the port
tasks         one for each prompt with its outputs; the key is a hash of their text; `current` ones are to be ranked now
labelers      by name; the run waits for the invited ones
tokens        SHA-256 of the secrets in the labelers' links; a labeler may have several
claims        a task given to a labeler, under a random id, the only one that their page gets; its order, drawn once
submissions   rankings and skips; one that is taken back stays, marked as withdrawn

The file has a write-ahead log with synchronous=FULL: when a commit returns, its data are on disk, and readers do not
wait for writers. The log uses memory that all processes with the file open share, so serve the page on one machine.
"""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

from rlhf.errors import UserError

VERSION = 2  # claims of version 1 had no id
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
# The state of each task: `done` counts the invited labelers that ranked or skipped it.
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
    """Open the file for use from any thread, with explicit transactions only.

    A new file gets its tables; one of version 1 is converted. Raises UserError if it is damaged or of another version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        db = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            db.execute(f"PRAGMA {setting}")
        _make_tables(db, path)
    except sqlite3.DatabaseError as error:
        damaged = "if the file is damaged, put it aside: its rankings are in it alone"
        fix = f"see that the folder can be written to; {damaged}"
        raise UserError(f"the labels cannot be opened: {error}", str(path), fix) from None
    return db


def _make_tables(db: sqlite3.Connection, path: Path) -> None:
    """Make missing tables, in one transaction, since another process may be opening the file at the same time."""
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
    """Return a random id for a claim, which unlike the task's hash reveals nothing about the outputs or their order."""
    return secrets.token_hex(16)
