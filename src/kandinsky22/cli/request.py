"""What a command line asks for: its own options first, then those of the recipe it repeats."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from pathlib import Path
from typing import Any

from kandinsky22.cli.recipe import Recipe
from kandinsky22.errors import InputError
from kandinsky22.hub import EMBEDDED


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for; None is left to the model."""

    prompt: str
    negative_prompt: str | None
    seeds: tuple[int, ...]
    model: str
    prior: str | None
    scheduler: str | None
    device: str
    dtype: str
    steps: int | None
    prior_steps: int | None
    guidance: float | None
    prior_guidance: float | None
    width: int | None
    height: int | None

    def call(self) -> dict[str, Any]:
        """What was given of the pipeline's arguments, under their names."""
        arguments = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "prior_num_inference_steps": self.prior_steps,
            "guidance_scale": self.guidance,
            "prior_guidance_scale": self.prior_guidance,
            "width": self.width,
            "height": self.height,
        }
        return {name: value for name, value in arguments.items() if value is not None}


def read_request(args: argparse.Namespace, recipe: Recipe | None) -> Request:
    """What `args` ask for, on top of `recipe` if there is one; raises InputError for bytes that are no text."""

    def pick(name: str) -> Any:
        given = getattr(args, name)
        return getattr(recipe, name) if given is None and recipe is not None else given

    width, height = args.size or ((recipe.width, recipe.height) if recipe is not None else (None, None))
    return Request(
        prompt=_text("prompt", pick("prompt")),
        negative_prompt=_text("negative prompt", pick("negative_prompt")),
        seeds=_seeds(args, recipe),
        model=pick("model") or EMBEDDED,
        # The recipe's prior belongs to the recipe's model.
        prior=pick("prior") if args.model is None else args.prior,
        scheduler=pick("scheduler"),
        device=pick("device") or "auto",
        dtype=pick("dtype") or "auto",
        steps=pick("steps"),
        prior_steps=pick("prior_steps"),
        guidance=pick("guidance"),
        prior_guidance=pick("prior_guidance"),
        width=width,
        height=height,
    )


def read_output(args: argparse.Namespace) -> Path:
    """Where the picture goes; a repeated picture goes beside its original unless told otherwise."""
    if args.output is not None:
        return Path(args.output)
    return Path("picture.png") if args.source is None else args.source.with_name(f"{args.source.stem}-again.png")


def _seeds(args: argparse.Namespace, recipe: Recipe | None) -> tuple[int, ...]:
    if recipe is not None and args.seed is None and args.count is None:
        return recipe.seeds
    if args.seed is not None:
        first = args.seed
    else:
        first = recipe.seeds[0] if recipe is not None else secrets.randbelow(2**32)
    count = args.count or (len(recipe.seeds) if recipe is not None else 1)
    return tuple(range(first, first + count))


def _text(name: str, text: Any) -> Any:
    """The text itself, unless the terminal handed over bytes that are no characters."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"the {name} {text!a} is not text in this terminal's encoding") from None
    return text
