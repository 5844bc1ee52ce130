"""One option of fine-tuning: its type, accepted values and help."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky22.errors import invalid

LARGEST_INTEGER = 2**31 - 1


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
        return "--" + self.name.replace("_", "-")

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
