"""Wildcards in texts: {red|blue|green} and {1-8}, expanded to all combinations or sampled."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence

from kandinsky22.errors import invalid

MODES = ("expand", "sample")
MAX_EXPANSIONS = 10_000  # texts that one row may stand for
# Braces with a bar or a range of integers. Other braces are text, and so are braces after a backslash.
WILDCARD = re.compile(r"(?<!\\)\{([^{}]*\|[^{}]*|\s*\d{1,9}\s*-\s*\d{1,9}\s*)(?<!\\)\}")
RANGE = re.compile(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*")


def has_wildcards(text: str) -> bool:
    """Return whether a text contains a wildcard.

    Args:
        text: The text.
    """
    return "{" in text and WILDCARD.search(text) is not None


def _options(content: str) -> Sequence[str] | range:
    """Return what a wildcard may stand for."""
    match = RANGE.fullmatch(content)
    if match is None:
        return content.split("|")
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise invalid("wildcard", f"{{{content}}}", "a range with its smaller end first, such as {1-8}")
    return range(first, last + 1)


def _parts(text: str) -> list[str | Sequence[str] | range]:
    """Return a text as an alternation of plain texts and options."""
    pieces = WILDCARD.split(text)
    return [_options(piece) if index % 2 else _plain(piece) for index, piece in enumerate(pieces)]


def _plain(text: str) -> str:
    return text.replace(r"\{", "{").replace(r"\}", "}")


def _count(parts: Sequence[str | Sequence[str] | range]) -> int:
    return math.prod(len(part) for part in parts if not isinstance(part, str))


def expand(texts: Sequence[str | None]) -> Iterator[list[str | None]]:
    """Yield all combinations of the wildcards in several texts of one row; the last wildcard varies fastest.

    Args:
        texts: The texts; None stays None.

    Raises:
        InputError: If there are more than `MAX_EXPANSIONS` combinations, or if a range is empty.
    """
    parts = [[] if text is None else _parts(text) for text in texts]
    if (count := math.prod(map(_count, parts))) > MAX_EXPANSIONS:
        raise invalid("number of texts that the wildcards stand for", count, f"at most {MAX_EXPANSIONS}")
    options = [[part] if isinstance(part, str) else [str(option) for option in part] for text in parts for part in text]
    for choice in itertools.product(*options):
        pieces = iter(choice)
        yield [
            None if text is None else "".join(itertools.islice(pieces, len(text_parts)))
            for text, text_parts in zip(texts, parts, strict=True)
        ]


def sample(texts: Sequence[str | None], key: str) -> list[str | None]:
    """Return several texts of one row with an option chosen for each wildcard.

    Args:
        texts: The texts; None stays None.
        key: Text that decides the choices: equal keys give equal choices on any machine.

    Raises:
        InputError: If a range is empty.
    """
    generator = random.Random(hashlib.sha256(key.encode()).digest())
    return [
        None
        if text is None
        else "".join(
            part if isinstance(part, str) else str(part[int(generator.random() * len(part))]) for part in _parts(text)
        )
        for text in texts
    ]
