"""`kandinsky22 completion SHELL`: print a script that completes subcommands, options and file names."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from kandinsky22.cli.option_values import image_path
from kandinsky22.cli.settings import IGNORES_SETTINGS, leaf_parsers
from kandinsky22.errors import MissingDependencyError

SHELLS = ("bash", "zsh", "fish")
FILE_TYPES = (Path, image_path)
FILE_METAVARS = ("FILE", "FOLDER", "MODEL", "IMAGE")


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], build: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add the subcommand `completion`.

    Args:
        subparsers: Subcommands of the command's parser.
        build: Function that returns the parser of the whole command line.
    """
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes command lines in a shell",
        description="Print a script that completes command lines in a shell.",
        epilog="examples:\n"
        '  eval "$(kandinsky22 completion bash)"                     # in ~/.bashrc\n'
        "  kandinsky22 completion zsh > ~/.zfunc/_kandinsky22        # a folder of $fpath\n"
        "  kandinsky22 completion fish > ~/.config/fish/completions/kandinsky22.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(run=lambda args: run(args, build()), needs_no_torch=True, **{IGNORES_SETTINGS: True})


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the script.

    Args:
        args: Parsed command line with `shell`.
        parser: Parser of the whole command line.

    Raises:
        MissingDependencyError: If shtab is not installed.
    """
    if importlib.util.find_spec("shtab") is None:
        raise MissingDependencyError(
            "completion needs shtab, which is not installed: pip install 'kandinsky22[completion]'"
        )
    import shtab

    for _, leaf in leaf_parsers(parser):
        for action in leaf._actions:
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
            if action.type in FILE_TYPES or any(name in FILE_METAVARS for name in names):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab
    print(shtab.complete(parser, shell=args.shell), end="")
