"""Captions say what is in the scene, say what they stated, and use known words only."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from kandinsky22.training.captions import (
    EMPTY_CAPTION,
    FULL,
    VOCABULARY,
    Detail,
    SceneDescription,
    ShapeDescription,
    add_nonsense_word,
    caption,
    matches,
    unknown_words,
    words,
)
from kandinsky22.training.scenes import COLORS, OPPOSITE, RELATIONS, Scene, Shape, sample_scene

PAIR = Scene(
    "yellow",
    (Shape("circle", "red", "small", 0.25, 0.5, 0.11), Shape("square", "blue", "large", 0.75, 0.5, 0.18)),
)


def test_every_caption_agrees_with_its_scene_and_uses_known_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(800):
        scene = sample_scene(rng)
        text, description = (result := caption(scene, rng)).text, result.description
        assert matches(description, scene)
        assert unknown_words(text) == []
        assert "  " not in text and text == text.strip()
        if description.background is not None:
            assert description.background in words(text)
        assert [shape.color for shape in description.shapes if shape.color] == [
            word for word in words(text) if word in COLORS and word != description.background
        ] or description.background in {shape.color for shape in description.shapes}


def test_articles_fit_their_words() -> None:
    rng = np.random.default_rng(1)
    for _ in range(800):
        text = words(caption(sample_scene(rng), rng).text)
        for first, second in itertools.pairwise(text):
            assert not (first == "a" and second[0] in "aeiou"), text
            assert not (first == "an" and second[0] not in "aeiou"), text


def test_full_captions_leave_nothing_open() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        description = caption(sample_scene(rng), rng, FULL).description
        assert description.background is not None
        assert (description.position is None) != (description.relation is None)
        assert all(shape.color and shape.size for shape in description.shapes)


def test_relations_are_stated_from_both_sides() -> None:
    rng = np.random.default_rng(3)
    relations = {caption(PAIR, rng, FULL).description.relation for _ in range(50)}
    assert relations == {"left of", "right of"}
    assert all(OPPOSITE[OPPOSITE[relation]] == relation for relation in RELATIONS)


def test_a_wrong_attribute_does_not_match() -> None:
    red, blue = ShapeDescription("circle", "red", "small"), ShapeDescription("square", "blue", None)
    right = SceneDescription((red, blue), "yellow", None, "left of")
    assert matches(right, PAIR)
    assert matches(SceneDescription((blue, red), None, None, "right of"), PAIR)
    assert matches(SceneDescription((blue, red)), PAIR)
    for wrong in (
        dataclasses.replace(right, background="red"),
        dataclasses.replace(right, relation="above"),
        dataclasses.replace(right, relation="right of"),
        dataclasses.replace(right, shapes=(dataclasses.replace(red, size="large"), blue)),
        dataclasses.replace(right, shapes=(red, dataclasses.replace(blue, kind="star"))),
        dataclasses.replace(right, shapes=(red,), relation=None),
    ):
        assert not matches(wrong, PAIR)
    assert matches(EMPTY_CAPTION.description, PAIR)


def test_detail_switches_attributes_off() -> None:
    rng = np.random.default_rng(4)
    bare = caption(PAIR, rng, Detail(size=0, color=0, background=0, position=0, relation=0)).description
    assert bare.background is None and bare.relation is None
    assert {(shape.color, shape.size) for shape in bare.shapes} == {(None, None)}


def test_unknown_words_are_named_once_in_order() -> None:
    assert unknown_words("A RED hexagon, a blue cat and a hexagon 42") == ["hexagon", "cat"]
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


def test_a_nonsense_word_is_one_more_word() -> None:
    rng = np.random.default_rng(5)
    for text in ("a red circle", ""):
        assert len(add_nonsense_word(text, rng).split()) == len(text.split()) + 1
