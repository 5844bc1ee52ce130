"""Hostile recipes, texts, sizes and terminals: one line, nothing unescaped, and no network is loaded."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.cli.helpers import Command, assert_one_line

import kandinsky22
from kandinsky22.cli.console import MAX_LINE, safe_messages
from kandinsky22.cli.failures import check_address_space
from kandinsky22.errors import CheckpointError, InputError, describe, printable
from kandinsky22.generation.limits import MAX_ASPECT_RATIO, MAX_PIXELS, MAX_SIDE, is_allowed_size
from kandinsky22.generation.memory_errors import is_out_of_memory

HOSTILE = "a\x1b[31m cat\u202e\x9b2J\nfake: line\x07"
RECIPE: dict[str, Any] = {
    "format": 1,
    "command": "variations",
    "seeds": [5],
    "model": "m",
    "model_digest": "d",
    "scheduler": "DDPMScheduler",
    "steps": 1,
    "prior_steps": 1,
    "guidance": 1,
    "prior_guidance": 1,
    "width": 32,
    "height": 32,
    "device": "cpu",
    "dtype": "float32",
    "hardware": "h",
    "versions": {},
}


def write(text: str, *more: str, path: str = "picture.png", compressed: bool = False) -> None:
    """Write a picture with recipes."""
    texts = PngInfo()
    for each in (text, *more):
        texts.add_itxt("kandinsky22", each, zip=compressed)
    Image.new("RGB", (32, 32)).save(path, pnginfo=texts)


def only_printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


# Text


def test_printable_escapes_what_controls_a_terminal() -> None:
    assert printable("a cat, кот,\u3000猫") == "a cat, кот,\u3000猫"
    assert printable("a\x1b[31m\u202e\udcff\x9b") == "a\\x1b[31m\\u202e\\udcff\\x9b"
    assert printable("a\r\n  b\u2028c") == "a b\\u2028c"
    assert printable(printable(HOSTILE)) == printable(HOSTILE)


class Hostile:
    """An object whose description controls the terminal."""

    def __repr__(self) -> str:
        return HOSTILE


@pytest.mark.parametrize("error", [InputError(HOSTILE), CheckpointError(HOSTILE), InputError(describe(Hostile()))])
def test_messages_of_the_family_are_one_printable_line(error: Exception) -> None:
    assert str(error).isprintable()
    assert "cat" in str(error)


def test_huge_integers_are_described() -> None:
    assert describe(10**5000) == "<int of about 5000 digits>"
    assert describe(2**70) == str(2**70)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a cat", HOSTILE, "--oil"),
        (HOSTILE,),
        ("generate", "a cat", "--scheduler", HOSTILE),
        ("generate", "a cat", "--model", HOSTILE),
        ("generate", "a cat", "--device", HOSTILE),
        ("generate", "a cat", "--dtype", HOSTILE),
        ("generate", "a cat", "-o", f"{HOSTILE}.png"),
        ("generate", "--from", f"{HOSTILE}.png"),
        ("img2img", "a cat", "--image", f"{HOSTILE}.png"),
        ("info", f"{HOSTILE}.png"),
    ],
)
def test_command_lines_are_escaped_in_errors(command: Command, arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert_one_line(result, result.code or -1, "\\x1b[31m")
    assert only_printable(result.err)


def test_info_escapes_and_loses_nothing(command: Command) -> None:
    write(json.dumps(RECIPE | {"prompt": HOSTILE, "model": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    result = command("info", "picture.png")
    assert only_printable(result.out)
    assert "prompt     a\\x1b[31m cat\\u202e\\x9b2J\\nfake: line\\x07" in result.out
    assert not any(line.startswith("fake") for line in result.out.splitlines())
    result = command("info", "--json", "picture.png")
    assert only_printable(result.out)
    assert json.loads(result.out)["prompt"] == HOSTILE


def test_warnings_and_log_records_of_libraries_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("transformers.tests")
    logger.addHandler(handler)
    try:
        with safe_messages():
            logger.warning("a model of type %s", HOSTILE)
            for _ in range(3):
                logging.getLogger("kandinsky22.tests").warning("tensor %s", HOSTILE)
            warnings.warn(HOSTILE, stacklevel=1)
    finally:
        logger.removeHandler(handler)
    error = capsys.readouterr().err
    assert only_printable(error)
    assert error.count("kandinsky22: warning: tensor a\\x1b[31m") == 1
    assert error.count("\\x1b[31m") >= 3


# Recipes


@pytest.mark.parametrize("arguments", [("info",), ("info", "--json"), ("generate", "--from")])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10_000 + "]" * 10_000, ("nested",)),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, ("nested",)),
        (json.dumps(RECIPE)[:-1] + ', "image": ' + "[" * 900 + "]" * 900 + "}", ("image=",)),
        (json.dumps(RECIPE | {"guidance": 10**400}), ("guidance", "a number from")),
        (json.dumps(RECIPE | {"seeds": [10**400]}), ("seeds", "18446744073709551615")),
        (json.dumps(RECIPE | {"seeds": [2**64]}), ("seeds", "18446744073709551615")),
        (json.dumps(RECIPE | {"seeds": [-1]}), ("seeds=-1",)),
        (json.dumps(RECIPE | {"seeds": [1] * 10_001}), ("seeds=",)),
        (json.dumps(RECIPE | {"steps": 10**9}), ("steps=1000000000", "10000")),
        (json.dumps(RECIPE | {"width": 10**9}), ("width=1000000000",)),
        (json.dumps(RECIPE | {"width": 8192, "height": 8192}), ("size='8192x8192'",)),
        (json.dumps(RECIPE | {"strength": 2}), ("strength=2",)),
        (json.dumps(RECIPE | {"guidance": float("nan")}), ("NaN",)),
        (json.dumps(RECIPE).replace('"guidance": 1', '"guidance": 1e999'), ("guidance=inf",)),
        (json.dumps(RECIPE | {"parts": [{"weight": 1}]}), ("exactly one",)),
        (json.dumps(RECIPE | {"model": "a\0b"}), ("model=", "null")),
        (json.dumps(RECIPE | {"model": "\ud800"}), ("model=", "surrogates")),
        (json.dumps(RECIPE | {"scheduler_settings": {"a": [1]}}), ("scheduler_settings=",)),
        (json.dumps(RECIPE | {"command": "generate; rm -rf ~"}), ("command='generate; rm -rf ~'", "subcommand")),
        (json.dumps(RECIPE | {"command": "mix\nb"}), ("command=",)),
        (json.dumps(RECIPE | {HOSTILE: 1}), ("\\x1b[31m",)),
        ('{"format": 1, "format": 1}', ("twice",)),
        ("[" + "1," * 600_000 + "1]", ("1048576",)),
        ("null", ("not a JSON object",)),
        ("", ("cannot be read",)),
    ],
)
def test_hostile_recipes_are_one_line(
    command: Command, text: str, words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    write(text)
    result = command(*arguments, "picture.png")
    assert_one_line(result, 1, "picture.png", *words)
    assert only_printable(result.err)


def test_two_recipes_and_bombs_are_one_line(command: Command) -> None:
    write(json.dumps(RECIPE), json.dumps(RECIPE))
    assert_one_line(command("info", "picture.png"), 1, "several recipes")
    write("a" * 3_000_000, compressed=True)
    assert_one_line(command("info", "picture.png"), 1, "damaged", "too large")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("extend", [8, 0, 0, 0]),
        ("crop", 1),
        ("hint", {"name": "-", "sha256": ""}),
        ("parts", [{"weight": 1, "text": "a"}]),
        ("keep_pixels", True),
    ],
)
def test_recipes_with_inputs_that_the_subcommand_lacks_are_refused(command: Command, entry: str, value: Any) -> None:
    write(json.dumps(RECIPE | {entry: value}))
    assert_one_line(command("variations", "--from", "picture.png"), 1, "picture.png", f"variations has no {entry}")


@pytest.mark.parametrize("source", ["/", ".", "..", "", "//"])
def test_folders_have_no_recipe(command: Command, source: str) -> None:
    assert_one_line(command("generate", "--from", source), 1, "directory")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"guidance": -5}, "guidance=-5 is invalid: expected a number from 0 to"),
        ({"prior_guidance": -5.0}, "prior_guidance=-5.0 is invalid: expected a number from 0 to"),
        ({"guidance_threshold": 0}, "guidance_threshold=0 is invalid: expected a number above 0"),
        ({"guidance_interval": [0.6, 0.1]}, "guidance_interval=(0.6, 0.1) is invalid"),
        ({"prior_guidance_interval": [0.6]}, "prior_guidance_interval=(0.6,) is invalid"),
        (
            {"subject": {"weight": 5, "subject": {"name": "s", "sha256": "0"}}},
            "subject.weight=5.0 is invalid: expected a number from 0 to 1",
        ),
    ],
)
def test_values_of_recipes_have_the_bounds_of_the_options(command: Command, entry: dict[str, Any], words: str) -> None:
    write(json.dumps({**RECIPE, "command": "generate", "prompt": "a cat", **entry}))
    assert_one_line(command("generate", "--from", "picture.png"), 1, words)


def test_the_last_seed_of_a_series_is_one_of_torch(command: Command) -> None:
    write(json.dumps({**RECIPE, "command": "generate", "prompt": "a cat", "seeds": [2**64 - 1]}))
    result = command("generate", "--from", "picture.png", "-n", 2)
    assert_one_line(result, 1, f"seed={2**64 - 1} is invalid: expected at most {2**64 - 2} for 2 images")


def test_recipes_with_equal_seeds_are_refused(command: Command) -> None:
    write(json.dumps(RECIPE | {"seeds": [1, 2, 1]}))
    assert_one_line(command("info", "picture.png"), 1, "picture.png", "seeds=(1, 2, 1)", "different seeds")


@pytest.mark.parametrize("option", ["--quantize", "--output", "--scheduler", "--model"])
def test_messages_that_repeat_long_values_are_shortened(command: Command, option: str) -> None:
    result = command("generate", "a cat", option, "a" * 5000)
    assert result.code in (1, 2)
    assert result.err.startswith("kandinsky22: error: ")
    assert result.err.count("\n") == 1
    assert len(result.err) <= MAX_LINE + 1


def test_the_command_to_run_is_quoted(command: Command) -> None:
    name = "a b; rm $(id) 'x'.png"
    write(json.dumps(RECIPE), path=name)
    result = command("generate", "--from", name)
    assert_one_line(result, 1, "run: kandinsky22 variations --from ")
    assert shlex.split(result.err.split("run: ")[1]) == ["kandinsky22", "variations", "--from", name]


# Sizes, counts and memory


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "8192x8192"), ("8192x8192", str(MAX_PIXELS), "memory")),
        (("--size", "64x8000"), ("aspect ratio", str(MAX_ASPECT_RATIO))),
        (("--size", f"{MAX_SIDE + 1}x8000"), (str(MAX_SIDE),)),
        (("--size", f"{'9' * 5000}x64"), ("WIDTHxHEIGHT",)),
        (("-n", str(10**30)), ("-n", "at most 10000")),
        (("--seed", str(2**64)), ("--seed", "at most")),
        (("--seed", "9" * 5000), ("--seed", "at most")),
        (("--steps", str(10**9)), ("--steps", "at most 10000")),
        (("--prior-steps", str(10**9)), ("--prior-steps", "at most 10000")),
        (("--cache-every", str(10**30)), ("--cache-every", "at most 10000")),
    ],
)
def test_huge_numbers_are_refused_with_the_limit(
    command: Command, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line(command("generate", "a cat", *arguments), 2, *words)


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (100, 3300)])
def test_sizes_derived_from_thin_pictures_are_refused_before_loading(
    command: Command, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("networks are loaded")

    monkeypatch.setattr("kandinsky22.cli.run.load_networks", load)
    Image.new("RGB", size).save("thin.png")
    shape = f"size of --image='{size[0]}x{size[1]}'"
    assert_one_line(command("img2img", "a cat", "--image", "thin.png"), 1, shape, "at most 32", "--size")


def test_allowed_sizes() -> None:
    assert all(is_allowed_size(*size) for size in ((1, 1), (64, 2048), (4096, 4096), (8192, 2048)))
    assert not any(is_allowed_size(*size) for size in ((0, 5), (4097, 4096), (8193, 1000), (33, 1)))


def test_a_limited_address_space_is_reported_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5 * 10**8, -1))
    with pytest.raises(MemoryError):
        check_address_space()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (-1, -1))
    check_address_space()


def test_other_errors_are_not_out_of_memory() -> None:
    assert not is_out_of_memory(FileNotFoundError(2, "No such file", "out of memory.png"))
    assert not is_out_of_memory(InputError("model='out of memory' is invalid"))
    assert not is_out_of_memory(RuntimeError("a bug"))
    try:
        raise CheckpointError("a.safetensors cannot be read") from OSError(12, "Cannot allocate memory")
    except CheckpointError as error:
        assert is_out_of_memory(error)


# Terminals

SHELL = pytest.mark.skipif(os.name == "nt", reason="redirections of a POSIX shell")


def run_in_shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(kandinsky22.__file__).parents[1]), **variables}
    program = f"{shlex.quote(sys.executable)} -m kandinsky22"
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("kandinsky22", program)],
        capture_output=True,
        cwd=folder,
        env=environment,
        encoding="utf-8",
        check=False,
    )


@SHELL
@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("kandinsky22 info picture.png 2>&-", 0, "кот", ""),
        ("kandinsky22 info missing.png 2>&-", 1, "", ""),
        ("kandinsky22 oil 2>&-", 2, "", ""),
        ("kandinsky22 info picture.png >&-", 0, "", ""),
        ("kandinsky22 info missing.png >&-", 1, "", "missing.png"),
        ("kandinsky22 info picture.png <&- >&- 2>&-", 0, "", ""),
        ("kandinsky22 info missing.png >&- 2>&-", 1, "", ""),
        ("kandinsky22 info picture.png > /dev/full", 1, "", "No space left"),
        ("kandinsky22 info missing.png 2> /dev/full", 1, "", ""),
    ],
)
def test_errors_go_to_stderr_or_nowhere(tmp_path: Path, line: str, code: int, out: str, err: str) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no full device")
    write(json.dumps(RECIPE | {"prompt": "кот"}), path=str(tmp_path / "picture.png"))
    result = run_in_shell(line, tmp_path)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert out in result.stdout if out else result.stdout == ""
    assert err in result.stderr if err else result.stderr == ""


@SHELL
@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_other_encodings_lose_nothing(tmp_path: Path, variables: dict[str, str]) -> None:
    write(json.dumps(RECIPE | {"prompt": "кот 猫"}), path=str(tmp_path / "picture.png"))
    result = run_in_shell("kandinsky22 info picture.png", tmp_path, **variables)
    assert "кот 猫" in result.stdout or "\\u043a\\u043e\\u0442 \\u732b" in result.stdout
    result = run_in_shell("kandinsky22 info --json picture.png", tmp_path, **variables)
    assert json.loads(result.stdout)["prompt"] == "кот 猫"
    result = run_in_shell("kandinsky22 info 猫.png", tmp_path, **variables)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_prompts_in_utf_8_are_read_in_a_locale_without_it() -> None:
    from kandinsky22.generation.input_images import check_text

    assert check_text("prompt", "кот".encode().decode("ascii", "surrogateescape")) == "кот"
    with pytest.raises(InputError, match="encoding"):
        check_text("prompt", "a \udcff cat")
