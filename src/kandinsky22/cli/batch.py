"""`kandinsky22 batch INPUT -o FOLDER`: draw every row of a file exactly once."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.cli import option_values, options
from kandinsky22.cli.console import Console, print_message, print_path, silenced_libraries
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.input_images import check_text
from kandinsky22.generation.limits import MAX_IMAGES

if TYPE_CHECKING:
    from kandinsky22.batch.sources import Source

# Settings of all rows, as options of the same name.
DEFAULTS = (
    "negative_prompt",
    "quality",
    "scheduler",
    "steps",
    "guidance",
    "prompt_weights",
    "guidance_interval",
    "guidance_rescale",
    "guidance_threshold",
    "prior_scheduler",
    "prior_steps",
    "prior_guidance",
    "prior_guidance_interval",
    "model",
    "prior",
    "dtype",
    "quantize",
    "cache_every",
    "engine",
    "lora",
    "tiny_decoder",
    "strength",
)
FORMATS, INPUT_FORMATS = ("files", "webdataset", "parquet"), ("jsonl", "csv", "parquet", "text")
DEFAULT_SHARD_SIZE, MAX_SHARD_SIZE = 100, 10_000  # those of `kandinsky22.batch.shards`
MAX_BATCH_SIZE, MAX_WORKERS = 1024, 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `batch`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "batch",
        help="draw every row of a file, on one machine or on a cluster",
        description="Draw every row of a file exactly once. A run that was interrupted or killed goes on when the\n"
        "same command is started again.",
        epilog="example:\n  kandinsky22 batch prompts.jsonl -o pictures --quality draft",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_input_options(parser.add_argument_group("input"))
    _add_output_options(parser.add_argument_group("output"))
    _add_run_options(parser.add_argument_group("run"))
    options.add_sampling_options(
        parser,
        seed_help="seed of the run: the seed of a row is a hash of it and of the row's id, unless the row sets one",
        seed_default="0",
    )
    options.add_model_options(parser, repeats=False)
    parser.set_defaults(run=run, fail=parser.error)


def _column(text: str) -> tuple[str, str]:
    setting, separator, column = text.partition("=")
    if not separator or not setting or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected SETTING=COLUMN, such as prompt=caption")
    return column, setting


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "input",
        metavar="INPUT",
        help="a .jsonl, .csv, .parquet or .txt file, or - for standard input; with --stage decoder, the output folder "
        "of an earlier run",
    )
    group.add_argument("--input-format", choices=INPUT_FORMATS, help="format of INPUT (default: by its extension)")
    group.add_argument(
        "--column",
        type=_column,
        action="append",
        default=[],
        metavar="SETTING=COLUMN",
        help="column that a setting is read from, such as prompt=caption; can be repeated",
    )
    group.add_argument(
        "--wildcards",
        choices=("expand", "sample"),
        help="{red|blue} and {1-8} in prompts: draw all combinations, or one at random (default: plain text)",
    )
    group.add_argument(
        "-n", type=option_values.integer(1, MAX_IMAGES), dest="count", default=1, metavar="N", help="pictures per row"
    )
    group.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be drawn")
    options.add_strength(group, "for rows with an image, fraction of the steps that run")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-o", "--output", required=True, metavar="FOLDER", help="output folder, or an address of fsspec")
    group.add_argument("--format", choices=FORMATS, default="files", help="format of the shards (default: files)")
    group.add_argument(
        "--shard-size",
        type=option_values.integer(1, MAX_SHARD_SIZE),
        default=DEFAULT_SHARD_SIZE,
        metavar="N",
        help=f"pictures per shard (default: {DEFAULT_SHARD_SIZE})",
    )
    group.add_argument(
        "--keep-embeddings",
        action="store_true",
        help="store the prior's results, from which --stage decoder draws again",
    )
    group.add_argument("--previews", action="store_true", help="write a contact sheet per shard into previews/")
    group.add_argument("--no-recipe", dest="recipe", action="store_false", help="write no recipes")
    group.add_argument("-q", "--quiet", action="store_true", help="print no progress and no notes, only errors")


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--stage",
        choices=("both", "prior", "decoder"),
        default="both",
        help="run one stage alone: the prior stores embeddings, the decoder reads them from an earlier run's folder",
    )
    group.add_argument(
        "--batch-size",
        type=option_values.integer(1, MAX_BATCH_SIZE),
        metavar="N",
        help="images that run together; 1 gives the bits of the other commands (default: measured once)",
    )
    group.add_argument(
        "--workers",
        type=option_values.integer(1, MAX_WORKERS),
        default=1,
        metavar="N",
        help="worker processes on this machine (default: 1)",
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="draw on a Ray cluster: without ADDRESS on a local one, else on that of ADDRESS, such as auto",
    )
    group.add_argument(
        "--ray-prior-actors",
        type=option_values.integer(1, MAX_WORKERS),
        metavar="N",
        help="with --ray, processes that run the prior (default: 1)",
    )
    group.add_argument(
        "--ray-decoder-actors",
        type=option_values.integer(1, MAX_WORKERS),
        metavar="N",
        help="with --ray, processes that run the decoder (default: one per GPU, or per CPU that is left)",
    )


def run(args: argparse.Namespace) -> None:
    """Draw the rows of a file. The output folder's path goes to stdout, everything else to stderr.

    Args:
        args: Parsed command line.

    Raises:
        KandinskyError: If rows, the output folder, the model or an option is invalid, or if a picture cannot be drawn.
        OSError: If a file cannot be read or written.
    """
    from kandinsky22.batch.ray_run import RayOptions
    from kandinsky22.batch.rows import is_address
    from kandinsky22.batch.run import RunOptions, run_batch

    console = Console(quiet=args.quiet)
    ray = None if args.ray is None else RayOptions(args.ray, args.ray_prior_actors or 1, args.ray_decoder_actors)
    if args.seed is not None and len(args.seed) > 1:
        args.fail("--seed takes one seed, from which the seeds of the rows follow")
    if args.ray is not None and args.workers > 1:
        args.fail("--workers and --ray exclude each other")
    if args.ray not in (None, "local") and args.input == "-":
        args.fail("standard input cannot be read by the machines of a cluster; name a file that all of them have")
    if args.ray is None and (args.ray_prior_actors or args.ray_decoder_actors):
        args.fail("--ray-prior-actors and --ray-decoder-actors require --ray")
    if args.stage == "prior" and args.previews:
        args.fail("--previews requires pictures, which --stage prior does not draw")
    with contextlib.ExitStack() as stack:
        if args.quiet:
            stack.enter_context(silenced_libraries())
        summary = run_batch(
            RunOptions(
                source=stack.enter_context(_source(args)),
                output=args.output,
                format=args.format,
                shard_size=args.shard_size,
                batch_size=args.batch_size,
                device="auto" if args.device is None else args.device,
                stage=args.stage,
                keep_embeddings=args.keep_embeddings,
                previews=args.previews,
                skip_bad=args.skip_bad,
                with_recipes=args.recipe,
                low_memory=args.low_memory,
                compile=args.compile,
                workers=args.workers,
                ray=ray,
            ),
            console.note,
            # Faults that end the run are errors, which --quiet does not hide.
            note_fault=console.note if args.skip_bad else lambda line: print_message(f"kandinsky22: {line}"),
        )
    console.note(
        f"{summary.pictures} pictures, {summary.drawn} of them drawn now in {summary.seconds:.1f} s; "
        f"{summary.failed} could not be drawn"
    )
    print_path(args.output if is_address(args.output) else Path(args.output))


@contextlib.contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    """Yield the source of a command line. Standard input is copied into a temporary file next to the output."""
    from kandinsky22.batch.items import ItemOptions
    from kandinsky22.batch.row_settings import FIELDS
    from kandinsky22.batch.rows import STDIN, RowFile, find_row_format, guess_format, spool
    from kandinsky22.batch.sources import RowSource, StoredSource

    defaults = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.negative_prompt is not None:
        defaults["negative_prompt"] = _negative_prompt(args)
    if args.size is not None:
        defaults["size"] = "x".join(map(str, args.size))
    seed = 0 if args.seed is None else args.seed[0]
    item_options = ItemOptions(_plain(defaults), seed, args.count, args.wildcards)
    if args.stage == "decoder":
        unused = ("input_format", "column", "wildcards", "seed")
        used = [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name)]
        if used := [*used, *(["-n"] if args.count != 1 else [])]:
            raise InputError(f"{', '.join(used)} would have no effect with --stage decoder")
        yield StoredSource(args.input, item_options)
        return
    columns = dict(args.column)
    if unknown := [setting for setting in columns.values() if setting not in FIELDS]:
        raise invalid("--column", ", ".join(unknown), f"one of the settings {', '.join(sorted(FIELDS))}")
    if len(set(columns.values())) < len(args.column):
        raise invalid("--column", args.column, "each setting and each column once")
    if args.input != STDIN:
        yield RowSource(RowFile(args.input, args.input_format or find_row_format(args.input), columns), item_options)
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("standard input is a terminal; name a file, or redirect one to standard input")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="kandinsky22-") as folder:
        path = Path(folder) / "stdin"
        spool(sys.stdin.buffer, path)
        yield RowSource(RowFile(str(path), args.input_format or guess_format(path), columns, Path()), item_options)


def _negative_prompt(args: argparse.Namespace) -> str:
    """Return the text of the option, read from a file or from standard input if it says so."""
    from kandinsky22.batch.rows import STDIN
    from kandinsky22.cli.standard_input import StandardInput

    if args.negative_prompt == args.input == STDIN:
        raise InputError("negative_prompt and input cannot both be read from standard input")
    return check_text("negative_prompt", StandardInput().read_text("negative_prompt", args.negative_prompt))


def _plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
