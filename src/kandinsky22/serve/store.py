"""The database of a server."""

from __future__ import annotations

from kandinsky22.serve.image_store import ImageStore
from kandinsky22.serve.job_store import JobStore


class Store(JobStore, ImageStore):
    """The database of a server: jobs, images, uploads and idempotency keys."""
