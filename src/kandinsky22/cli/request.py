"""What a command line asks for: its own options first, then those of the recipe it repeats."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli.inputs import Inputs, checked_text
from kandinsky22.cli.options import Portion
from kandinsky22.cli.recipe import InputFile, Part, Recipe
from kandinsky22.errors import InputError
from kandinsky22.sampling.presets import preset

PICTURES = ("image", "mask", "hint")


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, under the names that recipes have for it; None is left to the model, or not used."""

    prompt: str | None
    negative_prompt: str | None
    image: InputFile | None
    mask: InputFile | None
    hint: InputFile | None
    parts: tuple[Part, ...] | None
    strength: float | None
    keep_pixels: bool | None
    seeds: tuple[int, ...]
    model: str
    prior: str | None
    scheduler: str | None
    scheduler_settings: Mapping[str, Any] | None
    prior_scheduler: str | None
    prior_scheduler_settings: Mapping[str, Any] | None
    device: str
    dtype: str | None
    steps: int | None
    prior_steps: int | None
    guidance: float | None
    prior_guidance: float | None
    guidance_interval: tuple[float, ...] | None
    guidance_rescale: float | None
    guidance_threshold: float | None
    prior_guidance_interval: tuple[float, ...] | None
    width: int | None
    height: int | None
    quantize: str | None
    cache_every: int | None

    def texts(self) -> list[str]:
        """All that is read by the text encoder."""
        parts = [part.text for part in self.parts or ()]
        return [text for text in (self.prompt, self.negative_prompt, *parts) if text is not None]


def read_request(
    args: argparse.Namespace, recipe: Recipe | None, inputs: Inputs, *, shape: str | None = None
) -> Request:
    """What `args` ask for, on top of `recipe` if there is one; `shape` names the picture that gives the size, if one
    does.

    Opens all pictures; raises InputError for those that are none and for bytes that are no text, OSError for files
    that are not there.
    """

    asked = _preset(args)

    def pick(name: str) -> Any:
        given = getattr(args, name, None)
        if given is None and name in asked:
            return asked[name]
        return getattr(recipe, name) if given is None and recipe is not None else given

    own: dict[str, Any] = {"seeds": _seeds(args, recipe), "parts": _parts(args, recipe, inputs)}
    own |= {name: _picture(name, pick(name), inputs) for name in PICTURES}
    # The recipe's size fits the recipe's picture, and its prior belongs to its model.
    same = recipe if shape is None or getattr(args, shape) is None else None
    own["width"], own["height"] = args.size or ((None, None) if same is None else (same.width, same.height))
    own["prior"] = pick("prior") if args.model is None else args.prior
    plain = {field.name: pick(field.name) for field in dataclasses.fields(Request) if field.name not in own}
    for name in ("prompt", "negative_prompt"):
        checked_text(name.replace("_", " "), plain[name] or "")
    # what changes nothing is no part of a recipe
    plain["quantize"] = None if plain["quantize"] == "none" else plain["quantize"]
    plain["cache_every"] = None if plain["cache_every"] == 1 else plain["cache_every"]
    defaults = {"model": EMBEDDED, "device": "auto"}
    plain |= {name: value for name, value in defaults.items() if plain[name] is None}
    return Request(**own, **plain)


def read_output(args: argparse.Namespace) -> Path:
    """Where the picture goes; a repeated picture goes beside its original unless told otherwise."""
    if args.output is not None:
        return Path(args.output)
    return Path("picture.png") if args.source is None else args.source.with_name(f"{args.source.stem}-again.png")


def _preset(args: argparse.Namespace) -> dict[str, Any]:
    """What --quality asks for. Settings belong to the scheduler they are for: one that is named has none of them."""
    found: dict[str, Any] = {}
    if (name := getattr(args, "quality", None)) is not None:
        chosen = preset(name)
        found |= {option: getattr(chosen, option) for option in ("guidance_interval", "prior_guidance_interval")}
        for prefix, sampler in (("", chosen.decoder), ("prior_", chosen.prior)):
            found |= {f"{prefix}scheduler": sampler.scheduler, f"{prefix}scheduler_settings": dict(sampler.settings)}
            found[f"{prefix}steps"] = sampler.steps
    for option in ("scheduler", "prior_scheduler"):
        if getattr(args, option, None) is not None:
            found[f"{option}_settings"] = None
    return found


def _seeds(args: argparse.Namespace, recipe: Recipe | None) -> tuple[int, ...]:
    if recipe is not None and args.seed is None and args.count is None:
        return recipe.seeds
    if args.seed is not None:
        first = args.seed
    else:
        first = recipe.seeds[0] if recipe is not None else secrets.randbelow(2**32)
    count = args.count or (len(recipe.seeds) if recipe is not None else 1)
    return tuple(range(first, first + count))


def _picture(name: str, value: Path | InputFile | None, inputs: Inputs) -> InputFile | None:
    if isinstance(value, InputFile):
        return inputs.recorded(name, value)
    return None if value is None else inputs.given(name, value)


def _parts(args: argparse.Namespace, recipe: Recipe | None, inputs: Inputs) -> tuple[Part, ...] | None:
    """What is to be mixed. Where no weights are given, all have an equal share."""
    given: Sequence[Portion] | None = getattr(args, "parts", None)
    if given is None:
        stored = None if recipe is None else recipe.parts
        return stored and tuple(
            dataclasses.replace(part, image=_picture("image", part.image, inputs)) for part in stored
        )
    unweighted = [portion.weight is None for portion in given]
    if any(unweighted) and not all(unweighted):
        raise InputError("some of what is mixed has a weight and some has none; give one to each, or to none")
    return tuple(
        Part(
            weight=1 / len(given) if portion.weight is None else portion.weight,
            text=None if portion.text is None else checked_text("text", portion.text),
            image=_picture("image", portion.image, inputs),
        )
        for portion in given
    )
