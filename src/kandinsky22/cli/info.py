"""`kandinsky22 info IMAGE`: print the recipe that an image file contains."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kandinsky22.errors import printable
from kandinsky22.generation.recipe import read_recipe


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
    parser.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP file written by kandinsky22")
    parser.add_argument("--json", action="store_true", help="print the recipe as the JSON that the file contains")
    parser.set_defaults(run=run, needs_no_torch=True)


def run(args: argparse.Namespace) -> None:
    """Print the recipe of an image file.

    Args:
        args: Parsed command line with `image` and `json`.

    Raises:
        InputError: If the file cannot be opened, is not an image or contains no readable recipe.
    """
    recipe = read_recipe(args.image)
    if args.json:
        print(_printable_json(recipe.to_json()))
        return
    entries = recipe.summary()
    width = max(len(name) for name, _ in entries)
    for name, value in entries:
        line_breaks_escaped = value.replace("\r", "\\r").replace("\n", "\\n")
        print(f"{name:<{width}}  {printable(line_breaks_escaped)}")


def _printable_json(text: str) -> str:
    """Return equal JSON, with escapes for characters that control terminals or that stdout's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def is_safe(character: str) -> bool:
        return character.isprintable() and character.encode(encoding, "ignore") != b""

    return "".join(character if is_safe(character) else json.dumps(character)[1:-1] for character in text)
