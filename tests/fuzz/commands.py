"""Command lines and recipes with unexpected contents, run in this process."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin
from tests.fuzz.harness import Case, Escape
from tests.fuzz.mutations import byte_edits, json_edits, mutate_bytes, mutate_json
from tests.fuzz.world import World
from tests.pipelines.pictures import box_mask_image, photo

from kandinsky22.cli.main import build_parser, main

NUMBERS = [
    "1",
    "0",
    "-1",
    "2",
    "3.5",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "0x10",
    "1_000",
    "٣",
    "½",
    "9223372036854775808",
]
SIZES = ["32x32", "0x0", "1x4000", "99999x99999", "32x", "x", "0,1,2,3", "4,4,4,4", "1,1", "0.5"]
FILES = [
    "photo.png",
    "mask.png",
    "old.png",
    "text.txt",
    "no/such/file.png",
    ".",
    "/",
    "/dev/null",
    "../../..",
    "@",
    "@nothing",
]
OUTPUTS = ["-", "out.png", "out.jpg", "out.webp", "out.xyz", "out/", "photo.png", "@text.txt"]
CHOICES = ["cpu", "cuda", "meta", "cuda:99", "auto", "float32", "bfloat16", "int8-dynamic", "draft", "ddim", "embedded"]
TEXTS = ["", "a cat", "true", "none", "\x1b[2J", "a\nb", "\udc80", "\u202e", "a" * 5000, "{}", "[]", "'", "$(id)", "--"]
WORDS = [*NUMBERS, *SIZES, *FILES, *OUTPUTS, *CHOICES, *TEXTS]
SUBCOMMANDS: dict[str, tuple[str, list[str]]] = {
    "generate": ("combined", ["a cat"]),
    "img2img": ("combined", ["a cat", "--image", "photo.png", "--strength", "0.6"]),
    "inpaint": ("inpaint", ["a cat", "--image", "photo.png", "--mask", "mask.png"]),
    "control": ("control/decoder", ["a cat", "--hint", "photo.png", "--prior-steps", "2"]),
    "mix": ("combined", ["--text", "a cat", "0.6", "--image", "photo.png", "0.4"]),
    "variations": ("combined", ["photo.png"]),
    "compare": ("combined", ["a cat", "--steps", "1,2"]),
    "info": ("", ["old.png"]),
}


class Commands:
    """Command lines with up to three options of unexpected values.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "commands"

    def __init__(self, world: World) -> None:
        self.world = world

    @cached_property
    def options(self) -> dict[str, list[tuple[str, int]]]:
        """Options of each subcommand, with the number of their values."""
        actions = build_parser()._actions
        subparsers = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
        found: dict[str, list[tuple[str, int]]] = {}
        for name, parser in subparsers.choices.items():
            found[name] = [
                (
                    action.option_strings[-1],
                    action.nargs if isinstance(action.nargs, int) else int(action.nargs is None),
                )
                for action in parser._actions
                if action.option_strings and action.dest != "help"
            ]
        return found

    @cached_property
    def recipe(self) -> Any:
        """The recipe of a picture that the command has generated."""
        with scratch_folder(self.world):
            run_command(["generate", "a cat", "--model", str(self.world.folder / "combined"), "-o", "generated.png"])
            with PIL.Image.open("generated.png") as picture:
                return json.loads(picture.info["kandinsky22"])

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a command line, in which MODEL stands for the checkpoint's folder."""
        name = rng.choice([known for known in SUBCOMMANDS if known in self.options])
        line = [name, *SUBCOMMANDS[name][1]]
        for _ in range(rng.randrange(1, 4)):
            option, count = rng.choice(self.options[name])
            if option == "--low-memory" and rng.random() < 0.5:
                continue
            line += [option, *rng.choices(WORDS, k=count)]
        if rng.random() < 0.15:
            line[rng.randrange(1, len(line))] = rng.choice(WORDS)
        return {"line": line}

    def run(self, case: Case) -> None:
        """Run the command line in a folder with a few pictures."""
        line = list(case["line"])
        model = SUBCOMMANDS[line[0]][0]
        if model and "--model" not in line:
            line += ["--model", str(self.world.folder / model)]
        with scratch_folder(self.world):
            before = snapshot()
            run_command(line)
            changed = [
                name for name, data in before.items() if not Path(name).exists() or Path(name).read_bytes() != data
            ]
            if changed and "--force" not in line:
                raise Escape(f"{line}: {', '.join(changed)} changed")


class Recipes:
    """Pictures whose recipe is damaged, read by `info` and by ``generate --from``.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "recipes"

    def __init__(self, world: World) -> None:
        self.world = world
        self.commands = Commands(world)

    def generate(self, rng: random.Random) -> Case:
        """Return a case: edits of the recipe or of the file's bytes, and the subcommand that reads it."""
        case: Case = {"subcommand": rng.choice(["info", "info --json", "generate --from"])}
        if rng.random() < 0.75:
            return {**case, "json": json_edits(rng, self.commands.recipe)}
        return {**case, "bytes": byte_edits(rng), "in": rng.choice(["text", "file"])}

    def run(self, case: Case) -> None:
        """Write the picture and read it with the command."""
        text = json.dumps(self.commands.recipe)
        if "json" in case:
            text = mutate_json(self.commands.recipe, case["json"])
        elif case["in"] == "text":
            text = mutate_bytes(text.encode(), case["bytes"]).decode("latin-1")
        with scratch_folder(self.world):
            chunks = PIL.PngImagePlugin.PngInfo()
            chunks.add_itxt("kandinsky22", text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
            photo(1).save("hostile.png", pnginfo=chunks)
            if case.get("in") == "file":
                path = Path("hostile.png")
                path.write_bytes(mutate_bytes(path.read_bytes(), case["bytes"]))
            subcommand = case["subcommand"].split()
            model = ["--model", str(self.world.folder / "combined")] if subcommand[0] == "generate" else []
            run_command([*subcommand, "hostile.png", *model])


@contextlib.contextmanager
def scratch_folder(world: World) -> Any:
    """Work in a new folder that holds pictures and a text file."""
    folder, before = world.folder / "scratch", Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    try:
        photo(1).save("photo.png")
        photo(2).save("old.png")
        box_mask_image().save("mask.png")
        Path("text.txt").write_text("a cat")
        yield
    finally:
        os.chdir(before)


def snapshot() -> dict[str, bytes]:
    """Return the contents of the files in this folder."""
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


class _Stream(io.TextIOWrapper):
    """A text stream of bytes in memory, in UTF-8."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data), "utf-8", errors="strict", write_through=True)

    @property
    def text(self) -> str:
        self.seek(0)
        return self.read()


def run_command(line: list[str]) -> None:
    """Run a command line; raise Escape if it ends in a traceback, in several lines, or with control characters."""
    out, err = _Stream(), _Stream()
    problem = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin():
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    errors = err.text
    if code not in (0, 1, 2):
        problem = f"exit code {code}"
    lines = errors.split("\n")
    if code and not any(row.startswith("kandinsky22: error: ") for row in lines):
        problem = "no error line"
    if "Traceback" in errors:
        problem = "a traceback"
    if hostile := {c for c in errors if ord(c) in (0x1B, 0x202E, 0x7F) or 0xD800 <= ord(c) < 0xE000}:
        problem = f"{hostile} on stderr"
    if problem:
        raise Escape(f"{line}: {problem}: {errors[-1500:]!r}")


@contextlib.contextmanager
def _stdin() -> Any:
    import sys

    before, sys.stdin = sys.stdin, _Stream(b"")
    try:
        yield
    finally:
        sys.stdin = before
