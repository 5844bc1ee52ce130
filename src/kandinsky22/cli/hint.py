"""`kandinsky22 hint edges|depth PHOTO`: draw the hint for `kandinsky22 control` from a photograph."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.cli import option_values
from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.console import print_path
from kandinsky22.cli.output_files import OutputFiles, OutputName, check_extension
from kandinsky22.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_OUTPUT = Path("hint.png")
# Repeats defaults of kandinsky22.inputs.hints: importing that module would import torch.
DEFAULT_LOW, DEFAULT_HIGH, DEFAULT_SIGMA = 100.0, 200.0, 1.0
threshold = option_values.finite_number("a number from 0 to 1443", 0, 1443)
blur = option_values.finite_number("a number of pixels from 0 to 100", 0, 100)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `hint`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "hint",
        help="draw a hint for control from a photograph",
        description="Draw the hint for `kandinsky22 control` from a photograph.",
        epilog="example: kandinsky22 hint edges photo.jpg -o hint.png",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    edges = _add_kind(kinds, "edges", "white outlines on black, by Canny's method", _edges)
    edges.add_argument(
        "--low",
        type=threshold,
        default=DEFAULT_LOW,
        metavar="X",
        help=f"faint edges are kept above this gradient if they continue strong ones (default: {DEFAULT_LOW:g})",
    )
    edges.add_argument(
        "--high",
        type=threshold,
        default=DEFAULT_HIGH,
        metavar="X",
        help=f"edges are strong above this gradient, 0 to 1443 (default: {DEFAULT_HIGH:g})",
    )
    edges.add_argument(
        "--sigma",
        type=blur,
        default=DEFAULT_SIGMA,
        metavar="X",
        help=f"blur in pixels that suppresses fine detail (default: {DEFAULT_SIGMA:g})",
    )
    depth = _add_kind(kinds, "depth", "near is white, far is black, by a depth estimation model", _depth)
    depth.add_argument(
        "--depth-model", metavar="MODEL", help="folder or Hub id of a depth estimation model of transformers"
    )
    depth.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    depth.add_argument("--invert", action="store_true", help="near is black, far is white")


def _add_kind(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    draw: Callable[[argparse.Namespace, Image], Image],
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        name,
        help=help,
        description=f"Draw a hint from a photograph: {help}.",
        epilog=f"example: kandinsky22 hint {name} photo.jpg -o hint.png",
        allow_abbrev=False,
    )
    parser.add_argument(
        "image", type=option_values.image_path, metavar="PHOTO", help="an image file; - reads standard input"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help="a .png, .jpg or .webp file, or - for standard output (default: hint.png); existing files are "
        "not replaced: the new one is NAME-2, NAME-3, ...",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.set_defaults(run=lambda args: run(args, draw))
    return parser


def run(args: argparse.Namespace, draw: Callable[[argparse.Namespace, Image], Image]) -> None:
    """Draw and save a hint, and print its path.

    Args:
        args: Parsed command line.
        draw: Function from the command line and the photograph to the hint.

    Raises:
        InputError: If an option or a file is invalid.
        CheckpointError: If the depth model cannot be loaded.
    """
    from kandinsky22.generation.image_files import EXTENSIONS, PNG, check_image, encode_image, find_format

    if getattr(args, "depth_model", "") is None:
        raise InputError(
            "hint depth needs a depth estimation model: name one with --depth-model, a folder or a Hub id such as "
            "'depth-anything/Depth-Anything-V2-Small-hf'"
        )
    check_extension(args.output, EXTENSIONS)
    inputs = CommandInputs(None)
    photo = inputs.images[inputs.open("PHOTO", args.image)]
    format = find_format(args.output) or PNG
    check_image(format, photo.size, {})
    stdout = None if sys.__stdout__ is None else sys.stdout
    files = OutputFiles(args.output, [OutputName()], force=args.force, inputs=inputs.paths, stdout=stdout)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints must not end up in the image
        hint = draw(args, photo)
    if (path := files.write(OutputName(), encode_image(hint, format, {}))) is not None:
        print_path(path)


def _edges(args: argparse.Namespace, photo: Image) -> Image:
    from kandinsky22.inputs.hints import make_edge_hint

    return make_edge_hint(photo, low=args.low, high=args.high, sigma=args.sigma)


def _depth(args: argparse.Namespace, photo: Image) -> Image:
    from kandinsky22.inputs.hints import make_depth_hint
    from kandinsky22.runtime.device import resolve_device

    return make_depth_hint(photo, args.depth_model, device=resolve_device(args.device), invert=args.invert)
