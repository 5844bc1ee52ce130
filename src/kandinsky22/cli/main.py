"""Entry point of the command `kandinsky22`: argument parser, subcommands and error reporting."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kandinsky22 import __version__
from kandinsky22.cli import batch, compare, completion, configuration, hint, info, models, serve, train
from kandinsky22.cli.console import print_message, safe_messages
from kandinsky22.cli.failures import check_address_space, failure_message
from kandinsky22.cli.modes import SUBCOMMANDS
from kandinsky22.cli.option_values import join_values
from kandinsky22.cli.run import run_mode
from kandinsky22.cli.settings import IGNORES_SETTINGS, options_of, parse_command_line, subcommands_of, variables
from kandinsky22.cli.settings_file import settings_path
from kandinsky22.errors import KandinskyError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Argument parser whose usage errors are one line, like every other error of the command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line in which options with several values may stand before the prompt.

        Args:
            args: Arguments without the program name; None reads those of the process.
            namespace: Object that receives the values; None creates one.

        Returns:
            The namespace, and the list of arguments that were not recognised.
        """
        return super().parse_known_args(join_values(sys.argv[1:] if args is None else args), namespace)

    def format_help(self) -> str:
        """Return the help, with a section about where the defaults of options come from."""
        keys = list(options_of(self))
        if keys and not subcommands_of(self) and not self.get_default(IGNORES_SETTINGS):
            path = self.prog.split()[1:]
            key = next((known for known in ("steps", "json") if known in keys), keys[-1])
            own, common = variables(path, key)
            text = (
                f"Options that are not on the command line take their values from the environment ({own} or\n"
                f"{common} for --{key}), then from the settings file ({_shortened(settings_path())}:\n"
                f"section [{'.'.join(path)}], or its top for all subcommands). See: kandinsky22 config --help"
            )
            if not any(group.title == "defaults" for group in self._action_groups):
                self.add_argument_group("defaults", text)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print a usage error in one line to stderr and exit with code 2.

        Args:
            message: Description of the error.
        """
        print_message(f"kandinsky22: error: {message} (see: {self.prog} --help)")
        self.exit(EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; it stores each subcommand's function ``run(args)`` in `args.run`."""
    parser: argparse.ArgumentParser = Parser(
        prog="kandinsky22",
        description="Generate images from prompts and images with Kandinsky 2.2.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"kandinsky22 {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers, run_mode)
    batch.add_parser(subparsers)
    compare.add_parser(subparsers)
    hint.add_parser(subparsers)
    info.add_parser(subparsers)
    train.add_parser(subparsers)
    models.add_parser(subparsers)
    serve.add_parser(subparsers)
    configuration.add_parser(subparsers, build_parser)
    completion.add_parser(subparsers, build_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: Arguments without the program name; None reads those of the process.

    Returns:
        0 for success, 1 for an error (reported in one line on stderr), 130 for an interrupt. argparse exits with code 2
        for an invalid command line.
    """
    with safe_messages():
        try:
            args = parse_command_line(build_parser(), sys.argv[1:] if argv is None else argv)
        except KandinskyError as error:  # in the settings
            return _report(str(error), EXIT_ERROR)
        _hide_import_warnings_of_torchao()
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run a subcommand and return the exit code."""
    try:
        if not getattr(args, "needs_no_torch", False):
            check_address_space()
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`). The interpreter flushes stdout at exit, which must not fail again.
        _discard_stdout()
        return EXIT_ERROR
    except KeyboardInterrupt:
        return _report("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if (message := failure_message(error)) is None:
            raise
        _discard_stdout()  # if it cannot be written to (a full disk), the flush at exit must not fail again
        return _report(message, EXIT_ERROR)
    return EXIT_OK


def _discard_stdout() -> None:
    """Redirect stdout to the null device if it cannot be written to."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _hide_import_warnings_of_torchao() -> None:
    """Set the log level of torchao and of torch's pytree module to ERROR for the rest of the process.

    transformers imports torchao where it is installed. During that import, torchao logs a warning for each CUDA library
    that it cannot load, and pytree logs one for each Enum class that torchao registers. Users of the command can do
    nothing about either. The library itself never calls this function.
    """
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _report(message: str, exit_code: int) -> int:
    print_message(f"kandinsky22: error: {message}")
    return exit_code


def _shortened(path: Path) -> str:
    """Return a path for display, with ~ for the user's folder."""
    home = os.path.expanduser("~")
    return f"~{str(path)[len(home) :]}" if home and str(path).startswith(home + os.sep) else str(path)
