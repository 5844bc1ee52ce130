"""What all drawing subcommands do: read what is asked for, load networks, draw, and save pictures with recipes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli import generate
from kandinsky22.cli.inputs import Inputs, check_shapes, fitting_size
from kandinsky22.cli.loading import Networks, load_networks, settle
from kandinsky22.cli.modes import Mode
from kandinsky22.cli.pictures import check_writable, contact_sheet, picture_paths, save_png, sheet_path
from kandinsky22.cli.recipe import Recipe, read_recipe
from kandinsky22.cli.request import Request, read_output, read_request
from kandinsky22.errors import InputError


class Teller:
    """Says things on stderr, or keeps quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, message: str) -> None:
        if not self.quiet:
            print(f"kandinsky22: {message}", file=sys.stderr)


def run(mode: Mode, args: argparse.Namespace) -> None:
    """Draw what `args` ask for; the pictures' paths go to stdout, everything else to stderr."""
    say, inputs = Teller(args.quiet), Inputs(args.source)
    recipe = _recipe_to_repeat(mode, args.source)
    shape = mode.shaped_by[0] if mode.shaped_by else None
    request, output = read_request(args, recipe, inputs, shape=shape), read_output(args)
    mode.check(request, args.fail)
    _check_prior_options(args, request)
    under = {name: file for name in mode.shaped_by if (file := getattr(request, name)) is not None}
    check_shapes({f"--{name}": inputs.pictures[file] for name, file in under.items()})
    several = len(request.seeds) > 1
    paths = picture_paths(output, len(request.seeds))
    _check_outputs([*paths, sheet_path(output)] if several else paths, inputs)
    introduce(mode.published, request, say)
    classes = mode.prior(request), mode.decoder(request)
    networks = load_networks(classes, request)
    for pipe in (networks.prior, networks.decoder):
        # None: bars where there is a terminal to show them.
        pipe.set_progress_bar_config(disable=True if args.quiet else None)
    if under:
        request = _fit(request, networks.decoder, inputs.pictures[next(iter(under.values()))].size, say)
    request = generate.with_defaults(request, networks)
    made = generate.recipe_of(mode.name, request, networks)
    settle(networks, request, low_memory=args.low_memory, compiled=args.compile)
    if recipe is not None and (changes := [*_changes(recipe, made), *inputs.changed]):
        say(f"warning: this may differ from {args.source} in its bits: {'; '.join(changes)}")
    images = []
    for number, (seed, path) in enumerate(zip(request.seeds, paths, strict=True), start=1):
        say(f"picture {number} of {len(paths)}, seed {seed}" if several else f"seed {seed}")
        images.append(_draw(networks, request, inputs, seed))
        _save(images[-1], path, made, (seed,))
    if several:
        _save(contact_sheet(images), sheet_path(output), made, request.seeds, size=images[0].size)


# Before anything is loaded


def _recipe_to_repeat(mode: Mode, source: Path | None) -> Recipe | None:
    recipe = None if source is None else read_recipe(source)
    if recipe is not None and recipe.command != mode.name:
        raise InputError(f"{source} was made by another command: kandinsky22 {recipe.command} --from {source}")
    return recipe


def _check_prior_options(args: argparse.Namespace, request: Request) -> None:
    names = "prior_scheduler", "prior_steps", "prior_guidance", "prior_guidance_interval"
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given and not request.texts():
        args.fail(f"the prior, and so {', '.join(given)}, acts only where a text is read; there is none")


def _check_outputs(paths: Sequence[Path], inputs: Inputs) -> None:
    check_writable(paths)
    for path in paths:
        if path.exists() and any(path.samefile(used) for used in inputs.paths):
            raise InputError(f"{path}: would replace a picture that is read for it; choose another output with -o")


def introduce(published: str, request: Request, say: Teller) -> None:
    """Say what is drawing, which words it cannot know, and which weights it is not used to."""
    if request.model == EMBEDDED:
        from kandinsky22.training.captions import unknown_words

        say(f"drawing with the small embedded model; for the published weights add --model {published}")
        if strangers := unknown_words(" ".join(request.texts())):
            say(f"warning: the embedded model never saw these words: {', '.join(strangers)}")
    if request.parts and abs(total := sum(part.weight for part in request.parts)) - 1 > 1e-6:
        say(f"warning: the weights sum to {total:g}; where that is not 1, results are outside of what models know")


# Before anything is drawn


def _fit(request: Request, decoder: Any, shape: tuple[int, int], say: Teller) -> Request:
    """The request with the size that a picture of `shape` is drawn at, unless one was asked for."""
    if request.width is None:
        width, height = fitting_size(shape, decoder.default_size, decoder.movq_scale_factor**2)
        request = dataclasses.replace(request, width=width, height=height)
    if shape != (request.width, request.height):
        given = f"{shape[0]}x{shape[1]}"
        say(f"what was given at {given} is drawn at {request.width}x{request.height}; see --size")
    return request


def _changes(then: Recipe, now: Recipe) -> list[str]:
    """What, other than options, is not as it was when the picture was made."""
    changes = [
        f"{name} {version} then, {now.versions.get(name, 'none')} now"
        for name, version in then.versions.items()
        if now.versions.get(name) != version
    ]
    if then.hardware != now.hardware:
        changes.append(f"made on {then.hardware}, this is {now.hardware}")
    same_model = (then.model, then.prior, then.dtype) == (now.model, now.prior, now.dtype)
    if same_model and then.model_digest != now.model_digest:
        changes.append(f"{now.model} has other weights now")
    return changes


# Drawing


def _draw(networks: Networks, request: Request, inputs: Inputs, seed: int) -> Any:
    """One picture, whose generator serves the prior first."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    embeddings = generate.embed(networks.prior, request, inputs, generator)
    return generate.draw(networks.decoder, request, inputs, embeddings, generator)


def _save(image: Any, path: Path, made: Recipe, seeds: tuple[int, ...], size: tuple[int, int] | None = None) -> None:
    width, height = size or image.size
    save_png(image, path, dataclasses.replace(made, seeds=seeds, width=width, height=height).text_entries())
    print(path, flush=True)
