"""The commands in the documentation run as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.helpers import Command

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "command-line.md"


@pytest.mark.usefixtures("embedded")
def test_the_commands_on_the_page_run_as_written(command: Command) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    drawing = {"generate", "img2img", "inpaint", "control", "mix", "variations"}
    assert {words[1] for words in lines} >= {*drawing, "compare", "info"}
    for program, *arguments in lines:
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
            continue
        result = command(*arguments)
        assert (program, result.code) == ("kandinsky22", 0), (arguments, result.err)
        assert arguments[0] == "info" or all(path.is_file() for path in result.paths)
