"""The commands in the documentation run as written."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.helpers import Command

GUIDES = Path(__file__).parents[2] / "docs" / "how-to"
# Subcommands that the commands of each page use. Blocks with a title are not run.
PAGES = {
    "command-line": {"generate", "img2img", "inpaint", "control", "mix", "variations", "compare", "info"},
    "configuration": {"config", "completion"},
    "hints": {"generate", "hint", "control"},
    "models": {"models", "generate"},
}
NO_IMAGES = {"info", "config", "completion", "models"}


@contextlib.contextmanager
def redirected(words: list[str]) -> Iterator[list[str]]:
    """Connect standard input and output as ``< FILE`` and ``> FILE`` say, and yield the other words."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for stream, sign, mode in (("stdin", "<", "rb"), ("stdout", ">", "wb")):
            if sign in words:
                position = words.index(sign)
                file = stack.enter_context(Path(words[position + 1]).open(mode))
                patch.setattr(sys, stream, io.TextIOWrapper(file, encoding="utf-8"))  # type: ignore[type-var]
                words = words[:position] + words[position + 2 :]
        yield words


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_on_the_page_run_as_written(
    command: Command, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path / "cache"))  # of the key of prepared checkpoints
    for package in ("shtab",) * (page == "configuration") + ("torchao",) * (page == "models"):
        pytest.importorskip(package)
    blocks = re.findall(r"```bash\n(.*?)```", (GUIDES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert {words[1] for words in lines if words[0] == "kandinsky22"} >= PAGES[page]
    for line in lines:
        with redirected(line) as (program, *arguments):
            if program == "python":
                subprocess.run([sys.executable, *arguments], check=True)
                continue
            if program == "echo":
                print(*arguments, flush=True)
                continue
            result = command(*arguments)
        assert (program, result.code) == ("kandinsky22", 0), (arguments, result.err)
        assert arguments[0] in NO_IMAGES or all(path.is_file() for path in result.paths)
