"""`kandinsky22 completion`: the scripts complete command lines in real shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.cli.helpers import Command, assert_one_line

pytest.importorskip("shtab")

BASH = """
source ./script
COMP_WORDS=({words})
COMP_CWORD={last}
COMP_LINE="{words}"
COMP_POINT=${{#COMP_LINE}}
_shtab_kandinsky22 kandinsky22 "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def shell(name: str, program: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    result = subprocess.run([name, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def complete_in_bash(words: str) -> set[str]:
    program = BASH.format(words=words, last=len(words.split()) - (0 if words.endswith(" ") else 1))
    if words.endswith(" "):
        program = program.replace(f"COMP_WORDS=({words})", f'COMP_WORDS=({words}"")')
    return {line.strip() for line in shell("bash", program).splitlines()}


@pytest.fixture
def script(command: Command, request: pytest.FixtureRequest) -> Path:
    result = command("completion", request.param)
    assert result.code == 0, result.err
    path = Path("script")
    path.write_text(result.out, encoding="utf-8")
    return path


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash(script: Path) -> None:
    assert {"generate", "models", "config"} <= complete_in_bash("kandinsky22 ")
    assert complete_in_bash("kandinsky22 gen") == {"generate"}
    assert complete_in_bash("kandinsky22 models re") == {"remove"}
    assert complete_in_bash("kandinsky22 generate --prior-s") == {"--prior-scheduler", "--prior-steps"}
    assert {"int8", "int4"} <= complete_in_bash("kandinsky22 generate --quantize int")
    Path("photo.png").touch()
    assert complete_in_bash("kandinsky22 img2img --image pho") == {"photo.png"}
    assert complete_in_bash("kandinsky22 generate --model pho") == {"photo.png"}


@pytest.mark.parametrize("script", ["fish"], indirect=True)
def test_fish(script: Path) -> None:
    for line, expected in (("models re", "remove"), ("generate --prior-st", "--prior-steps"), ("gen", "generate")):
        output = shell("fish", f'source ./{script}; complete -C "kandinsky22 {line}"')
        assert [word.split("\t")[0] for word in output.splitlines()] == [expected]


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh(script: Path) -> None:
    shell("zsh", f"zsh -n {script}")
    listed = shell("zsh", f"autoload -Uz compinit; compinit -u -D; source ./{script}; print -l ${{(k)functions}}")
    assert "_shtab_kandinsky22_models_pull_options" in listed or "_shtab_kandinsky22_models" in listed


def test_another_shell(command: Command) -> None:
    assert_one_line(command("completion", "csh"), 2, "csh", "bash")
