"""Errors are reported in one line with an exit code, and leave no file behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cli.helpers import Command, Result, assert_one_line, save_png

import kandinsky22
from kandinsky22.cli.main import build_parser


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("COMMAND",)),
        (("paint",), ("paint",)),
        (("generate",), ("PROMPT",)),
        (("generate", "a cat", "--colour"), ("--colour",)),
        (("generate", "a cat", "--scheduler", "oil"), ("oil", "ddpm, ddim, dpm")),
        (("generate", "a cat", "--prior-scheduler", "oil"), ("--prior-scheduler", "oil")),
        (("generate", "a cat", "--quality", "good"), ("good", "draft, balanced, best")),
        (("generate", "a cat", "--guidance-interval", "0.5"), ("--guidance-interval", "2")),
        (("generate", "a cat", "--guidance-interval", "0.6", "0.1"), ("0.6 0.1", "START < END")),
        (("generate", "a cat", "--guidance-interval", "0", "7"), ("7", "from 0 to 1")),
        (("generate", "a cat", "--prior-guidance-interval", "0.6", "0.1"), ("--prior-", "0.6 0.1", "START < END")),
        (("generate", "a cat", "--prior-guidance-interval", "nan", "1"), ("--prior-", "nan", "from 0 to 1")),
        (("generate", "a cat", "--guidance-rescale", "2"), ("'2'", "from 0 to 1")),
        (("generate", "a cat", "--guidance-threshold", "0"), ("'0'", "above 0")),
        (("generate", "a cat", "--size", "0x64"), ("0x64", "512x768")),
        (("generate", "a cat", "--size", "-64x64"), ("--size",)),
        (("generate", "a cat", "--size", "64"), ("'64'",)),
        (("generate", "a cat", "--size", "axb"), ("axb",)),
        (("generate", "a cat", "--steps", "0"), ("--steps", "at least 1")),
        (("generate", "a cat", "--steps", "many"), ("many",)),
        (("generate", "a cat", "--prior-steps", "2.5"), ("2.5",)),
        (("generate", "a cat", "--guidance", "nan"), ("nan",)),
        (("generate", "a cat", "--guidance", "high"), ("high",)),
        (
            (
                "generate",
                "a cat",
                "--prior-guidance=-1",
            ),
            ("-1",),
        ),
        (("generate", "a cat", "--seed", "-3"), ("--seed",)),
        (("generate", "a cat", "--seed", str(2**63)), ("at most",)),
        (("generate", "a cat", "-n", "0"), ("-n",)),
        (("info",), ("IMAGE",)),
        (("compare",), ("PROMPT",)),
        (("compare", "a cat", "--scheduler", "ddim,oil"), ("oil", "ddpm, ddim")),
        (("compare", "a cat", "--scheduler", ""), ("--scheduler", "''")),
        (("compare", "a cat", "--steps", "4,0"), ("--steps", "0", "at least 1")),
        (("compare", "a cat", "--steps", "4 8"), ("4 8",)),
        (("compare", "a cat", "--guidance", "2,nan"), ("nan",)),
        (("compare", "a cat", "--quality", "best"), ("--quality",)),
        (("img2img", "--image", "photo.png"), ("PROMPT",)),
        (("img2img", "a cat"), ("--image",)),
        (("img2img", "a cat", "--image", ""), ("--image", "''", "the path of an image file")),
        (("img2img", "a cat", "--image", "https://a.b/c.png"), ("download", "https://a.b/c.png")),
        (("img2img", "a cat", "--image", "photo.png", "--strength", "1.5"), ("1.5", "from 0 to 1")),
        (("img2img", "a cat", "--image", "photo.png", "--mask", "photo.png"), ("--mask",)),
        (("inpaint", "a cat", "--image", "photo.png"), ("--mask",)),
        (("inpaint", "a cat", "--mask", "photo.png"), ("--image",)),
        (("control", "a cat"), ("--hint",)),
        (("control", "a cat", "--hint", "photo.png", "--strength", "0.5"), ("--strength", "--image")),
        (("mix",), ("--text", "--image")),
        (("mix", "--text", "a", "cat", "0.5"), ("--text", "quote")),
        (("mix", "--text", "a cat", "heavy"), ("heavy", "weight")),
        (("mix", "--image", "photo.png", "nan"), ("nan", "weight")),
        (("mix", "--image", "photo.png", "--prior-steps", "3"), ("--prior-steps", "no text")),
        (("variations",), ("IMAGE",)),
        (("variations", "photo.png", "--strength", "0.5"), ("--strength", "--prompt")),
        (("variations", "photo.png", "--prior-guidance", "3"), ("--prior-guidance",)),
        (("variations", "photo.png", "--prior-guidance-interval", "0", "1"), ("--prior-guidance-interval",)),
        (("variations", "photo.png", "--prior-scheduler", "dpm"), ("--prior-scheduler",)),
    ],
)
def test_invalid_command_lines_are_reported(
    command: Command, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    Image.new("RGB", (32, 32)).save("photo.png")
    result = command(*arguments)
    assert_one_line(result, 2, *words)
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("subcommand", ["generate", "compare"])
@pytest.mark.parametrize(
    ("part", "words"), [("prior_prior", "Prior"), ("unet", "V22Pipeline"), ("movq", "V22Pipeline")]
)
def test_nan_results_are_reported_and_not_saved(
    command: Command, model: Path, part: str, words: str, subcommand: str
) -> None:
    shutil.copytree(model, "nan")
    (path,) = Path("nan", part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(name for name in weights if name.endswith("weight"))[0]
    save_file(weights | {name: weights[name] * float("nan")}, path, {"format": "pt"})
    before = sorted(Path().rglob("*"))
    result = command(subcommand, "a cat", "--model", "nan", "--prior-steps", 2, "--steps", 2)
    assert_one_line(result, 1, words, "produced NaN", "float32")
    assert sorted(Path().rglob("*")) == before


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a network is about to be loaded."""

    def load(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a model is loaded although the output cannot be written")

    monkeypatch.setattr("kandinsky22.cli.run.load_networks", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/picture.png", ("missing", "is not an existing folder")),
        ("file/picture.png", ("is not an existing folder",)),
        ("folder.png", ("is a folder",)),
        ("/proc/picture.png", ("cannot be written",)),
        ("picture.gif", ("--output='picture.gif' is invalid", ".png, .jpg")),
        ("picture", ("--output='picture' is invalid", ".png")),
    ],
)
def test_unwritable_outputs_are_reported_before_loading(
    command: Command, tmp_path: Path, output: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(command("generate", "a cat", "-o", output), 1, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_loading")
def test_a_folder_with_the_sheets_name_is_reported_before_loading(command: Command) -> None:
    Path("picture-sheet.png").mkdir()
    assert_one_line(command("generate", "a cat", "-n", 2), 1, "picture-sheet.png", "is a folder")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("img2img", "a cat", "--image", "missing.png"), ("missing.png", "No such file")),
        (("img2img", "a cat", "--image", "folder"), ("folder", "directory")),
        (("img2img", "a cat", "--image", "text.png"), ("image", "text.png", "cannot")),
        (("img2img", "a cat", "--image", "half.png"), ("image", "half.png", "cannot be read")),
        (("img2img", "a cat", "--image", "photo.png", "-o", "photo.png"), ("photo.png", "would be overwritten")),
        (("variations", "photo.png", "-o", "./a.png", "--seed", "1", "2"), ("a-seed1.png", "would be overwritten")),
        (
            ("inpaint", "a cat", "--image", "photo.png", "--mask", "wide.png"),
            ("size of --mask='64x32' is invalid", "the aspect ratio of --image, which is 32x32"),
        ),
        (("inpaint", "a cat", "--image", "photo.png", "--mask", "text.png"), ("mask", "text.png")),
        (
            ("control", "a cat", "--hint", "wide.png", "--image", "photo.png"),
            ("size of --image='32x32' is invalid", "the aspect ratio of --hint, which is 64x32"),
        ),
        (("control", "a cat", "--hint", "half.png"), ("hint", "half.png")),
        (("mix", "--text", "a cat", "0.5", "--text", "a dog"), ("only some", "weight")),
        (("mix", "--image", "photo.png", "--image", "missing.png"), ("missing.png",)),
        (("mix", "--text", "a \udcff cat"), ("encoding",)),
        (("variations", "missing.png"), ("missing.png",)),
        (("variations", "a \udcff.png"), ("a ",)),
        (("generate", "--from", "varied.png"), ("varied.png", "kandinsky22 variations --from varied.png")),
    ],
)
def test_bad_pictures_are_reported_before_loading(
    command: Command, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    Image.new("RGB", (32, 32)).save("photo.png")
    os.link("photo.png", "a-seed1.png")
    Image.new("RGB", (64, 32)).save("wide.png")
    Image.effect_noise((64, 64), 90).save("half.png")
    Path("half.png").write_bytes(Path("half.png").read_bytes()[:900])
    Path("text.png").write_text("no picture")
    Path("folder").mkdir()
    recipe_of_variations = {
        "command": "variations",
        "seeds": [5],
        "model": "m",
        "model_digest": "d",
        "scheduler": "DDPMScheduler",
    }
    recipe_of_variations |= {
        "steps": 1,
        "prior_steps": 1,
        "guidance": 1,
        "prior_guidance": 1,
        "width": 32,
        "height": 32,
    }
    recipe_of_variations |= {"device": "cpu", "dtype": "float32", "hardware": "h", "versions": {}, "format": 1}
    save_png(Image.new("RGB", (32, 32)), Path("varied.png"), {"kandinsky22": json.dumps(recipe_of_variations)})
    before = sorted(Path().rglob("*"))
    assert_one_line(command(*arguments), 1, *words)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("generate", "a cat"), "inpaint"),
        (("img2img", "a cat", "--image", "photo.png"), "control/decoder"),
        (("inpaint", "a cat", "--image", "photo.png", "--mask", "photo.png"), "combined"),
        (("control", "a cat", "--hint", "photo.png"), "a/decoder"),
        (("variations", "photo.png"), "b/prior"),
    ],
)
def test_checkpoints_of_other_classes_are_reported_before_weights_are_read(
    command: Command, models: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], folder: str
) -> None:
    monkeypatch.setattr("kandinsky22.pipelines.base.load_component", failing(AssertionError("weights are read")))
    Image.new("RGB", (32, 32)).save("photo.png")
    result = command(*arguments, "--model", models / folder)
    beginning = f"--model='{models / folder}' is invalid: expected weights for Kandinsky"
    assert_one_line(result, 1, beginning, ", not for Kandinsky")


def test_a_prior_of_another_width_is_reported_before_networks_run(
    command: Command, models: Path, tmp_path: Path
) -> None:
    decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(models / "a/decoder")
    options = {**decoder.unet.config, "encoder_hid_dim": 24}
    decoder.unet = kandinsky22.UNet2DConditionModel(**options)
    decoder.save_pretrained(tmp_path / "other")
    result = command("generate", "a cat", "--model", "other", "--prior", models / "b/prior")
    assert_one_line(result, 1, "prior_prior.config.embedding_dim=32 does not fit unet.config.encoder_hid_dim=24")


@pytest.mark.parametrize(("name", "needs"), [("inpaint", "--mask"), ("control", "--hint")])
def test_missing_embedded_weights_are_reported(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, needs: str
) -> None:
    monkeypatch.setattr("kandinsky22.checkpoints.hub.importlib.resources.files", lambda package: tmp_path)
    Image.new("RGB", (32, 32)).save("photo.png")
    image = ("--image", "photo.png") if name == "inpaint" else ()
    result = command(name, "a circle", *image, needs, "photo.png")
    assert_one_line(result, 1, f"no embedded {name} weights")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere/at/all"), ("nowhere/at/all",)),
        (("--device", "abacus"), ("device='abacus'", "auto, cpu, cuda, cuda:N or mps")),
        (("--device", "cuda:99"), ("device='cuda:99'", "available here", "cuda devices")),
        (("--dtype", "float7"), ("float7", "bfloat16")),
    ],
)
def test_missing_models_devices_and_dtypes_are_reported(
    command: Command, model: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line(command("generate", "a cat", "--model", model, *arguments), 1, *words)
    assert not list(Path().iterdir())


def test_a_decoder_without_a_prior_is_reported(command: Command, models: Path) -> None:
    assert_one_line(command("generate", "a cat", "--model", models / "a/decoder"), 1, "prior")


def test_a_damaged_model_is_reported(command: Command, broken_model: Path) -> None:
    assert_one_line(command("generate", "a cat", "--model", broken_model), 1, "unet")
    assert not Path("picture.png").exists()


def test_an_undecodable_prompt_is_reported(command: Command) -> None:
    assert_one_line(command("generate", "a \udcff cat"), 1, "encoding")


def failing(error: BaseException) -> Callable[..., None]:
    def draw(*arguments: Any, **keywords: Any) -> None:
        raise error

    return draw


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ("interrupted",)),
        (OSError(28, "No space left on device", "picture.png"), 1, ("picture.png", "No space left")),
        (OutOfMemoryError("CUDA out of memory"), 1, ("out of memory", "--size")),
        (MemoryError(), 1, ("out of memory", "--size")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, ("out of memory", "--size")),
        (RuntimeError("could not create a primitive"), 1, ("out of memory",)),
        (RuntimeError("could not create a memory object"), 1, ("out of memory",)),
        (RuntimeError("std::bad_alloc"), 1, ("out of memory",)),
        (OSError(12, "Cannot allocate memory"), 1, ("out of memory",)),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, ("out of memory",)),
        (OSError("libtorch.so: cannot allocate memory in static TLS block"), 1, ("out of memory",)),
    ],
)
def test_errors_while_generating_leave_no_file(
    command: Command,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr("kandinsky22.generation.stages.generate_image", failing(error))
    assert_one_line(command("generate", "a cat", "--model", model), code, *words)
    assert not list(Path().iterdir())


def test_errors_while_writing_leave_the_old_picture(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("picture.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", failing(OSError(28, "No space left on device")))
    assert_one_line(command("generate", "a cat", "--model", model), 1, "No space left")
    assert [path.read_bytes() for path in Path().iterdir()] == [b"old"]


def test_bugs_raise_a_traceback(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky22.generation.stages.generate_image", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        command("generate", "a cat", "--model", model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("picture.png", "No such file")),
        (b"not a picture", ("not an image",)),
        ({}, ("no recipe",)),
        ({"kandinsky22": "{"}, ("cannot be read",)),
        ({"kandinsky22": "[]"}, ("cannot be read",)),
        ({"kandinsky22": json.dumps({"format": 99})}, ("another version",)),
        ({"kandinsky22": json.dumps({"format": 1, "prompt": 7})}, ("prompt=7 is invalid: expected str",)),
        (
            {"kandinsky22": json.dumps({"format": 1, "prompt": "a cat", "seeds": []})},
            ("seeds=[] is invalid: expected a non-empty tuple[int, ...]",),
        ),
        ({"kandinsky22": json.dumps({"format": 1, "brush": "thin"})}, ("brush",)),
        ({"kandinsky22": json.dumps({"format": 1, "prompt": "a cat"})}, ("cannot be read", "missing entries seeds")),
    ],
)
@pytest.mark.parametrize("arguments", [("info",), ("generate", "--from")])
def test_pictures_without_a_readable_recipe(
    command: Command, content: Any, words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    if isinstance(content, bytes):
        Path("picture.png").write_bytes(content)
    elif content is not None:
        save_png(Image.new("RGB", (4, 4)), Path("picture.png"), content)
    assert_one_line(command(*arguments, "picture.png"), 1, *words)


def test_a_truncated_picture_is_reported(command: Command) -> None:
    Image.effect_noise((64, 64), 90).save("picture.png")
    Path("picture.png").write_bytes(Path("picture.png").read_bytes()[:900])
    assert_one_line(command("info", "picture.png"), 1, "picture.png", "damaged")


@pytest.mark.parametrize("scheduler", ["OilScheduler", "KandinskyV22Pipeline"])
def test_a_recipe_with_an_unknown_scheduler_is_reported(command: Command, model: Path, scheduler: str) -> None:
    command("generate", "a cat", "--model", model)
    with Image.open("picture.png") as picture:
        recipe = {**json.loads(picture.info["kandinsky22"]), "scheduler": scheduler}
        save_png(picture.copy(), Path("other.png"), {"kandinsky22": json.dumps(recipe)})
    assert_one_line(command("generate", "--from", "other.png"), 1, scheduler)


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['kandinsky22', 'generate', '--help']\n"
        "from kandinsky22.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--negative-prompt" in result.stdout


@pytest.mark.parametrize("name", ["generate", "img2img", "inpaint", "control", "mix", "variations", "info"])
def test_help_ends_with_an_example_that_is_understood(command: Command, name: str) -> None:
    help_text = command(name, "--help").out
    program, *example = shlex.split(help_text[help_text.index("example:") :].removeprefix("example:"))
    args = build_parser().parse_args(example)
    assert (program, example[0]) == ("kandinsky22", name)
    assert callable(args.run)
    assert name in command("--help").out


def test_the_installed_module_reports_like_the_function(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kandinsky22", "generate", "a cat", "--model", "nowhere/at/all"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(kandinsky22.__file__).parents[1])},
        check=False,
    )
    assert_one_line(Result(result.returncode, result.stdout, result.stderr), 1, "nowhere/at/all")
    assert not list(tmp_path.iterdir())
