"""Test cases of the embedded model's modes: scenes, their images, masks, pairs of scenes, and prompts for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.embedded_prompts import EVALUATION_SEED
from benchmarks.pixel_judge import Bools, to_array
from kandinsky22.training.captions import SceneDescription, ShapeDescription
from kandinsky22.training.scenes import Scene, is_held_out, render, sample_scene

SIZE = 128
MARGIN = 0.05  # distance from a shape to the edge of its mask, in images


def case_rng(seed: int, mode: int, index: int) -> np.random.Generator:
    """Return the random generator of a case, which does not depend on other cases.

    Args:
        seed: Seed of the benchmark.
        mode: Number of the mode.
        index: Index of the case.
    """
    return np.random.default_rng([EVALUATION_SEED + seed, 100 + mode, index])


def render_image(scene: Scene) -> Image.Image:
    """Return a rendered scene as a PIL image.

    Args:
        scene: The scene.
    """
    return to_image(render([scene], SIZE)[0])


def to_image(image: Any) -> Image.Image:
    """Return an image as a PIL image.

    Args:
        image: Any image that `to_array` accepts.
    """
    return Image.fromarray((to_array(image) * 255).round().astype(np.uint8))


def full_description(scene: Scene) -> SceneDescription:
    """Return all attributes of a scene that a caption can state.

    Args:
        scene: The scene.
    """
    shapes = tuple(ShapeDescription(shape.kind, shape.color, shape.size) for shape in scene.shapes)
    return SceneDescription(shapes, scene.background, scene.position, scene.relation)


def _is_valid(scene: Scene) -> bool:
    looks = {(shape.kind, shape.color) for shape in scene.shapes}
    is_visible = all(shape.color != scene.background for shape in scene.shapes)
    return is_visible and len(looks) == len(scene.shapes) and not is_held_out(scene)


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replacement of a shape by inpainting.

    Attributes:
        target: Scene with the replacement.
        mask: True for repainted pixels (SIZE, SIZE), around both shapes.
    """

    target: Scene
    mask: Bools


def sample_edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """Return a random replacement of one shape of a scene.

    Args:
        scene: The scene.
        rng: Random generator.
    """
    slot = int(rng.integers(len(scene.shapes)))
    old = scene.shapes[slot]
    while True:
        model = sample_scene(rng, shapes=1).shapes[0]
        new = dataclasses.replace(model, x=old.x, y=old.y)
        target = Scene(scene.background, (*scene.shapes[:slot], new, *scene.shapes[slot + 1 :]))
        if _is_valid(target) and (new.kind, new.color) != (old.kind, old.color):
            break
    extent = 1.28 * max(old.radius, new.radius) + MARGIN
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    edges = (old.x - extent, old.x + extent, old.y - extent, old.y + extent)
    left, right, top, bottom = (min(max(round(SIZE * value), 0), SIZE) for value in edges)
    mask[top:bottom, left:right] = True
    return Edit(target, mask)


def neighbours(rng: np.random.Generator, attribute: str) -> tuple[Scene, Scene]:
    """Return two scenes of one shape that differ in one attribute.

    Args:
        rng: Random generator.
        attribute: "background", "color", "size" or "position".
    """
    while True:
        scene, other = (sample_scene(rng, shapes=1) for _ in range(2))
        shape, source = scene.shapes[0], other.shapes[0]
        changes: dict[str, dict[str, Any]] = {
            "color": {"color": source.color},
            "size": {"size": source.size, "radius": source.radius},
            "position": {"x": source.x, "y": source.y},
        }
        fields = changes.get(attribute, {})
        background = other.background if attribute == "background" else scene.background
        second = Scene(background, (dataclasses.replace(shape, **fields),))
        if _is_valid(second) and full_description(second) != full_description(scene):
            return scene, second


def description_without(scene: Scene, attribute: str) -> SceneDescription:
    """Return all attributes of a scene of one shape except one.

    Args:
        scene: The scene.
        attribute: "background" or "color", the attribute that is left out.
    """
    description = full_description(scene)
    if attribute == "background":
        return dataclasses.replace(description, background=None)
    return dataclasses.replace(description, shapes=(dataclasses.replace(description.shapes[0], color=None),))


def sentence(scene: Scene, attribute: str, value: str | None) -> str:
    """Return a simple prompt for a scene of one shape with another value of one attribute.

    Args:
        scene: The scene.
        attribute: "background" or "color".
        value: Name of the colour; None leaves the attribute out.
    """
    shape = scene.shapes[0]
    background = value if attribute == "background" else scene.background
    color = value if attribute == "color" else shape.color
    phrases = {"center": "in the center", "left": "on the left", "right": "on the right"}
    position = phrases.get(scene.position or "", f"at the {scene.position}")
    subject = " ".join(["a", shape.size, *([color] if color else []), shape.kind])
    return " ".join([subject, *([f"on a {background} background"] if background else []), position])
