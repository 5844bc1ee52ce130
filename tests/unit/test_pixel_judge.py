"""The judge of the embedded model must be right where the picture is, and must not be talked into anything."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from benchmarks.embedded_prompts import Prompt, Share, count, draw_prompts, judge_all, states_held_out, table
from benchmarks.pixel_judge import Verdict, judge, read_image, to_array
from PIL import Image, ImageFilter

from kandinsky22.training.captions import SceneDescription, ShapeDescription
from kandinsky22.training.scenes import COLORS, OPPOSITE, POSITIONS, SHAPES, SIZES, Scene, Shape, is_held_out, render

Pixels = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return draw_prompts(40, detail="full", seed=7)


@pytest.fixture(scope="module")
def pictures(prompts: list[Prompt]) -> list[Pixels]:
    return [to_array(picture) for picture in render([prompt.scene for prompt in prompts])]


def as_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def blurred(pixels: Pixels, rng: np.random.Generator) -> Image.Image:
    return as_image(pixels).filter(ImageFilter.GaussianBlur(1.2))


def noisy(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.clip(pixels + rng.normal(0, 0.08, pixels.shape), 0, 1).astype(np.float32)


def compressed(pixels: Pixels, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    as_image(pixels).save(file, "JPEG", quality=40)
    return Image.open(file)


def tinted(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    waves = rng.uniform(-0.05, 0.05, (4, 4, 3)).repeat(32, 0).repeat(32, 1)
    return np.clip(pixels + waves, 0, 1).astype(np.float32)


def halved(pixels: Pixels, rng: np.random.Generator) -> Image.Image:
    return as_image(pixels).resize((64, 64), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BILINEAR)


def wrong_descriptions(right: SceneDescription) -> Iterator[SceneDescription]:
    """Yield all descriptions that differ from the right one in one attribute."""
    yield from (replace(right, background=color) for color in COLORS if color != right.background)
    if right.position is not None:
        yield from (replace(right, position=position) for position in POSITIONS if position != right.position)
    if right.relation is not None:
        yield from (replace(right, relation=relation) for relation in OPPOSITE if relation != right.relation)
    for index, shape in enumerate(right.shapes):
        others = [replace(shape, kind=kind) for kind in SHAPES if kind != shape.kind]
        others += [replace(shape, color=color) for color in COLORS if color != shape.color]
        others += [replace(shape, size=size) for size in SIZES if size != shape.size]
        for other in others:
            yield replace(right, shapes=(*right.shapes[:index], other, *right.shapes[index + 1 :]))
    if len(right.shapes) == 2:
        yield replace(right, shapes=right.shapes[::-1])
        yield replace(right, shapes=right.shapes[:1], relation=None)
    else:
        yield replace(right, shapes=(*right.shapes, ShapeDescription("circle", None, None)), position=None)


def test_clean_pictures_are_right(prompts: list[Prompt], pictures: list[Pixels]) -> None:
    assert [prompt.text for prompt, verdict in judged(pictures, prompts) if not verdict.all_correct] == []


def judged(pictures: list[Pixels], prompts: list[Prompt]) -> list[tuple[Prompt, Verdict]]:
    return list(zip(prompts, judge_all(pictures, prompts), strict=True))


def test_measures_agree_with_the_scene(prompts: list[Prompt], pictures: list[Pixels]) -> None:
    for prompt, picture in zip(prompts[::3], pictures[::3], strict=True):
        shapes_read = sorted(read_image(picture).shapes, key=lambda shape: shape.x + shape.y)
        for shape, read in zip(prompt.scene.shapes, shapes_read, strict=True):
            assert (read.kind, read.color, read.size) == (shape.kind, shape.color, shape.size)
            assert read.radius == pytest.approx(shape.radius, rel=0.02)
            assert (read.x, read.y) == pytest.approx((shape.x, shape.y), abs=0.02)


@pytest.mark.parametrize("spoil", [blurred, noisy, compressed, tinted, halved])
def test_spoiled_pictures_are_right(
    spoil: Callable[[Pixels, np.random.Generator], Image.Image | Pixels],
    prompts: list[Prompt],
    pictures: list[Pixels],
) -> None:
    rng = np.random.default_rng(3)
    wrong = [
        prompt.text
        for prompt, picture in zip(prompts[::4], pictures[::4], strict=True)
        if not judge(spoil(picture, rng), prompt.description).all_correct
    ]
    assert wrong == []


def test_any_wrong_attribute_is_noticed(
    prompts: list[Prompt], pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted, count = [], 0
    for prompt, picture in zip(prompts[::4], pictures[::4], strict=True):
        reading = read_image(picture)
        monkeypatch.setattr("benchmarks.pixel_judge.read_image", lambda _, reading=reading: reading)
        for description in wrong_descriptions(prompt.description):
            count += 1
            if judge(picture, description).all_correct:
                accepted.append((prompt.text, description))
    assert count > 1000
    assert accepted == []


def test_only_stated_attributes_are_judged() -> None:
    scene = Scene("blue", (Shape("star", "red", "small", 0.26, 0.5, 0.11),))
    (picture,) = render([scene])
    verdict = judge(picture, SceneDescription((ShapeDescription("star", None, None),)))
    assert verdict.correct == {"count": True, "shape": True}
    verdict = judge(picture, SceneDescription((ShapeDescription("star", "green", "large"),), "blue", "top"))
    assert verdict.wrong == ("color", "size", "position") and not verdict.all_correct


def test_a_stated_shape_that_is_missing_makes_its_attributes_wrong() -> None:
    (picture,) = render([Scene("white", (Shape("circle", "red", "large", 0.26, 0.5, 0.18),))])
    stated = (ShapeDescription("circle", "red", "large"), ShapeDescription("square", "blue", "large"))
    verdict = judge(picture, SceneDescription(stated, "white", None, "left of"))
    assert verdict.correct == {
        "background": True,
        "count": False,
        "shape": False,
        "color": False,
        "size": False,
        "relation": False,
    }


DESCRIPTION = SceneDescription((ShapeDescription("circle", "red", "large"),), "white")


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((128, 128, 3), np.float32),
        np.ones((128, 128, 3), np.float32),
        np.full((128, 128, 3), np.nan, np.float32),
        np.random.default_rng(0).random((128, 128, 3)),
        np.random.default_rng(0).random((16, 16, 3)).repeat(8, 0).repeat(8, 1),
    ],
    ids=["black", "white", "nan", "noise", "patches"],
)
def test_pictures_of_nothing_fail(picture: Pixels) -> None:
    assert not judge(picture, SceneDescription((ShapeDescription("circle", None, None),))).all_correct


def circle(color: str = "red", size: int = 128) -> Pixels:
    return to_array(render([Scene("white", (Shape("circle", color, "large", 0.5, 0.5, 0.185),))], size=size)[0])


def test_extra_paint_fails() -> None:
    picture = circle()
    assert judge(picture, DESCRIPTION).all_correct
    speck = picture.copy()
    speck[4:6, 60:63] = 0.0
    assert judge(speck, DESCRIPTION).all_correct
    for color in (COLORS["black"], COLORS["red"], (0.5, 0.5, 0.5)):
        blot = picture.copy()
        blot[10:22, 60:72] = color
        assert judge(blot, DESCRIPTION).wrong[:1] == ("count",)


def test_damaged_shapes_fail() -> None:
    half = circle()
    half[:, 64:] = COLORS["white"]
    assert "shape" in judge(half, DESCRIPTION).wrong
    two_tone = circle()
    two_tone[:64][(two_tone[:64] != np.array(COLORS["white"], np.float32)).any(-1)] = COLORS["blue"]
    assert "count" in judge(two_tone, DESCRIPTION).wrong
    pink = circle() * 0.45 + 0.55
    assert not judge(pink, DESCRIPTION).all_correct


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes_are_judged_alike(size: int) -> None:
    assert judge(circle(size=size), DESCRIPTION).all_correct


def test_every_kind_of_picture_is_read_alike() -> None:
    tensor = render([Scene("white", (Shape("circle", "red", "large", 0.5, 0.5, 0.185),))])[0]
    array = (to_array(tensor) * 255).round().astype(np.uint8)
    for picture in (tensor, tensor.bfloat16(), torch.from_numpy(array).movedim(-1, 0), array, Image.fromarray(array)):
        assert judge(picture, DESCRIPTION).all_correct
    with pytest.raises(ValueError, match=r"image.shape=\(128, 128\) is invalid"):
        to_array(np.zeros((128, 128)))
    with pytest.raises(ValueError, match="expected at least one shape"):
        judge(tensor, SceneDescription())


def test_prompts_are_fixed_by_their_seed() -> None:
    first, again, other = draw_prompts(5), draw_prompts(5), draw_prompts(5, seed=1)
    assert first == again and {prompt.text for prompt in first} != {prompt.text for prompt in other}
    assert draw_prompts(3)[:3] == draw_prompts(5)[:3]
    for prompt in first:
        assert is_held_out(prompt.scene) == prompt.held_out == states_held_out(prompt.description)


def test_success_is_counted_by_group_and_attribute() -> None:
    prompts = draw_prompts(3, held_out=[False], detail="full")
    verdicts = judge_all(render([prompt.scene for prompt in prompts]), prompts)
    verdicts[0] = replace(verdicts[0], correct=verdicts[0].correct | {"color": False})
    shares = count(prompts, verdicts)
    assert shares[1, False]["all"] == shares[1, False]["color"] == Share(2, 3)
    assert shares[1, False]["relation"] == Share(0, 0) and shares[2, False]["all"] == Share(3, 3)
    assert "96 %: missed" in table(shares) and "88 %: reached" in table(shares)
    low, high = Share(2, 3).interval
    assert 0 < low < 2 / 3 < high < 1
