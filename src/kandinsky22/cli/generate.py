"""`kandinsky22 generate PROMPT -o picture.png`: pictures from a prompt, or once more from a picture's recipe."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.cli import options
from kandinsky22.cli.loading import PUBLISHED, hardware, load_text_to_image, model_digest, versions
from kandinsky22.cli.pictures import check_writable, contact_sheet, picture_paths, save_png, sheet_path
from kandinsky22.cli.recipe import Recipe, read_recipe
from kandinsky22.cli.request import Request, read_output, read_request
from kandinsky22.hub import EMBEDDED

EXAMPLE = 'kandinsky22 generate "a red circle to the left of a blue square on a yellow background" -o picture.png'


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="draw pictures from a prompt",
        description="Draw pictures from a prompt. Each carries its recipe: see `kandinsky22 info`.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shows")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="repeat the recipe in this picture; other options win"
    )
    options.add_output_options(parser)
    options.add_sampling_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> None:
    """Draw what `args` ask for; the pictures' paths go to stdout, everything else to stderr."""
    recipe = read_recipe(args.source) if args.source is not None else None
    if recipe is None and args.prompt is None:
        args.fail("a PROMPT is needed, or a picture to repeat: --from picture.png")
    request, output = read_request(args, recipe), read_output(args)
    several = len(request.seeds) > 1
    paths = picture_paths(output, len(request.seeds))
    check_writable([*paths, sheet_path(output)] if several else paths)
    say = Teller(args.quiet)
    if request.model == EMBEDDED:
        _introduce_embedded(f"{request.prompt} {request.negative_prompt or ''}", say)
    pipe = load_text_to_image(request.model, request.prior, request.scheduler, request.device, request.dtype)
    # None: bars where there is a terminal to show them.
    pipe.set_progress_bar_config(disable=True if args.quiet else None)
    # Steps, guidance and the like: what was asked for, else what this model does best, else the library's defaults.
    call = {**_signature_defaults(pipe), **pipe.generation_defaults, **request.call()}
    made = _recipe(pipe, request, call)
    if recipe is not None and (changes := _changes(recipe, made)):
        say(f"warning: this may differ from {args.source} in its bits: {'; '.join(changes)}")
    images = []
    for number, (seed, path) in enumerate(zip(request.seeds, paths, strict=True), start=1):
        say(f"picture {number} of {len(paths)}, seed {seed}" if several else f"seed {seed}")
        images.append(_draw(pipe, call, seed))
        _save(images[-1], path, made, (seed,))
    if several:
        _save(contact_sheet(images), sheet_path(output), made, request.seeds, size=images[0].size)


class Teller:
    """Says things on stderr, or keeps quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, message: str) -> None:
        if not self.quiet:
            print(f"kandinsky22: {message}", file=sys.stderr)


def _introduce_embedded(text: str, say: Teller) -> None:
    """Say what is drawing, and which words of `text` it cannot know."""
    from kandinsky22.training.captions import unknown_words

    say(f"drawing with the small embedded model; for the published weights add --model {PUBLISHED}")
    if strangers := unknown_words(text):
        say(f"warning: the embedded model never saw these words: {', '.join(strangers)}")


def _draw(pipe: Any, call: Mapping[str, Any], seed: int) -> Any:
    """One picture. A picture at a time, so that each is the same alone and in a series, to the bit."""
    import torch

    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0]


def _save(image: Any, path: Path, made: Recipe, seeds: tuple[int, ...], size: tuple[int, int] | None = None) -> None:
    width, height = size or image.size
    save_png(image, path, dataclasses.replace(made, seeds=seeds, width=width, height=height).text_entries())
    print(path, flush=True)


def _signature_defaults(pipe: Any) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "prior_num_inference_steps", "prior_guidance_scale")
    parameters = inspect.signature(pipe.__call__).parameters
    return {name: parameters[name].default for name in names}


def _recipe(pipe: Any, request: Request, call: Mapping[str, Any]) -> Recipe:
    """What is about to be done; the size is known for certain once there is a picture."""
    from kandinsky22.runtime.device import dtype_name

    return Recipe(
        prompt=request.prompt,
        negative_prompt=call.get("negative_prompt"),
        seeds=request.seeds,
        model=request.model,
        prior=request.prior,
        model_digest=model_digest(pipe),
        scheduler=type(pipe.scheduler).__name__,
        steps=call["num_inference_steps"],
        prior_steps=call["prior_num_inference_steps"],
        guidance=float(call["guidance_scale"]),
        prior_guidance=float(call["prior_guidance_scale"]),
        width=call.get("width", 0),
        height=call.get("height", 0),
        device=str(pipe.device),
        dtype=dtype_name(pipe.dtype),
        hardware=hardware(pipe),
        versions=versions(),
    )


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
