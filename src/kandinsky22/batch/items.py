"""Items: the pictures of a batch. A row is one item, or several if it has wildcards or a number of pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kandinsky22.batch import wildcards
from kandinsky22.batch.row_settings import FIELDS, Part, RowSettings, parse_settings
from kandinsky22.batch.rows import Row, has_surrogates
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.limits import MAX_IMAGES, MAX_SEED

SEED_BITS = 53  # seeds of rows are exact in JSON readers that know only floating-point numbers
MAX_KEPT_CHARACTERS = 2000  # of an additional column, in the metadata


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One picture of a batch.

    Attributes:
        index: Position in the batch, from 0.
        row: Number of the row in the input file.
        id: Identifier, from which the seed follows: that of the row, or its number, with "-N" for the N-th of several
            pictures of one row.
        seed: Seed of the noise.
        settings: Settings of the row by name, with wildcards replaced.
        columns: Other columns of the row, which the metadata repeat.
        fault: Why the picture cannot be drawn; None if nothing is known against it.
        dropped: Names of columns that the metadata do not repeat.
    """

    index: int
    row: int
    id: str
    seed: int
    settings: Mapping[str, Any]
    columns: Mapping[str, Any]
    fault: str | None = None
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ItemOptions:
    """How rows become items.

    Attributes:
        defaults: Settings of all rows that do not set them.
        seed: Seed of the run.
        count: Pictures per row.
        wildcards: "expand", "sample", or None if braces are text.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    count: int = 1
    wildcards: str | None = None


def row_seed(run_seed: int, id: str) -> int:
    """Return the seed of an item: a hash of the run's seed and the item's identifier.

    Args:
        run_seed: Seed of the run.
        id: Identifier of the item.
    """
    digest = hashlib.sha256(f"{run_seed}\0{id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def read_items(rows: Iterable[Row], options: ItemOptions) -> Iterator[Item]:
    """Yield the items of rows. A row with a fault is one item with that fault.

    Args:
        rows: The rows.
        options: How rows become items.
    """
    index = 0
    for row in rows:
        for item in _items_of_row(row, options):
            yield dataclasses.replace(item, index=index)
            index += 1


def _items_of_row(row: Row, options: ItemOptions) -> Iterator[Item]:
    """Yield the items of one row, without their positions in the batch."""
    settings = {name: value for name, value in row.values.items() if name in FIELDS and not _is_missing(value)}
    others = {name: value for name, value in row.values.items() if name not in FIELDS and not _is_missing(value)}
    columns = {name: value for name, value in others.items() if _is_kept(value) and not has_surrogates(name)}
    dropped = tuple(name for name in others if name not in columns)
    faulty = Item(0, row.number, str(row.number), 0, settings, columns, dropped=dropped)
    if row.fault is not None:
        yield dataclasses.replace(faulty, fault=row.fault)
        return
    try:
        parsed = parse_settings(settings)
        items = list(_expanded(faulty, parsed, options))
    except InputError as error:
        yield dataclasses.replace(faulty, fault=str(error))
        return
    yield from items


def _expanded(item: Item, parsed: RowSettings, options: ItemOptions) -> Iterator[Item]:
    id = item.id if parsed.id is None else parsed.id
    if parsed.seed is not None and not 0 <= parsed.seed <= MAX_SEED:
        raise invalid("seed", parsed.seed, f"an integer from 0 to {MAX_SEED}")
    count = options.count if parsed.n is None else parsed.n
    texts = _texts(parsed, options.defaults)
    expansions = list(wildcards.expand(texts)) if options.wildcards == "expand" else [texts]
    if len(expansions) * count > MAX_IMAGES:
        raise invalid("number of pictures of the row", len(expansions) * count, f"at most {MAX_IMAGES}")
    for number in range(len(expansions) * count):
        own_id = id if len(expansions) * count == 1 else f"{id}-{number}"
        own_texts = expansions[number // count]
        if options.wildcards == "sample":
            own_texts = wildcards.sample(texts, f"{options.seed}\0{own_id}")
        settings = dict(item.settings) if own_texts == texts else {**item.settings, **_replaced(parsed, own_texts)}
        seed = row_seed(options.seed, own_id) if parsed.seed is None else parsed.seed + number
        yield dataclasses.replace(item, id=own_id, seed=seed, settings=settings)


def _texts(parsed: RowSettings, defaults: Mapping[str, Any]) -> list[str | None]:
    """Return the texts that may contain wildcards: prompt, negative prompt, and the texts of parts."""
    prompts = [
        defaults.get(name) if getattr(parsed, name) is None else getattr(parsed, name)
        for name in ("prompt", "negative_prompt")
    ]
    return [*prompts, *(part.text for part in parsed.parts or ())]


def _replaced(parsed: RowSettings, texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the settings in which wildcards were replaced, as JSON has them."""
    prompts = zip(("prompt", "negative_prompt"), texts, strict=False)
    changed: dict[str, Any] = {name: text for name, text in prompts if text is not None}
    if parsed.parts is None:
        return changed
    parts: list[Part] = [
        dataclasses.replace(part, text=text) for part, text in zip(parsed.parts, texts[2:], strict=True)
    ]
    return {
        **changed,
        "parts": [
            {name: value for name, value in dataclasses.asdict(part).items() if value is not None} for part in parts
        ],
    }


def _is_missing(value: Any) -> bool:
    """Return whether a value stands for nothing: null, or NaN, which tables of numbers have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_kept(value: Any) -> bool:
    """Return whether the value of an additional column is copied to the metadata: short texts and numbers are."""
    if isinstance(value, str):
        return len(value) <= MAX_KEPT_CHARACTERS and not has_surrogates(value)
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
