"""An option of fine-tuning, its type, accepted values and help; and tables of options."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kandinsky22.errors import InputError, invalid

LARGEST_INTEGER = 2**31 - 1
TableT = TypeVar("TableT", bound="OptionTable")


def flag_of(name: str) -> str:
    """Return an option as the command writes it.

    Args:
        name: Name of the option's field.
    """
    return "--" + name.replace("_", "-")


class IneffectiveOptionError(InputError):
    """An option is set that has no effect in a training.

    Args:
        name: Name of the option's field.
        where: Where it has no effect, as the end of a sentence.

    Attributes:
        name: Name of the option's field.
    """

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"{flag_of(name)} has no effect {where}: leave it out")
        self.name = name


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Name of the field; the command writes it with hyphens.
        kind: Type of the value, of each value for a repeatable option: int, float, str or bool.
        default: Value if the option is left out.
        help: What it does, as a phrase.
        group: Title of the group that help texts list it in.
        lowest: Smallest accepted number.
        highest: Largest accepted number.
        choices: Accepted strings; empty accepts all.
        repeatable: Whether the value is a tuple of values.
        above: Whether `lowest` itself is not accepted.
    """

    name: str
    kind: type
    default: Any
    help: str
    group: str
    lowest: float = -math.inf
    highest: float = math.inf
    choices: tuple[str, ...] = ()
    repeatable: bool = False
    above: bool = False

    @property
    def flag(self) -> str:
        """The option as the command writes it."""
        return flag_of(self.name)

    @property
    def default_text(self) -> str:
        """The default as the command writes it; empty if there is none."""
        if self.default is None:
            return ""
        return " ".join(self.default) if self.repeatable else str(self.default)

    @property
    def expected(self) -> str:
        """Description of the accepted values, for messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return "a list of texts that are not empty" if self.repeatable else "a text that is not empty"
        name = "an integer" if self.kind is int else "a finite number"
        bounds = [f"above {self.lowest:g}" if self.above else f"of at least {self.lowest:g}"] * (
            self.lowest > -math.inf
        )
        bounds += [f"at most {self.highest:g}"] * (self.highest < LARGEST_INTEGER)
        return f"{name} {' and '.join(bounds)}".strip()

    def checked(self, value: Any) -> Any:
        """Return a value of the option's type.

        Args:
            value: Value from Python, YAML or the command line; None stands for the default of repeatable options and of
                those whose default is None.

        Raises:
            InputError: The value is not accepted.
        """
        if value is None and (self.default is None or self.repeatable):
            return self.default
        if self.repeatable:
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list | tuple) or not all(
                isinstance(item, str) and item.strip() for item in values
            ):
                raise invalid(self.flag, value, self.expected)
            return tuple(values)
        if self.kind is str and isinstance(value, Path):
            value = str(value)
        if self.kind is float and isinstance(value, str):  # YAML reads 1e-4 as a text
            value = _as_number(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind or not self._accepts(value):
            raise invalid(self.flag, value, self.expected)
        return value

    def _accepts(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind is str:
            return bool(value)
        if self.kind is bool:
            return True
        above = value > self.lowest if self.above else value >= self.lowest
        return bool(math.isfinite(value) and above and value <= min(self.highest, LARGEST_INTEGER))


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def option_field(
    kind: type,
    default: Any,
    group: str,
    help: str,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    choices: tuple[str, ...] = (),
    repeatable: bool = False,
    above: bool = False,
) -> Any:
    """Return a dataclass field that holds an option and what `Option` says of it.

    Args:
        kind: Type of the value: bool, int, float or str.
        default: Default value.
        group: Group of options in the help.
        help: Help text.
        lowest: Smallest accepted number.
        highest: Largest accepted number.
        choices: Accepted texts; empty for any.
        repeatable: Whether the value is a tuple of texts.
        above: Whether `lowest` itself is refused.
    """
    about = {
        "kind": kind,
        "group": group,
        "help": help,
        "lowest": lowest,
        "highest": highest,
        "choices": choices,
        "repeatable": repeatable,
        "above": above,
    }
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class OptionTable:
    """Options as fields of a dataclass, each of them the result of `option_field`.

    Raises:
        InputError: A value is not accepted, or two options contradict each other.
    """

    def __post_init__(self) -> None:
        for option in self.options():
            object.__setattr__(self, option.name, option.checked(getattr(self, option.name)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise an error if two options contradict each other."""
        raise NotImplementedError

    @classmethod
    def options(cls) -> Iterator[Option]:
        """Yield the descriptions of all options, in the order of their groups."""
        for field in dataclasses.fields(cls):
            yield Option(name=field.name, default=field.default, **field.metadata)

    @classmethod
    def from_mapping(cls: type[TableT], values: Mapping[str, Any], source: str = "options") -> TableT:
        """Return the options of a mapping; hyphens and underscores in names are the same.

        Args:
            values: Values by name.
            source: Where they come from, for messages.

        Raises:
            InputError: A name is unknown, or a value is not accepted.
        """
        names = [option.name for option in cls.options()]
        by_name = {str(name).replace("-", "_"): value for name, value in values.items()}
        if unknown := sorted(set(by_name) - set(names)):
            similar = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.0)
            raise InputError(
                f"{source}: no option is named {', '.join(unknown)}; similar ones are {', '.join(similar)}"
            )
        return cls(**by_name)

    def refuse(self, where: str, *names: str) -> None:
        """Raise an error if options have other values than their defaults.

        Args:
            where: Where they have no effect, as the end of a sentence.
            *names: Names of their fields.

        Raises:
            IneffectiveOptionError: One of them has another value.
        """
        for option in self.options():
            if option.name in names and getattr(self, option.name) != option.default:
                raise IneffectiveOptionError(option.name, where)
