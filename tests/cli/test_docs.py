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

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "command-line.md"


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
def test_the_commands_on_the_page_run_as_written(command: Command) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    drawing = {"generate", "img2img", "inpaint", "control", "mix", "variations"}
    assert {words[1] for words in lines if words[0] == "kandinsky22"} >= {*drawing, "compare", "info"}
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
        assert arguments[0] == "info" or all(path.is_file() for path in result.paths)
