"""`kandinsky22 info IMAGE`: print the recipe that an image file contains."""

from __future__ import annotations

import argparse
from pathlib import Path

from kandinsky22.cli.recipe import read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `info`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "info",
        help="print how an image was generated",
        epilog="example: kandinsky22 info picture.png",
        allow_abbrev=False,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="PNG file written by kandinsky22")
    parser.add_argument("--json", action="store_true", help="print the recipe as the JSON that the file contains")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the recipe of an image file.

    Args:
        args: Parsed command line with `image` and `json`.

    Raises:
        InputError: If the file is not an image or contains no readable recipe.
        OSError: If the file cannot be opened.
    """
    recipe = read_recipe(args.image)
    if args.json:
        print(recipe.to_json())
        return
    entries = recipe.summary()
    width = max(len(name) for name, _ in entries)
    for name, value in entries:
        print(f"{name:<{width}}  {value}")
