"""Settings of a row: their types and ranges, from the values of JSON, CSV and Parquet files."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.engine_names import ENGINES
from kandinsky22.generation.limits import MAX_IMAGES, check_interval
from kandinsky22.generation.recipe_json import parse_value

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclasses.dataclass(frozen=True)
class Part:
    """One text, image or learned subject of a mixture. Exactly one of the three is set.

    Attributes:
        text: The text, or None.
        image: Path of the image, or None.
        subject: Path of the file of a learned subject, or None.
        weight: Factor of the embedding; None if no item has one, which makes all of them equal.
    """

    text: str | None = None
    image: str | None = None
    subject: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if [self.text, self.image, self.subject].count(None) != 2:
            raise ValueError("an item of parts has exactly one of text, image and subject")


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Settings of one row. None means that the row does not set it.

    Attributes: those of `Request` with the same names, images as paths, and

        id: Identifier of the row.
        mode: Name of the mode; None for the one that the inputs imply.
        seed: Seed of the noise.
        n: Number of pictures.
        size: Size as WIDTHxHEIGHT.
        quality: Name of a preset.
        lora: Adapters, each of them as FILE or FILE:WEIGHT.
        tiny_decoder: File, folder or Hub id of a tiny decoder, or "none".
        subject: Learned subject of the mode generate, as FILE or FILE:WEIGHT.
    """

    id: str | None = None
    mode: str | None = None
    seed: int | None = None
    n: int | None = None
    size: str | None = None
    quality: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    mask: str | None = None
    hint: str | None = None
    parts: tuple[Part, ...] | None = None
    subject: str | None = None
    strength: float | None = None
    keep_pixels: bool | None = None
    crop: int | None = None
    extend: tuple[int, ...] | None = None
    model: str | None = None
    prior: str | None = None
    scheduler: str | None = None
    prior_scheduler: str | None = None
    dtype: str | None = None
    steps: int | None = None
    prior_steps: int | None = None
    guidance: float | None = None
    prior_guidance: float | None = None
    prompt_weights: bool | None = None
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float | None = None
    guidance_threshold: float | None = None
    prior_guidance_interval: tuple[float, ...] | None = None
    width: int | None = None
    height: int | None = None
    quantize: str | None = None
    cache_every: int | None = None
    engine: str | None = None
    lora: tuple[str, ...] | None = None
    tiny_decoder: str | None = None


FIELDS = frozenset(field.name for field in dataclasses.fields(RowSettings))


def parse_settings(values: Mapping[str, Any]) -> RowSettings:
    """Return the settings of a row. Texts of CSV files become numbers where a number is expected.

    Args:
        values: Values by name of the setting.

    Raises:
        InputError: If values have another type or are out of range; the message describes all of them.
    """
    parsed: dict[str, Any] = {}
    faults = []
    for name, value in values.items():
        try:
            kind = _kinds()[name]
            parsed[name] = None if value is None else parse_value(_converted(value, kind, name), kind, name)
            _check(name, parsed[name])
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return RowSettings(**parsed)


def _check(name: str, value: Any) -> None:
    """Raise an error if a value is beyond a limit that recipes do not check."""
    if name in ("guidance_interval", "prior_guidance_interval") and value is not None:
        check_interval(name, value)
    if name == "engine" and value is not None and value not in ENGINES:
        raise invalid(name, value, f"one of {', '.join(ENGINES)}")
    if name == "extend" and value is not None and len(value) != 4:
        raise invalid(name, value, "left, top, right and bottom margin")
    if name == "n" and value is not None and not 1 <= value <= MAX_IMAGES:
        raise invalid(name, value, f"an integer from 1 to {MAX_IMAGES}")


@functools.cache
def _kinds() -> dict[str, Any]:
    """Return the type of each setting, without None."""
    hints = typing.get_type_hints(RowSettings)
    return {
        name: typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint for name, hint in hints.items()
    }


def _converted(value: Any, kind: Any, name: str) -> Any:
    """Return a value as JSON would have it: texts of CSV files and whole floats of tables become what is expected."""
    if kind is str:
        return str(value) if name == "id" and isinstance(value, int) else value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is bool and text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        if name == "lora" and not text.startswith("["):
            return [text]
        if typing.get_origin(kind) is tuple:
            return json.loads(text if text.startswith("[") else f"[{text}]")
    except ValueError:
        pass
    return value
