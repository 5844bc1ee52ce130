"""Rules for the settings of networks, checked before a module is built.

Bounds are generous: several times the sizes of the published networks. Beyond them, building the modules would take
minutes, or their weights would fit into no machine that these networks are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kandinsky22.errors import ConfigError, invalid

MAX_WIDTH = 2**16  # channels, and widths of embeddings and tokens
MAX_LAYERS = 512  # layers of a transformer: its modules are built one by one
MAX_LEVELS = 10  # resolution levels: the input's sides are multiples of 2^(levels - 1)
MAX_LAYERS_PER_BLOCK = 32
MAX_SIDE = 2**16  # latents or pixels
MAX_CODES = 2**24
MAX_PARAMETERS = 2**32  # three times as many as the published UNet has; 16 GiB in float32


class Settings:
    """Settings of one network, with checks that raise ConfigError."""

    def __init__(self, owner: str, values: Mapping[str, Any]) -> None:
        """Store the settings.

        Args:
            owner: Class name of the network, for messages.
            values: Settings by name.
        """
        self._owner, self._values = owner, values

    def check(self, name: str, accepted: bool, expected: str) -> None:
        """Raise ConfigError unless a setting is accepted.

        Args:
            name: Name of the setting, or an expression such as ``block_out_channels[1]``.
            accepted: Whether its value is accepted.
            expected: Description of accepted values.

        Raises:
            ConfigError: If it is not.
        """
        if not accepted:
            value = self._values[name] if name in self._values else self._element(name)
            raise invalid(f"{self._owner}: {name}", value, expected, error=ConfigError)

    def _element(self, name: str) -> Any:
        setting, _, index = name.removesuffix("]").partition("[")
        return self._values[setting][int(index)]

    def integers(self, names: Sequence[str], highest: int = MAX_WIDTH, *, optional: bool = False) -> None:
        """Check settings that are positive integers.

        Args:
            names: Names of the settings.
            highest: The largest accepted value.
            optional: Whether None is accepted.
        """
        for name in names:
            value = self._values[name]
            expected = f"an integer from 1 to {highest}{' or None' if optional else ''}"
            self.check(name, _is_integer(value, highest) or (optional and value is None), expected)

    def number(self, name: str, highest: float, *, above: float = 0.0) -> None:
        """Check a setting that is a finite number.

        Args:
            name: Name of the setting.
            highest: The largest accepted value.
            above: A bound that the value must exceed.
        """
        value = self._values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        accepted = is_number and math.isfinite(value) and above < value <= highest
        self.check(name, accepted, f"a number above {above:g}, at most {highest:g}")

    def widths(self, name: str, *, multiple_of: Mapping[str, int]) -> None:
        """Check the channels per resolution level.

        Args:
            name: Name of the setting.
            multiple_of: Numbers that divide all of them, by their description.
        """
        widths = self._values[name]
        is_sequence = isinstance(widths, tuple) and 1 <= len(widths) <= MAX_LEVELS
        self.check(name, is_sequence, f"1 to {MAX_LEVELS} integers, one per resolution level")
        divisors = " and of ".join(multiple_of)
        for index, width in enumerate(widths):
            accepted = _is_integer(width, MAX_WIDTH) and not any(width % number for number in multiple_of.values())
            self.check(f"{name}[{index}]", accepted, f"a multiple of {divisors}, at most {MAX_WIDTH}")

    def stages(self, name: str, kinds: Sequence[str], levels: int) -> None:
        """Check the types of stages, one per resolution level.

        Args:
            name: Name of the setting.
            kinds: Names of accepted types.
            levels: Number of resolution levels.

        Raises:
            ConfigError: If a type is unknown, or their number differs.
        """
        types = self._values[name]
        self.check(name, isinstance(types, tuple), f"a list of {levels} names of stages")
        for index, kind in enumerate(types):
            accepted = isinstance(kind, str) and kind in kinds
            self.check(f"{name}[{index}]", accepted, " or ".join(map(repr, kinds)))
        if len(types) != levels:
            expected = f"{levels}, one per entry of block_out_channels"
            raise invalid(f"{self._owner}: len({name})", len(types), expected, error=ConfigError)

    def parameters(self, count: int) -> None:
        """Check the approximate number of parameters.

        Args:
            count: Parameters of the network, to within a factor of two.

        Raises:
            ConfigError: If there are too many.
        """
        if count > MAX_PARAMETERS:
            expected = f"about {MAX_PARAMETERS:.1e} at most (16 GiB in float32)"
            raise invalid(f"{self._owner}: number of parameters", f"{count:.1e}", expected, error=ConfigError)


def _is_integer(value: Any, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest
