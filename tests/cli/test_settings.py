"""Defaults of options from the environment and the settings file: precedence, errors, and `kandinsky22 config`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from tests.cli.helpers import Command, assert_one_line, stored

from kandinsky22.cli import option_values
from kandinsky22.cli.main import Parser, build_parser
from kandinsky22.cli.settings import FROM_SETTINGS, leaf_parsers, options_of, parse_command_line
from kandinsky22.cli.settings_file import settings_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write(text: str) -> Path:
    path = settings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def parse(*argv: str) -> argparse.Namespace:
    return parse_command_line(build_parser(), argv)


def test_command_line_before_environment_before_file_before_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("generate", "x").steps is None
    write("steps = 3\n[generate]\nsteps = 4\n")
    assert (parse("generate", "x").steps, parse("img2img", "x").steps) == (4, 3)
    monkeypatch.setenv("KANDINSKY22_STEPS", "5")
    assert (parse("generate", "x").steps, parse("img2img", "x").steps) == (5, 5)
    monkeypatch.setenv("KANDINSKY22_GENERATE_STEPS", "6")
    args = parse("generate", "x")
    assert (args.steps, parse("img2img", "x").steps) == (6, 5)
    assert getattr(args, FROM_SETTINGS) == {"steps"}
    assert parse("generate", "x", "--steps", "7").steps == 7
    assert not getattr(parse("generate", "x", "--steps", "7"), FROM_SETTINGS)


def test_without_settings_every_default_is_that_of_the_parser() -> None:
    for line in (
        ["generate", "x"],
        ["mix", "--text", "a", "1", "--image", "b.png", "2"],
        ["compare", "x"],
        ["info", "x"],
    ):
        values = vars(parse(*line))
        expected = vars(build_parser().parse_args(line))
        assert values.pop(FROM_SETTINGS) == frozenset()
        assert {k: v for k, v in values.items() if not callable(v)} == {
            k: v for k, v in expected.items() if not callable(v)
        }


def test_every_kind_of_option() -> None:
    write(
        "seed = [3, 4]\nsize = '64x32'\nforce = true\nquiet = false\nno_recipe = true\nprompt-weights = false\n"
        "guidance_interval = [0, 0.5]\nquantize = 'int8'\nguidance = 2\n"
        "[inpaint]\ncrop = 8\nkeep-pixels = true\n[compare]\nsteps = [1, 2]\nscheduler = 'ddim'\n"
        "[mix]\ntext = ['a cat', 0.5]\n"
    )
    args = parse("inpaint", "x")
    assert (args.seed, args.size, args.force, args.quiet, args.recipe) == ((3, 4), (64, 32), True, False, False)
    assert (args.prompt_weights, args.guidance_interval, args.quantize, args.guidance) == (False, (0, 0.5), "int8", 2)
    assert (args.crop, args.keep_pixels) == (8, True)
    assert parse("inpaint", "x", "--no-crop").crop is False
    compare = parse("compare", "x", "--seed", "1")
    assert (compare.grid_steps, compare.grid_scheduler, compare.grid_guidance) == ((1, 2), ("DDIMScheduler",), (2.0,))
    assert [(item.text, item.weight) for item in parse("mix").parts] == [("a cat", 0.5)]
    assert [item.text for item in parse("mix", "--text", "a dog").parts] == ["a dog"]


def test_flags_and_intervals_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE", "yes"), ("QUIET", "0"), ("GUIDANCE_INTERVAL", "0.1 0.6"), ("KEEP_PIXELS", "off")):
        monkeypatch.setenv(f"KANDINSKY22_{name}", value)
    args = parse("inpaint", "x")
    assert (args.force, args.quiet, args.guidance_interval, args.keep_pixels) == (True, False, (0.1, 0.6), False)


def test_a_new_subcommand_has_settings_without_code_of_its_own() -> None:
    parser = Parser(prog="kandinsky22")
    tools = parser.add_subparsers(required=True).add_parser("tool").add_subparsers(required=True)
    sharpen = tools.add_parser("sharpen")
    sharpen.add_argument("--radius", type=option_values.integer(1), required=True)
    write("[tool]\nradius = 1\n[tool.sharpen]\nradius = 2\n")
    assert parse_command_line(parser, ["tool", "sharpen"]).radius == 2
    assert "KANDINSKY22_TOOL_SHARPEN_RADIUS" in sharpen.format_help()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generate]\nstpes = 25", ("config.toml", "'stpes'", "[generate]", "did you mean steps?")),
        ("[generatex]\nsteps = 25", ("section", "'generatex'", "did you mean generate?")),
        ("colour = 1", ("unknown key", "'colour'")),
        ("[config.set]\nkey = 1", ("unknown key", "'key'")),
        ("[generate]\nsteps = 0", ("[generate]", "steps", "'0'", "at least 1")),
        ("[generate]\nsteps = true", ("steps", "True", "a number")),
        ("[generate]\nforce = 'maybe'", ("force", "maybe", "true or false")),
        ("[generate]\nguidance-interval = [0.1]", ("guidance-interval", "2 values")),
        ("[generate]\nguidance-interval = [0.6, 0.1]", ("guidance-interval", "START < END")),
        ("[generate]\nquantize = 'int2'", ("quantize", "int2", "int8, ")),
        ("[generate\n", ("config.toml", "not TOML", "line 1")),
        ("a = " + "[" * 5000, ("config.toml", "not TOML")),
    ],
)
def test_a_wrong_settings_file_is_one_line(command: Command, text: str, words: tuple[str, ...]) -> None:
    write(text)
    assert_one_line(command("generate", "a cat"), 1, *words)
    assert command("config", "path").code == 0


def test_a_settings_file_that_is_no_text(command: Command) -> None:
    write("").write_bytes(b"\xff\xfe\x00")
    assert_one_line(command("generate", "a cat"), 1, "config.toml", "UTF-8")
    settings_path().unlink()
    settings_path().mkdir()
    assert_one_line(command("generate", "a cat"), 1, "config.toml", "cannot be read")


def test_a_wrong_variable_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANDINSKY22_SIZE", "64")
    assert_one_line(command("generate", "a cat"), 1, "KANDINSKY22_SIZE", "'64'", "WIDTHxHEIGHT")


def test_settings_never_change_a_repeated_recipe(command: Command, model: Path) -> None:
    first = command("generate", "a cat", "--model", model, "--seed", 3, "-n", 2, "-o", "cat.png")
    write("steps = 1\nseed = 9\ncount = 4\nmodel = 'nothing'\nquality = 'draft'\nforce = true\n")
    again = command("generate", "--from", "cat-seed3.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert Path("again.png").read_bytes() == first.paths[0].read_bytes()


def test_a_preset_on_the_command_line_replaces_settings(command: Command, model: Path) -> None:
    write(f"[generate]\nsteps = 1\nprior-steps = 1\nmodel = {json.dumps(str(model))}\n")
    command("generate", "a cat", "-o", "own.png")
    command("generate", "a cat", "--quality", "draft", "-o", "draft.png")
    command("generate", "a cat", "--quality", "draft", "--steps", 2, "-o", "both.png")
    steps = [(stored(Path(name))["steps"], stored(Path(name))["prior_steps"]) for name in ("own.png", "draft.png")]
    assert steps[0] == (1, 1) and 1 not in steps[1]
    assert stored(Path("both.png"))["steps"] == 2


def test_settings_without_effect_are_no_error(command: Command, model: Path) -> None:
    write("prior-steps = 2\nstrength = 0.5\ncount = 3\nsteps = 1\n")
    command("generate", "a cat", "--model", model, "--seed", 1, "-n", 1, "-o", "cat.png")
    result = command("variations", "cat.png", "--model", model, "--seed", 1, 2)
    assert result.code == 0, result.err
    assert [stored(path).get("strength") for path in result.paths] == [None] * 3  # two pictures and their sheet


def test_config_writes_what_the_command_reads(command: Command) -> None:
    path = Path(command("config", "path").out.strip())
    assert path == settings_path() and not path.exists()
    for arguments in (
        ("generate.steps", 25),
        ("device", "cpu"),
        ("generate.guidance-interval", 0.1, 0.6),
        ("inpaint.keep_pixels", "true"),
        ("generate.negative-prompt", 'a "b" \\ \x7f é'),
        ("generate.steps", 26),
    ):
        result = command("config", "set", *arguments)
        assert result.code == 0, result.err
    assert tomllib.loads(path.read_text("utf-8")) == {
        "device": "cpu",
        "generate": {"steps": 26, "guidance-interval": [0.1, 0.6], "negative-prompt": 'a "b" \\ \x7f é'},
        "inpaint": {"keep-pixels": True},
    }
    shown = command("config", "show").out
    assert "generate.steps = 26  ([generate] in " in shown and "mix.device" in shown
    entries = [json.loads(line) for line in command("config", "show", "--json").out.splitlines()]
    assert {"option": "generate.steps", "value": 26, "origin": f"[generate] in {path}"} in entries
    assert command("config", "unset", "generate.steps").code == 0
    assert "steps" not in path.read_text("utf-8")


def test_config_preserves_the_rest_of_the_file(command: Command) -> None:
    path = write("# mine\ndevice = 'cpu' # here\n\n[generate] # pictures\nsteps = 5\n\n# end\n[mix]\nsteps = 7\n")
    assert command("config", "set", "generate.guidance", 3).code == 0
    assert command("config", "set", "mix.steps", 8).code == 0
    text = path.read_text("utf-8")
    assert text.startswith("# mine\ndevice = 'cpu' # here\n\n[generate] # pictures\nsteps = 5\n")
    assert tomllib.loads(text)["mix"] == {"steps": 8}
    line = "negative-prompt = 'a cat\u2028on a mat\x85'"
    path.write_text(f"{line}\r\n[generate]\nsteps = 5\n", encoding="utf-8")
    assert command("config", "set", "generate.steps", 6).code == 0
    assert path.read_text("utf-8").splitlines(keepends=False)[-1] == "steps = 6"
    assert line in path.read_text("utf-8")
    path.write_text("[generate]\nsteps = 5\nseed = [\n  1,\n  2,\n]\nsteps2 = 1\n", encoding="utf-8")
    before = path.read_text("utf-8")
    assert_one_line(command("config", "set", "generate.seed", 3), 1, "text editor")
    assert path.read_text("utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate.stpes", 3), ("'stpes'", "did you mean steps?")),
        (("generatex.steps", 3), ("'generatex'", "did you mean generate?")),
        (("generate.steps", "many"), ("steps", "'many'", "an integer")),
        (("steps.x", 1), ("'steps'",)),
        (("config.set.key", 1), ("'key'",)),
    ],
)
def test_config_refuses_what_no_option_accepts(
    command: Command, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_one_line(command("config", "set", *arguments), 1, *words)
    assert not settings_path().exists()


def test_secrets_are_not_shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any("token" in options_of(leaf) for _, leaf in leaf_parsers(build_parser())):
        pytest.skip("no subcommand has a token")
    monkeypatch.setenv("KANDINSKY22_TOKEN", "s3cret")
    result = command("config", "show")
    assert "token" in result.out and "s3cret" not in result.out


def test_help_says_where_defaults_come_from(command: Command) -> None:
    for path, leaf in leaf_parsers(build_parser()):
        text = command(*path, "--help").out
        if path[0] in ("config", "completion"):
            assert "KANDINSKY22_" not in text
        else:
            name = "_".join(path).upper().replace("-", "_")
            assert f"KANDINSKY22_{name}_" in text and str(settings_path().name) in text, path
            assert options_of(leaf)


def test_the_variable_names_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("steps = 9\n", encoding="utf-8")
    monkeypatch.setenv("KANDINSKY22_CONFIG", str(other))
    assert parse("generate", "x").steps == 9
    monkeypatch.delenv("KANDINSKY22_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert settings_path().is_absolute()
