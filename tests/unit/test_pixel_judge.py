"""The judge of the embedded model must be right where the picture is, and must not be talked into anything."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from benchmarks.embedded_prompts import Prompt, Share, count, draw_prompts, judge_all, names_held_out, table
from benchmarks.pixel_judge import Verdict, judge, read_picture, to_array
from PIL import Image, ImageFilter

from kandinsky22.training.captions import Named, NamedShape
from kandinsky22.training.scenes import COLORS, OPPOSITE, PLACES, SHAPES, SIZES, Scene, Shape, is_held_out, render

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


def wrong_names(named: Named) -> Iterator[Named]:
    """Everything a caption could say instead that differs in one attribute."""
    yield from (replace(named, background=color) for color in COLORS if color != named.background)
    if named.place is not None:
        yield from (replace(named, place=place) for place in PLACES if place != named.place)
    if named.relation is not None:
        yield from (replace(named, relation=relation) for relation in OPPOSITE if relation != named.relation)
    for index, shape in enumerate(named.shapes):
        others = [replace(shape, kind=kind) for kind in SHAPES if kind != shape.kind]
        others += [replace(shape, color=color) for color in COLORS if color != shape.color]
        others += [replace(shape, size=size) for size in SIZES if size != shape.size]
        for other in others:
            yield replace(named, shapes=(*named.shapes[:index], other, *named.shapes[index + 1 :]))
    if len(named.shapes) == 2:
        yield replace(named, shapes=named.shapes[::-1])
        yield replace(named, shapes=named.shapes[:1], relation=None)
    else:
        yield replace(named, shapes=(*named.shapes, NamedShape("circle", None, None)), place=None)


def test_clean_pictures_are_right(prompts: list[Prompt], pictures: list[Pixels]) -> None:
    assert [prompt.text for prompt, verdict in judged(pictures, prompts) if not verdict.all_right] == []


def judged(pictures: list[Pixels], prompts: list[Prompt]) -> list[tuple[Prompt, Verdict]]:
    return list(zip(prompts, judge_all(pictures, prompts), strict=True))


def test_measures_agree_with_the_scene(prompts: list[Prompt], pictures: list[Pixels]) -> None:
    for prompt, picture in zip(prompts[::3], pictures[::3], strict=True):
        found = sorted(read_picture(picture).shapes, key=lambda shape: shape.x + shape.y)
        for shape, seen in zip(prompt.scene.shapes, found, strict=True):
            assert (seen.kind, seen.color, seen.size) == (shape.kind, shape.color, shape.size)
            assert seen.radius == pytest.approx(shape.radius, rel=0.02)
            assert (seen.x, seen.y) == pytest.approx((shape.x, shape.y), abs=0.02)


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
        if not judge(spoil(picture, rng), prompt.named).all_right
    ]
    assert wrong == []


def test_any_wrong_attribute_is_noticed(
    prompts: list[Prompt], pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    fooled, tried = [], 0
    for prompt, picture in zip(prompts[::4], pictures[::4], strict=True):
        reading = read_picture(picture)
        monkeypatch.setattr("benchmarks.pixel_judge.read_picture", lambda _, reading=reading: reading)
        for named in wrong_names(prompt.named):
            tried += 1
            if judge(picture, named).all_right:
                fooled.append((prompt.text, named))
    assert tried > 1000
    assert fooled == []


def test_only_what_is_named_is_judged() -> None:
    scene = Scene("blue", (Shape("star", "red", "small", 0.26, 0.5, 0.11),))
    (picture,) = render([scene])
    verdict = judge(picture, Named((NamedShape("star", None, None),)))
    assert verdict.right == {"count": True, "shape": True}
    verdict = judge(picture, Named((NamedShape("star", "green", "large"),), "blue", "top"))
    assert verdict.wrong == ("color", "size", "place") and not verdict.all_right


def test_a_named_shape_that_is_missing_makes_its_attributes_wrong() -> None:
    (picture,) = render([Scene("white", (Shape("circle", "red", "large", 0.26, 0.5, 0.18),))])
    told = (NamedShape("circle", "red", "large"), NamedShape("square", "blue", "large"))
    verdict = judge(picture, Named(told, "white", None, "left of"))
    assert verdict.right == {
        "background": True, "count": False, "shape": False, "color": False, "size": False, "relation": False,
    }  # fmt: skip


NAMED = Named((NamedShape("circle", "red", "large"),), "white")


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
    assert not judge(picture, Named((NamedShape("circle", None, None),))).all_right


def circle(color: str = "red", size: int = 128) -> Pixels:
    return to_array(render([Scene("white", (Shape("circle", color, "large", 0.5, 0.5, 0.185),))], size=size)[0])


def test_extra_paint_fails() -> None:
    picture = circle()
    assert judge(picture, NAMED).all_right
    speck = picture.copy()
    speck[4:6, 60:63] = 0.0
    assert judge(speck, NAMED).all_right
    for color in (COLORS["black"], COLORS["red"], (0.5, 0.5, 0.5)):
        blot = picture.copy()
        blot[10:22, 60:72] = color
        assert judge(blot, NAMED).wrong[:1] == ("count",)


def test_damaged_shapes_fail() -> None:
    half = circle()
    half[:, 64:] = COLORS["white"]
    assert "shape" in judge(half, NAMED).wrong
    two_tone = circle()
    two_tone[:64][(two_tone[:64] != np.array(COLORS["white"], np.float32)).any(-1)] = COLORS["blue"]
    assert "count" in judge(two_tone, NAMED).wrong
    pink = circle() * 0.45 + 0.55
    assert not judge(pink, NAMED).all_right


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes_are_judged_alike(size: int) -> None:
    assert judge(circle(size=size), NAMED).all_right


def test_every_kind_of_picture_is_read_alike() -> None:
    tensor = render([Scene("white", (Shape("circle", "red", "large", 0.5, 0.5, 0.185),))])[0]
    array = (to_array(tensor) * 255).round().astype(np.uint8)
    for picture in (tensor, tensor.bfloat16(), torch.from_numpy(array).movedim(-1, 0), array, Image.fromarray(array)):
        assert judge(picture, NAMED).all_right
    with pytest.raises(ValueError, match=r"\(128, 128\)"):
        to_array(np.zeros((128, 128)))
    with pytest.raises(ValueError, match="names no shape"):
        judge(tensor, Named())


def test_prompts_are_fixed_by_their_seed() -> None:
    first, again, other = draw_prompts(5), draw_prompts(5), draw_prompts(5, seed=1)
    assert first == again and {prompt.text for prompt in first} != {prompt.text for prompt in other}
    assert draw_prompts(3)[:3] == draw_prompts(5)[:3]
    for prompt in first:
        assert is_held_out(prompt.scene) == prompt.held_out == names_held_out(prompt.named)


def test_success_is_counted_by_group_and_attribute() -> None:
    prompts = draw_prompts(3, held_out=[False], detail="full")
    verdicts = judge_all(render([prompt.scene for prompt in prompts]), prompts)
    verdicts[0] = replace(verdicts[0], right=verdicts[0].right | {"color": False})
    shares = count(prompts, verdicts)
    assert shares[1, False]["all"] == shares[1, False]["color"] == Share(2, 3)
    assert shares[1, False]["relation"] == Share(0, 0) and shares[2, False]["all"] == Share(3, 3)
    assert "96 %: missed" in table(shares) and "88 %: reached" in table(shares)
    low, high = Share(2, 3).interval
    assert 0 < low < 2 / 3 < high < 1
