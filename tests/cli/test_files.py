"""Files of the command: free names, standard input and output, formats, texts from files, crops and extensions."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.helpers import DEFAULTS, SIZE, Command, assert_one_line, pixels, stored

import kandinsky22
from kandinsky22.cli.main import build_parser
from kandinsky22.cli.request import model_location
from kandinsky22.cli.run import output_names
from kandinsky22.errors import InputError

PROGRAM = "import sys; from kandinsky22.cli.main import main; sys.exit(main())"
FAST = ("--steps", 1, "--prior-steps", 2, "--seed", 5)


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """A wide photo, and a mask whose centre is repainted."""
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = Image.new("L", (100, 60))
    mask.paste(255, (40, 20, 60, 40))
    mask.save(tmp_path / "mask.png")


@pytest.fixture
def generate(command: Command, model: Path) -> Callable[..., Any]:
    """Run `generate` with few steps."""
    return lambda *arguments: command("generate", *arguments, "--model", model, *FAST)


@pytest.fixture
def inpaint(command: Command, models: Path) -> Callable[..., Any]:
    """Run `inpaint` on the photo."""

    def run(*arguments: object) -> Any:
        return command("inpaint", "a cat", "--image", "photo.png", "--model", models / "inpaint", *FAST, *arguments)

    return run


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Set the content of standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


# Existing files


def test_an_existing_picture_gets_a_neighbour(generate: Callable[..., Any]) -> None:
    Path("cat.png").write_bytes(b"old")
    result = generate("a cat", "-o", "cat.png")
    assert (result.code, result.out) == (0, "cat-2.png\n")
    assert "cat.png exists; the image will be cat-2.png" in result.err
    assert Path("cat.png").read_bytes() == b"old"
    assert generate("a cat", "-o", "cat.png", "--force").out == "cat.png\n"
    assert Path("cat.png").read_bytes() == Path("cat-2.png").read_bytes()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_repeated_picture_is_protected(
    command: Command, generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, force: tuple[str, ...]
) -> None:
    generate("a cat", "-o", "a.png")
    content = Path("a.png").read_bytes()
    monkeypatch.setattr("kandinsky22.cli.run.load_networks", None)
    result = command("generate", "--from", "a.png", "-o", "a.png", "--steps", 2, *force)
    assert_one_line(result, 1, "a.png is an input and would be overwritten")
    assert Path("a.png").read_bytes() == content


def test_compare_replaces_only_tables_of_its_own(command: Command, model: Path) -> None:
    arguments = ("compare", "a cat", "--model", model, "--scheduler", "ddim", "--steps", 1, "--prior-steps", 2)
    Path("compare.csv").write_text("scheduler,steps\nmine,1\n")
    assert command(*arguments).out.splitlines() == ["compare-2.png", "compare-2.csv"]
    assert command(*arguments).out.splitlines() == ["compare-3.png", "compare-3.csv"]
    assert command(*arguments, "-o", "compare-2.png", "--force").out.splitlines() == ["compare-2.png", "compare-2.csv"]
    result = command(*arguments, "--force")
    assert_one_line(result, 1, "compare.csv is not a table of kandinsky22 compare")
    assert Path("compare.csv").read_text() == "scheduler,steps\nmine,1\n"
    assert not Path("compare.png").exists()


# Standard input and output


def test_a_picture_can_go_through_a_pipe(generate: Callable[..., Any], tmp_path: Path) -> None:
    generate("a cat", "-o", "cat.png")
    for output in ("-", "/dev/stdout"):
        arguments = ["generate", "--from", "cat.png", "-o", output]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, cwd=tmp_path, check=True
        )
        assert result.stdout == Path("cat.png").read_bytes()
        assert b"seed 5" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["cat.png", "mask.png", "photo.png"]


@pytest.mark.parametrize(("target", "words"), [("/dev/full", "No space left"), (None, "is closed")])
def test_an_unwritable_standard_output_is_reported(model: Path, target: str | None, words: str) -> None:
    arguments = ["generate", "a cat", "--model", str(model), *map(str, FAST), "-q", "-o", "-"]
    shell = f'exec "$0" -m kandinsky22 "$@" {">&-" if target is None else f"> {target}"}'
    result = subprocess.run(
        ["sh", "-c", shell, sys.executable, *arguments], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("kandinsky22: error: ") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_several_pictures_cannot_go_to_standard_output(generate: Callable[..., Any]) -> None:
    result = generate("a cat", "-o", "-", "-n", 2)
    assert_one_line(result, 1, "--output='-' takes one file")


def test_an_image_is_read_from_standard_input_once(
    command: Command, model: Path, stdin: Callable[[bytes], None]
) -> None:
    arguments = ("img2img", "a cat", "--model", model, *FAST, "--strength", 1)
    command(*arguments, "--image", "photo.png", "-o", "file.png")
    stdin(Path("photo.png").read_bytes())
    assert command(*arguments, "--image", "-", "-o", "pipe.png").code == 0
    assert np.array_equal(pixels(Path("pipe.png")), pixels(Path("file.png")))
    assert stored(Path("pipe.png"))["image"] == {**stored(Path("file.png"))["image"], "name": "-"}
    assert_one_line(command("img2img", "--from", "pipe.png"), 1, "an image on standard input", "--image")
    assert command("img2img", "--from", "pipe.png", "--image", "photo.png").code == 0
    stdin(b"")
    assert_one_line(command(*arguments, "--image", "-"), 1, "image='-'", "not empty")
    stdin(b"no image")
    assert_one_line(command(*arguments, "--image", "-"), 1, "image='-'", "cannot be read")
    stdin(Path("photo.png").read_bytes())
    assert_one_line(command("img2img", "-", "--model", model, "--image", "-"), 1, "standard input")


# Formats and recipes


@pytest.mark.parametrize("extension", [".jpg", ".JPEG", ".webp"])
def test_other_formats_contain_the_recipe(command: Command, generate: Callable[..., Any], extension: str) -> None:
    generate("кот, a cat", "-o", "cat.png")
    result = generate("кот, a cat", "-o", f"cat{extension}")
    assert (result.code, result.paths) == (0, [Path(f"cat{extension}")])
    assert command("info", f"cat{extension}", "--json").out == command("info", "cat.png", "--json").out
    with Image.open(f"cat{extension}") as picture:
        assert picture.format == ("WEBP" if extension == ".webp" else "JPEG")
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("кот, a cat\nSteps: 1")
        difference = np.asarray(picture.convert("RGB"), dtype=int) - pixels(Path("cat.png"))
        assert np.abs(difference).max() <= (0 if extension == ".webp" else 40)
    assert command("generate", "--from", f"cat{extension}").paths == [Path(f"cat-again{extension}")]
    assert Path(f"cat-again{extension}").read_bytes() == Path(f"cat{extension}").read_bytes()


def test_a_recipe_that_a_jpeg_file_cannot_hold_is_reported(
    generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kandinsky22.generation.stages.generate_image", None)
    result = generate("cat " * 9000, "-o", "cat.jpg")
    assert_one_line(result, 1, "at most", "JPEG", "--no-recipe")


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.webp"])
def test_no_recipe_leaves_no_text(command: Command, generate: Callable[..., Any], name: str) -> None:
    assert generate("a cat", "-o", name, "--no-recipe").code == 0
    with Image.open(name) as picture:
        picture.load()
        assert not picture.getexif()
        assert not {"kandinsky22", "parameters", "Software", "xmp"} & picture.info.keys()
    assert b"a cat" not in Path(name).read_bytes()
    assert_one_line(command("info", name), 1, "no recipe")


# Seeds


def test_each_seed_gives_a_picture_with_its_name(command: Command, model: Path) -> None:
    arguments = ("--model", model, "--steps", 1, "--prior-steps", 2)
    result = command("generate", "--seed", 9, 4, "a cat", *arguments, "-o", "cat.png")
    assert [path.name for path in result.paths] == ["cat-seed9.png", "cat-seed4.png", "cat-sheet.png"]
    assert stored(Path("cat-sheet.png"))["seeds"] == [9, 4]
    again = command("generate", "--from", "cat-sheet.png", "-o", "again.png")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in result.paths]


def test_seeds_and_counts() -> None:
    parser = build_parser()
    assert parser.parse_args(["generate", "--seed", "7", "a cat"]).prompt == "a cat"
    assert parser.parse_args(["generate", "--seed=7", "8", "a cat"]).seed == (7, 8)
    assert parser.parse_args(["generate", "--seed", "7", "--", "8"]).prompt == "8"
    assert parser.parse_args(["generate", "--seed", "1", "2", "--seed", "3", "x"]).seed == (3,)
    args = parser.parse_args(["inpaint", "--crop", "a cat", "--seed", "3"])
    assert (args.crop, args.prompt, args.seed) == (32, "a cat", (3,))
    assert parser.parse_args(["inpaint", "a cat", "--crop", "7"]).crop == 7
    assert [name.suffix for name in output_names((3, 1))] == ["-seed3", "-seed1", "-sheet"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "x", "--seed", "1", "2", "-n", "3"), ("-n 3", "2 seeds")),
        (("generate", "x", "--seed", "1", "1"), ("1,1", "different")),
        (("compare", "x", "--seed", "1", "2"), ("one seed",)),
        (("inpaint", "x", "--image", "photo.png"), ("--mask or --extend",)),
        (("inpaint", "x", "--image", "photo.png", "--extend", "1,2,3"), ("LEFT,TOP,RIGHT,BOTTOM",)),
        (("inpaint", "x", "--image", "photo.png", "--extend", "0,0,9000,0"), ("at most 8192",)),
        (("inpaint", "x", "--image", "photo.png", "--extend", "0,0,9,0", "--size", "64x64"), ("--size", "--extend")),
        (("inpaint", "x", "--image", "photo.png", "--mask", "mask.png", "--crop", "-4"), ("--crop",)),
    ],
)
def test_contradictions_are_usage_errors(command: Command, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(command(*arguments), 2, *words)


# Texts from files


def test_prompts_are_read_from_files_and_standard_input(
    generate: Callable[..., Any], command: Command, model: Path, stdin: Callable[[bytes], None]
) -> None:
    Path("prompt.txt").write_text("кот, a cat\n", encoding="utf-8")
    stdin(b"a dog\r\n")
    assert generate("@prompt.txt", "--negative-prompt", "-", "-o", "a.png").code == 0
    assert (stored(Path("a.png"))["prompt"], stored(Path("a.png"))["negative_prompt"]) == ("кот, a cat", "a dog")
    generate("@@cat", "-o", "b.png")
    assert stored(Path("b.png"))["prompt"] == "@cat"
    assert command("generate", "--from", "b.png", "-o", "c.png").code == 0
    assert stored(Path("c.png"))["prompt"] == "@cat"
    command("mix", "--text", "@prompt.txt", "--model", model, *FAST, "-o", "d.png")
    assert stored(Path("d.png"))["parts"] == [{"weight": 1.0, "text": "кот, a cat", "image": None, "subject": None}]


@pytest.mark.parametrize(
    ("content", "prompt", "words"),
    [
        (None, "@missing.txt", ("prompt='@missing.txt'", "No such file", "@@")),
        (b"\xff\xfe\x00", "@prompt.txt", ("prompt", "not text in UTF-8")),
        (b"\n", "@prompt.txt", ("prompt", "empty")),
        (b"a " * 600_000, "@prompt.txt", ("more than 1048576 bytes",)),
        (None, "@/dev/zero", ("more than 1048576 bytes",)),
        (None, "@.", ("prompt='@.'", "directory")),
    ],
)
def test_files_that_are_no_prompts(
    command: Command, content: bytes | None, prompt: str, words: tuple[str, ...]
) -> None:
    if content is not None:
        Path("prompt.txt").write_bytes(content)
    assert_one_line(command("generate", prompt), 1, *words)


# Messages


@pytest.mark.parametrize(
    ("arguments", "effect"),
    [
        (
            ("img2img", "a cat", "--image", "photo.png", "--strength", "0", "--steps", "20"),
            "is only encoded and decoded",
        ),
        (("img2img", "a cat", "--image", "photo.png", "--strength", "0.04", "--steps", "20"), "leaves no step of 20"),
        (("img2img", "a cat", "--image", "photo.png", "--strength", "0.05", "--steps", "20"), None),
        (("variations", "photo.png", "--prompt", "a dog", "--strength", "0.1"), "the prompt has no effect"),
        (("variations", "photo.png", "--prompt", "a dog", "--strength", "0.4"), None),
    ],
)
def test_a_strength_without_steps_is_reported_before_networks_run(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], effect: str | None
) -> None:
    def run(*arguments: object) -> None:
        raise InputError("a network runs")

    monkeypatch.setattr("kandinsky22.generation.stages.generate_image", run)
    result = command(*arguments, "--model", model).err
    assert result.endswith("error: a network runs\n")
    assert ("leaves no step" in result) == (effect is not None)
    assert effect is None or effect in result


def test_quiet_is_quiet(tmp_path: Path, model: Path) -> None:
    """In a process of its own: nothing is hidden by what other tests have imported or printed before."""
    arguments = ["a cat", "--model", str(model), "--image", "photo.png", "--strength", "0.01", "--seed", "5", "-q"]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "img2img", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "picture.png\n", "")


def test_a_relative_model_is_found_next_to_the_picture(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "weights").symlink_to(model)
    monkeypatch.chdir(project)
    command("generate", "a cat", "--model", "weights", *FAST)
    monkeypatch.chdir(tmp_path)
    result = command("generate", "--from", "project/picture.png")
    assert result.code == 0, result.err
    assert "bit-identical" not in result.err
    assert Path("project/picture-again.png").read_bytes() == Path("project/picture.png").read_bytes()
    assert model_location("weights", None) == model_location("weights", Path("picture.png")) == "weights"
    assert model_location("embedded", Path("project/picture.png")) == "embedded"


# Crops and extensions


def test_a_crop_is_repainted_at_the_photographs_own_size(inpaint: Callable[..., Any], models: Path) -> None:
    assert inpaint("--mask", "mask.png", "--crop", 6).code == 0
    photo, result = pixels(Path("photo.png")), pixels(Path("picture.png"))
    changed = (photo != result).any(-1)
    assert result.shape == photo.shape
    assert changed[20:40, 40:60].mean() > 0.9
    changed[20:40, 40:60] = False
    assert not changed.any()
    recipe = stored(Path("picture.png"))
    assert (recipe["crop"], recipe["width"], recipe["height"]) == (6, SIZE, SIZE)
    pipe = kandinsky22.AutoPipelineForInpainting.from_pretrained(models / "inpaint")
    steps = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "output_type": "pil"}
    scales = {name: DEFAULTS[name] for name in ("guidance_scale", "prior_guidance_scale")}
    generator = torch.Generator().manual_seed(5)
    embeddings = pipe.prior_pipe(
        "a cat", num_inference_steps=2, guidance_scale=scales["prior_guidance_scale"], generator=generator
    )
    (expected,) = pipe.decoder_pipe(
        *embeddings.to_tuple()[:1],
        image=Image.open("photo.png"),
        mask_image=Image.open("mask.png"),
        negative_image_embeds=embeddings.negative_image_embeds,
        num_inference_steps=steps["num_inference_steps"],
        guidance_scale=scales["guidance_scale"],
        generator=generator,
        padding_mask_crop=6,
    ).images
    assert np.array_equal(np.asarray(expected), result)


def test_a_crop_repeats_and_can_be_taken_back(inpaint: Callable[..., Any], command: Command) -> None:
    inpaint("--mask", "mask.png", "--crop", "--size", "40x24")
    assert (stored(Path("picture.png"))["width"], stored(Path("picture.png"))["crop"]) == (40, 32)
    assert command("inpaint", "--from", "picture.png").code == 0
    assert Path("picture-again.png").read_bytes() == Path("picture.png").read_bytes()
    assert command("inpaint", "--from", "picture.png", "--no-crop", "-o", "entire.png").code == 0
    assert pixels(Path("entire.png")).shape == (24, 40, 3)


@pytest.mark.parametrize("margins", ["0,0,13,0", "7,0,0,5", "1,2,3,150"])
def test_an_extension_has_exactly_the_requested_size(
    inpaint: Callable[..., Any], command: Command, margins: str
) -> None:
    assert inpaint("--extend", margins, "--keep-pixels").code == 0
    left, top, right, bottom = map(int, margins.split(","))
    result = pixels(Path("picture.png"))
    assert result.shape == (60 + top + bottom, 100 + left + right, 3)
    assert np.array_equal(result[top : top + 60, left : left + 100], pixels(Path("photo.png")))
    assert stored(Path("picture.png"))["extend"] == [left, top, right, bottom]
    assert command("inpaint", "--from", "picture.png").code == 0
    assert Path("picture-again.png").read_bytes() == Path("picture.png").read_bytes()


def test_an_extension_may_have_a_mask_and_a_crop(inpaint: Callable[..., Any]) -> None:
    assert inpaint("--extend", "0,0,20,0", "--mask", "mask.png", "--crop", 4, "-o", "both.png").code == 0
    changed = (pixels(Path("both.png"))[:, :100] != pixels(Path("photo.png"))).any(-1)
    assert pixels(Path("both.png")).shape == (60, 120, 3)
    assert changed[20:40, 40:60].mean() > 0.9
    changed[20:40, 40:60] = False
    assert not changed.any()
