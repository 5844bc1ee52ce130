"""Recipes from JSON. Image files come from anywhere, therefore types, ranges and sizes of all values are checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from kandinsky22.errors import describe, invalid
from kandinsky22.generation.limits import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MAX_TORCH_SEED

MAX_CHARACTERS = 2**20  # of the JSON
# Smallest and largest value by field, also of the items of a field.
RANGES: Mapping[str, tuple[float, float]] = {
    "seeds": (0, MAX_TORCH_SEED),
    "steps": (1, MAX_STEPS),
    "prior_steps": (1, MAX_STEPS),
    "cache_every": (1, MAX_STEPS),
    "batch_size": (1, MAX_IMAGES),
    "width": (1, MAX_SIDE),
    "height": (1, MAX_SIDE),
    "crop": (0, MAX_SIDE),
    "extend": (0, MAX_SIDE),
    "strength": (0, 1),
    "guidance_interval": (0, 1),
    "prior_guidance_interval": (0, 1),
    "guidance_rescale": (0, 1),
    "guidance_threshold": (1e-9, 1),
    "guidance": (0, 1e38),
    "prior_guidance": (0, 1e38),
}
# Descriptions of ranges that their numbers do not describe well.
EXPECTED: Mapping[str, str] = {"guidance_threshold": "a number above 0 and at most 1"}


def parse_object(text: str) -> dict[str, Any]:
    """Return the entries of a JSON object.

    Args:
        text: The JSON.

    Raises:
        ValueError: If the text is not a JSON object, is too long or nested too deeply, or repeats a name.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    try:
        entries = json.loads(text, object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    return entries


def parse_fields(kind: type, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a dataclass.

    Args:
        kind: The dataclass. Its fields have the types str, int, float, bool, tuples, mappings and other dataclasses.
        entries: JSON values by name; lists become tuples.

    Raises:
        ValueError: If a name is missing or unknown, or if a value has another type or is out of range.
    """
    hints = _type_hints(kind)
    if unknown := sorted(entries.keys() - hints.keys()):
        raise ValueError(f"unknown entries {describe(unknown)}")
    values = {name: parse_value(value, hints[name], name) for name, value in entries.items()}
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in entries]:
        raise ValueError(f"missing entries {', '.join(missing)}")
    return values


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("it contains a name twice")
    return entries


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def parse_value(value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value converted to the type of a dataclass field.

    Args:
        value: The value.
        hint: Type of the field.
        name: Name of the field.

    Raises:
        ValueError: If the value has another type or is out of range.
    """
    if isinstance(hint, types.UnionType):
        return None if value is None else parse_value(value, typing.get_args(hint)[0], name)
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list) and 0 < len(value) <= MAX_IMAGES:
        return tuple(parse_value(item, parameters[0], name) for item in value)
    if origin is not None and origin is not tuple and isinstance(value, dict):
        return {parse_value(key, str, name): parse_value(item, parameters[1], name) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return hint(**parse_fields(hint, value))
    is_number = hint is float and type(value) is int
    is_setting = hint is Any and isinstance(value, str | int | float)
    if not (is_number or is_setting or (origin is None and type(value) is hint)):
        raise invalid(name, value, _type_name(hint))
    if isinstance(value, str):
        return _checked_text(value, name)
    _check_range(value, name)
    return float(value) if is_number else value


def _checked_text(value: str, name: str) -> str:
    """Return a text that can be written and used as a file name."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise invalid(name, value, "text without null characters and lone surrogates")
    if name == "command" and not re.fullmatch(r"[a-z][a-z0-9-]*", value):
        raise invalid(name, value, "the name of a subcommand")
    return value


def _check_range(value: float, name: str) -> None:
    if value != value or value in (math.inf, -math.inf):  # `math.isfinite` cannot take large integers
        raise invalid(name, value, "a finite number")
    low, high = RANGES.get(name, (-MAX_TORCH_SEED, MAX_TORCH_SEED) if isinstance(value, int) else (-1e38, 1e38))
    if not low <= value <= high:
        raise invalid(name, value, EXPECTED.get(name, f"a number from {low} to {high}"))


def _type_name(hint: Any) -> str:
    if hint is Any:
        return "a string or a number"
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else f"a non-empty {hint}"
