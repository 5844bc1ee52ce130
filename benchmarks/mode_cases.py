"""The cases of the embedded model's modes: scenes, their pictures, holes in them, neighbours, and words for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.embedded_prompts import EVALUATION_SEED
from benchmarks.pixel_judge import Bools, to_array
from kandinsky22.training.captions import Named, NamedShape
from kandinsky22.training.scenes import Scene, is_held_out, render, sample_scene

SIZE = 128
MARGIN = 0.05  # from a shape to the edge of its hole, in pictures


def case_rng(seed: int, mode: int, index: int) -> np.random.Generator:
    """The randomness of one case: prompts and pictures of its own, whatever else is judged."""
    return np.random.default_rng([EVALUATION_SEED + seed, 100 + mode, index])


def picture_of(scene: Scene) -> Image.Image:
    """The scene drawn, as the user's picture."""
    return as_image(render([scene], SIZE)[0])


def as_image(picture: Any) -> Image.Image:
    """Anything `to_array` takes as a PIL image."""
    return Image.fromarray((to_array(picture) * 255).round().astype(np.uint8))


def stated(scene: Scene) -> Named:
    """Everything a caption could say of a scene."""
    shapes = tuple(NamedShape(shape.kind, shape.color, shape.size) for shape in scene.shapes)
    return Named(shapes, scene.background, scene.place, scene.relation)


def _fits(scene: Scene) -> bool:
    looks = {(shape.kind, shape.color) for shape in scene.shapes}
    visible = all(shape.color != scene.background for shape in scene.shapes)
    return visible and len(looks) == len(scene.shapes) and not is_held_out(scene)


def repainted(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Bools]:
    """A scene in which another shape stands in the place of one of these, and a hole (SIZE, SIZE) around both."""
    slot = int(rng.integers(len(scene.shapes)))
    old = scene.shapes[slot]
    while True:
        look = sample_scene(rng, shapes=1).shapes[0]
        new = dataclasses.replace(look, x=old.x, y=old.y)
        shapes = (*scene.shapes[:slot], new, *scene.shapes[slot + 1 :])
        target = Scene(scene.background, shapes)
        if _fits(target) and (new.kind, new.color) != (old.kind, old.color):
            break
    reach = 1.28 * max(old.radius, new.radius) + MARGIN
    hole = np.zeros((SIZE, SIZE), dtype=bool)
    low_x, high_x, low_y, high_y = (
        min(max(round(SIZE * value), 0), SIZE) for value in (old.x - reach, old.x + reach, old.y - reach, old.y + reach)
    )
    hole[low_y:high_y, low_x:high_x] = True
    return target, hole


def neighbours(rng: np.random.Generator, attribute: str) -> tuple[Scene, Scene]:
    """Two scenes of one shape that differ in this attribute alone."""
    while True:
        scene, other = (sample_scene(rng, shapes=1) for _ in range(2))
        shape, changed = scene.shapes[0], other.shapes[0]
        changes: dict[str, dict[str, Any]] = {
            "color": {"color": changed.color},
            "size": {"size": changed.size, "radius": changed.radius},
            "place": {"x": changed.x, "y": changed.y},
        }
        fields = changes.get(attribute, {})
        ground = other.background if attribute == "background" else scene.background
        second = Scene(ground, (dataclasses.replace(shape, **fields),))
        if _fits(second) and stated(second) != stated(scene):
            return scene, second


def left_open(scene: Scene, attribute: str) -> Named:
    """All that a sentence says of a scene of one shape which leaves this attribute open."""
    named = stated(scene)
    if attribute == "background":
        return dataclasses.replace(named, background=None)
    return dataclasses.replace(named, shapes=(dataclasses.replace(named.shapes[0], color=None),))


def sentence(scene: Scene, attribute: str, value: str | None) -> str:
    """Plain words for a scene of one shape, whose "color" or "background" is `value`, or left open if that is None."""
    shape = scene.shapes[0]
    ground = value if attribute == "background" else scene.background
    color = value if attribute == "color" else shape.color
    where = {"center": "in the center", "left": "on the left", "right": "on the right"}
    place = where.get(scene.place or "", f"at the {scene.place}")
    subject = " ".join(["a", shape.size, *([color] if color else []), shape.kind])
    return " ".join([subject, *([f"on a {ground} background"] if ground else []), place])
