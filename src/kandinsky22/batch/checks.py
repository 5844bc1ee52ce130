"""The check of all rows before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from kandinsky22.batch import wildcards
from kandinsky22.batch.items import Item
from kandinsky22.batch.requests import RequestOptions, build_request, concerns_row
from kandinsky22.errors import KandinskyError

MAX_FAULTS = 100  # faults that are kept; the others are counted
MAX_COLUMNS = 20  # names of unused columns that are kept
MAX_CANDIDATES = 10  # good items that are kept


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row that cannot be drawn.

    Attributes:
        row: Number of the row.
        message: What is wrong.
    """

    row: int
    message: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of the check.

    Attributes:
        items: Number of pictures, those of bad rows included.
        faults: The first `MAX_FAULTS` faults.
        fault_count: Number of bad items.
        unused_columns: Names of columns that are no settings, at most `MAX_COLUMNS`.
        dropped_columns: Names of those that the metadata do not repeat, at most `MAX_COLUMNS`.
        wildcard_rows: Number of items whose prompts contain braces that would be wildcards.
        candidates: The first good items, at most `MAX_CANDIDATES`. Their models are not known to be good.
    """

    items: int
    faults: tuple[Fault, ...]
    fault_count: int
    unused_columns: tuple[str, ...]
    dropped_columns: tuple[str, ...]
    wildcard_rows: int
    candidates: tuple[Item, ...]

    @property
    def first(self) -> Item | None:
        """The first good item; None if there is none."""
        return self.candidates[0] if self.candidates else None


def check_items(
    items: Iterable[Item], options: RequestOptions, on_fault: Callable[[Fault], None] | None = None
) -> Report:
    """Return what is wrong with items. Every image is opened, no network is loaded.

    Args:
        items: The items of a run.
        options: What all requests of the run share.
        on_fault: Called for each fault; None calls nothing.

    Raises:
        KandinskyError: If a row needs what is not installed here.
    """
    count = fault_count = wildcard_rows = 0
    faults: list[Fault] = []
    unused: dict[str, None] = {}
    dropped: dict[str, None] = {}
    candidates: list[Item] = []
    for item in items:
        count += 1
        if len(unused) < MAX_COLUMNS:
            unused.update(dict.fromkeys(item.columns))
        if len(dropped) < MAX_COLUMNS:
            dropped.update(dict.fromkeys(item.dropped))
        try:
            request = build_request(item, options).request
        except KandinskyError as error:
            if not concerns_row(error):
                raise
            fault_count += 1
            fault = Fault(item.row, str(error))
            if len(faults) < MAX_FAULTS:
                faults.append(fault)
            if on_fault is not None:
                on_fault(fault)
            continue
        wildcard_rows += any(map(wildcards.has_wildcards, request.texts()))
        if len(candidates) < MAX_CANDIDATES:
            candidates.append(item)
    return Report(
        items=count,
        faults=tuple(faults),
        fault_count=fault_count,
        unused_columns=tuple(unused)[:MAX_COLUMNS],
        dropped_columns=tuple(dropped)[:MAX_COLUMNS],
        wildcard_rows=wildcard_rows,
        candidates=tuple(candidates),
    )
