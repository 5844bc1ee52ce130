"""Jobs and images: the database, the files and the events, kept in step."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kandinsky22.errors import KandinskyError
from kandinsky22.generation.recipe import Recipe, read_recipe
from kandinsky22.serve import messages
from kandinsky22.serve.database import now
from kandinsky22.serve.events import EventHub
from kandinsky22.serve.failures import JobFailure, invalid_request, not_found
from kandinsky22.serve.files import Files, image_id
from kandinsky22.serve.image_store import ImageRow, NewImage
from kandinsky22.serve.job_store import JobRow
from kandinsky22.serve.requests import batch_key, check_job
from kandinsky22.serve.schemas import Failure, ImageInfo, JobInfo, JobRequest, Picture, Progress
from kandinsky22.serve.settings import ServerSettings
from kandinsky22.serve.store import Store

logger = logging.getLogger("kandinsky22.serve")

ENDED = ("done", "failed", "cancelled")


class Gallery:
    """Jobs and images of a server.

    Args:
        settings: Settings of the server.
        store: The database.
        files: The files.
        hub: Receives events.
    """

    def __init__(self, settings: ServerSettings, store: Store, files: Files, hub: EventHub) -> None:
        self.settings, self.store, self.files, self.hub = settings, store, files, hub
        self.progress_of: Callable[[str], Progress | None] = lambda job: None
        self._uploads = threading.Lock()  # a file and its row appear and vanish together

    # Jobs

    def submit(self, job: JobRequest, key: str | None = None) -> tuple[JobRow, bool]:
        """Queue a job.

        Args:
            job: The job.
            key: Idempotency key; None for none.

        Returns:
            The job, and whether it is new.

        Raises:
            KandinskyError: If the job is invalid, or if the queue is full.
        """
        import secrets

        posted = job.model_dump(mode="json", exclude_none=True)
        digest = hashlib.sha256(json.dumps(posted, sort_keys=True).encode()).hexdigest()
        # The answer to a repeated request is the same, also if its input pictures have gone since.
        if key is not None and (known := self.store.job_of_key(key, digest)) is not None:
            return known, False
        if job.seed is None:
            job = job.model_copy(update={"seed": secrets.randbelow(2**32)})
        sizes = {name: self.picture_size(name, picture) for name, picture in job.pictures().items()}
        model = check_job(job, self.settings, sizes)
        job = job.model_copy(update={"model": model.id})
        row, is_new = self.store.add_job(
            job.mode,
            job.model_dump(mode="json", exclude_none=True),
            batch_key(job, model),
            max_waiting=self.settings.max_waiting,
            key=key,
            digest=digest,
        )
        if is_new:
            self.publish_job(row.id, "state")
        return row, is_new

    def claim(self, owner: str, limit: int) -> list[JobRow]:
        """Return the next jobs for a worker, see `Store.claim`.

        Args:
            owner: Name of the worker.
            limit: Largest number of jobs.
        """
        return self.store.claim(owner, limit=limit, lease_seconds=self.settings.lease_seconds)

    def order(self, job: JobRow) -> messages.Order:
        """Return what a worker needs to run a job.

        Args:
            job: The job.
        """
        request = JobRequest.model_validate(job.request)
        for position in range(request.count):
            self._adopt(image_id(job.id, position))
        existing = {image.position for image in self.store.images_of(job.id)}
        inputs = {name: str(self.picture_path(picture)) for name, picture in request.pictures().items()}
        positions = tuple(position for position in range(request.count) if position not in existing)
        return messages.Order(job.id, job.request, job.created_at, inputs, positions)

    def cancel(self, job: str) -> JobRow:
        """Cancel a job. A running one stops when its worker is told so.

        Args:
            job: Id of the job.

        Returns:
            The job.

        Raises:
            ApiError: If there is no such job.
        """
        row = self.store.cancel(job)
        if row is None:
            raise not_found("job")
        if row.state == "cancelled":
            self._publish_end(job)
        return row

    def finish(self, job: str, state: str, failure: JobFailure | None = None) -> None:
        """End a job and tell everyone.

        Args:
            job: Id of the job.
            state: "done", "failed" or "cancelled".
            failure: Why it failed; None if it did not.
        """
        if self.store.finish(job, state, failure) is not None:
            self._publish_end(job)

    def try_again(self, job: str, *, charged: bool, reason: JobFailure) -> None:
        """Queue a job again whose attempt has ended, or fail it after its last attempt.

        Args:
            job: Id of the job.
            charged: Whether the attempt counts.
            reason: What ended the attempt.
        """
        row = self.store.requeue(job, charged=charged, max_attempts=self.settings.max_attempts, reason=reason)
        if row is None:
            return
        if row.state in ENDED:
            self._publish_end(job)
        else:
            self.publish_job(job, "state")

    def job_info(self, job: JobRow) -> JobInfo:
        """Return a job as the API shows it.

        Args:
            job: The job.
        """
        return JobInfo(
            id=job.id,
            state=job.state,  # type: ignore[arg-type]  # the database checks it
            mode=job.mode,
            request=job.request,
            group=job.group_name,
            priority=job.priority,
            attempts=job.attempts,
            position=self.store.position(job),
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            progress=self.progress_of(job.id) if job.state == "running" else None,
            images=[image_info(image) for image in self.store.images_of(job.id) if image.trashed_at is None],
            error=None if job.error is None else Failure(message=job.error, code=job.failure.code),
        )

    def publish_job(self, id: str, name: str) -> None:
        """Send a job to all listeners.

        Args:
            id: Id of the job.
            name: Name of the event, "state" or "end".
        """
        if (job := self.store.job(id)) is not None:
            self.hub.publish(name, self.job_info(job).model_dump(), id)

    def _publish_end(self, job: str) -> None:
        self.publish_job(job, "state")
        self.publish_job(job, "end")

    # Images

    def enter(self, id: str) -> None:
        """Enter an image whose files are on the disk, unless it is known, and tell everyone.

        Args:
            id: Id of the image.
        """
        image = read_image(self.files, id)
        if image is not None and self.store.add_image(image):
            row = self.store.image(id)
            assert row is not None
            self.hub.publish("image", image_info(row).model_dump(), row.job)
            self.hub.publish("gallery", {"added": [id], "removed": [], "changed": []})

    def _adopt(self, id: str) -> None:
        """Enter an image that was written right before the server or the worker ended."""
        if self.store.image(id) is None and self.files.image(id).is_file():
            self.enter(id)

    def change(self, id: str, *, starred: bool | None = None, trashed: bool | None = None) -> ImageRow:
        """Star an image or move it to the trash or back, also in its record.

        Args:
            id: Id of the image.
            starred: Whether it is starred; None keeps it.
            trashed: Whether it is in the trash; None keeps it.

        Returns:
            The image.

        Raises:
            ApiError: If there is no such image.
        """
        row = self.store.image(id)
        if row is None:
            raise not_found("image")
        record = self.files.read_record(id)
        if starred is not None:
            record["starred"] = starred
        if trashed is not None:
            record["trashed_at"] = now() if trashed else None
        self.files.save_record(id, record)
        if starred is not None:
            row = self.store.set_starred(id, starred)
        if trashed is not None:
            row = self.store.set_trashed(id, trashed)
        assert row is not None
        kinds = {"added": [id] if trashed is False else [], "removed": [id] if trashed else []}
        self.hub.publish("gallery", {**kinds, "changed": [id] if starred is not None else []})
        return row

    # Input pictures

    def add_upload(self, content: bytes, size: tuple[int, int]) -> str:
        """Store an upload.

        Args:
            content: Bytes of the file, which have been checked.
            size: Width and height in pixels.

        Returns:
            Its id.
        """
        with self._uploads:
            id = self.files.save_upload(content)
            self.store.add_upload(id, size)
        return id

    def remove_upload(self, id: str, before: str) -> bool:
        """Remove an upload, unless it was used since a time.

        Args:
            id: Id of the upload.
            before: Time in ISO 8601, in UTC.

        Returns:
            Whether it was removed.
        """
        with self._uploads:
            is_removed = self.store.remove_upload(id, before)
            if is_removed:
                self.files.delete_upload(id)
        return is_removed

    def picture_size(self, name: str, picture: Picture) -> tuple[int, int]:
        """Return the (width, height) of an input picture.

        Args:
            name: Name of the argument, for messages.
            picture: Reference to the picture.

        Raises:
            ApiError: If the server does not have it.
        """
        if picture.upload is not None:
            with self._uploads:
                size = self.store.upload_size(picture.upload)
                if size is None or not self.files.upload(picture.upload).is_file():
                    raise invalid_request(f"the upload {picture.upload[:16]}... does not exist", name)
                self.store.add_upload(picture.upload, size)  # it is in use, and not removed before the job refers to it
            return size
        row = self.store.image(str(picture.image))
        if row is None or not self.files.image(row.id).is_file():
            raise invalid_request(f"there is no image {picture.image}", name)
        return row.width, row.height

    def picture_path(self, picture: Picture) -> Path:
        """Return the path of an input picture.

        Args:
            picture: Reference to the picture.
        """
        if picture.upload is not None:
            return self.files.upload(picture.upload)
        return self.files.image(str(picture.image))

    # Start

    def recover(self) -> None:
        """Bring database and files together after the server was ended at any moment. No worker runs yet."""
        jobs = self.store.requeue_interrupted()
        for job in jobs:
            for position in range(JobRequest.model_validate(job.request).count):
                self._adopt(image_id(job.id, position))
        missing = [id for id in self.store.image_ids() if not self.files.image(id).is_file()]
        if missing:
            logger.warning("%d images are missing on the disk and leave the gallery", len(missing))
            self.store.remove_images(missing)


def image_info(image: ImageRow) -> ImageInfo:
    """Return an image as the API shows it.

    Args:
        image: The image.
    """
    return ImageInfo(
        id=image.id,
        job=image.job,
        group=image.group_name,
        created_at=image.created_at,
        mode=image.mode,
        model=image.model,
        title=image.title,
        seed=image.seed,
        width=image.width,
        height=image.height,
        sha256=image.sha256,
        starred=image.starred,
        url=f"/api/images/{image.id}/file",
        thumbnail=f"/api/images/{image.id}/thumbnail",
    )


def read_image(files: Files, id: str) -> NewImage | None:
    """Return an image as its files describe it, or None if the picture cannot be read.

    Args:
        files: The files.
        id: Id of the image.
    """
    import PIL.Image

    path = files.image(id)
    try:
        content = path.read_bytes()
        recipe = read_recipe(path)
        with PIL.Image.open(path) as image:
            width, height = image.size
    except (OSError, KandinskyError):
        return None
    record = files.read_record(id)
    request = record.get("request")
    return NewImage(
        id=id,
        job=_text(record, "job") or id,
        position=record["position"] if isinstance(record.get("position"), int) else 0,
        group_name=_text(record, "group"),
        created_at=_text(record, "created_at") or _file_time(path.stat().st_mtime),
        mode=_text(record, "mode") or recipe.command,
        model=_text(record, "model") or recipe.model,
        title=_text(record, "title") or _recipe_title(recipe),
        seed=recipe.seeds[0],
        width=width,
        height=height,
        sha256=hashlib.sha256(content).hexdigest(),
        recipe=json.loads(recipe.to_json()),
        request=request if isinstance(request, dict) else None,
        starred=record.get("starred") is True,
        trashed_at=_text(record, "trashed_at"),
    )


def rebuild(files: Files, store: Store, max_pixels: int) -> Mapping[str, int]:
    """Enter all pictures and uploads of the disk into a database that lacks them.

    Args:
        files: The files.
        store: The database.
        max_pixels: Largest number of pixels of an upload.

    Returns:
        The numbers of entered and of unreadable "images" and "uploads".
    """
    from kandinsky22.serve.files import checked_upload

    counts = {"images": 0, "uploads": 0, "unreadable images": 0, "unreadable uploads": 0}
    readable = []
    for id in files.image_ids():
        image = read_image(files, id)
        if image is None:
            counts["unreadable images"] += 1
        else:
            readable.append(image)
    readable.sort(key=lambda image: (image.created_at, image.position))
    counts["images"] = sum(store.add_image(image) for image in readable)
    for image in readable:
        if image.request is not None:
            created_at = _text(files.read_record(image.id), "job_created_at") or image.created_at
            is_complete = len(store.images_of(image.job)) >= int(image.request.get("count") or 1)
            state = "done" if is_complete else "cancelled"  # a cancelled job can be run again
            store.restore_job(image.job, state, image.mode, image.request, created_at)
    for id in files.upload_ids():
        if store.upload_size(id) is not None:
            continue
        try:
            size = checked_upload(files.upload(id).read_bytes(), max_pixels)
        except (OSError, KandinskyError):
            counts["unreadable uploads"] += 1
            continue
        store.add_upload(id, size)
        counts["uploads"] += 1
    return counts


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    return value if isinstance(value, str) else None


def _file_time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _recipe_title(recipe: Recipe) -> str:
    if recipe.prompt:
        return recipe.prompt
    if recipe.parts is not None:
        return ", ".join(f"{item.weight:g} {item.text or 'picture'}" for item in recipe.parts)
    return recipe.command
