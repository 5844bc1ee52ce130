"""Results with named fields that also read like the tuple or dictionary of those fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Output:
    """Base of all results: `out.field`, `out["field"]`, `out[0]`, `a, b = out.to_tuple()`. Fields that are None do
    not count as entries."""

    def _fields(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries in order."""
        return tuple(self._fields().values())

    def keys(self) -> Iterator[str]:
        """The names of the entries, as of a dictionary."""
        return iter(self._fields())

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __len__(self) -> int:
        return len(self._fields())

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._fields()[key] if isinstance(key, str) else self.to_tuple()[key]
