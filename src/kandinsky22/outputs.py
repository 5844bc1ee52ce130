"""Base class of results: named fields that are also readable as a tuple or a dictionary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Output:
    """Base class of all results: `out.field`, `out["field"]`, `out[0]` and `a, b = out.to_tuple()` all work.

    Fields that are None do not count as entries.
    """

    def _entries(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the entries in order."""
        return tuple(self._entries().values())

    def keys(self) -> Iterator[str]:
        """Return an iterator over the names of the entries, like that of a dictionary."""
        return iter(self._entries())

    def values(self) -> Iterator[Any]:
        """Return an iterator over the entries, like that of a dictionary."""
        return iter(self._entries().values())

    def items(self) -> Iterator[tuple[str, Any]]:
        """Return an iterator over the names of the entries and the entries, like that of a dictionary."""
        return iter(self._entries().items())

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, or a default if there is none of that name.

        Args:
            key: Name of the entry.
            default: The default.
        """
        return self._entries().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._entries()

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __len__(self) -> int:
        return len(self._entries())

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._entries()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in {field.name for field in dataclasses.fields(self)}:
            raise KeyError(key)
        setattr(self, key, value)
