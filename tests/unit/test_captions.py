"""Captions say what is in the scene, say what they stated, and use known words only."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from kandinsky22.training.captions import (
    EMPTY,
    FULL,
    VOCABULARY,
    Detail,
    Named,
    NamedShape,
    agrees,
    caption,
    distracted,
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
        told = caption(scene, rng)
        assert agrees(told.named, scene)
        assert unknown_words(told.text) == []
        assert "  " not in told.text and told.text == told.text.strip()
        if told.named.background is not None:
            assert told.named.background in words(told.text)
        assert [shape.color for shape in told.named.shapes if shape.color] == [
            word for word in words(told.text) if word in COLORS and word != told.named.background
        ] or told.named.background in {shape.color for shape in told.named.shapes}


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
        named = caption(sample_scene(rng), rng, FULL).named
        assert named.background is not None
        assert (named.place is None) != (named.relation is None)
        assert all(shape.color and shape.size for shape in named.shapes)


def test_relations_are_told_from_both_sides() -> None:
    rng = np.random.default_rng(3)
    told = {caption(PAIR, rng, FULL).named.relation for _ in range(50)}
    assert told == {"left of", "right of"}
    assert all(OPPOSITE[OPPOSITE[relation]] == relation for relation in RELATIONS)


def test_a_wrong_attribute_does_not_agree() -> None:
    red, blue = NamedShape("circle", "red", "small"), NamedShape("square", "blue", None)
    right = Named((red, blue), "yellow", None, "left of")
    assert agrees(right, PAIR)
    assert agrees(Named((blue, red), None, None, "right of"), PAIR)
    assert agrees(Named((blue, red)), PAIR)
    for wrong in (
        dataclasses.replace(right, background="red"),
        dataclasses.replace(right, relation="above"),
        dataclasses.replace(right, relation="right of"),
        dataclasses.replace(right, shapes=(dataclasses.replace(red, size="large"), blue)),
        dataclasses.replace(right, shapes=(red, dataclasses.replace(blue, kind="star"))),
        dataclasses.replace(right, shapes=(red,), relation=None),
    ):
        assert not agrees(wrong, PAIR)
    assert agrees(EMPTY.named, PAIR)


def test_detail_switches_attributes_off() -> None:
    rng = np.random.default_rng(4)
    bare = caption(PAIR, rng, Detail(size=0, color=0, background=0, place=0, relation=0)).named
    assert bare.background is None and bare.relation is None
    assert {(shape.color, shape.size) for shape in bare.shapes} == {(None, None)}


def test_unknown_words_are_named_once_in_order() -> None:
    assert unknown_words("A RED hexagon, a blue cat and a hexagon 42") == ["hexagon", "cat"]
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


def test_a_distraction_adds_one_word() -> None:
    rng = np.random.default_rng(5)
    for text in ("a red circle", ""):
        assert len(distracted(text, rng).split()) == len(text.split()) + 1
