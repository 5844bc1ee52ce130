"""Files in the Hub cache: downloads that resume after an interruption, digests, and removal.

The cache stores the content of a file once, as `blobs/<etag>`. For files of the Hub's large storage the etag is the
SHA-256 of the content, for all others it is that of git: SHA-1 of a header and the content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.locks import lock_file
from kandinsky22.errors import CheckpointError, KandinskyError

SHA256, GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
PART = ".kandinsky22.part"  # ending of the name of an unfinished download
BLOCK_BYTES = 1 << 20
INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A checkpoint in the Hub cache.

    Attributes:
        name: Its Hub id.
        class_name: Class in its `model_index.json`.
        folder: Folder of its newest complete snapshot.
        bytes: Size of all its files.
        files: Number of files in the folder.
    """

    name: str
    class_name: str
    folder: Path
    bytes: int
    files: int


def file_digest(path: Path, kind: str = "sha256") -> str:
    """Return the hexadecimal digest of a file.

    Args:
        path: The file.
        kind: "sha256", or "git" for the SHA-1 that git computes.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        if kind == "git":
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def has_digest(path: Path, etag: str) -> bool | None:
    """Return whether a file has the content that an etag of the Hub stands for; None if the etag is no digest.

    Args:
        path: The file.
        etag: The etag.

    Raises:
        OSError: If the file cannot be read.
    """
    if SHA256.fullmatch(etag):
        return file_digest(path) == etag
    return file_digest(path, "git") == etag if GIT_SHA1.fullmatch(etag) else None


def download_files(
    repository: str, commit: str | None, names: Iterable[str], *, cache_dir: Path | None, token: str | bool | None
) -> None:
    """Download the content of files into the Hub cache, continuing earlier downloads that were interrupted.

    A file with another digest than the Hub's is deleted and downloaded again, once. `snapshot_download` then finds
    the content and only gives it its name.

    Args:
        repository: Hub id.
        commit: Commit of the files; None for the default branch.
        names: Names of the files.
        cache_dir: Folder of the Hub cache; None for the default.
        token: Access token of the Hub.

    Raises:
        CheckpointError: If the content that the Hub sends has another digest, or another process downloads it.
        Exception: What the Hub client raises if it cannot reach the Hub.
    """
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(cache_dir or HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
    for name in names:
        url = hub.hf_hub_url(repository, name, revision=commit)
        metadata = hub.get_hf_file_metadata(url, token=token)
        if metadata.etag is None or metadata.size is None or not re.fullmatch(r"[\w.-]+", metadata.etag):
            continue  # left to the Hub client
        blob = blobs / metadata.etag
        blobs.mkdir(parents=True, exist_ok=True)
        if blob.exists() and has_digest(blob, metadata.etag) is not False:
            continue
        for attempt in (1, 2):
            with _locked_part(blob.with_name(metadata.etag + PART), name) as part:
                _continue_download(url, part, metadata.size, _headers(token))
                part.flush()
                path = Path(part.name)
                if has_digest(path, metadata.etag) is not False:
                    os.replace(path, blob)
                    break
                path.unlink()
            if attempt == 2:
                raise CheckpointError(f"{name} of {repository} arrived with another digest than {metadata.etag} twice")


def _headers(token: str | bool | None) -> dict[str, str]:
    from huggingface_hub import utils

    headers: dict[str, str] = utils.build_hf_headers(token=token)  # type: ignore[attr-defined]  # not re-exported
    return headers


@contextlib.contextmanager
def _locked_part(path: Path, name: str) -> Iterator[BinaryIO]:
    """Yield an unfinished download, open for appending, which no other process may write meanwhile."""
    with path.open("ab") as file:
        if lock_file(file.fileno()) is False:
            raise CheckpointError(f"{name} is being downloaded by another process; try again when it has finished")
        yield file  # closing the file releases the lock


def _continue_download(url: str, part: BinaryIO, size: int, headers: dict[str, str]) -> None:
    from huggingface_hub.file_download import http_get

    part.seek(0, os.SEEK_END)
    present = part.tell()
    if present > size:
        part.truncate(0)
        present = 0
    http_get(url, part, resume_size=present, headers=headers, expected_size=size)


# The cache


def cached_models(cache_dir: Path | None = None) -> list[CachedModel]:
    """Return the pipelines in the Hub cache, sorted by name. Only their index is read.

    Args:
        cache_dir: Folder of the Hub cache; None for the default.
    """
    models = []
    for repository in _repositories(cache_dir):
        for revision in sorted(repository.revisions, key=lambda revision: revision.last_modified, reverse=True):
            folder = Path(revision.snapshot_path)
            with contextlib.suppress(KandinskyError):
                class_name = read_json(folder / INDEX).get("_class_name")
                if isinstance(class_name, str):
                    size = repository.size_on_disk
                    models.append(CachedModel(repository.repo_id, class_name, folder, size, revision.nb_files))
                    break
    return sorted(models, key=lambda model: model.name)


def cached_size(name: str, cache_dir: Path | None = None) -> int:
    """Return the size of all files of a repository in the Hub cache, in bytes.

    Args:
        name: Hub id.
        cache_dir: Folder of the Hub cache; None for the default.

    Raises:
        CheckpointError: If the cache does not have the repository.
    """
    return int(_repository(name, cache_dir).size_on_disk)


def remove_cached(name: str, cache_dir: Path | None = None) -> int:
    """Remove all files of a repository from the Hub cache.

    Args:
        name: Hub id.
        cache_dir: Folder of the Hub cache; None for the default.

    Returns:
        Number of bytes that this frees.

    Raises:
        CheckpointError: If the cache does not have the repository.
    """
    import shutil

    folder = Path(_repository(name, cache_dir).repo_path)
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    shutil.rmtree(folder)
    return freed


def _repository(name: str, cache_dir: Path | None) -> Any:
    for repository in _repositories(cache_dir):
        if repository.repo_id == name:
            return repository
    raise CheckpointError(f"{name!r} is not in the Hub cache; see: kandinsky22 models list")


def _repositories(cache_dir: Path | None) -> list[Any]:
    """Return the model repositories of the cache; none if there is no cache."""
    import huggingface_hub as hub

    try:
        return [each for each in hub.scan_cache_dir(cache_dir).repos if each.repo_type == "model"]
    except (hub.CacheNotFound, ValueError):
        return []
