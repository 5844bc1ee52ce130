"""Command lines and recipes with unexpected contents, run in this process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz.harness import LONGEST_MESSAGE, Case, Escape
from tests.fuzz.mutations import byte_edits, json_edits, mutate_bytes, mutate_json
from tests.fuzz.world import World
from tests.pipelines.pictures import box_mask_image, photo

from kandinsky22.cli.main import build_parser, main
from kandinsky22.generation.image_files import FORMATS, RECIPE_KEYWORD, encode_image
from kandinsky22.generation.recipe import read_recipe

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
OUTPUTS = ["-", "out.png", "out.jpg", "out.webp", "out.xyz", "out/", "photo.png", "@text.txt", "made.png", "made.JPG"]
CHOICES = ["cpu", "cuda", "meta", "cuda:99", "auto", "float32", "bfloat16", "int8-dynamic", "draft", "ddim", "embedded"]
TEXTS = ["", "a cat", "true", "none", "\x1b[2J", "a\nb", "\udc80", "\u202e", "a" * 5000, "{}", "[]", "'", "$(id)", "--"]
WORDS = [*NUMBERS, *SIZES, *FILES, *OUTPUTS, *CHOICES, *TEXTS]
SUBCOMMANDS: dict[str, tuple[str, list[str]]] = {
    "generate": ("combined", ["a cat"]),
    "img2img": ("combined", ["a cat", "--image", "photo.png", "--strength", "0.6"]),
    "inpaint": ("inpaint", ["a cat", "--image", "photo.png", "--mask", "mask.png"]),
    "control": ("control/decoder", ["a cat", "--hint", "photo.png", "--prior-steps", "2", "--steps", "2"]),
    "mix": ("combined", ["--text", "a cat", "0.6", "--image", "photo.png", "0.4"]),
    "variations": ("combined", ["photo.png"]),
    "compare": ("combined", ["a cat", "--steps", "1,2"]),
    "info": ("", ["made.png"]),
}
# Values that an option may well have, so that a command line gets further than its parser.
SCHEDULERS = [["ddim"], ["euler"], ["LMS"], ["lcm"], ["pndm"], ["unclip"], ["dpm,heun"]]
TEXT_VALUES = [["red"], ["@text.txt"], ["-"], ["@@x"], ["(red:1.5) [cat]"], [""]]
FRACTIONS = [["0"], ["0.5"], ["1"], ["1e-30"]]
INTERVALS = [["0", "1"], ["0.2", "0.8"], ["0.9", "0.1"], ["0.99", "1"]]
VALUES: dict[str, list[list[str]]] = {
    "--server": [["none"], ["http://127.0.0.1:9"], ["https://[::1]:9/x"], ["ftp://x"], ["http://"], ["http://a b"]],
    "--seed": [["1"], ["1", "2"], ["3,4"], ["0", "0"], ["9223372036854775807"], ["18446744073709551615"]],
    "-n": [["1"], ["2"], ["3"]],
    "--output": [[name] for name in OUTPUTS],
    "--size": [["32x32"], ["48X32"], ["64x33"], ["1x1"]],
    "--steps": [["1"], ["3"], ["1,2"]],
    "--prior-steps": [["1"], ["3"]],
    "--guidance": [["1"], ["4"], ["0"], ["1,5"], ["1e30"]],
    "--prior-guidance": [["1"], ["4"], ["1e30"]],
    "--scheduler": SCHEDULERS,
    "--prior-scheduler": SCHEDULERS,
    "--quality": [["draft"]],
    "--negative-prompt": TEXT_VALUES,
    "--prompt": TEXT_VALUES,
    "--text": [["red"], ["red", "0.5"], ["@text.txt", "-1"], ["-", "1e30"]],
    "--guidance-interval": INTERVALS,
    "--prior-guidance-interval": INTERVALS,
    "--guidance-rescale": FRACTIONS,
    "--guidance-threshold": FRACTIONS,
    "--strength": FRACTIONS,
    "--crop": [[], ["0"], ["4"], ["999999"]],
    "--extend": [["8,0,0,0"], ["1,2,3,4"], ["0,0,0,0"], ["0,8192,0,0"]],
    "--from": [["made.png"], ["made.jpg"], ["made.webp"], ["photo.png"], ["-"]],
    "--image": [["photo.png"], ["made.webp"], ["-"], ["mask.png", "0.5"]],
    "--mask": [["mask.png"], ["photo.png"], ["-"]],
    "--hint": [["photo.png"], ["-"]],
    "--dtype": [["bfloat16"], ["auto"], ["float16"]],
    "--device": [["cpu"], ["auto"]],
    "--lora": [["none"], ["photo.png"], ["text.txt:0.5"], [".:1e30"], ["nobody:nan"], ["C:\\x:1"]],
    "--tiny-decoder": [["none"], ["photo.png"], ["."], ["nobody"], ["C:\\x"], [""]],
    "--quantize": [["int8"], ["int4"], ["none"]],
    "--cache-every": [["2"], ["1"]],
}
# Compilation takes longer than the time limit of a case; as a flag it has no values that could be unexpected. --open
# would start the viewer of the machine.
EXCLUDED = ("--help", "--compile", "--open")
# Command lines whose recipes are damaged, by subcommand.
RECIPES: dict[str, list[str]] = {
    "generate": ["--negative-prompt", "red", "--quality", "draft", "--quantize", "int8", "--cache-every", "2"],
    "img2img": ["--prompt-weights", "--guidance-interval", "0.2", "0.8", "--guidance-rescale", "0.5"],
    "inpaint": ["--crop", "4", "--extend", "8,0,0,0", "--keep-pixels"],
    "control": ["--image", "photo.png", "--guidance-threshold", "0.9"],
    "mix": ["--seed", "1", "2"],
    "variations": ["--prompt", "red", "--strength", "0.5", "--steps", "1"],
}
# Values that have the type of a recipe's field, so that a recipe gets further than the check of types.
SETTINGS: list[Any] = [
    {},
    {"unknown": 1},
    {"beta_start": -1},
    {"beta_start": 1e300, "beta_end": 1e-300},
    {"num_train_timesteps": 0},
    {"num_train_timesteps": 10**8},
    {"timestep_spacing": "\x1b[2J"},
    {"prediction_type": "sample", "thresholding": True},
    {"solver_order": 99},
    {"clip_sample_range": 0.0, "sample_max_value": -1},
    {"_class_name": "object"},
    {"self": 1},
    {"beta_schedule": "x"},
    {"steps_offset": 2**62},
]
FILE_RECORDS = [
    {"name": name, "sha256": digest}
    for name in ("photo.png", "text.txt", "..", "/dev/zero", "-", "", "\x1b[2J", "a" * 5000, "~", "http://localhost:9/")
    for digest in ("", "0" * 64)
]
TEXT_FIELDS = ["", "\x1b[31mred", "\u202e", "a\nb\r\tc", "@text.txt", "-", "((((", "(a:1e400)", "(a:nan)", "a" * 50000]
FIELD_VALUES: dict[str, list[Any]] = {
    "seeds": [[0], [2**64 - 1], [2**64 - 1, 0], [1, 1], [2**63, 3]],
    "model": [
        "",
        ".",
        "/",
        "embedded",
        "a/b",
        "a/b/c",
        "\x1b[2J",
        "a" * 5000,
        "photo.png",
        "text.txt",
        "~",
        "http://x",
    ],
    "prior": ["", ".", "embedded", "a/b", "\u202e", "a" * 5000, "photo.png"],
    "model_digest": TEXT_FIELDS,
    "hardware": TEXT_FIELDS,
    "scheduler": ["object", "", "ddim", "LCMScheduler", "PNDMScheduler", "UnCLIPScheduler", "__class__", "\x1b[2J"],
    "prior_scheduler": ["object", "", "LCMScheduler", "PNDMScheduler", "UnCLIPScheduler", "SchedulerOptions"],
    "scheduler_settings": SETTINGS,
    "prior_scheduler_settings": SETTINGS,
    "steps": [1, 2, 7],
    "prior_steps": [1, 2, 7],
    "guidance": [0, -1, 1, 1e-30, 1e38, -1e38],
    "prior_guidance": [0, -1, 1, 1e-30, 1e38],
    "width": [1, 7, 33, 96, 8192],
    "height": [1, 7, 33, 96, 8192],
    "device": ["", "cuda", "meta", "cpu:99", "xla", "\x1b[2J", "auto"],
    "dtype": ["", "float64", "int8", "complex64", "bfloat16", "\x1b[2J", "auto", "Tensor"],
    "versions": [{}, {"\x1b[2J": "\u202e"}, {"torch": "1"}, {"a" * 5000: "b" * 5000}],
    "command": ["generate", "info", "compare", "mix", "inpaint", "variations", "control", "img2img", "a-"],
    "prompt": TEXT_FIELDS,
    "negative_prompt": TEXT_FIELDS,
    "image": FILE_RECORDS,
    "mask": FILE_RECORDS,
    "hint": FILE_RECORDS,
    "parts": [
        [{"weight": 1e38, "text": "a"}, {"weight": -1e38, "text": "b"}],
        [{"weight": 0, "text": ""}],
        [{"weight": 1, "text": "a", "image": FILE_RECORDS[0]}],
        [{"weight": 1}],
        [{"weight": 1, "text": "\x1b[2J"}] * 50,
        [{"weight": 0.5, "image": record} for record in FILE_RECORDS],
    ],
    "strength": [0, 1, 1e-300],
    "keep_pixels": [True, False],
    "crop": [0, 1, 8192],
    "extend": [[0, 0, 0, 0], [1], [8192] * 4, [1, 2, 3, 4], [1] * 5],
    "prompt_weights": [True, False],
    "guidance_interval": [[0, 0], [1, 0], [0.5], [0, 0.5, 1], [0, 1e-300]],
    "prior_guidance_interval": [[0, 0], [1, 0], [0.5], [0, 0.5, 1], [0, 1e-300]],
    "guidance_rescale": [0, 1, 1e-300],
    "guidance_threshold": [0, 1, 1e-300],
    "lora": [
        [{"name": "photo.png", "sha256": "", "weight": 1}],
        [{"name": "\x1b[2J", "sha256": "x", "weight": -1e38}],
        [{"name": name, "sha256": "", "weight": 0} for name in (".", "/", "..", "C:\\x", "-", "a" * 300)],
        [{"name": "photo.png"}],
    ],
    "tiny_decoder": [
        {"name": "photo.png", "sha256": ""},
        {"name": "\x1b[2J", "sha256": "x"},
        *({"name": name, "sha256": ""} for name in (".", "/", "..", "C:\\x", "-", "", "a" * 300)),
        {"name": "photo.png"},
    ],
    "quantize": ["", "none", "int8", "int4", "int2", "\x1b[2J"],
    "cache_every": [1, 2, 10000],
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
    def options(self) -> dict[str, list[tuple[str, Any]]]:
        """Options of each subcommand, with the `nargs` of argparse."""
        actions = build_parser()._actions
        subparsers = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
        return {
            name: [
                (action.option_strings[-1], action.nargs)
                for action in parser._actions
                if action.option_strings and action.option_strings[-1] not in EXCLUDED
            ]
            for name, parser in subparsers.choices.items()
        }

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a command line, in which MODEL stands for the checkpoint's folder."""
        name = rng.choice([known for known in SUBCOMMANDS if known in self.options])
        line = [name, *SUBCOMMANDS[name][1]]
        for _ in range(rng.randrange(1, 4)):
            option, nargs = rng.choice(self.options[name])
            if option == "--low-memory" and rng.random() < 0.5:
                continue
            if option in VALUES and rng.random() < 0.6:
                values = rng.choice(VALUES[option])
            else:
                count = nargs if isinstance(nargs, int) else rng.randrange(1, 4) if nargs == "+" else 1
                words = (
                    [word for word in WORDS if word != "1_000"] if option == "-n" else WORDS
                )  # 1000 pictures take long
                values = rng.choices(words, k=count)
            if name == "compare" and option in ("--output", "--force") and rng.random() < 0.5:
                values = [*values, "--pictures"]
            line += [option, *values]
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
            for name, data in self.pictures.items():
                Path(name).write_bytes(data)
            run_in_folder(line)

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Pictures with a recipe, one for each format, by file name."""
        text = recipes_of(self.world, ["generate"])["generate"]
        return {
            f"made.{format.name.lower().replace('jpeg', 'jpg')}": encode_image(
                photo(3), format, {RECIPE_KEYWORD: json.dumps(text)}
            )
            for format in FORMATS
        }


class Recipes:
    """Pictures whose recipe is damaged, read by `info` and by ``--from`` of all subcommands.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "recipes"

    def __init__(self, world: World) -> None:
        self.world = world

    @cached_property
    def recipes(self) -> dict[str, Any]:
        """A recipe of each subcommand."""
        return recipes_of(self.world, list(RECIPES))

    def generate(self, rng: random.Random) -> Case:
        """Return a case: edits of the recipe or of the file's bytes, and the subcommand that reads it."""
        name = rng.choice(list(RECIPES))
        reader = rng.choice(["info", "info --json", f"{name} --from", f"{name} --from"])
        case: Case = {"recipe": name, "format": rng.randrange(len(FORMATS)), "subcommand": reader}
        kind = rng.random()
        if kind < 0.5:
            fields = rng.choices(list(FIELD_VALUES), k=rng.randrange(1, 4))
            return {**case, "json": [["set", [field], rng.choice(FIELD_VALUES[field])] for field in fields]}
        if kind < 0.8:
            return {**case, "json": json_edits(rng, self.recipes[name])}
        return {**case, "bytes": byte_edits(rng), "in": rng.choice(["text", "file"])}

    def run(self, case: Case) -> None:
        """Write the picture and read it with the command."""
        recipe = self.recipes[case["recipe"]]
        text = json.dumps(recipe)
        if "json" in case:
            text = mutate_json(recipe, case["json"])
        elif case["in"] == "text":
            text = mutate_bytes(text.encode(), case["bytes"]).decode("latin-1")
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        with scratch_folder(self.world):
            format = FORMATS[case["format"]]
            path = Path(f"hostile{format.extensions[0]}")
            path.write_bytes(encode_image(photo(1), format, {RECIPE_KEYWORD: text}))
            if case.get("in") == "file":
                path.write_bytes(mutate_bytes(path.read_bytes(), case["bytes"]))
            words = case["subcommand"].split()
            model = SUBCOMMANDS[words[0]][0]
            run_in_folder([*words, str(path), *(["--model", str(self.world.folder / model)] if model else [])])


def recipes_of(world: World, names: list[str]) -> dict[str, Any]:
    """Return the recipe that each of these subcommands has written, as JSON."""
    recipes: dict[str, Any] = {}
    for name in names:
        model, arguments = SUBCOMMANDS[name]
        with scratch_folder(world):
            line = [name, *arguments, *RECIPES[name], "--model", str(world.folder / model), "-o", "generated.png"]
            if run_command(line).code:
                raise Escape(f"{line} fails")
            path = next(Path().glob("generated*.png"))
            recipes[name] = json.loads(read_recipe(path).to_json())
    return recipes


def run_in_folder(line: list[str]) -> None:
    """Run a command line; raise Escape if it changes an existing file without need, or leaves a temporary one."""
    before = snapshot()
    code = run_command(line).code
    changed = [name for name, data in before.items() if not Path(name).exists() or Path(name).read_bytes() != data]
    if changed and (code or "--force" not in line):
        raise Escape(f"{', '.join(changed)} changed")
    if left := [path.name for path in Path().iterdir() if path.name.startswith(".") or not path.is_file()]:
        raise Escape(f"{', '.join(left)} left")


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
    def data(self) -> bytes:
        """All bytes."""
        self.seek(0)
        return bytes(self.buffer.read())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line has returned and printed."""

    line: list[str]
    code: int
    output: bytes
    errors: str

    @property
    def problem(self) -> str | None:
        """What no user may see; None if there is nothing of that kind."""
        rows = self.errors.splitlines()
        failures = [row for row in rows if row.startswith("kandinsky22: error: ")]
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if len(failures) != bool(self.code) or (self.code and rows[-1] != failures[-1]):
            return f"exit code {self.code} with {len(failures)} error lines"
        if any(not row.startswith("kandinsky22: ") or len(row) > LONGEST_MESSAGE for row in rows):
            return "a line of another kind"
        if hostile := _hostile(self.errors):
            return f"{hostile} on stderr"
        if self.code or "-" in self.line:  # "-": stdout may be a picture
            return None
        if hostile := _hostile(text := self.output.decode()):
            return f"{hostile} on stdout"
        paths = text.splitlines()
        if "--json" in self.line and self.line[0] != "info":
            paths = [json.loads(line)["path"] for line in paths]
        if self.line[0] != "info" and not all(Path(name).exists() for name in paths):
            return "paths on stdout that do not exist"
        return None


def _hostile(text: str) -> set[str]:
    """Return characters that may not be printed."""
    return {c for c in text if c != "\n" and not c.isprintable() and unicodedata.category(c) != "Zs"}


def run_command(line: list[str]) -> Outcome:
    """Run a command line; raise Escape if it prints what it may not print."""
    out, err = _Stream(), _Stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin():
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    outcome = Outcome(line, code, out.data, err.data.decode())
    if outcome.problem:
        raise Escape(
            f"{outcome.problem}: {outcome.errors[:300]!r} ... {outcome.errors[-700:]!r}, {outcome.output[:300]!r}"
        )
    return outcome


@contextlib.contextmanager
def _stdin() -> Any:
    import sys

    before, sys.stdin = sys.stdin, _Stream(b"")
    try:
        yield
    finally:
        sys.stdin = before
