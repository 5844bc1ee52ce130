"""What people say about a scene: captions in many wordings, each with a record of what it states.

The vocabulary is closed (`VOCABULARY`), so that whoever writes a prompt can be told which words the model never saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kandinsky22.training.scenes import COLORS, OPPOSITE, SHAPES, Scene, Shape

KIND_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
SIZE_WORDS = {"small": ("small", "small", "small", "little", "tiny"), "large": ("large", "large", "big", "big", "huge")}
PLACE_PHRASES = {
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
# The side on which the first shape stands, and the side on which the other one does.
RELATION_SIDES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
GROUND_PHRASES = (
    *("on a {} background",) * 2,
    "on {}",
    "against a {} background",
    "over a {} background",
)
ARTICLES = ("a", "a", "a", "the", "one", "")
OPENINGS = (
    *("",) * 8,
    "a picture of", "a picture with", "a drawing of", "an image of", "an image with", "an illustration of", "there is",
)  # fmt: skip
WHOLES = (*("",) * 5, "of the picture", "of the image")

_WORD = re.compile(r"[a-z]+|[^a-z\s]+")


@dataclass(frozen=True)
class NamedShape:
    """What a caption states of one shape; None is left open."""

    kind: str
    color: str | None
    size: str | None


@dataclass(frozen=True)
class Named:
    """What a caption states: the shapes in the order of the text, `relation` as the first stands to the second."""

    shapes: tuple[NamedShape, ...] = ()
    background: str | None = None
    place: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Caption:
    """A caption and what it states."""

    text: str
    named: Named


EMPTY = Caption("", Named())


@dataclass(frozen=True)
class Detail:
    """How often a caption states what it may leave open, as probabilities."""

    size: float = 0.6
    color: float = 0.97
    background: float = 0.75
    place: float = 0.75
    relation: float = 0.95


# Everything is stated, as in the prompts that are hardest to follow.
FULL = Detail(1.0, 1.0, 1.0, 1.0, 1.0)


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(named: NamedShape, rng: np.random.Generator) -> str:
    words = [_choose(rng, SIZE_WORDS[named.size])] if named.size else []
    words += [named.color] if named.color else []
    words += [_choose(rng, KIND_WORDS[named.kind])]
    article = _choose(rng, ARTICLES)
    if article == "a" and words[0] == "orange":
        article = "an"
    return " ".join([article, *words] if article else words)


def _ground(color: str, rng: np.random.Generator) -> str:
    phrase = _choose(rng, GROUND_PHRASES).format(color)
    return phrase.replace(" a orange", " an orange")


def _place(place: str, rng: np.random.Generator) -> str:
    return f"{_choose(rng, PLACE_PHRASES[place])} {_choose(rng, WHOLES)}".strip()


def _pair(first: str, second: str, relation: str | None, rng: np.random.Generator) -> str:
    if relation is None:
        return f"{first} and {second}"
    if rng.random() < 0.8:
        return f"{first} {_choose(rng, RELATION_PHRASES[relation])} {second}"
    here, there = RELATION_SIDES[relation]
    return f"{first} {_choose(rng, PLACE_PHRASES[here][:2])} and {second} {_choose(rng, PLACE_PHRASES[there][:2])}"


def _assemble(subject: str, place: str, ground: str | None, rng: np.random.Generator) -> str:
    """Join the parts of a sentence in one of the orders in which people put them."""
    if ground is not None and rng.random() < 0.15:
        article = "an" if ground == "orange" else "a"
        sentence = f"{article} {ground} background with {subject} {place}"
    else:
        background = _ground(ground, rng) if ground is not None else ""
        style = rng.random()
        if place and style < 0.12:
            sentence = f"{place}, {subject} {background}"
        elif style < 0.3:
            sentence = f"{subject} {background} {place}"
        elif background and style < 0.45:
            sentence = f"{subject} {place}, {background}"
        else:
            sentence = f"{subject} {place} {background}"
        sentence = f"{_choose(rng, OPENINGS)} {sentence}"
    sentence = " ".join(sentence.split()).replace(" ,", ",")
    return sentence + "." if rng.random() < 0.1 else sentence


def caption(scene: Scene, rng: np.random.Generator, detail: Detail | None = None) -> Caption:
    """Describe `scene` in a random wording that states the attributes `detail` asks for."""
    chance = detail or Detail()

    def name(shape: Shape) -> NamedShape:
        color = shape.color if rng.random() < chance.color else None
        return NamedShape(shape.kind, color, shape.size if rng.random() < chance.size else None)

    background = scene.background if rng.random() < chance.background else None
    shapes, relation, place = scene.shapes, None, None
    if len(shapes) == 1:
        place = scene.place if rng.random() < chance.place else None
    else:
        relation = scene.relation
        if rng.random() < 0.5:
            shapes, relation = shapes[::-1], OPPOSITE[relation or "left of"]
        relation = relation if rng.random() < chance.relation else None
    named = Named(tuple(name(shape) for shape in shapes), background, place, relation)
    nouns = [_noun(shape, rng) for shape in named.shapes]
    subject = nouns[0] if len(nouns) == 1 else _pair(nouns[0], nouns[1], relation, rng)
    return Caption(_assemble(subject, _place(place, rng) if place else "", background, rng), named)


def distracted(text: str, rng: np.random.Generator) -> str:
    """`text` with one meaningless word somewhere, so that words the model never saw do not confuse it."""
    parts = text.split()
    word = "".join(_choose(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(int(rng.integers(2, 9))))
    parts.insert(int(rng.integers(len(parts) + 1)), word)
    return " ".join(parts)


def agrees(named: Named, scene: Scene) -> bool:
    """Whether `scene` is one that a caption stating `named` describes."""
    if not named.shapes:
        return True
    if len(named.shapes) != len(scene.shapes) or named.background not in (None, scene.background):
        return False
    if named.place not in (None, scene.place):
        return False
    orders = [scene.shapes] if named.relation in (None, scene.relation) else []
    if len(scene.shapes) == 2 and (named.relation is None or OPPOSITE[named.relation] == scene.relation):
        orders.append(scene.shapes[::-1])
    return any(
        all(
            told.kind == shape.kind and told.color in (None, shape.color) and told.size in (None, shape.size)
            for told, shape in zip(named.shapes, order, strict=True)
        )
        for order in orders
    )


def words(text: str) -> list[str]:
    """Split a text into lower-case words and runs of other characters, as the tokenizer does."""
    return _WORD.findall(text.lower())


def _vocabulary(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for phrase in phrases for word in words(phrase) if word.isalpha()}))


VOCABULARY = _vocabulary(
    [
        *(word for row in (*KIND_WORDS.values(), *SIZE_WORDS.values()) for word in row),
        *(phrase for row in (*PLACE_PHRASES.values(), *RELATION_PHRASES.values()) for phrase in row),
        *(phrase.replace("{}", "") for phrase in GROUND_PHRASES),
        *COLORS, *SHAPES, *ARTICLES, *OPENINGS, *WHOLES,
        "an", "and", "with",
    ]
)  # fmt: skip


def unknown_words(text: str) -> list[str]:
    """The words of `text` that no caption of the training uses, each once, in order."""
    known = set(VOCABULARY)
    return list(dict.fromkeys(word for word in words(text) if word[0].isalpha() and word not in known))
