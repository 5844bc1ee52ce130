"""Schema of the database, and the migrations from earlier versions."""

from __future__ import annotations

import sqlite3

from kandinsky22.errors import KandinskyError

# One entry per version: statements that lead from the version before to this one.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
            mode TEXT NOT NULL,
            request TEXT NOT NULL,
            batch_key TEXT NOT NULL,
            group_name TEXT,
            priority INTEGER NOT NULL DEFAULT 0,
            attempts INTEGER NOT NULL DEFAULT 0,
            interruptions INTEGER NOT NULL DEFAULT 0,
            created_at TEXT NOT NULL,
            started_at TEXT,
            finished_at TEXT,
            error TEXT,
            cancel_requested INTEGER NOT NULL DEFAULT 0,
            lease_owner TEXT,
            lease_until REAL
        )""",
        "CREATE INDEX jobs_waiting ON jobs (state, priority DESC, seq)",
        "CREATE INDEX jobs_group ON jobs (group_name, seq)",
        """CREATE TABLE images (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            job TEXT NOT NULL,
            position INTEGER NOT NULL,
            group_name TEXT,
            created_at TEXT NOT NULL,
            mode TEXT NOT NULL,
            model TEXT NOT NULL,
            title TEXT NOT NULL,
            seed INTEGER NOT NULL,
            width INTEGER NOT NULL,
            height INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            starred INTEGER NOT NULL DEFAULT 0,
            trashed_at TEXT,
            recipe TEXT NOT NULL,
            request TEXT,
            UNIQUE (job, position)
        )""",
        "CREATE INDEX images_digest ON images (sha256)",
        "CREATE TABLE uploads (id TEXT PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL, created_at TEXT)",
        "CREATE TABLE idempotency (key TEXT PRIMARY KEY, job TEXT NOT NULL, digest TEXT NOT NULL, created_at TEXT)",
    ),
    ("ALTER TABLE jobs ADD COLUMN error_code TEXT",),
)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database to the current version, in one transaction per version.

    Args:
        connection: Connection in autocommit mode.

    Raises:
        KandinskyError: A newer version of kandinsky22 wrote the database.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise KandinskyError(
            f"the database has version {version}, and this version of kandinsky22 reads up to {VERSION}"
        )
    for number in range(version, VERSION):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
