"""The pictures the embedded model learns from: what is drawn is what the scene says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kandinsky22.errors import InputError
from kandinsky22.training.scenes import (
    COLORS,
    MIN_CONTRAST,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Shape,
    is_held_out,
    mixed_palettes,
    nearest_color,
    random_palette,
    render,
    sample_scene,
)


def scenes(count: int, **options: object) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [sample_scene(rng, **options) for _ in range(count)]  # type: ignore[arg-type]


def one(kind: str, *, color: str = "red", background: str = "white", x: float = 0.5, radius: float = 0.18) -> Scene:
    return Scene(background, (Shape(kind, color, "large", x, 0.5, radius),))


def test_pictures_are_rgb_in_range_and_keep_the_order_of_scenes() -> None:
    batch = scenes(24)
    pictures = render(batch, 64)
    assert pictures.shape == (24, 3, 64, 64)
    assert pictures.dtype == torch.float32
    assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    assert torch.equal(pictures[5:6], render(batch[5:6], 64))


def test_background_and_centre_have_exactly_their_colours() -> None:
    for scene, picture in zip(scenes(64), render(scenes(64)), strict=True):
        assert torch.allclose(picture[:, 0, 0], torch.tensor(COLORS[scene.background]))
        for shape in scene.shapes:
            x, y = int(shape.x * 128), int(shape.y * 128)
            assert torch.allclose(picture[:, y, x], torch.tensor(COLORS[shape.color]))


@pytest.mark.parametrize(
    ("kind", "area"),
    # areas in units of the squared radius, from elementary geometry
    [("circle", np.pi), ("square", 4 * 0.9**2), ("triangle", 3 * 3**0.5 / 4 * 1.28**2), ("star", 2.31)],
)
def test_anti_aliasing_preserves_the_area_at_every_size(kind: str, area: float) -> None:
    for size in (48, 128):
        picture = render([one(kind, color="black", background="white")], size)[0, 0].double()
        ground, ink = COLORS["white"][0], COLORS["black"][0]
        covered = float(((ground - picture) / (ground - ink)).mean())
        assert covered == pytest.approx(area * 0.18**2, rel=0.02)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_mirror_images_of_themselves(kind: str) -> None:
    picture = render([one(kind)])
    assert torch.allclose(picture, picture.flip(3), atol=1e-5)


def test_two_shapes_stay_apart_and_inside() -> None:
    for scene in scenes(100, shapes=2):
        alone = [render([Scene(scene.background, (shape,))])[0] for shape in scene.shapes]
        ground = torch.tensor(COLORS[scene.background])[:, None, None]
        first, second = ((picture - ground).abs().amax(0) > 1e-3 for picture in alone)
        assert not bool((first & second).any())
        drawn = first | second
        assert not bool(drawn[0].any() | drawn[-1].any() | drawn[:, 0].any() | drawn[:, -1].any())


def test_sizes_do_not_overlap() -> None:
    radii = {size: [s.radius for scene in scenes(300) for s in scene.shapes if s.size == size] for size in SIZES}
    assert max(radii["small"]) < 0.7 * min(radii["large"])


def test_first_of_two_shapes_is_left_or_above() -> None:
    for scene in scenes(200, shapes=2):
        first, second = scene.shapes
        if scene.relation == "left of":
            assert first.x < second.x and abs(first.y - second.y) < 0.1
        else:
            assert scene.relation == "above"
            assert first.y < second.y and abs(first.x - second.x) < 0.1
        assert scene.position is None


def test_all_positions_and_attributes_occur() -> None:
    samples = scenes(600, shapes=1)
    assert {scene.position for scene in samples} == set(POSITIONS)
    assert {scene.shapes[0].kind for scene in samples} == set(SHAPES)
    assert {scene.shapes[0].color for scene in samples} == set(COLORS) == {scene.background for scene in samples}
    assert all(scene.relation is None for scene in samples)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_combinations_are_kept_apart(held_out: bool) -> None:
    assert all(is_held_out(scene) is held_out for scene in scenes(300, held_out=held_out))


def test_training_still_shows_every_attribute_of_what_is_held_out() -> None:
    pairs = {(s.kind, s.color) for scene in scenes(2000, shapes=1) for s in scene.shapes}
    missing = set(itertools.product(SHAPES, COLORS)) - pairs
    assert 0 < len(missing) <= 4
    assert len({kind for kind, _ in missing}) == len({color for _, color in missing}) == len(missing)


def test_same_seed_same_scene_and_wrong_count_is_refused() -> None:
    assert scenes(5) == scenes(5)
    with pytest.raises(InputError, match="shapes=3 is invalid: expected 1, 2 or None"):
        sample_scene(np.random.default_rng(0), shapes=3)


def test_repainted_pictures_have_the_colours_of_their_palettes() -> None:
    rng, batch = np.random.default_rng(4), scenes(200)
    palettes = [random_palette(scene, rng) for scene in batch]
    for scene, palette, picture in zip(batch, palettes, render(batch, 64, palettes), strict=True):
        ground = torch.tensor(palette[scene.background])
        assert torch.allclose(picture[:, 0, 0], ground)
        for shape in scene.shapes:
            paint = torch.tensor(palette[shape.color])
            assert torch.allclose(picture[:, int(shape.y * 64), int(shape.x * 64)], paint)
            assert float((paint - ground).norm()) >= MIN_CONTRAST


def test_no_palette_is_near_held_out_colours() -> None:
    rng = np.random.default_rng(5)
    for scene in scenes(300):
        named = {name: nearest_color(color) for name, color in random_palette(scene, rng).items()}
        shapes = [Shape(s.kind, named[s.color], s.size, s.x, s.y, s.radius) for s in scene.shapes]
        assert not is_held_out(Scene(named[scene.background], tuple(shapes)))


def test_a_share_of_scenes_is_repainted() -> None:
    batch, rng = scenes(400), np.random.default_rng(6)
    named = sum(palette is COLORS for palette in mixed_palettes(batch, rng, 0.25))
    assert 270 <= named <= 330
    assert all(palette is COLORS for palette in mixed_palettes(batch, rng, 0.0))
    assert all(nearest_color(color) == name for name, color in COLORS.items())
