"""Output files: nothing is replaced without force, and no part of a file ever appears under its name."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kandinsky22.cli.output_files import OutputFiles, OutputName
from kandinsky22.errors import InputError

PICTURE, SHEET = OutputName(), OutputName("-sheet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(
    output: str | Path, content: bytes = b"new", *, force: bool = False, inputs: tuple[Path, ...] = ()
) -> Path | None:
    return OutputFiles(Path(output), [PICTURE], force=force, inputs=inputs).write(PICTURE, content)


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_existing_files_stay_and_new_ones_get_free_names() -> None:
    paths = [save("a.png", bytes([number])) for number in range(3)]
    assert paths == [Path("a.png"), Path("a-2.png"), Path("a-3.png")]
    assert [path.read_bytes() for path in paths if path] == [b"\0", b"\1", b"\2"]
    Path("a-2.png").unlink()
    assert save("a.png") == Path("a-2.png")


def test_files_of_one_command_share_a_number() -> None:
    Path("a-sheet.png").write_bytes(b"old")
    Path("a-2.csv").write_bytes(b"old")
    all_names = [PICTURE, SHEET, OutputName(extension=".csv")]
    files = OutputFiles(Path("a.png"), all_names, force=False)
    paths = [files.write(name, b"new") for name in all_names]
    assert paths == [Path("a-3.png"), Path("a-3-sheet.png"), Path("a-3.csv")]


def test_a_file_that_appears_while_images_are_generated_is_not_replaced() -> None:
    files = OutputFiles(Path("a.png"), [PICTURE, SHEET], force=False)
    Path("a.png").write_bytes(b"late")
    assert [files.write(PICTURE, b"new"), files.write(SHEET, b"new")] == [Path("a-2.png"), Path("a-2-sheet.png")]
    assert Path("a.png").read_bytes() == b"late"


@pytest.mark.parametrize("hard_links", [True, False])
def test_many_writers_of_one_name_lose_nothing(monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr("kandinsky22.cli.output_files.os.link", refuse)
    barrier = threading.Barrier(16)

    def write(number: int) -> Path | None:
        files = OutputFiles(Path("a.png"), [PICTURE], force=False)
        barrier.wait()
        return files.write(PICTURE, b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(write, range(16)))
    assert len(set(paths)) == 16
    assert [path.read_bytes() for path in paths if path] == [b"%d" % number for number in range(16)]
    assert len(names()) == 16


def test_force_replaces_and_keeps_permissions() -> None:
    Path("a.png").write_bytes(b"old")
    os.chmod("a.png", 0o640)
    assert save("a.png", force=True) == Path("a.png")
    assert Path("a.png").read_bytes() == b"new"
    assert stat.S_IMODE(Path("a.png").stat().st_mode) == 0o640
    assert names() == ["a.png"]


def test_new_files_have_the_permissions_of_the_umask() -> None:
    previous = os.umask(0o027)
    try:
        save("a.png")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(Path("a.png").stat().st_mode) == 0o640


def test_links_are_followed(folder: Path) -> None:
    (folder / "other").mkdir()
    Path("link.png").symlink_to("other/target.png")
    assert save("link.png", b"first") == Path("link.png")
    assert Path("other/target.png").read_bytes() == b"first"
    assert save("link.png", b"second") == Path("link-2.png")
    assert Path("other/target.png").read_bytes() == b"first"
    assert save("link.png", b"third", force=True) == Path("link.png")
    assert Path("other/target.png").read_bytes() == b"third"
    assert Path("link.png").is_symlink()
    assert os.listdir("other") == ["target.png"]


@pytest.mark.parametrize("force", [False, True])
def test_inputs_are_never_replaced(force: bool) -> None:
    Path("a.png").write_bytes(b"old")
    Path("soft.png").symlink_to("a.png")
    os.link("a.png", "hard.png")
    for output in ("a.png", "./a.png", "soft.png", "hard.png"):
        with pytest.raises(InputError, match="is an input and would be overwritten"):
            save(output, force=force, inputs=(Path("a.png"),))
    assert Path("a.png").read_bytes() == b"old"


def test_protected_and_special_files_are_not_replaced_by_force(folder: Path) -> None:
    Path("a.png").write_bytes(b"old")
    os.chmod("a.png", 0o444)
    with pytest.raises(InputError, match=r"a\.png cannot be written: it is write-protected"):
        save("a.png", force=True)
    assert save("a.png") == Path("a-2.png")
    Path("loop.png").symlink_to("loop.png")
    for force in (False, True):
        with pytest.raises(InputError, match=r"loop\.png cannot be written"):
            save("loop.png", force=force)
    (folder / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        save("folder.png", force=True)
    Path("protected").mkdir()
    os.chmod("protected", 0o555)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            save("protected/a.png")
    finally:
        os.chmod("protected", 0o755)
    assert not os.listdir("protected")


def test_fifos_and_devices_receive_the_bytes() -> None:
    os.mkfifo("fifo.png")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(Path("fifo.png").read_bytes()))
    reader.start()
    assert save("fifo.png", b"x" * 200_000, force=True) == Path("fifo.png")
    reader.join()
    assert received == [b"x" * 200_000]
    assert stat.S_ISFIFO(Path("fifo.png").stat().st_mode)
    assert save("/dev/null", force=True) == Path("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match="takes one file"):
        OutputFiles(Path("/dev/null"), [PICTURE, SHEET], force=False)
    with pytest.raises(InputError, match="No space left"):
        save("/dev/full")


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_no_part_of_a_file(force: bool) -> None:
    Path("a.png").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            save("a.png", b"x" * 200_000, force=force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (names(), Path("a.png").read_bytes()) == (["a.png"], b"old")


def test_a_killed_process_leaves_only_complete_files(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from kandinsky22.cli.output_files import *\n"
        "name = OutputName()\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for force in (True, False):\n"
        "        OutputFiles(Path('a.png'), [name], force=force).write(name, bytes(3_000_000))\n"
    )
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * number)
        process.kill()
        process.wait()
        process.stdout.close()
    assert all(path.stat().st_size == 3_000_000 for path in folder.glob("a*.png"))
