"""Configurations: frozen dataclasses that also read like the dictionaries they are stored as."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from kandinsky22.errors import ConfigError

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Constructor arguments of one network or scheduler: `config.name`, `config["name"]` and `dict(config)` all work.

    Subclasses are frozen dataclasses. `only` lists arguments that checkpoints may carry but that Kandinsky 2.2 uses
    at one setting: any other value is refused by name instead of being ignored.
    """

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def parse(cls: type[C], values: Mapping[str, Any], *, owner: str, ignore_unknown: bool = False) -> C:
        """Build the config of `owner` from stored or passed values; raises ConfigError naming what does not fit.

        Keys that start with an underscore are bookkeeping and are skipped. Lists become tuples. With `ignore_unknown`
        (schedulers, whose files travel between classes) unknown keys are dropped, otherwise they are refused unless
        they are off (None or False).
        """
        names = cls.field_names()
        chosen: dict[str, Any] = {}
        for name, value in values.items():
            if name.startswith("_"):
                continue
            value = _freeze(value)
            if name in names:
                chosen[name] = value
            elif name in cls.only:
                if value not in cls.only[name]:
                    accepted = " or ".join(repr(choice) for choice in cls.only[name])
                    raise ConfigError(f"{owner}: {name}={value!r} is not part of Kandinsky 2.2; accepted: {accepted}")
            elif not ignore_unknown and value is not None and value is not False:
                raise ConfigError(f"{owner}: unknown setting {name}={value!r}; accepted: {', '.join(sorted(names))}")
        try:
            return cls(**chosen)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
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
        """The arguments' names, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value
