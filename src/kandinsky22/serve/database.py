"""The database: its connection, transactions, times and ids."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from kandinsky22.errors import KandinskyError
from kandinsky22.serve.schema import migrate


def now() -> str:
    """Return the current time as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """Return a random id of 128 bits."""
    return secrets.token_urlsafe(16)


class UnreadableDatabaseError(KandinskyError):
    """The file of the database is damaged or no database."""


def set_aside(path: Path) -> Path:
    """Rename a database and the files that SQLite keeps next to it.

    Args:
        path: File of the database.

    Returns:
        Its new path.
    """
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    for suffix in ("-wal", "-shm", ""):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.rename(path.with_name(f"{path.name}.damaged-{number}{suffix}"))
    return path.with_name(f"{path.name}.damaged-{number}")


def _check(connection: sqlite3.Connection) -> None:
    """Raise `sqlite3.DatabaseError` if a part of the file is damaged."""
    (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise sqlite3.DatabaseError(result)


class Database:
    """Connection to the database of a server, for any thread.

    Args:
        path: File of the database. It is created, or migrated from an earlier version.

    Raises:
        UnreadableDatabaseError: The file is damaged or no database.
        KandinskyError: A newer version of kandinsky22 wrote the database.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a queued job survives a power failure
            migrate(self._connection)
            _check(self._connection)
        except sqlite3.OperationalError:  # a full disk or a lock, for example: the file may be whole
            self._connection.close()
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise UnreadableDatabaseError(
                f"{path} is damaged ({error}); this command makes a new one from the pictures: "
                f"kandinsky22 gallery rebuild --state {path.parent}"
            ) from error
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection in a transaction, which is undone if the block raises."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself undoes some, if the disk is full for example
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """Return the rows of a query.

        Args:
            statement: The query.
            values: Values of its parameters.
        """
        with self._lock:
            return self._connection.execute(statement, values).fetchall()
