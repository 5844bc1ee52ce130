"""What the command prints and shows besides paths: JSON, previews in terminals, and the system's viewer."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import stat
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tests.cli.helpers import Command, assert_one_line, pixels, stored
from tests.pipelines.pictures import photo

from kandinsky22 import VQModel
from kandinsky22.cli.terminal_images import ITERM, KITTY, PALETTE, TRUE_COLOUR, TerminalPreview, image_protocol
from kandinsky22.generation.previews import PreviewMap

FAST = ("--steps", 2, "--prior-steps", 2, "--seed", 3)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


# --json


def test_a_line_of_json_per_file(command: Command, model: Path) -> None:
    result = command("generate", "a \x1b[2J cat é", "--model", model, *FAST, "-n", 2, "--json", "-o", "cat.png")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.out.isascii() and result.out.isprintable() is False and "\x1b" not in result.out
    assert [line["path"] for line in lines] == ["cat-seed3.png", "cat-seed4.png", "cat-sheet.png"]
    for line in lines:
        path = Path(line["path"])
        assert line["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert line["recipe"] == stored(path)
        assert (line["height"], line["width"]) == pixels(path).shape[:2]
    assert [line["seed"] for line in lines] == [3, 4, None]
    bare = json.loads(command("generate", "x", "--model", model, *FAST, "--json", "--no-recipe").out)
    assert bare["recipe"]["prompt"] == "x"


def test_json_of_compare(command: Command, model: Path) -> None:
    result = command("compare", "a cat", "--model", model, "--steps", "1,2", "--scheduler", "ddim", "--json", "-q")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["path"] for line in lines] == ["compare.png", "compare.csv"], result.err
    assert lines[1].keys() == {"path", "sha256"}


def test_contradictions(command: Command, model: Path) -> None:
    assert_one_line(command("generate", "x", "--json", "-o", "-"), 2, "--json", "-o -")
    assert_one_line(command("generate", "x", "--preview", "-q"), 2, "--preview", "--quiet")


# --open


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="other systems have other viewers")
def test_the_finished_image_is_opened(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    viewer = programs / "xdg-open"
    new, opened = tmp_path / "opened.tmp", tmp_path / "opened"
    viewer.write_text(f'#!/bin/sh\nprintf %s "$1" > "{new}"\nmv "{new}" "{opened}"\n')
    viewer.chmod(viewer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    result = command("generate", "a cat", "--model", model, *FAST, "--open", "-o", "cat.png")
    assert result.code == 0 and "cat.png was not opened: there is no display" in result.err
    monkeypatch.setenv("DISPLAY", ":0")
    command("generate", "a cat", "--model", model, *FAST, "-n", 2, "--open", "-o", "cats.png")
    deadline = time.monotonic() + 10
    while not opened.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert opened.read_text() == str(Path("cats-sheet.png").absolute())
    monkeypatch.setenv("PATH", str(tmp_path))
    result = command("generate", "a cat", "--model", model, *FAST, "--open", "-o", "cat.png")
    assert result.code == 0 and "xdg-open is not installed" in result.err


# --preview


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, KITTY),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, ITERM),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, ITERM),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, PALETTE),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, TRUE_COLOUR),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, TRUE_COLOUR),
        ({"TERM": "xterm"}, PALETTE),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({}, None),
    ],
)
def test_protocols(environment: dict[str, str], protocol: str | None) -> None:
    assert image_protocol(environment) == protocol


@pytest.mark.parametrize("protocol", [TRUE_COLOUR, PALETTE])
def test_newer_images_replace_older_ones(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pyte = pytest.importorskip("pyte")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    screen = pyte.Screen(40, 20)
    stream = pyte.Stream(screen)
    output = Terminal()
    preview = TerminalPreview(output, protocol)
    output.write("$ kandinsky22\n" * 12)
    for colour, size in (("red", (8, 4)), ("blue", (8, 4)), ("lime", (8, 5)), ("black", (8, 4))):
        preview.show(PIL.Image.new("RGB", size, colour), f"{colour} \x1b[2J")
    preview.finish()
    output.write("next\n")
    stream.feed(output.getvalue().replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display]
    text = [line for line in lines if line and "▀" not in line]
    assert text[-2:] == ["black \\x1b[2J", "next"] and set(text[:-2]) == {"$ kandinsky22"}
    blocks = [number for number, line in enumerate(lines) if "▀" in line]
    assert len(blocks) == 10 and blocks == list(range(blocks[0], blocks[0] + 10))  # 39 columns of a 2:1 image
    assert screen.buffer[blocks[0]][0].fg == "000000"


def test_sequences_of_image_protocols() -> None:
    image = photo(3, 64, 32)
    for protocol in (KITTY, ITERM):
        output = Terminal()
        TerminalPreview(output, protocol).show(image, "step 1")
        if protocol == KITTY:
            chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", output.getvalue())
            assert chunks[0][0].startswith("a=T,f=100,") and all(len(data) <= 4096 for _, data in chunks)
            assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
            content = "".join(data for _, data in chunks)
        else:
            (content,) = re.findall(r"\x1b\]1337;File=inline=1;[^:]*:([^\a]*)\a", output.getvalue())
        with PIL.Image.open(io.BytesIO(base64.b64decode(content))) as shown:
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(image))


def test_a_preview_changes_nothing(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = command("generate", "a cat", "--model", model, *FAST, "-o", "plain.png")
    result = command("generate", "a cat", "--model", model, *FAST, "--preview", "-o", "piped.png")
    assert plain.code == result.code == 0 and "no preview" in result.err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name, options in (("shown.png", ()), ("low.png", ("--low-memory",))):
        assert command("generate", "a cat", "--model", model, *FAST, "--preview", *options, "-o", name).code == 0
        assert terminal.getvalue().count("step 1 of 2") == terminal.getvalue().count("seed 3\x1b[K") > 0
    assert Path("plain.png").read_bytes() == Path("shown.png").read_bytes() == Path("piped.png").read_bytes()


def test_previews_have_the_colours_of_the_image() -> None:
    """The embedded MoVQ: the map explains most of the colours of pictures that it was not fitted to."""
    movq = VQModel.from_pretrained("embedded", subfolder="movq")
    colours = PreviewMap(movq, "cpu")
    image = photo(9, 128, 128)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        latents = movq.encode(values).latents[0]
    preview = np.asarray(colours.image(latents)).astype(float)
    expected = np.asarray(image.resize(preview.shape[1::-1], PIL.Image.Resampling.BOX)).astype(float)
    error, spread = ((preview - expected) ** 2).mean(), expected.var()
    assert error < 0.1 * spread
    assert colours.data_url(latents).startswith("data:image/webp;base64,")
    assert colours.image(torch.full((4, 2, 3), torch.nan)).size == (3, 2)
