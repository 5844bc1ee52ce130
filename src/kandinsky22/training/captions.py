"""Captions of scenes in many wordings, each with a record of the attributes that it states.

The vocabulary is closed (`VOCABULARY`), thus words of a prompt that the model has never been trained on can be listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kandinsky22.training.scenes import COLORS, OPPOSITE, SHAPES, Scene, Shape

# A wording that is listed several times is sampled as many times as often.
KIND_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
SIZE_WORDS = {"small": ("small", "small", "small", "little", "tiny"), "large": ("large", "large", "big", "big", "huge")}
POSITION_PHRASES = {
    "center": ("in the center", "in the center", "in the middle", "at the center", "in the centre"),
    "left": ("on the left", "on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right", "on the right side", "at the right"),
    "top": ("at the top", "at the top", "in the upper half", "on the upper side"),
    "bottom": ("at the bottom", "at the bottom", "in the lower half", "on the lower side"),
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "to the right of", "on the right of"),
    "above": ("above", "above", "on top of"),
    "below": ("below", "below", "under", "beneath"),
}
# Positions of the first and of the second shape.
RELATION_POSITIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
BACKGROUND_PHRASES = (
    *("on a {} background",) * 2,
    "on {}",
    "against a {} background",
    "over a {} background",
)
ARTICLES = ("a", "a", "a", "the", "one", "")
OPENINGS = (
    *("",) * 8,
    "a picture of",
    "a picture with",
    "a drawing of",
    "an image of",
    "an image with",
    "an illustration of",
    "there is",
)
IMAGE_PHRASES = (*("",) * 5, "of the picture", "of the image")

_WORD = re.compile(r"[a-z]+|[^a-z\s]+")


@dataclass(frozen=True)
class ShapeDescription:
    """Attributes that a caption states of one shape.

    Attributes:
        kind: Kind of shape, one of SHAPES.
        color: Name of the colour, one of COLORS, or None if the caption does not state it.
        size: Size, one of SIZES, or None if the caption does not state it.
    """

    kind: str
    color: str | None
    size: str | None


@dataclass(frozen=True)
class SceneDescription:
    """Attributes that a caption states of a scene.

    Attributes:
        shapes: The shapes in the order of the text.
        background: Name of the background's colour, one of COLORS, or None if the caption does not state it.
        position: Position of a single shape, one of POSITIONS, or None if the caption does not state it.
        relation: Relation of the first shape to the second, one of RELATIONS, or None if the caption does not state it.
    """

    shapes: tuple[ShapeDescription, ...] = ()
    background: str | None = None
    position: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Caption:
    """A caption.

    Attributes:
        text: Its text.
        description: The attributes that it states.
    """

    text: str
    description: SceneDescription


EMPTY_CAPTION = Caption("", SceneDescription())


@dataclass(frozen=True)
class Detail:
    """Probabilities that a caption states the attributes that it may leave open.

    Attributes:
        size: Probability for the size of each shape.
        color: Probability for the colour of each shape.
        background: Probability for the background's colour.
        position: Probability for the position of a single shape.
        relation: Probability for the relation of two shapes.
    """

    size: float = 0.6
    color: float = 0.97
    background: float = 0.75
    position: float = 0.75
    relation: float = 0.95


# Captions that state every attribute are the hardest to follow.
FULL = Detail(1.0, 1.0, 1.0, 1.0, 1.0)


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(shape: ShapeDescription, rng: np.random.Generator) -> str:
    words = [_choose(rng, SIZE_WORDS[shape.size])] if shape.size else []
    words += [shape.color] if shape.color else []
    words += [_choose(rng, KIND_WORDS[shape.kind])]
    article = _choose(rng, ARTICLES)
    if article == "a" and words[0] == "orange":
        article = "an"
    return " ".join([article, *words] if article else words)


def _background_phrase(color: str, rng: np.random.Generator) -> str:
    phrase = _choose(rng, BACKGROUND_PHRASES).format(color)
    return phrase.replace(" a orange", " an orange")


def _position_phrase(position: str, rng: np.random.Generator) -> str:
    return f"{_choose(rng, POSITION_PHRASES[position])} {_choose(rng, IMAGE_PHRASES)}".strip()


def _pair_phrase(first: str, second: str, relation: str | None, rng: np.random.Generator) -> str:
    if relation is None:
        return f"{first} and {second}"
    if rng.random() < 0.8:
        return f"{first} {_choose(rng, RELATION_PHRASES[relation])} {second}"
    here, there = (POSITION_PHRASES[position][:2] for position in RELATION_POSITIONS[relation])
    return f"{first} {_choose(rng, here)} and {second} {_choose(rng, there)}"


def _sentence(subject: str, position: str, background: str | None, rng: np.random.Generator) -> str:
    """Join the parts of a sentence in one of several common orders."""
    if background is not None and rng.random() < 0.15:
        article = "an" if background == "orange" else "a"
        sentence = f"{article} {background} background with {subject} {position}"
    else:
        ground = _background_phrase(background, rng) if background is not None else ""
        order = rng.random()
        if position and order < 0.12:
            sentence = f"{position}, {subject} {ground}"
        elif order < 0.3:
            sentence = f"{subject} {ground} {position}"
        elif ground and order < 0.45:
            sentence = f"{subject} {position}, {ground}"
        else:
            sentence = f"{subject} {position} {ground}"
        sentence = f"{_choose(rng, OPENINGS)} {sentence}"
    sentence = " ".join(sentence.split()).replace(" ,", ",")
    return sentence + "." if rng.random() < 0.1 else sentence


def caption(scene: Scene, rng: np.random.Generator, detail: Detail | None = None) -> Caption:
    """Return a caption of a scene in a random wording.

    Args:
        scene: The scene.
        rng: Random generator.
        detail: Probabilities that attributes are stated; None takes the defaults.
    """
    probability = detail or Detail()

    def describe(shape: Shape) -> ShapeDescription:
        color = shape.color if rng.random() < probability.color else None
        return ShapeDescription(shape.kind, color, shape.size if rng.random() < probability.size else None)

    background = scene.background if rng.random() < probability.background else None
    shapes, relation, position = scene.shapes, None, None
    if len(shapes) == 1:
        position = scene.position if rng.random() < probability.position else None
    else:
        relation = scene.relation
        if rng.random() < 0.5:
            shapes, relation = shapes[::-1], OPPOSITE[relation or "left of"]
        relation = relation if rng.random() < probability.relation else None
    description = SceneDescription(tuple(describe(shape) for shape in shapes), background, position, relation)
    nouns = [_noun_phrase(shape, rng) for shape in description.shapes]
    subject = nouns[0] if len(nouns) == 1 else _pair_phrase(nouns[0], nouns[1], relation, rng)
    return Caption(
        _sentence(subject, _position_phrase(position, rng) if position else "", background, rng), description
    )


def add_nonsense_word(text: str, rng: np.random.Generator) -> str:
    """Return a text with one meaningless word inserted, which trains the model to ignore unknown words.

    Args:
        text: The text.
        rng: Random generator.
    """
    words = text.split()
    nonsense = "".join(_choose(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(int(rng.integers(2, 9))))
    words.insert(int(rng.integers(len(words) + 1)), nonsense)
    return " ".join(words)


def matches(description: SceneDescription, scene: Scene) -> bool:
    """Return whether a caption with this description is true of a scene.

    Args:
        description: Attributes that a caption states.
        scene: The scene.
    """
    if not description.shapes:
        return True
    if len(description.shapes) != len(scene.shapes) or description.background not in (None, scene.background):
        return False
    if description.position not in (None, scene.position):
        return False
    orders = [scene.shapes] if description.relation in (None, scene.relation) else []
    if len(scene.shapes) == 2 and (description.relation is None or OPPOSITE[description.relation] == scene.relation):
        orders.append(scene.shapes[::-1])
    return any(
        all(
            stated.kind == shape.kind and stated.color in (None, shape.color) and stated.size in (None, shape.size)
            for stated, shape in zip(description.shapes, order, strict=True)
        )
        for order in orders
    )


def words(text: str) -> list[str]:
    """Return the lower-case words and the runs of other characters of a text, as the tokenizer splits it.

    Args:
        text: The text.
    """
    return _WORD.findall(text.lower())


def _vocabulary(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for phrase in phrases for word in words(phrase) if word.isalpha()}))


VOCABULARY = _vocabulary(
    [
        *(word for synonyms in (*KIND_WORDS.values(), *SIZE_WORDS.values()) for word in synonyms),
        *(phrase for phrases in (*POSITION_PHRASES.values(), *RELATION_PHRASES.values()) for phrase in phrases),
        *(phrase.replace("{}", "") for phrase in BACKGROUND_PHRASES),
        *COLORS,
        *SHAPES,
        *ARTICLES,
        *OPENINGS,
        *IMAGE_PHRASES,
        "an",
        "and",
        "with",
    ]
)


def unknown_words(text: str) -> list[str]:
    """Return the words of a text that no caption of the training contains, each once, in order.

    Args:
        text: A prompt.
    """
    known = set(VOCABULARY)
    return list(dict.fromkeys(word for word in words(text) if word[0].isalpha() and word not in known))
