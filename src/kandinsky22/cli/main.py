"""Entry point of the command `kandinsky22`: argument parser, subcommands and error reporting."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kandinsky22 import __version__
from kandinsky22.cli import compare, info
from kandinsky22.cli.modes import MODES
from kandinsky22.cli.run import run_mode
from kandinsky22.errors import KandinskyError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Argument parser whose usage errors are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        """Print a usage error in one line to stderr and exit with code 2.

        Args:
            message: Description of the error.
        """
        self.exit(EXIT_USAGE, f"kandinsky22: error: {message} (see: {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; it stores each subcommand's function ``run(args)`` in `args.run`."""
    parser: argparse.ArgumentParser = Parser(
        prog="kandinsky22",
        description="Generate images from prompts and images with Kandinsky 2.2.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"kandinsky22 {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for mode in MODES:
        mode.add_parser(subparsers, run_mode)
    compare.add_parser(subparsers)
    info.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: Arguments without the program name; None reads those of the process.

    Returns:
        0 for success, 1 for an error (reported in one line on stderr), 130 for an interrupt. argparse exits with code 2
        for an invalid command line.
    """
    args = build_parser().parse_args(argv)
    _hide_import_warnings_of_torchao()
    try:
        args.run(args)
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`). The interpreter flushes stdout at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except KeyboardInterrupt:
        return _report("interrupted", EXIT_INTERRUPTED)
    except (KandinskyError, OSError, MemoryError) as error:
        return _report(_one_line(error), EXIT_ERROR)
    except RuntimeError as error:
        # torch's exception class is compared by name, because this module must not import torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _report("out of memory on the device; try a smaller --size, --dtype float16 or --device cpu", EXIT_ERROR)
    return EXIT_OK


def _hide_import_warnings_of_torchao() -> None:
    """Set the log level of torchao and of torch's pytree module to ERROR for the rest of the process.

    transformers imports torchao where it is installed. During that import, torchao logs a warning for each CUDA library
    that it cannot load, and pytree logs one for each Enum class that torchao registers. Users of the command can do
    nothing about either. The library itself never calls this function.
    """
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _report(message: str, exit_code: int) -> int:
    print(f"kandinsky22: error: {message}", file=sys.stderr)
    return exit_code
