"""Saves of several files appear together; interrupted ones are completed or deleted, hostile journals are refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.tiny_models import TINY_MOVQ, assert_same_weights

from kandinsky22 import CheckpointError, ConfigError, InputError, KandinskyV22Pipeline, VQModel
from kandinsky22.checkpoints import atomic_files, folder_save, locks
from kandinsky22.checkpoints.folder_save import JOURNAL, complete_saves, read_consistently
from kandinsky22.checkpoints.hub import CheckpointSource

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
SHARDED = {"max_shard_size": "100KB"}


def content(folder: Path) -> dict[str, str]:
    """All files by path, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save_files(folder: Path, files: dict[str, str], removed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Save files, those of subfolders as components."""
    with folder_save.folder_save(folder) as save:
        for name, text in files.items():
            subfolder, _, file = name.rpartition("/")
            (save.stage(subfolder) / file).write_text(text)
        save.replace("", removed.intersection)


OLD = {"model_index.json": "old", "unet/config.json": "old", "unet/stale": "old", "README.md": "user"}
NEW = {"model_index.json": "new", "unet/config.json": "new", "movq/config.json": "new"}


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up."""


@contextlib.contextmanager
def killed_after(moves: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill the saving process after its commit and a number of moved files."""
    count = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        if count == moves:
            raise Killed
        count += 1
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folder_save.os, "replace", replace)
        with pytest.raises(Killed):
            yield


def test_files_appear_together_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    save_files(tmp_path, NEW)
    assert content(tmp_path) == {**OLD, **NEW}
    save_files(tmp_path, {"model_index.json": "third"}, removed={"README.md", "model_index.json", "absent"})
    assert content(tmp_path) == {**NEW, "unet/stale": "old", "model_index.json": "third"}


def test_a_failure_leaves_the_old_files(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    with pytest.raises(CheckpointError, match="disk full"), folder_save.folder_save(tmp_path) as save:
        (save.stage("movq") / "config.json").write_text("new")
        raise OSError(errno.ENOSPC, "disk full")
    assert content(tmp_path) == OLD
    assert not (tmp_path / "movq").exists()


@pytest.mark.parametrize("moves", range(5))
def test_a_failure_after_the_commit_restores_the_old_files(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OLD)
    calls: list[Any] = []

    def replace(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == moves + 1:
            raise PermissionError(errno.EPERM, "write-protected")
        os.rename(source, target)

    monkeypatch.setattr(folder_save.os, "replace", replace)
    with pytest.raises(CheckpointError, match="write-protected"):
        save_files(tmp_path, NEW)
    assert content(tmp_path) == OLD


@pytest.mark.parametrize("moves", range(5))
def test_committed_saves_are_completed(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OLD)
    with killed_after(moves, monkeypatch):
        save_files(tmp_path, NEW)
    seen = content(tmp_path)
    assert JOURNAL in seen
    index, network = seen.get("model_index.json"), seen.get("unet/config.json")
    assert (index, network) in {("old", "old"), (None, "old"), (None, None), (None, "new"), ("new", "new")}
    complete_saves(tmp_path / "unet" if moves % 2 else tmp_path)  # a component is loaded, or the pipeline
    assert content(tmp_path) == {**OLD, **NEW}


@pytest.mark.parametrize("moves", range(5))
def test_a_folder_is_found_after_an_interrupted_save(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("decoder", "prior"):
        write(tmp_path / name, OLD)
        with killed_after(moves, monkeypatch):
            save_files(tmp_path / name, NEW)
    source = CheckpointSource(tmp_path / "decoder")
    assert (source.fetch(lambda names: names) / "model_index.json").read_text() == "new"
    assert Path(source.matching_prior().name) == tmp_path / "prior"


def test_new_files_have_the_permissions_of_the_umask_which_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    umask = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("other threads would create files with this mask"))
            atomic_files.write_json(tmp_path / "file.json", {})
        assert atomic_files.permissions(tmp_path / "file.json") == 0o640
        (tmp_path / "file.json").chmod(0o600)
        with atomic_files.atomic_write(tmp_path / "file.json") as temporary:
            assert atomic_files.permissions(temporary) == 0o600
    finally:
        os.umask(umask)


@pytest.mark.parametrize("name", ["\N{GREEK SMALL LETTER ALPHA}" * 125 + ".json", "\N{PARTY POPPER}" * 62 + ".json"])
def test_names_of_the_greatest_length(name: str, tmp_path: Path) -> None:
    atomic_files.write_json(tmp_path / name, {})
    assert os.listdir(tmp_path) == [name]


def test_a_save_completes_an_earlier_one_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_after(1, monkeypatch):
        save_files(tmp_path, NEW)
    save_files(tmp_path / "unet", {"config.json": "third"})
    assert content(tmp_path) == {**NEW, "unet/config.json": "third"}


def test_folders_under_the_name_of_a_file_are_refused_before_anything_changes(tmp_path: Path) -> None:
    write(tmp_path, {**OLD, "movq/config.json/inside": "user"})
    with pytest.raises(CheckpointError, match=r"config\.json is a folder"):
        save_files(tmp_path, NEW)
    assert content(tmp_path) == {**OLD, "movq/config.json/inside": "user"}


def test_permissions_are_those_of_the_replaced_file(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    (tmp_path / "model_index.json").chmod(0o600)
    save_files(tmp_path, NEW)
    assert (tmp_path / "model_index.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "plain").touch()
    assert atomic_files.permissions(tmp_path / "movq" / "config.json") == atomic_files.permissions(tmp_path / "plain")


def test_component_folders_may_be_links(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(elsewhere)
    save_files(tmp_path / "model", NEW)
    assert content(elsewhere) == {"config.json": "new"}
    assert (tmp_path / "model" / "unet").is_symlink()


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def move(source: Any, target: Any) -> None:
        events.append(f"rename {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", move)
    save_files(tmp_path, NEW)
    commit = events.index(f"rename {JOURNAL}")
    before, after = events[:commit], events[commit + 1 :]
    for name in ("model_index.json", "config.json", "journal.json", "new"):
        assert any(event.endswith(f"/{name}") for event in before), name
    assert {str(tmp_path), str(tmp_path / "unet"), str(tmp_path / "movq")} <= set(after)


# Staging folders and temporary files of killed processes


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.folder_save import FolderSave
save = FolderSave(Path(sys.argv[1]))
(save.stage("unet") / "config.json").write_text("half")
with atomic_write(Path(sys.argv[1]) / "picture.png"):
    print("written", flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED_SAVE, str(folder), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def test_the_next_save_deletes_what_killed_ones_have_left(tmp_path: Path) -> None:
    write(tmp_path, {"model_index.json": "old", ".saving-notes/mine": "user", ".picture.png.bak.png": "user"})
    with start(tmp_path) as process:
        process.wait()
    assert len(list(tmp_path.glob(".saving-*"))) == 2, "and the user's own"
    assert len(list(tmp_path.glob("unet/.saving-*"))) == 1
    with atomic_files.atomic_write(tmp_path / "picture.png") as temporary:
        temporary.write_text("picture")
    save_files(tmp_path, {"model_index.json": "new"})
    assert content(tmp_path) == {
        "model_index.json": "new",
        "picture.png": "picture",
        ".saving-notes/mine": "user",
        ".picture.png.bak.png": "user",
    }


def test_running_saves_are_left_alone(tmp_path: Path) -> None:
    with start(tmp_path, "wait") as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        before = content(tmp_path)
        save_files(tmp_path, {"model_index.json": "new"})
        atomic_files.write_json(tmp_path / "picture.png", {})
        assert {**before, "model_index.json": "new"}.items() <= content(tmp_path).items()
        process.kill()


def test_a_locked_folder_is_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_TIMEOUT", 0.05)
    with locks.locked_folders([tmp_path]) as are_locked:
        assert are_locked
        with pytest.raises(CheckpointError, match=f"{tmp_path} is locked by another process"):
            save_files(tmp_path, NEW)
    assert content(tmp_path) == {}


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    write(tmp_path, OLD)
    with killed_after(2, monkeypatch):
        save_files(tmp_path, NEW)
    monkeypatch.setattr(folder_save, "LOCK_TIMEOUT", 0.05)  # the other process may still be saving
    complete_saves(tmp_path)
    (tmp_path / ".saving-0123456789abcdef").mkdir()
    save_files(tmp_path, {"model_index.json": "third"})
    assert (tmp_path / ".saving-0123456789abcdef").is_dir()
    os.utime(tmp_path / ".saving-0123456789abcdef", (0, 0))
    save_files(tmp_path, {"model_index.json": "third"})
    assert content(tmp_path) == {**OLD, **NEW, "model_index.json": "third"}
    assert not list(tmp_path.glob(".saving-*"))


def test_threads_that_save_into_one_folder(tmp_path: Path) -> None:
    versions = [{name: str(number) for name in ("model_index.json", "unet/a", "movq/b")} for number in range(6)]
    threads = [threading.Thread(target=save_files, args=(tmp_path, version)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path) in versions


# Reading


@pytest.mark.parametrize("error", [CheckpointError, ConfigError, InputError])
def test_folders_that_are_replaced_meanwhile_are_read_again(error: type[Exception], tmp_path: Path) -> None:
    save_files(tmp_path, OLD)
    reads: list[str] = []

    def read() -> str:
        reads.append((tmp_path / "model_index.json").read_text())
        if len(reads) == 1:
            save_files(tmp_path, NEW)
        if len(reads) == 2:
            save_files(tmp_path, OLD)
            raise error("half old and half new")
        return reads[-1]

    assert read_consistently(tmp_path, read) == "old"
    assert reads == ["old", "new", "old"]
    with pytest.raises(CheckpointError, match="is being replaced by another process"):
        read_consistently(tmp_path, lambda: save_files(tmp_path, NEW))


def test_a_folder_that_cannot_be_completed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_after(1, monkeypatch):
        save_files(tmp_path, NEW)

    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folder_save.os, "replace", read_only)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: a save was interrupted.*Read-only"):
        VQModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a save was interrupted"):
        KandinskyV22Pipeline.from_pretrained(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"subfolder": "", "staging": ".saving-0123456789abcdef", "new": [], "removed": [], **changes}


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "[]",
        "{}",
        "[" * 10_000,
        {"destinations": 3},
        {"destinations": [3]},
        {"destinations": [{}]},
        {"destinations": [entry(new=None)]},
        {"destinations": [entry(new=[3])]},
        {"destinations": [entry(removed=["../victim"])]},
        {"destinations": [entry(removed=["a\0b"])]},
        {"destinations": [entry(removed=["\ud800"])]},
        {"destinations": [entry(removed=["link/victim"])]},
        {"destinations": [entry(subfolder="..", removed=["victim"])]},
        {"destinations": [entry(subfolder="link", removed=["victim"])]},
        {"destinations": [entry(subfolder="link")]},
        {"destinations": [entry(staging="../outside")]},
        {"destinations": [entry(staging=".saving-fedcba9876543210", new=["victim"])]},
        {"destinations": [entry(new=["/etc/victim"])]},
    ],
    ids=lambda journal: re.sub(r"\W+", " ", json.dumps(journal))[:60],
)
def test_journals_never_touch_other_folders(journal: Any, tmp_path: Path) -> None:
    outside, model = tmp_path / "outside", tmp_path / "model"
    write(outside, {"victim": "user", ".saving-0123456789abcdef/new/victim": "user"})
    write(tmp_path, {"victim": "user"})
    model.mkdir()
    (model / "link").symlink_to(outside)
    (model / ".saving-fedcba9876543210").symlink_to(outside)
    (model / JOURNAL).write_text(journal if isinstance(journal, str) else json.dumps(journal))
    before = content(outside)
    with pytest.raises(CheckpointError, match=re.escape(JOURNAL)):
        VQModel.from_pretrained(model)
    assert content(outside) == before
    assert (tmp_path / "victim").read_text() == "user"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes the owner of a file")
def test_journals_of_other_users_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_after(1, monkeypatch):
        save_files(tmp_path, NEW)
    before = content(tmp_path)
    os.chown(tmp_path / JOURNAL, 12345, -1)
    with pytest.raises(CheckpointError, match="a save of another user was interrupted"):
        complete_saves(tmp_path)
    tmp_path.chmod(0o1777)
    complete_saves(tmp_path)
    assert content(tmp_path) == before


# Networks and pipelines


def test_index_and_shards_of_two_saves_are_refused(tmp_path: Path) -> None:
    models = [VQModel(**TINY_MOVQ) for _ in range(2)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number), **SHARDED)
    shard = "diffusion_pytorch_model-00001-of-0000{}.safetensors"
    names = [path.name for path in (tmp_path / "0").iterdir() if path.name.startswith(shard[:30])]
    copied = sorted(names)[0]
    (tmp_path / "0" / copied).write_bytes((tmp_path / "1" / copied).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{copied} is not of the save that has written"):
        VQModel.from_pretrained(tmp_path / "0")


def test_shards_without_digests_are_not_judged(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = VQModel(**TINY_MOVQ)
    model.save_pretrained(tmp_path, **SHARDED)
    for path in tmp_path.glob("*.safetensors"):  # as another program rewrites them
        save_file(load_file(path), path, metadata={"format": "pt"})
    assert_same_weights(VQModel.from_pretrained(tmp_path), model)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model = VQModel(**TINY_MOVQ)
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name, **SHARDED)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("folder", [None, 3, b"bytes", "", "a\0b", ["list"], 1.5, object])
def test_folders_to_save_to_are_paths(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"save_directory=.* is invalid: expected the path of a folder"):
        VQModel(**TINY_MOVQ).save_pretrained(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("variant", value) for value in (3, b"fp16", "", "a b", "../a", "a" * 65, ["fp16"], True, 1.5)),
        *(("max_shard_size", value) for value in (10**5 * "9" + "GB", "1e3GB", float("nan"), float("inf"), [], "-1GB")),
        *(("safe_serialization", value) for value in (None, "no", 1, [])),
    ],
    ids=lambda value: str(value)[:20],
)
def test_odd_arguments_of_saving(argument: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{argument}=.* is invalid"):
        VQModel(**TINY_MOVQ).save_pretrained(tmp_path / "model", **{argument: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["9" * 400 + "GB", 10**400, "0.5MB", " 1 gib "])
def test_shard_sizes_have_no_upper_limit(size: Any, tmp_path: Path) -> None:
    model = VQModel(**TINY_MOVQ)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert_same_weights(VQModel.from_pretrained(tmp_path), model)


def test_a_reader_waits_for_a_save(tmp_path: Path) -> None:
    """A process that is replacing files holds the lock until the folder is whole again."""
    save_files(tmp_path, OLD)
    destinations = [folder_save.Destination("", ".saving-0123456789abcdef")]
    (tmp_path / ".saving-0123456789abcdef" / "new").mkdir(parents=True)
    with locks.locked_folders([tmp_path]):
        (tmp_path / JOURNAL).write_text(json.dumps({"destinations": [vars(part) for part in destinations]}))
        thread = threading.Thread(target=complete_saves, args=(tmp_path,))
        thread.start()
        time.sleep(0.05)
        assert thread.is_alive()
        (tmp_path / JOURNAL).unlink()
    thread.join()
    assert content(tmp_path) == OLD
