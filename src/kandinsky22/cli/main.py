"""The command's front door: the parser with its subcommands, and what becomes of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kandinsky22 import __version__
from kandinsky22.cli import compare, draw, info
from kandinsky22.cli.modes import MODES
from kandinsky22.errors import KandinskyError

FAILED, INTERRUPTED = 1, 130


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, like every other error of the command (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kandinsky22: error: {message} (see: {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each subcommand's `run(args)` is found in `args.run`."""
    parser = Parser(
        prog="kandinsky22", description="Pictures from prompts and pictures with Kandinsky 2.2.", allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=f"kandinsky22 {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for mode in MODES:
        mode.add_parser(subparsers, draw.run)
    compare.add_parser(subparsers)
    info.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code.

    0: done. 1: an error, told in one line. 2: a command line that makes no sense (raised as SystemExit by argparse).
    130: interrupted.
    """
    args = build_parser().parse_args(argv)
    # where torchao is installed, transformers imports it, and it tells of each CUDA library that it cannot load
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        args.run(args)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); point stdout elsewhere so that the exit itself does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except (KandinskyError, OSError, MemoryError) as error:
        return _report(_one_line(error), FAILED)
    except RuntimeError as error:
        # torch's type, named instead of imported: this module must stay light.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _report("out of memory on the device; try a smaller --size, --dtype float16 or --device cpu", FAILED)
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _report(message: str, code: int) -> int:
    print(f"kandinsky22: error: {message}", file=sys.stderr)
    return code
