"""`kandinsky22 compare`: a labelled grid and a table of the pictures that `generate` would give."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.helpers import SIZE, Command, assert_one_line, pixels, stored

from kandinsky22.cli.request import Request
from kandinsky22.cli.sheets import GAP, MARGIN, MAX_IMAGE_SIDE, RowLabel, Sheet, render_sheet
from kandinsky22.errors import NotFiniteError
from kandinsky22.generation import stages

GRID = ("--scheduler", "dpm,heun", "--steps", "2,3", "--guidance", "1,3", "--seed", 5)


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_holds_what_generate_draws(command: Command, model: Path) -> None:
    result = command("compare", "a cat", "--model", model, *GRID, "--pictures")
    assert result.code == 0, result.err
    files = [f"compare-{row}-{column}.png" for row in (1, 2, 3, 4) for column in (1, 2)]
    assert result.out.splitlines() == [*files, "compare.png", "compare.csv"]
    rows = table("compare.csv")
    assert [(row["scheduler"], row["steps"], row["guidance"]) for row in rows] == [
        (scheduler, steps, scale)
        for scale in "13"
        for scheduler in ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
        for steps in "23"
    ]
    assert [row["evaluations"] for row in rows] == ["2", "3", "3", "5"] * 2
    assert [row["file"] for row in rows] == files
    assert all(float(row["seconds"]) > 0 for row in rows)
    sheet = np.asarray(Image.open("compare.png").convert("RGB"))
    for row in rows[:1] + rows[-1:]:
        options = ("--scheduler", row["scheduler"], "--steps", row["steps"], "--guidance", row["guidance"])
        command("generate", "a cat", "--model", model, "--seed", 5, *options, "-o", "single.png", "--force")
        assert Path("single.png").read_bytes() == Path(row["file"]).read_bytes()
        assert holds(sheet, pixels(Path("single.png")))
    command("generate", "--from", "compare-4-2.png")
    assert Path("compare-4-2-again.png").read_bytes() == Path("compare-4-2.png").read_bytes()
    assert stored(Path("compare-4-2.png"))["command"] == "generate"


def test_guidance_of_the_prior_ends_in_all_cells_as_it_does_in_generate(command: Command, model: Path) -> None:
    options = ("--model", model, "--prior-guidance-interval", "0", "0.4", "--seed", 5)
    assert command("compare", "a cat", *options, "--scheduler", "ddim", "--steps", "2", "--pictures").code == 0
    command("generate", "a cat", *options, "--scheduler", "ddim", "--steps", "2", "-o", "single.png")
    assert stored(Path("compare-1-1.png"))["prior_guidance_interval"] == [0.0, 0.4]
    assert Path("single.png").read_bytes() == Path("compare-1-1.png").read_bytes()
    command("generate", "--from", "compare-1-1.png", "--prior-guidance-interval", "0", "1", "-o", "guided.png")
    assert not np.array_equal(pixels(Path("guided.png")), pixels(Path("single.png")))


def holds(sheet: np.ndarray[Any, Any], picture: np.ndarray[Any, Any]) -> bool:
    """Return whether the sheet contains the picture, pixel by pixel."""
    high, wide = picture.shape[:2]
    positions = np.argwhere((sheet == picture[0, 0]).all(-1))
    return any(np.array_equal(sheet[top : top + high, left : left + wide], picture) for top, left in positions)


def test_a_cell_of_nan_is_marked_and_the_others_are_saved(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_decoder = stages.run_decoder

    def fail_at_two(decoder: Any, request: Any, *arguments: Any) -> Any:
        if request.steps != 2:
            return run_decoder(decoder, request, *arguments)
        with stages.nan_errors(decoder, request.steps):
            raise NotFiniteError("images: 1 of 1 are not finite")

    monkeypatch.setattr(stages, "run_decoder", fail_at_two)
    options = ("--model", model, "--scheduler", "ddim", "--steps", "2,4", "--prior-steps", 3, "--pictures")
    result = command("compare", "a cat", *options)
    assert result.out.splitlines() == ["compare-1-2.png", "compare.png", "compare.csv"]
    last = result.err.splitlines()[-1]
    assert result.code == 1
    assert all(words in last for words in ("kandinsky22: error: 1 of 2 cells", "produced NaN", "steps: 2"))
    assert [row["file"] for row in table("compare.csv")] == ["", "compare-1-2.png"]


def test_only_the_grid_is_saved_by_default(command: Command, model: Path) -> None:
    arguments = ("--scheduler", "ddim", "--steps", "2", "--negative-prompt", "a dog", "-o", "one.png")
    result = command("compare", "кот, a cat", "--model", model, *arguments)
    assert (result.code, result.paths) == (0, [Path("one.png"), Path("one.csv")])
    assert sorted(path.name for path in Path().iterdir()) == ["one.csv", "one.png"]
    assert [(row["row"], row["column"], row["file"]) for row in table("one.csv")] == [("1", "1", "")]
    with Image.open("one.png") as picture:
        assert picture.info["Description"].startswith("кот, a cat, seed ")
        assert "DDIMScheduler,2,2" in picture.info["Description"]
    assert_one_line(command("info", "one.png"), 1, "no recipe")


def test_the_grid_of_a_command_without_recipes_does_not_show_the_prompt(command: Command, model: Path) -> None:
    sheets = {}
    for prompt in ("a cat", "a red dragon over the sea"):
        options = ("--scheduler", "ddim", "--steps", "2", "--seed", 5, "-o", "grid.png", "--force")
        for recipe in ((), ("--no-recipe",)):
            assert command("compare", prompt, "--negative-prompt", "x", "--model", model, *options, *recipe).code == 0
            with Image.open("grid.png") as picture:
                assert ("Description" in picture.info) == (not recipe)
                sheets[prompt, bool(recipe)] = np.asarray(picture.convert("RGB"))
    for prompt in ("a cat", "a red dragon over the sea"):
        with_title, without = sheets[prompt, False], sheets[prompt, True]
        assert len(without) < len(with_title)
        first_rows = MARGIN + GAP // 2 + GAP  # up to the labels of the columns
        assert (without[:first_rows] == 255).all() and not (with_title[:first_rows] == 255).all()


def test_times_exclude_the_warm_up(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One guided and one unguided step are run before the grid."""
    drawn: list[tuple[float | None, int | None]] = []
    draw = stages.run_decoder

    def record(decoder: Any, request: Request, *rest: Any) -> Any:
        drawn.append((request.guidance, request.steps))
        return draw(decoder, request, *rest)

    monkeypatch.setattr(stages, "run_decoder", record)
    arguments = ("--scheduler", "ddim", "--steps", "2", "--guidance", "1,3,4")
    assert command("compare", "a cat", "--model", model, *arguments).code == 0
    assert sorted(drawn[:2]) == [(1.0, 1), (3.0, 1)]
    assert drawn[2:] == [(1.0, 2), (3.0, 2), (4.0, 2)]


@pytest.mark.usefixtures("embedded")
def test_the_grid_is_small_and_useful_without_options(command: Command) -> None:
    result = command("compare", "a red dragon", "--quiet")
    assert (result.code, result.err) == (0, "")
    rows = table("compare.csv")
    assert len({row["scheduler"] for row in rows}) * len({row["steps"] for row in rows}) == len(rows) == 20
    assert "not trained on these words: dragon" in command("compare", "a red dragon", "--steps", 1).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "4,2000"), ("2000", "1000")),
        (("--scheduler", "lcm", "--steps", "60"), ("60",)),
        (("--model", "nowhere/at/all"), ("nowhere/at/all",)),
        (("-o", "compare.gif"), ("--output='compare.gif'", ".png", ".webp")),
        (("-o", "missing/compare.png"), ("missing", "is not an existing folder")),
        (("-o", "taken.png"), ("taken.csv", "is a folder")),
        (("-o", "kept.png", "--pictures"), ("kept-1-1.png", "is a folder")),
    ],
)
def test_invalid_grids_are_reported_before_anything_is_generated(
    command: Command,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr("kandinsky22.generation.stages.run_prior", None)
    for folder in ("taken.csv", "kept-1-1.png"):
        Path(folder).mkdir()
    assert_one_line(command("compare", "a cat", "--model", model, *arguments), 1, *words)
    assert len(list(Path().iterdir())) == 2


def test_grids_have_a_largest_number_of_pictures(command: Command, model: Path) -> None:
    steps = ",".join(map(str, range(1, 1000)))
    guidance = ",".join(map(str, range(1, 10)))
    result = command("compare", "a cat", "--model", model, "--steps", steps, "--guidance", guidance)
    assert_one_line(result, 2, "44955 combinations", "at most 10000")


def test_sheets_scale_large_pictures_down_and_keep_small_ones() -> None:
    for side, shown in ((SIZE, SIZE), (4 * MAX_IMAGE_SIDE, MAX_IMAGE_SIDE)):
        images = [Image.new("RGB", (side, side // 2), color) for color in ("#0000ff", "#ff0000")]
        sheet = render_sheet(
            Sheet("a title " * 40, "about", ["2 steps", "4 steps"], [RowLabel("ddim")], images, ["", ""])
        )
        values = np.asarray(sheet)
        for color in ((0, 0, 255), (255, 0, 0)):
            high, wide = (np.ptp(positions) + 1 for positions in np.nonzero((values == color).all(-1)))
            assert (wide, high) == (shown, shown // 2)
        assert (values[:MARGIN] == 255).all() and (values[:, -GAP:] == 255).all()
