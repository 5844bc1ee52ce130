"""Configurations: frozen dataclasses that are also readable as the dictionaries they are stored as."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from kandinsky22.errors import SHOWN_CHARACTERS, ConfigError, invalid

C = TypeVar("C", bound="Config")

MAX_DEPTH = 4  # of nested lists in a setting


@dataclasses.dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Constructor arguments of one network or scheduler: `config.name`, `config["name"]` and `dict(config)` all work.

    Subclasses are frozen dataclasses. Their `supported_values` lists settings that checkpoints contain but that have
    no field, because Kandinsky 2.2 uses them with the values listed only. Any other value is refused instead of being
    ignored.
    """

    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def parse(cls: type[C], values: Mapping[str, Any], *, owner: str) -> C:
        """Return the config with stored or passed settings.

        Args:
            values: Settings by name. Names that start with an underscore are bookkeeping and are skipped, as are
                unknown settings that are None or False. Lists become tuples.
            owner: Class name of the network or scheduler, for messages.

        Raises:
            ConfigError: If a setting is unknown, or if its value is not accepted.
        """
        names = cls.field_names()
        settings: dict[str, Any] = {}
        for name, value in values.items():
            if not isinstance(name, str):
                raise invalid(f"{owner}: name of a setting", name, "a string", error=ConfigError)
            if name.startswith("_"):
                continue
            value = _lists_to_tuples(value)
            if name in names:
                settings[name] = value
            elif name in cls.supported_values:
                if not _is_among(value, cls.supported_values[name]):
                    expected = " or ".join(repr(supported) for supported in cls.supported_values[name])
                    advice = "Kandinsky 2.2 uses no other value"
                    raise invalid(f"{owner}: {name}", value, expected, advice, error=ConfigError)
            elif value is not None and value is not False:
                expected = f"a known setting ({', '.join(sorted(names))})"
                raise invalid(f"{owner}: {name[:SHOWN_CHARACTERS]}", value, expected, error=ConfigError)
        try:
            return cls(**settings)
        except ConfigError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ConfigError(f"{owner}: {error}") from error

    def __getitem__(self, name: str) -> Any:
        if name not in self.field_names():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.field_names())

    def __len__(self) -> int:
        return len(self.field_names())

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the settings in order."""
        return tuple(field.name for field in dataclasses.fields(cls))


def _lists_to_tuples(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, list | tuple) or depth > MAX_DEPTH:  # no setting is nested deeper: it is refused as it is
        return value
    return tuple(_lists_to_tuples(item, depth + 1) for item in value)


def _is_among(value: Any, supported: tuple[Any, ...]) -> bool:
    """Return whether a plain value is one of these; True and 1 are different."""
    if not (value is None or isinstance(value, bool | int | float | str)):
        return False
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in supported)
