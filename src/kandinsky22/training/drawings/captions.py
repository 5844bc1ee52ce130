"""Captions of scenes in many wordings, each with a record of the attributes that it states.

A caption that names no colour of a thing means its natural colours. Everything else that is left open may be anything.
The vocabulary is closed (`VOCABULARY`), thus words of a prompt that the model has never been trained on can be listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kandinsky22.training.drawings.scenes import Background, Scene
from kandinsky22.training.drawings.vocabulary import (
    BACKGROUNDS,
    COLORS,
    GRADIENT,
    NATURAL,
    PAINTED_PHRASES,
    PLAIN,
    POSITION_PHRASES,
    RELATION_PHRASES,
    SIZE_WORDS,
    STYLE_WORDS,
    SYNONYMS,
)

PLAIN_PHRASES = (*("on a {} background",) * 3, "on {}", "against a {} background", "over a {} background")
GRADIENT_PHRASES = (
    "on a {} gradient",
    "on a {} gradient background",
    "on a shaded {} background",
    "against a {} gradient",
)
ARTICLES = ("a", "a", "a", "a", "the", "one", "")
OPENINGS = (*("",) * 9, "a picture of", "a picture with", "an image of", "an image with", "there is")
# Places of the style in a caption: "{}" is its word, and the subject follows or precedes.
STYLE_OPENINGS = ("a {} drawing of", "a {} drawing of", "a {} picture of", "a {} illustration of", "{} style,")
STYLE_ENDINGS = (", {} style", ", {}", "in {} style", "as a {} drawing")
# Words that people add to any prompt. They change nothing.
ENDINGS = (
    *("",) * 24,
    ", 4k photo",
    ", high quality",
    ", highly detailed",
    ", beautiful",
    ", best quality",
    ", digital art",
    ", cinematic lighting",
    ", 4k",
    ", hd",
    ", cute",
)
FANTASY, LANDSCAPE = (
    ("castle", "dragon", "unicorn"),
    ("mountain", "house", "tree", "castle", "church", "volcano", "fir"),
)
LANDSCAPE_PHRASES = ("a landscape", "a beautiful landscape", "a landscape painting")
FANTASY_PHRASES = ("a fantasy landscape", "a fantasy scene", "fantasy landscape")

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^a-z0-9\s]+")


@dataclass(frozen=True)
class ThingDescription:
    """Attributes that a caption states of one thing.

    Attributes:
        name: Its name, one of THINGS.
        color: Name of its colour, one of THING_COLORS.
        size: Its size, one of SIZES, or None if the caption does not state it.
    """

    name: str
    color: str
    size: str | None


@dataclass(frozen=True)
class SceneDescription:
    """Attributes that a caption states of a scene.

    Attributes:
        things: The things as in the scene, from back to front; empty if the caption names none.
        ordered: Whether the caption tells which of the things is where.
        arrangement: Arrangement, one of ARRANGEMENTS, or None if the caption does not state it.
        style: Style, one of STYLES, or None if the caption does not state it.
        background: Index in BACKGROUNDS, or None if the caption does not state it.
        position: Position of a single thing, one of POSITIONS, or None if the caption does not state it.
    """

    things: tuple[ThingDescription, ...] = ()
    ordered: bool = True
    arrangement: str | None = None
    style: str | None = None
    background: int | None = None
    position: str | None = None


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
        size: Probability for the size of each thing.
        style: Probability for the style.
        background: Probability for the background.
        position: Probability for the position of a single thing.
        relation: Probability for the relation of two things.
    """

    size: float = 0.4
    style: float = 0.35
    background: float = 0.7
    position: float = 0.5
    relation: float = 0.92


FULL = Detail(1.0, 1.0, 1.0, 1.0, 1.0)
SPARSE = Detail(0.1, 0.15, 0.3, 0.15, 0.6)


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def with_article(phrase: str, article: str = "a") -> str:
    """Return a phrase after an article, "an" before vowels.

    Args:
        phrase: Words such as "orange cat".
        article: The article; empty for none.
    """
    if article == "a" and phrase[0] in "aeio":
        article = "an"
    return f"{article} {phrase}".strip()


def _noun_phrase(thing: ThingDescription, rng: np.random.Generator) -> str:
    words = [_choose(rng, SIZE_WORDS[thing.size])] if thing.size in SIZE_WORDS else []
    words += [thing.color] if thing.color != NATURAL else []
    synonyms = SYNONYMS[thing.name]
    words += [synonyms[0] if rng.random() < 0.6 else _choose(rng, synonyms)]
    return with_article(" ".join(words), _choose(rng, ARTICLES))


def background_phrase(background: Background, rng: np.random.Generator) -> str:
    """Return a random wording of a background.

    Args:
        background: The background.
        rng: Random generator.
    """
    if background.kind not in (PLAIN, GRADIENT):
        return _choose(rng, PAINTED_PHRASES[background.name])
    phrase = _choose(rng, PLAIN_PHRASES if background.kind == PLAIN else GRADIENT_PHRASES).format(background.name)
    return phrase.replace(" a orange", " an orange")


def _pair_phrase(nouns: Sequence[str], arrangement: str | None, rng: np.random.Generator) -> str:
    """Return a phrase of two or three things; nouns are in the order of the scene."""
    first, second = nouns[:2]
    if arrangement == "row":
        return f"{first}, {second} and {nouns[2]}"
    if arrangement is None:
        joint = ("and", "and", "with")[int(rng.integers(3))]
        return f"{first} {joint} {second}" if rng.random() < 0.5 else f"{second} {joint} {first}"
    swapped = rng.random() < 0.5
    if arrangement == "beside":
        relation = "right of" if swapped else "left of"
        if rng.random() < 0.15:
            relation, swapped = "beside", False
    elif arrangement == "above":
        relation = "below" if swapped else "above"
    elif arrangement == "on":
        relation, swapped = "on", True  # the upper thing is named first
        if rng.random() < 0.15:
            return f"{first} with {second} on top"
    else:
        relation = "front" if swapped else "behind"
    here, there = (second, first) if swapped else (first, second)
    return f"{here} {_choose(rng, RELATION_PHRASES[relation])} {there}"


def _sentence(subject: str, place: str, ground: str, style: str | None, rng: np.random.Generator) -> str:
    """Join the parts of a sentence in one of several common orders."""
    order = rng.random()
    if place and order < 0.12:
        sentence = f"{place}, {subject} {ground}"
    elif order < 0.3:
        sentence = f"{subject} {ground} {place}"
    elif ground and order < 0.42:
        sentence = f"{subject} {place}, {ground}"
    else:
        sentence = f"{subject} {place} {ground}"
    if style is None:
        sentence = f"{_choose(rng, OPENINGS)} {sentence}"
    elif rng.random() < 0.7:
        sentence = f"{_choose(rng, STYLE_OPENINGS).format(style)} {sentence}"
    else:
        sentence = f"{sentence} {_choose(rng, STYLE_ENDINGS).format(style)}"
    sentence = " ".join(f"{sentence} {_choose(rng, ENDINGS)}".split()).replace(" ,", ",")
    return sentence + "." if rng.random() < 0.08 else sentence


def caption(scene: Scene, rng: np.random.Generator, detail: Detail | None = None) -> Caption:
    """Return a caption of a scene in a random wording.

    Args:
        scene: The scene.
        rng: Random generator.
        detail: Probabilities that attributes are stated; None takes the defaults.
    """
    probability = detail or Detail()
    landscape = _landscape(scene, rng)
    if landscape is not None:
        return landscape
    things = tuple(
        ThingDescription(thing.name, thing.color, _stated_size(scene, thing.size, rng, probability))
        for thing in scene.things
    )
    style = scene.style if rng.random() < probability.style else None
    background = scene.background if rng.random() < probability.background else None
    position = scene.position if scene.position and rng.random() < probability.position else None
    arrangement = scene.arrangement
    if arrangement in ("beside", "above") and rng.random() >= probability.relation:
        arrangement = None
    nouns = [_noun_phrase(thing, rng) for thing in things]
    subject = nouns[0] if len(nouns) == 1 else _pair_phrase(nouns, arrangement, rng)
    place = _choose(rng, POSITION_PHRASES[position]) if position else ""
    ground = background_phrase(background, rng) if background else ""
    word = _choose(rng, STYLE_WORDS[style]) if style else None
    is_symmetric = any(f" {phrase} " in subject for phrase in RELATION_PHRASES["beside"])
    description = SceneDescription(
        things,
        ordered=len(things) == 1 or (arrangement is not None and not is_symmetric),
        arrangement=arrangement,
        style=style,
        background=background.index if background else None,
        position=position,
    )
    return Caption(_sentence(subject, place, ground, word, rng), description)


def _stated_size(scene: Scene, size: str, rng: np.random.Generator, probability: Detail) -> str | None:
    """Return the size that a caption states: a medium one has no word, and some arrangements have fixed sizes."""
    varies = scene.arrangement in (None, "beside", "above")
    return size if varies and size in SIZE_WORDS and rng.random() < probability.size else None


def _landscape(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """Return a caption without things, for some of the painted scenes that it fits."""
    if scene.background.kind in (PLAIN, GRADIENT) or len(scene.things) > 1 or rng.random() > 0.3:
        return None
    thing = scene.things[0]
    if thing.color != NATURAL or thing.name not in {*FANTASY, *LANDSCAPE}:
        return None
    phrases = FANTASY_PHRASES if thing.name in FANTASY else LANDSCAPE_PHRASES
    return Caption(f"{_choose(rng, phrases)}{_choose(rng, ENDINGS)}", SceneDescription(ordered=False))


def add_nonsense_word(text: str, rng: np.random.Generator) -> str:
    """Return a text with one meaningless word inserted, which trains the model to ignore unknown words.

    Args:
        text: The text.
        rng: Random generator.
    """
    parts = text.split()
    nonsense = "".join(_choose(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(int(rng.integers(2, 9))))
    parts.insert(int(rng.integers(len(parts) + 1)), nonsense)
    return " ".join(parts)


def words(text: str) -> list[str]:
    """Return the lower-case words and the runs of other characters of a text.

    Args:
        text: The text.
    """
    return _WORD.findall(text.lower())


def _vocabulary(phrases: Iterable[str]) -> tuple[str, ...]:
    # The tokenizer splits "t-shirt" into its letters, the hyphen and a word.
    return tuple(
        sorted({part for phrase in phrases for part in re.findall(r"[a-z]+", phrase.lower().replace("{}", " "))})
    )


VOCABULARY = _vocabulary(
    [
        *(
            word
            for table in (SYNONYMS, SIZE_WORDS, STYLE_WORDS, PAINTED_PHRASES)
            for row in table.values()
            for word in row
        ),
        *(word for table in (POSITION_PHRASES, RELATION_PHRASES) for row in table.values() for word in row),
        *(phrase for phrases in (PLAIN_PHRASES, GRADIENT_PHRASES, OPENINGS, ENDINGS) for phrase in phrases),
        *(
            phrase
            for phrases in (STYLE_OPENINGS, STYLE_ENDINGS, LANDSCAPE_PHRASES, FANTASY_PHRASES)
            for phrase in phrases
        ),
        *(name for kind, name in BACKGROUNDS if kind not in (PLAIN, GRADIENT)),
        *COLORS,
        *ARTICLES,
        "an",
        "and",
        "with",
        "on top",
    ]
)


def unknown_words(text: str) -> list[str]:
    """Return the words of a text that no caption of the training contains, each once, in order.

    Args:
        text: A prompt.
    """
    known = set(VOCABULARY)
    return list(dict.fromkeys(word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in known))
