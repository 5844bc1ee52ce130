"""Jobs in the database. Each method is one transaction."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sqlite3
import time
from collections.abc import Collection
from typing import Any

from kandinsky22.errors import KandinskyError
from kandinsky22.serve.database import Database, new_id, now
from kandinsky22.serve.failures import JobFailure

MAX_INTERRUPTIONS = 50  # ends of the server during one job, after which the job is not tried again
KEY_DAYS = 7  # days that an idempotency key is remembered


class QueueFullError(KandinskyError):
    """The queue has no place for another job."""


class KeyReusedError(KandinskyError):
    """An idempotency key was used for another request."""


@dataclasses.dataclass(frozen=True)
class JobRow:
    """A job. The attributes are the columns of the table."""

    seq: int
    id: str
    state: str
    mode: str
    request: dict[str, Any]
    batch_key: str
    group_name: str | None
    priority: int
    attempts: int
    interruptions: int
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    error_code: str | None

    @property
    def failure(self) -> JobFailure:
        """Why the job failed. Earlier versions did not store the kind of failure."""
        return JobFailure(self.error or "the job failed", self.error_code or JobFailure.code)


class JobStore(Database):
    """Jobs and idempotency keys."""

    def add_job(
        self,
        mode: str,
        request: dict[str, Any],
        batch_key: str,
        *,
        max_waiting: int,
        key: str | None = None,
        digest: str = "",
    ) -> tuple[JobRow, bool]:
        """Queue a job, unless its idempotency key has been used.

        Args:
            mode: Mode of generation.
            request: Complete request with its seed.
            batch_key: Key that jobs share which can be generated in one batch.
            max_waiting: Largest number of waiting jobs.
            key: Idempotency key; None for none.
            digest: Digest of the request as it was posted, which a repeated key must have again.

        Returns:
            The job, and whether it is new.

        Raises:
            QueueFullError: If too many jobs wait.
            KeyReusedError: If the key was used for another request.
        """
        with self.transaction() as connection:
            if key is not None and (known := self.job_of_key(key, digest)) is not None:
                return known, False
            if self.waiting_count() >= max_waiting:
                raise QueueFullError(f"{max_waiting} jobs wait already")
            id = new_id()
            connection.execute(
                "INSERT INTO jobs (id, state, mode, request, batch_key, group_name, priority, created_at) "
                "VALUES (?, 'queued', ?, ?, ?, ?, ?, ?)",
                (id, mode, json.dumps(request), batch_key, request.get("group"), request.get("priority") or 0, now()),
            )
            if key is not None:
                connection.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)", (key, id, digest, now()))
            job = self.job(id)
            assert job is not None
            return job, True

    def job_of_key(self, key: str, digest: str) -> JobRow | None:
        """Return the job that was queued with an idempotency key, or None.

        Args:
            key: Idempotency key.
            digest: Digest of the request as it was posted.

        Raises:
            KeyReusedError: If the key was used for another request.
        """
        used = self.rows("SELECT job, digest FROM idempotency WHERE key = ?", key)
        if not used:
            return None
        if used[0]["digest"] != digest:
            raise KeyReusedError("the idempotency key was used for another request")
        return self.job(used[0]["job"])

    def job(self, id: str) -> JobRow | None:
        """Return a job, or None.

        Args:
            id: Id of the job.
        """
        rows = self.rows("SELECT * FROM jobs WHERE id = ?", id)
        return _job(rows[0]) if rows else None

    def jobs(self, *, state: str | None, group: str | None, before: int | None, limit: int) -> list[JobRow]:
        """Return jobs, newest first.

        Args:
            state: State of the jobs; None for all.
            group: Group of the jobs; None for all.
            before: Only jobs with a smaller `seq`; None for all.
            limit: Largest number of jobs.
        """
        rows = self.rows(
            "SELECT * FROM jobs WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR group_name = ?2) "
            "AND (?3 IS NULL OR seq < ?3) ORDER BY seq DESC LIMIT ?4",
            state,
            group,
            before,
            limit,
        )
        return [_job(row) for row in rows]

    def waiting_count(self) -> int:
        """Return the number of waiting jobs."""
        return int(self.rows("SELECT COUNT(*) AS n FROM jobs WHERE state = 'queued'")[0]["n"])

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by state."""
        return {row["state"]: row["n"] for row in self.rows("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")}

    def position(self, job: JobRow) -> int | None:
        """Return the number of jobs that run before a waiting job, or None for other jobs.

        Args:
            job: The job.
        """
        if job.state != "queued":
            return None
        rows = self.rows(
            "SELECT COUNT(*) AS n FROM jobs WHERE state = 'queued' AND (priority > ?1 OR (priority = ?1 AND seq < ?2))",
            job.priority,
            job.seq,
        )
        return int(rows[0]["n"])

    def claim(self, owner: str, *, limit: int, lease_seconds: float) -> list[JobRow]:
        """Return the next jobs, now running: the first one, and those right behind it that fit into its batch.

        The order is that of arrival within a priority. A job that has been tried before is generated alone, so that a
        job that crashes its worker does not harm others.

        Args:
            owner: Name of the worker.
            limit: Largest number of jobs.
            lease_seconds: Time until the worker must show a sign of life.
        """
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT * FROM jobs WHERE state = 'queued' ORDER BY priority DESC, seq LIMIT ?", (limit,)
            ).fetchall()
            batch = rows[:1]
            for row in rows[1:]:
                if row["batch_key"] != rows[0]["batch_key"] or row["attempts"] or rows[0]["attempts"]:
                    break
                batch.append(row)
            for row in batch:
                connection.execute(
                    "UPDATE jobs SET state = 'running', attempts = attempts + 1, started_at = ?, lease_owner = ?, "
                    "lease_until = ? WHERE id = ?",
                    (now(), owner, time.time() + lease_seconds, row["id"]),
                )
            return [job for row in batch if (job := self.job(row["id"])) is not None]

    def renew(self, ids: Collection[str], lease_seconds: float) -> None:
        """Renew the leases of jobs whose worker has shown a sign of life.

        Args:
            ids: Ids of the jobs that the worker has.
            lease_seconds: Time until its next sign of life.
        """
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND state = 'running'",
                [(time.time() + lease_seconds, id) for id in ids],
            )

    def expired(self) -> list[str]:
        """Return the ids of running jobs whose lease has ended."""
        return [
            row["id"]
            for row in self.rows("SELECT id FROM jobs WHERE state = 'running' AND lease_until < ?", time.time())
        ]

    def finish(self, id: str, state: str, failure: JobFailure | None = None) -> JobRow | None:
        """End a job.

        Args:
            id: Id of the job.
            state: "done", "failed" or "cancelled".
            failure: Why it failed; None if it did not.

        Returns:
            It; None if it had ended before.
        """
        with self.transaction() as connection:
            job = self.job(id)
            if job is None or job.state not in ("queued", "running"):
                return None
            return self._end(connection, job, state, failure)

    def cancel(self, id: str) -> JobRow | None:
        """Cancel a waiting job, or note that a running one is to stop.

        Args:
            id: Id of the job.

        Returns:
            It; None if there is none.
        """
        with self.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'cancelled', finished_at = ? WHERE id = ? AND state = 'queued'", (now(), id)
            )
            connection.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ? AND state = 'running'", (id,))
            return self.job(id)

    def requeue(self, id: str, *, charged: bool, max_attempts: int, reason: JobFailure) -> JobRow | None:
        """Queue a running job again at its old place, or fail it after its last attempt.

        Args:
            id: Id of the job.
            charged: Whether the attempt counts.
            max_attempts: Number of attempts.
            reason: What ended the attempt.

        Returns:
            The job, or None if it does not run.
        """
        with self.transaction() as connection:
            job = self.job(id)
            if job is None or job.state != "running":
                return None
            if job.cancel_requested:
                return self._end(connection, job, "cancelled", None)
            if charged and job.attempts >= max_attempts:
                message = f"{reason.message}; the job was tried {job.attempts} times"
                return self._end(connection, job, "failed", JobFailure(message, reason.code))
            connection.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - ?, lease_owner = NULL, lease_until = NULL "
                "WHERE id = ?",
                (0 if charged else 1, id),
            )
            return self.job(id)

    def requeue_interrupted(self) -> list[JobRow]:
        """Queue all jobs again that ran when the server ended.

        Returns:
            Them. Called before any worker starts.
        """
        with self.transaction() as connection:
            rows = [_job(row) for row in self.rows("SELECT * FROM jobs WHERE state = 'running'")]
            for job in rows:
                if job.cancel_requested:
                    self._end(connection, job, "cancelled", None)
                    continue
                if job.interruptions >= MAX_INTERRUPTIONS:
                    reason = f"the server ended {job.interruptions + 1} times during the job"
                    self._end(connection, job, "failed", JobFailure(reason, "worker_ended"))
                    continue
                connection.execute(
                    "UPDATE jobs SET state = 'queued', attempts = attempts - 1, interruptions = interruptions + 1, "
                    "lease_owner = NULL, lease_until = NULL WHERE id = ?",
                    (job.id,),
                )
            return [current for job in rows if (current := self.job(job.id)) is not None]

    def retry(self, id: str) -> JobRow | None:
        """Queue a failed or cancelled job again at the end of the queue.

        Args:
            id: Id of the job.

        Returns:
            The job; None if it is neither failed nor cancelled.
        """
        with self.transaction() as connection:
            (last,) = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
            changed = connection.execute(
                "UPDATE jobs SET seq = ?, state = 'queued', attempts = 0, interruptions = 0, error = NULL, "
                "error_code = NULL, cancel_requested = 0, started_at = NULL, finished_at = NULL "
                "WHERE id = ? AND state IN ('failed', 'cancelled')",
                (last + 1, id),
            ).rowcount
            if changed:
                connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'jobs'", (last + 1,))
            return self.job(id) if changed else None

    def restore_job(self, id: str, state: str, mode: str, request: dict[str, Any], created_at: str) -> None:
        """Enter a job whose images exist, unless it is known.

        Args:
            id: Id of the job.
            state: "done", or "cancelled" if images are missing.
            mode: Mode of generation.
            request: Complete request.
            created_at: Time of its first image.
        """
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO jobs (id, state, mode, request, batch_key, group_name, priority, created_at, "
                "finished_at) VALUES (?, ?, ?, ?, '', ?, ?, ?, ?)",
                (
                    id,
                    state,
                    mode,
                    json.dumps(request),
                    request.get("group"),
                    request.get("priority") or 0,
                    created_at,
                    created_at,
                ),
            )

    def _end(
        self, connection: sqlite3.Connection, job: JobRow, state: str, failure: JobFailure | None
    ) -> JobRow | None:
        error, code = (None, None) if failure is None else (failure.message, failure.code)
        connection.execute(
            "UPDATE jobs SET state = ?, error = ?, error_code = ?, finished_at = ?, lease_owner = NULL, "
            "lease_until = NULL WHERE id = ?",
            (state, error, code, now(), job.id),
        )
        return self.job(job.id)

    def forget_old_keys(self) -> None:
        """Remove idempotency keys that are older than `KEY_DAYS`."""
        limit = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=KEY_DAYS)
        with self.transaction() as connection:
            connection.execute("DELETE FROM idempotency WHERE created_at < ?", (limit.isoformat(),))


def _job(row: sqlite3.Row) -> JobRow:
    names = [field.name for field in dataclasses.fields(JobRow)]
    return JobRow(**({name: row[name] for name in names} | {"request": json.loads(row["request"])}))
