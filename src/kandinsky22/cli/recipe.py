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
class Recipe:
    """How one picture, or the pictures of a contact sheet, were made: one picture a seed, all else in common."""

    prompt: str
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
    negative_prompt: str | None = None
    prior: str | None = None

    def to_json(self) -> str:
        """The recipe as JSON, with the number of its format."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> Recipe:
        """Read what `to_json` wrote; raises InputError that names `origin` when it is something else."""
        try:
            stored = json.loads(text)
            if stored.pop("format") != FORMAT:
                raise ValueError("it was written in another format, by another version")
            hints = typing.get_type_hints(cls)
            if unknown := sorted(stored.keys() - hints.keys()):
                raise ValueError(f"unknown entries {', '.join(unknown)}")
            return cls(**{name: _read(value, hints[name], name) for name, value in stored.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{origin}: its recipe cannot be read ({error})") from error

    def text_entries(self) -> dict[str, str]:
        """What is written into the file, by keyword: the recipe as JSON, and again as people and galleries read it."""
        return {KEY: self.to_json(), "parameters": self._parameters(), "Software": f"kandinsky22 {__version__}"}

    def lines(self) -> list[tuple[str, str]]:
        """The recipe as (name, value) pairs for people."""
        return [
            ("prompt", self.prompt),
            *([("negative prompt", self.negative_prompt)] if self.negative_prompt is not None else []),
            ("seed", _seeds(self.seeds)),
            ("size", f"{self.width}x{self.height}"),
            ("steps", f"{self.steps}, prior {self.prior_steps}"),
            ("guidance", f"{self.guidance:g}, prior {self.prior_guidance:g}"),
            ("scheduler", self.scheduler),
            ("model", self.model),
            *([("prior", self.prior)] if self.prior is not None else []),
            ("digest", self.model_digest),
            ("device", f"{self.device}, {self.dtype}, {self.hardware}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]

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
            "Prior steps": self.prior_steps,
            "Prior CFG scale": f"{self.prior_guidance:g}",
            "Version": f"kandinsky22 {self.versions.get('kandinsky22', __version__)}",
        }
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt is not None else []
        return "\n".join([self.prompt, *negative, ", ".join(f"{name}: {value}" for name, value in settings.items())])


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
        raise InputError(f"{path}: carries no recipe; `kandinsky22 generate` writes one into its PNG files")
    return Recipe.from_json(stored, origin=str(path))


def _seeds(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def _read(value: Any, hint: Any, name: str) -> Any:
    """Check a JSON value against a field's type; lists become tuples."""
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
    raise ValueError(f"{name} is {value!r}")
