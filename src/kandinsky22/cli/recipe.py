"""A picture's recipe: all that is needed to draw it again, kept as text inside the picture's own file."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22 import __version__
from kandinsky22.errors import InputError

KEY = "kandinsky22"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that a picture was made from: its name as it was given, and the SHA-256 of its bytes."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.sha256}"


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a mixture: a text or a picture, and its weight."""

    weight: float
    text: str | None = None
    image: InputFile | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one picture, or the pictures of a contact sheet, were made: one picture a seed, all else in common."""

    seeds: tuple[int, ...]
    model: str
    model_digest: str
    scheduler: str
    steps: int
    prior_steps: int
    guidance: float
    prior_guidance: float
    width: int
    height: int
    device: str
    dtype: str
    hardware: str
    versions: Mapping[str, str]
    command: str = "generate"
    prompt: str | None = None
    negative_prompt: str | None = None
    image: InputFile | None = None
    mask: InputFile | None = None
    hint: InputFile | None = None
    parts: tuple[Part, ...] | None = None
    strength: float | None = None
    keep_pixels: bool | None = None
    prior: str | None = None
    scheduler_settings: Mapping[str, Any] | None = None
    prior_scheduler: str | None = None
    prior_scheduler_settings: Mapping[str, Any] | None = None
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float | None = None
    guidance_threshold: float | None = None
    prior_guidance_interval: tuple[float, ...] | None = None
    quantize: str | None = None
    cache_every: int | None = None

    def to_json(self) -> str:
        """The recipe as JSON, with the number of its format; what it does not use is left out."""
        entries = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps({"format": FORMAT, **entries}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> Recipe:
        """Read what `to_json` wrote; raises InputError that names `origin` when it is something else."""
        try:
            stored = json.loads(text)
            if stored.pop("format") != FORMAT:
                raise ValueError("it was written in another format, by another version")
            return cls(**_read_fields(cls, stored))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{origin}: its recipe cannot be read ({error})") from error

    def text_entries(self) -> dict[str, str]:
        """What is written into the file, by keyword: the recipe as JSON, and again as people and galleries read it."""
        return {KEY: self.to_json(), "parameters": self._parameters(), "Software": f"kandinsky22 {__version__}"}

    def lines(self) -> list[tuple[str, str]]:
        """The recipe as (name, value) pairs for people."""
        given = {
            "prompt": self.prompt,
            "negative prompt": self.negative_prompt,
            "image": self.image,
            "mask": self.mask,
            "hint": self.hint,
            "strength": None if self.strength is None else f"{self.strength:g}",
            "keep pixels": None if self.keep_pixels is None else "yes" if self.keep_pixels else "no",
        }
        return [
            ("command", self.command),
            *((name, str(value)) for name, value in given.items() if value is not None),
            *(("mixed in", f"{part.weight:g} of {part.image or part.text}") for part in self.parts or ()),
            ("seed", _seeds(self.seeds)),
            ("size", f"{self.width}x{self.height}"),
            ("steps", f"{self.steps}, prior {self.prior_steps}"),
            ("guidance", f"{self.guidance:g}, prior {self.prior_guidance:g}"),
            *((name, value) for name, value in self._guided().items()),
            *((name, value) for name, value in self._schedulers().items()),
            ("model", self.model),
            *([("prior", self.prior)] if self.prior is not None else []),
            *self.sped_up().items(),
            ("digest", self.model_digest),
            ("device", f"{self.device}, {self.dtype}, {self.hardware}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]

    def _guided(self) -> dict[str, str]:
        """The options of guidance that are in use."""
        rescale, threshold = self.guidance_rescale, self.guidance_threshold
        intervals = {"guided from": self.guidance_interval, "prior guided from": self.prior_guidance_interval}
        return {
            **{name: " to ".join(f"{part:g}" for part in given) for name, given in intervals.items() if given},
            **({} if rescale is None else {"guidance rescaled": f"{rescale:g}"}),
            **({} if threshold is None else {"guidance threshold": f"{threshold:g}"}),
        }

    def sped_up(self) -> dict[str, str]:
        """The options in use that trade the picture for speed or memory."""
        return {
            **({} if self.quantize is None else {"quantized": self.quantize}),
            **({} if self.cache_every is None else {"cached": f"all of the UNet every {self.cache_every} steps"}),
        }

    def _schedulers(self) -> dict[str, str]:
        """The schedulers with the settings that are not the model's."""
        both = {
            "scheduler": (self.scheduler, self.scheduler_settings),
            "prior scheduler": (self.prior_scheduler, self.prior_scheduler_settings),
        }
        return {
            name: ", ".join([kind, *(f"{key}={value}" for key, value in (settings or {}).items())])
            for name, (kind, settings) in both.items()
            if kind is not None
        }

    def _parameters(self) -> str:
        """The layout that picture galleries know: prompt, negative prompt, then settings on one line."""
        settings = {
            "Steps": self.steps,
            "Sampler": self.scheduler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": _seeds(self.seeds),
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_digest[:10],
            "Model": self.model,
            **({} if self.strength is None else {"Denoising strength": f"{self.strength:g}"}),
            "Prior steps": self.prior_steps,
            "Prior CFG scale": f"{self.prior_guidance:g}",
            "Version": f"kandinsky22 {self.versions.get('kandinsky22', __version__)}",
        }
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt is not None else []
        shown = [part.image.name if part.image else part.text for part in self.parts or ()]
        prompt = " + ".join(map(str, shown)) if self.prompt is None else self.prompt
        if self.prompt is None and self.parts is None:
            prompt = f"{self.command} of {self.image and self.image.name}"
        return "\n".join([prompt, *negative, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def read_recipe(path: Path) -> Recipe:
    """The recipe in the picture at `path`; raises InputError when there is none, OSError when there is no file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            # Where text stands after the pixels, it is known only once those are read.
            picture.load()
            stored = picture.info.get(KEY)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path}: damaged picture ({error})") from error
    if not isinstance(stored, str):
        raise InputError(f"{path}: carries no recipe; `kandinsky22` writes one into the PNG files it draws")
    return Recipe.from_json(stored, origin=str(path))


def _seeds(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def _read(value: Any, hint: Any, name: str) -> Any:
    """Check a JSON value against a field's type; lists become tuples."""
    if hint is Any and isinstance(value, str | int | float):
        return value
    if isinstance(hint, types.UnionType):
        return None if value is None else _read(value, typing.get_args(hint)[0], name)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list) and value:
        return tuple(_read(item, parts[0], name) for item in value)
    if origin is not None and origin is not tuple and isinstance(value, dict):
        return {str(key): _read(item, parts[1], name) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return hint(**_read_fields(hint, value))
    raise ValueError(f"{name} is {value!r}")


def _read_fields(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a dataclass from JSON values by name."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(stored.keys() - hints.keys()):
        raise ValueError(f"unknown entries {', '.join(unknown)}")
    return {name: _read(value, hints[name], name) for name, value in stored.items()}
