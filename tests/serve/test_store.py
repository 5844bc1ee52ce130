"""The queue and the gallery in the database, without a server."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import png

from kandinsky22.errors import InputError, KandinskyError
from kandinsky22.serve.database import UnreadableDatabaseError, set_aside
from kandinsky22.serve.failures import JobFailure
from kandinsky22.serve.files import Files, checked_upload, image_id, lock_folder
from kandinsky22.serve.image_store import ImageQuery, NewImage
from kandinsky22.serve.job_store import MAX_INTERRUPTIONS, KeyReusedError, QueueFullError
from kandinsky22.serve.schema import MIGRATIONS, VERSION, migrate
from kandinsky22.serve.store import Store

CRASH = JobFailure("a crash", "worker_ended")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "database.sqlite3")


def add(store: Store, batch_key: str = "", *, max_waiting: int = 100, **request: Any) -> str:
    return store.add_job("generate", request, batch_key, max_waiting=max_waiting)[0].id


def claim(store: Store, limit: int = 1) -> list[str]:
    return [job.id for job in store.claim("worker", limit=limit, lease_seconds=10)]


def test_first_come_first_served_within_a_priority(store: Store) -> None:
    jobs = [add(store, priority=priority) for priority in (0, 1, 0, 1)]
    assert [store.position(job) for id in jobs if (job := store.job(id))] == [2, 0, 3, 1]
    assert [claim(store) for _ in range(5)] == [[jobs[1]], [jobs[3]], [jobs[0]], [jobs[2]], []]


def test_only_neighbours_with_equal_keys_share_a_batch(store: Store) -> None:
    jobs = [add(store, key) for key in "aaabaa"]
    assert claim(store, 2) == jobs[:2]
    assert claim(store, 8) == jobs[2:3]
    assert claim(store, 8) == jobs[3:4]
    store.requeue(jobs[0], charged=True, max_attempts=3, reason=CRASH)
    assert claim(store, 8) == jobs[:1]  # a job that may have crashed its worker runs alone
    assert claim(store, 8) == jobs[4:]


def test_two_workers_never_get_the_same_job(store: Store) -> None:
    jobs = {add(store) for _ in range(40)}
    taken: list[str] = []

    def work() -> None:
        while ids := claim(store):
            taken.extend(ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(jobs)


def test_attempts_are_charged_for_crashes_and_not_for_ends_of_the_server(store: Store) -> None:
    job = add(store)
    for _ in range(MAX_INTERRUPTIONS):
        claim(store)
        store.requeue_interrupted()
    row = store.job(job)
    assert row is not None and (row.state, row.attempts) == ("queued", 0)
    claim(store)
    assert [row.state for row in store.requeue_interrupted()] == ["failed"]
    other = add(store)
    for _ in range(2):
        claim(store)
        row = store.requeue(other, charged=True, max_attempts=2, reason=CRASH)
    assert row is not None and row.state == "failed" and row.error == "a crash; the job was tried 2 times"
    assert row.failure.code == "worker_ended" and row.failure.api_error.status == 500
    assert store.retry(other) is not None and claim(store) == [other]


def test_cancelled_jobs_stay_cancelled_whatever_ends_their_worker(store: Store) -> None:
    jobs = [add(store) for _ in range(3)]
    claim(store, 2)
    claim(store)
    for job in jobs:
        store.cancel(job)
    row = store.requeue(jobs[0], charged=True, max_attempts=3, reason=CRASH)
    assert row is not None and row.state == "cancelled"
    assert {row.state for row in store.requeue_interrupted()} == {"cancelled"}


def test_leases_end_without_a_sign_of_life(store: Store) -> None:
    jobs = [add(store, "equal") for _ in range(2)]
    assert store.claim("worker", limit=2, lease_seconds=-1) and store.expired() == jobs
    store.renew(jobs[:1], 10)
    assert store.expired() == jobs[1:]


def test_keys_and_limits(store: Store) -> None:
    def submit(digest: str) -> tuple[str, bool]:
        job, is_new = store.add_job("generate", {}, "", max_waiting=1, key="a key", digest=digest)
        return job.id, is_new

    first = submit("a")
    assert submit("a") == (first[0], False)
    with pytest.raises(KeyReusedError):
        submit("b")
    with pytest.raises(QueueFullError):
        add(store, max_waiting=1)


def test_an_image_enters_once(store: Store) -> None:
    image = NewImage(
        id=image_id("job", 0),
        job="job",
        position=0,
        group_name=None,
        created_at="2026-01-01T00:00:00.000Z",
        mode="generate",
        model="embedded",
        title="a star",
        seed=1,
        width=8,
        height=8,
        sha256="0",
        recipe={},
        request=None,
    )
    assert store.add_image(image) and not store.add_image(image)
    assert [row.id for row in store.images(ImageQuery("STAR"), before=None, limit=9)] == [image.id]


def test_databases_of_newer_versions_are_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.sqlite3", isolation_level=None)
    migrate(connection)
    migrate(connection)  # nothing is left to do
    assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(KandinskyError, match="reads up to"):
        migrate(connection)


def test_jobs_of_the_first_version_have_no_kind_of_failure(tmp_path: Path) -> None:
    path = tmp_path / "database.sqlite3"
    with sqlite3.connect(path, isolation_level=None) as connection:
        for statement in MIGRATIONS[0]:
            connection.execute(statement)
        connection.execute("PRAGMA user_version = 1")
        connection.execute(
            "INSERT INTO jobs (id, state, mode, request, batch_key, created_at, error) "
            "VALUES ('x', 'failed', 'generate', '{}', '', '', 'an error')"
        )
    row = Store(path).job("x")
    assert row is not None and row.failure == JobFailure("an error", "generation_failed")
    assert row.failure.api_error.status == 422


@pytest.mark.parametrize("content", [b"no database at all" * 500, bytes(8192)])
def test_a_damaged_database_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "database.sqlite3"
    path.write_bytes(content)
    with pytest.raises(UnreadableDatabaseError, match="gallery rebuild"):
        Store(path)
    assert path.read_bytes() == content
    assert set_aside(path).read_bytes() == content and not path.exists()
    path.write_bytes(content)
    assert set_aside(path) != set_aside(path.parent / "none")


def test_damage_within_a_database_is_found(tmp_path: Path) -> None:
    path = tmp_path / "database.sqlite3"
    store = Store(path)
    for _ in range(50):
        add(store, prompt="x" * 500)
    store.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(UnreadableDatabaseError):
        Store(path)


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.sqlite3", isolation_level=None)
    connection.execute("CREATE TABLE uploads (id TEXT)")  # in the way of the first version's last tables
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection)
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'jobs'").fetchall() == []


def test_files_appear_whole_and_under_exact_ids_only(tmp_path: Path) -> None:
    files = Files(tmp_path)
    id = image_id("job", 0)
    files.save_image(id, png(), {"job": "job"})
    assert list(files.image_ids()) == [id] and files.read_record(id) == {"job": "job"}
    upload = files.save_upload(png("blue"))
    assert list(files.upload_ids()) == [upload]
    for wrong in ("", "..", "../x", id + "\n", id + "x", "/" + id[1:], "a" * 64):
        with pytest.raises(InputError):
            files.image(wrong)
    assert not [path for path in tmp_path.rglob(".*")]
    with pytest.raises(InputError, match="at most 100"):
        checked_upload(png(size=(11, 10)), 100)


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    assert lock > 0
