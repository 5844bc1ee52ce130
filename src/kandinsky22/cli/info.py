"""`kandinsky22 info picture.png`: the recipe a picture carries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kandinsky22.cli.recipe import read_recipe


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="print how a picture was made",
        epilog="example: kandinsky22 info picture.png",
        allow_abbrev=False,
    )
    parser.add_argument("picture", type=Path, help="a PNG file written by kandinsky22")
    parser.add_argument("--json", action="store_true", help="print the recipe as it is stored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the recipe of `args.picture`."""
    recipe = read_recipe(args.picture)
    if args.json:
        print(recipe.to_json())
        return
    lines = recipe.lines()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
