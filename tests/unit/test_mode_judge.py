"""The judge of the embedded model's modes: true pictures pass, wrong ones fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import embedded_modes, mode_cases, mode_judge
from benchmarks.embedded_prompts import Share
from benchmarks.pixel_judge import judge, to_array
from PIL import Image, ImageFilter

from kandinsky22.training.captions import caption
from kandinsky22.training.scenes import COLORS, Scene, Shape, is_held_out, render, sample_scene

CIRCLE = Shape("circle", "red", "large", 0.5, 0.5, 0.18)
SCENE = Scene("white", (CIRCLE,))


def picture(scene: Scene, size: int = 128) -> Image.Image:
    return mode_cases.to_image(render([scene], size)[0])


def test_overlap_is_full_for_the_scene_and_falls_with_the_distance() -> None:
    assert mode_judge.overlap_with_scene(picture(SCENE), SCENE) > 0.97
    assert mode_judge.overlap_with_scene(picture(SCENE).filter(ImageFilter.GaussianBlur(1)), SCENE) > 0.9
    recoloured = Scene("blue", (replace(CIRCLE, color="yellow"),))
    assert mode_judge.overlap_with_scene(picture(recoloured), SCENE) > 0.97
    scores = [
        mode_judge.overlap_with_scene(picture(Scene("white", (replace(CIRCLE, x=x),))), SCENE) for x in (0.52, 0.6, 0.8)
    ]
    assert scores[0] > mode_judge.MIN_OVERLAP > scores[1] > scores[2]
    assert mode_judge.overlap_with_scene(picture(Scene("white", (replace(CIRCLE, kind="star"),))), SCENE) < 0.8
    assert mode_judge.overlap_with_scene(Image.new("RGB", (128, 128), "white"), SCENE) == 0


def test_a_composition_is_number_positions_sizes_and_background_but_neither_kinds_nor_colours() -> None:
    other = Shape("star", "blue", "small", 0.25, 0.75, 0.11)
    pair = Scene("white", (replace(CIRCLE, x=0.7, y=0.3), other))
    for scene in (SCENE, pair):
        assert mode_judge.has_composition(picture(scene), scene)
        first, *rest = scene.shapes
        same_composition = Scene("white", (replace(first, kind="square", color="green", x=first.x + 0.05), *rest))
        assert mode_judge.has_composition(picture(same_composition), scene)
        for wrong in (
            Scene("white", (replace(first, x=first.x - 0.2), *rest)),
            Scene("white", (replace(first, radius=0.1), *rest)),
            Scene("yellow", scene.shapes),
            Scene("white", (first, *rest, Shape("circle", "black", "small", 0.2, 0.2, 0.1))),
        ):
            assert not mode_judge.has_composition(picture(wrong), scene)
    assert not mode_judge.has_composition(picture(Scene("white", (other,))), pair)
    assert not mode_judge.has_composition(Image.new("RGB", (128, 128), "white"), SCENE)


def test_masks_that_hold_nothing_overlap_fully() -> None:
    empty = np.zeros((4, 4), dtype=bool)
    assert mode_judge.overlap(empty, empty) == 1.0
    assert mode_judge.overlap(empty, ~empty) == 0.0


def test_only_pixels_outside_the_mask_count() -> None:
    original = to_array(picture(SCENE))
    mask = np.zeros((128, 128), dtype=bool)
    mask[32:96, 32:96] = True
    inside, outside = original.copy(), original.copy()
    inside[mask] = 0
    outside[~mask] = np.clip(outside[~mask] - 4 / 255, 0, 1)
    assert mode_judge.known_region_error(inside, original, mask) == 0
    assert mode_judge.known_region_error(outside, original, mask) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("attribute", mode_judge.ATTRIBUTES)
def test_half_way_is_between_and_the_ends_are_not(attribute: str) -> None:
    ends = {
        "background": (Scene("white", (CIRCLE,)), Scene("blue", (CIRCLE,))),
        "color": (SCENE, Scene("white", (replace(CIRCLE, color="blue"),))),
        "size": (SCENE, Scene("white", (replace(CIRCLE, radius=0.11),))),
        "position": (Scene("white", (replace(CIRCLE, x=0.26),)), Scene("white", (replace(CIRCLE, x=0.74),))),
    }[attribute]
    first, second = (to_array(picture(scene)) for scene in ends)
    if attribute in ("background", "color"):
        half = (first + second) / 2
    else:
        half = to_array(
            picture({"size": Scene("white", (replace(CIRCLE, radius=0.145),)), "position": SCENE}[attribute])
        )
    mask = mode_judge.foreground(first) & mode_judge.foreground(second) if attribute == "color" else None
    values = [mode_judge.measure(image, attribute, mask) for image in (half, first, second)]
    assert mode_judge.is_between(*values)
    assert not mode_judge.is_between(values[1], values[1], values[2])
    assert not mode_judge.is_between(values[2], values[1], values[2])


def test_two_shapes_half_way_are_not_one_between() -> None:
    two = Scene("white", (replace(CIRCLE, x=0.26), replace(CIRCLE, x=0.74)))
    value = mode_judge.measure(picture(two), "position")
    assert not mode_judge.is_between(value, np.array([0.26, 0.5]), np.array([0.74, 0.5]))


def test_attributes_are_read_where_there_is_one_shape() -> None:
    assert mode_judge.read_attribute(picture(SCENE), "background") == "white"
    assert mode_judge.read_attribute(picture(SCENE), "color") == "red"
    assert mode_judge.read_attribute(Image.new("RGB", (128, 128), "white"), "color") is None


def test_an_edited_scene_differs_in_the_mask_alone() -> None:
    for index in range(16):
        rng = mode_cases.case_rng(0, 1, index)
        scene = sample_scene(rng)
        edit = mode_cases.sample_edit(scene, rng)
        before, after = (to_array(picture(some)) for some in (scene, edit.target))
        assert mode_judge.known_region_error(after, before, edit.mask) == 0
        assert not is_held_out(edit.target)
        assert judge(after, caption(edit.target, rng).description).all_correct
        full = mode_cases.full_description(edit.target)
        assert judge(after, full).all_correct and not judge(before, full).all_correct


@pytest.mark.parametrize("attribute", mode_judge.ATTRIBUTES)
def test_scenes_to_mix_differ_in_one_attribute_alone(attribute: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, second = mode_cases.neighbours(rng, attribute)
        one, other = first.shapes[0], second.shapes[0]
        differing = {
            "background": first.background != second.background,
            "color": one.color != other.color,
            "size": one.size != other.size,
            "position": first.position != second.position,
        }
        assert [name for name, differs in differing.items() if differs] == [attribute]
        assert one.kind == other.kind


def test_sentences_state_the_requested_attributes() -> None:
    assert mode_cases.sentence(SCENE, "color", None) == "a large circle on a white background in the center"
    assert mode_cases.sentence(SCENE, "color", "blue").startswith("a large blue circle on a white")
    assert mode_cases.sentence(SCENE, "background", None) == "a large red circle in the center"
    low = Scene("white", (replace(CIRCLE, y=0.74),))
    assert mode_cases.sentence(low, "background", "green").endswith("on a green background at the bottom")
    description = mode_cases.description_without(SCENE, "background")
    assert judge(picture(Scene("blue", (CIRCLE,))), description).all_correct
    assert not judge(picture(Scene("white", (replace(CIRCLE, color="green"),))), description).all_correct


def test_rows_say_whether_the_target_is_reached() -> None:
    good = embedded_modes.share_row("mode", "criterion", [True] * 19 + [False], 0.9)
    bad = embedded_modes.share_row("mode", "criterion", [True, False], 0.9)
    error = embedded_modes.Row("mode", "error", None, 1.5, 2.0, at_most=True, percent=False)
    assert good.reached and not bad.reached and error.reached
    assert "at least 90.0 %: reached" in str(good) and "missed" in str(bad) and "at most 2.000: reached" in str(error)
    assert good.share == Share(19, 20)
    assert embedded_modes.table([good, bad]).count("\n") == 3


def test_sheets_hold_every_case_and_mark_the_wrong_ones(tmp_path: Path) -> None:
    black = picture(Scene("white", (replace(CIRCLE, color="black"),)))
    for right in (True, False):
        cells = [embedded_modes.Cell([black, to_array(black)], "words " * 20, right)] * 7
        embedded_modes.contact_sheet(cells, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            pixels = np.asarray(sheet).astype(int)
        assert (pixels[..., 0] - pixels[..., 1] > 100).any() != right
        assert pixels.shape[1] >= 2 * 96


def test_every_colour_can_be_the_other() -> None:
    rng = np.random.default_rng(0)
    colours = {embedded_modes._other_color("green", SCENE, rng) for _ in range(100)}
    assert colours == set(COLORS) - {"green", "white", "red"}
