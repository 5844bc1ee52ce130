"""Removal of what a server no longer needs: deleted images, uploads without a reference, old idempotency keys."""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import time

from kandinsky22.serve.gallery import Gallery

logger = logging.getLogger("kandinsky22.serve")

INTERVAL_SECONDS = 3600.0
DIGEST = re.compile(r"[0-9a-f]{64}")


async def tidy_regularly(gallery: Gallery) -> None:
    """Delete expired files and records, at once and then every `INTERVAL_SECONDS`.

    Args:
        gallery: Jobs and images of the server.
    """
    while True:
        try:
            await asyncio.to_thread(tidy, gallery)
        except Exception:  # a full disk, for example; the server works without
            logger.exception("old files could not be removed")
        await asyncio.sleep(INTERVAL_SECONDS)


def tidy(gallery: Gallery) -> None:
    """Remove old idempotency keys, deleted images and uploads without a reference.

    Args:
        gallery: Jobs and images of the server.
    """
    gallery.store.forget_old_keys()
    empty_trash(gallery)
    remove_old_uploads(gallery)


def empty_trash(gallery: Gallery) -> int:
    """Remove images from the disk that were deleted `trash_days` ago.

    Args:
        gallery: Jobs and images of the server.

    Returns:
        Their number.
    """
    ids = gallery.store.trashed_before(_days_ago(gallery.settings.trash_days))
    for id in ids:
        gallery.files.delete_image(id)
    gallery.store.remove_images(ids)
    return len(ids)


def remove_old_uploads(gallery: Gallery) -> int:
    """Remove uploads that were last used `upload_days` ago and that no waiting job and no image refers to.

    Args:
        gallery: Jobs and images of the server.

    Returns:
        Their number.
    """
    limit = _days_ago(gallery.settings.upload_days)
    old = gallery.store.uploads_before(limit)
    if old:
        old -= {digest for text in gallery.store.texts_with_references() for digest in DIGEST.findall(text)}
    # An upload that is used again in the meantime has a new time, and is not removed.
    removed = sum(gallery.remove_upload(id, limit) for id in sorted(old))
    return removed + _remove_unknown_uploads(gallery)


def _remove_unknown_uploads(gallery: Gallery) -> int:
    """Remove files of uploads that never entered the database, because the server was killed in between."""
    limit, removed = time.time() - gallery.settings.upload_days * 86400, 0
    for id in gallery.files.upload_ids():
        if gallery.files.upload_time(id) < limit and gallery.store.upload_size(id) is None:
            gallery.files.delete_upload(id)
            removed += 1
    return removed


def _days_ago(days: float) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=days)
    return moment.isoformat()
