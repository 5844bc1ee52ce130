"""Single files are written by several processes at once, and nothing is left of those that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky22.adapters import files
from kandinsky22.adapters.files import write_adapter
from kandinsky22.adapters.updates import LowRankUpdate
from kandinsky22.checkpoints import atomic_files, locks, subject_file
from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.subject_file import Subject, load_subject, save_subject
from kandinsky22.errors import CheckpointError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files are locked on POSIX systems")
ADAPTER = {"unet": {"layer.weight": LowRankUpdate(torch.ones(2, 4), torch.ones(4, 2), 2.0)}}


def write(path: Path) -> None:
    write_adapter(path.parent, ADAPTER, weight_name=path.name)


SAVES: dict[str, tuple[Any, Callable[[Path], None]]] = {
    "adapter": (files, write),
    "subject": (subject_file, lambda path: save_subject(path, Subject(torch.zeros(1, 4), "digest", 1))),
}


@pytest.mark.parametrize("kind", SAVES)
def test_a_save_during_another_one_disturbs_neither(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors replaces the temporary file of the first save; the second must not take it for abandoned."""
    module, save = SAVES[kind]
    path = tmp_path / "file.safetensors"
    saves: list[Any] = []

    def save_file_slowly(tensors: Any, temporary: Path, *arguments: Any, **options: Any) -> None:
        save_file(tensors, temporary, *arguments, **options)
        saves.append(temporary)
        if len(saves) == 1:
            save(path)

    monkeypatch.setattr(module, "save_file", save_file_slowly)
    save(path)
    assert len(saves) == 2 and os.listdir(tmp_path) == [path.name]
    assert load_file(path)


@pytest.mark.parametrize("kind", SAVES)
def test_threads_that_save_one_file(kind: str, tmp_path: Path) -> None:
    save, errors = SAVES[kind][1], list[BaseException]()

    def run() -> None:
        try:
            for _ in range(20):
                save(tmp_path / "file.safetensors")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["file.safetensors"]


KILLED = """
import os, signal, sys
import torch
from safetensors.torch import save_file
from kandinsky22.checkpoints.atomic_files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    save_file({"a": torch.zeros(1)}, temporary)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["a.safetensors", "TOKEN.json", "a.lock", "a"])
def test_the_files_of_a_killed_save_are_deleted_by_the_next(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], env=environment, check=False)
    assert len(os.listdir(tmp_path)) == 2, "the temporary file and its lock file"
    with atomic_write(tmp_path / name) as temporary:
        assert len(os.listdir(tmp_path)) == 2
        temporary.write_text("new")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "new"


def test_without_locks_the_age_of_both_files_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    names = [".a.json.saving-0123456789ab.json", ".a.json.saving-0123456789ab.lock"]
    for name in names:
        (tmp_path / name).touch()
    for name in (None, *names):
        if name is not None:
            assert sorted(os.listdir(tmp_path)) == sorted([*names, "a.json"])
            os.utime(tmp_path / name, (0, 0))
        atomic_files.write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


def test_temporary_files_of_earlier_releases_are_deleted(tmp_path: Path) -> None:
    """They had no lock file, and were locked themselves."""
    temporary = tmp_path / ".a.json.saving-0123456789ab.json"
    temporary.touch()
    descriptor = os.open(temporary, os.O_RDWR)
    assert locks.lock_file(descriptor)
    atomic_files.write_json(tmp_path / "a.json", {})
    assert temporary.exists()
    locks.unlock(descriptor)
    atomic_files.write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "settings",
    [
        '{"image_encoder": "a", "pictures": Infinity}',
        '{"image_encoder": "a", "pictures": NaN}',
        '{"image_encoder": "a", "pictures": 1.5}',
        '{"image_encoder": "a", "pictures": "3"}',
        '{"image_encoder": "a", "pictures": true}',
        '{"image_encoder": "a", "pictures": -1}',
        '{"image_encoder": "a", "pictures": 1e400}',
        '{"image_encoder": 5, "pictures": 1}',
        '{"image_encoder": null, "pictures": 1}',
        '{"pictures": 1}',
        "[]",
        "5",
    ],
)
def test_settings_that_no_subject_has(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "subject.safetensors"
    save_file({"image_embeds": torch.zeros(1, 8)}, path, {"kandinsky22_subject": settings})
    with pytest.raises(CheckpointError, match="is not a subject"):
        load_subject(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_embeddings_of_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "subject.safetensors"
    settings = '{"image_encoder": "a", "pictures": 1}'
    save_file({"image_embeds": torch.ones(1, 8, dtype=dtype)}, path, {"kandinsky22_subject": settings})
    with pytest.raises(CheckpointError, match="is not a subject"):
        load_subject(path)
