"""Removal of deleted images, of uploads without a reference, and of old keys."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import png

from kandinsky22.cli.main import main
from kandinsky22.serve.database import now
from kandinsky22.serve.events import EventHub
from kandinsky22.serve.failures import ApiError, JobFailure
from kandinsky22.serve.files import Files, image_id
from kandinsky22.serve.gallery import Gallery, rebuild
from kandinsky22.serve.housekeeping import tidy
from kandinsky22.serve.image_store import NewImage
from kandinsky22.serve.schemas import JobRequest, Picture
from kandinsky22.serve.settings import ServerSettings
from kandinsky22.serve.store import Store

SIZE = (96, 96)


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    files = Files(tmp_path)
    return Gallery(ServerSettings(state=tmp_path), Store(files.database), files, EventHub())


def days_ago(days: float) -> str:
    return (datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=days)).isoformat()


def upload(gallery: Gallery, color: str, age: float) -> str:
    """Store an upload that was last used some days ago."""
    id = gallery.add_upload(png(color), SIZE)
    with gallery.store.transaction() as connection:
        connection.execute("UPDATE uploads SET created_at = ? WHERE id = ?", (days_ago(age), id))
    return id


def exists(gallery: Gallery, id: str) -> bool:
    return gallery.store.upload_size(id) is not None and gallery.files.upload(id).is_file()


def image(job: str, recipe: dict[str, Any], request: dict[str, Any] | None, **changes: Any) -> NewImage:
    values: dict[str, Any] = {"mode": "img2img", "model": "embedded", "title": "", "seed": 1, "width": 8, "height": 8}
    values |= {"created_at": days_ago(90), "group_name": None, "sha256": "0", "position": 0}
    return NewImage(id=image_id(job, 0), job=job, recipe=recipe, request=request, **{**values, **changes})


def test_uploads_go_when_nothing_refers_to_them(gallery: Gallery) -> None:
    fresh, old, in_request, in_recipe = (
        upload(gallery, color, age) for color, age in (("red", 29), ("green", 31), ("blue", 90), ("white", 90))
    )
    gallery.store.add_image(image("first", {}, {"image": {"upload": in_request}}))
    gallery.store.add_image(image("second", {"image": {"name": "a", "sha256": in_recipe}}, None))
    tidy(gallery)
    assert [exists(gallery, id) for id in (fresh, old, in_request, in_recipe)] == [True, False, True, True]
    assert not gallery.files.upload(old).exists()


def test_waiting_jobs_keep_their_uploads_and_ended_ones_do_not(gallery: Gallery) -> None:
    id = upload(gallery, "red", 0)
    job, _ = gallery.submit(JobRequest(mode="variations", image=Picture(upload=id), seed=1))
    upload(gallery, "red", 90)
    tidy(gallery)
    assert exists(gallery, id)
    gallery.store.finish(job.id, "failed", JobFailure("a crash"))
    tidy(gallery)
    assert not exists(gallery, id)
    with pytest.raises(ApiError, match=r"upload .* does not exist"):
        gallery.picture_size("image", Picture(upload=id))


def test_an_upload_that_is_used_again_is_young_again(gallery: Gallery) -> None:
    by_upload, by_job = upload(gallery, "red", 90), upload(gallery, "blue", 90)
    gallery.add_upload(png("red"), SIZE)
    gallery.picture_size("image", Picture(upload=by_job))
    tidy(gallery)
    assert exists(gallery, by_upload) and exists(gallery, by_job)


def test_files_of_interrupted_uploads_go(gallery: Gallery) -> None:
    old, fresh = gallery.files.save_upload(png("red")), gallery.files.save_upload(png("blue"))
    month = time.time() - 31 * 86400
    os.utime(gallery.files.upload(old), (month, month))
    tidy(gallery)
    assert not gallery.files.upload(old).exists() and gallery.files.upload(fresh).exists()


def test_a_rebuilt_database_knows_uploads_and_their_times(gallery: Gallery) -> None:
    """The command enters what the database lacks; what it has stays as it is."""
    id = gallery.add_upload(png(), SIZE)
    gallery.store.remove_upload(id, "9999")
    assert rebuild(gallery.files, gallery.store, 10**6)["uploads"] == 1
    time.sleep(0.01)
    limit = now()
    time.sleep(0.01)
    assert rebuild(gallery.files, gallery.store, 10**6)["uploads"] == 0
    assert gallery.store.uploads_before(limit) == {id}


def test_rebuild_takes_the_folder_of_the_server_and_sets_a_damaged_database_aside(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery.add_upload(png(), SIZE)
    gallery.store.close()
    folder = gallery.files.database.parent
    gallery.files.database.write_bytes(b"no database" * 1000)
    monkeypatch.setenv("KANDINSKY22_SERVE_STATE", str(folder))
    assert main(["gallery", "rebuild"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{folder}: 0 images, 1 uploads")
    assert "database.sqlite3.damaged-1" in output.err and folder.joinpath("database.sqlite3.damaged-1").exists()


def test_rebuild_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", "rebuild", "--state", str(tmp_path / "none")]) != 0
    assert "a folder that a server has used" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_trash_is_emptied(gallery: Gallery) -> None:
    for job, age in (("old", 31), ("fresh", 29)):
        entry = image(job, {}, None, trashed_at=days_ago(age))
        gallery.files.save_image(entry.id, png(), {})
        gallery.store.add_image(entry)
    tidy(gallery)
    assert gallery.store.image_ids() == {image_id("fresh", 0)}
    assert list(gallery.files.image_ids()) == [image_id("fresh", 0)]
