"""`kandinsky22 train`: adapters, whole networks, subjects, fast networks and tiny decoders."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky22.cli.console import Console, print_path, silenced_libraries
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.errors import InputError
from kandinsky22.training.finetuning.effects import TINY_DECODER_LACKS
from kandinsky22.training.finetuning.option import IneffectiveOptionError, Option
from kandinsky22.training.finetuning.options import (
    DistillOptions,
    SubjectOptions,
    TinyDecoderOptions,
    TrainingOptions,
    read_config,
)

Run = Callable[[Any, Callable[[str], None] | None], list[Path]]
"""Function that trains: (options, receiver of lines of text or None) -> the results."""


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Attributes:
        name: Name of the subcommand.
        summary: Line in the list of subcommands.
        description: Sentences at the top of the help.
        example: Arguments of the example at the end of the help.
        options: Class of the options.
        run: Function that trains.
        without: Groups of options, and names of options, that have no effect.
    """

    name: str
    summary: str
    description: str
    example: str
    options: type[TrainingOptions]
    run: Run
    without: tuple[str, ...] = ()

    def has(self, option: Option) -> bool:
        """Return whether an option has an effect.

        Args:
            option: One of `options`.
        """
        return option.group not in self.without and option.name not in self.without


def _finetune(kind: str) -> Run:
    def run(options: Any, report: Callable[[str], None] | None) -> list[Path]:
        from kandinsky22.training.finetuning.finetune import finetune

        return finetune(options, kind, report)

    return run


def _subject(options: Any, report: Callable[[str], None] | None) -> list[Path]:
    from kandinsky22.training.finetuning.subject import train_subject

    return train_subject(options, report)


def _distill(options: Any, report: Callable[[str], None] | None) -> list[Path]:
    from kandinsky22.training.finetuning.distill import distill

    return distill(options, report)


def _tiny_decoder(options: Any, report: Callable[[str], None] | None) -> list[Path]:
    from kandinsky22.training.finetuning.tiny_decoder import train_tiny_decoder

    return train_tiny_decoder(options, report)


# A further kind is one more entry.
KINDS = (
    Kind(
        "lora",
        "train adapters (LoRA) of the decoder, the prior or both",
        "Train low-rank adapters and write pytorch_lora_weights.safetensors to the output folder.",
        "--train-data-dir pictures --max-train-steps 500 --output-dir style",
        TrainingOptions,
        _finetune("lora"),
    ),
    Kind(
        "full",
        "train all weights of the decoder, the prior or both",
        "Train all weights and write complete pipelines to the folders decoder and prior of the output folder.",
        "--train-data-dir pictures --learning-rate 1e-5 --output-dir model",
        TrainingOptions,
        _finetune("full"),
        without=("LoRA",),
    ),
    Kind(
        "subject",
        "learn a subject from 3 to 5 pictures",
        "Learn one image embedding (subject.safetensors), or with --method dreambooth adapters of the decoder.",
        "--train-data-dir my-cat --output-dir my-cat-subject",
        SubjectOptions,
        _subject,
    ),
    Kind(
        "distill",
        "make the decoder, the prior or both draw in 2 to 4 steps",
        "Train adapters, or with --full all weights, with which LCMScheduler draws in 2 to 4 steps without guidance.",
        "--prompts prompts.txt --stage both --output-dir fast",
        DistillOptions,
        _distill,
        without=("objective",),
    ),
    Kind(
        "tiny-decoder",
        "train a small decoder that stands in for MoVQ's",
        "Train a small network to decode latents as MoVQ does, and write it to the folder tiny_decoder of the output "
        "folder, for --tiny-decoder.",
        "--train-data-dir pictures --output-dir tiny",
        TinyDecoderOptions,
        _tiny_decoder,
        without=TINY_DECODER_LACKS,
    ),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `train` with its kinds.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    summary = "train adapters, networks, subjects or tiny decoders on pictures"
    parser = subparsers.add_parser("train", help=summary, allow_abbrev=False)
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    for kind in KINDS:
        _add_kind(kinds, kind)


def _add_kind(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], kind: Kind) -> None:
    parser = subparsers.add_parser(
        kind.name,
        help=kind.summary,
        description=kind.description,
        epilog=f"example: kandinsky22 train {kind.name} {kind.example}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options by name; the command line wins"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors and the path of the result")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in kind.options.options():
        if not kind.has(option):
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add_option(groups[option.group], option)
    parser.set_defaults(run=lambda args: run(args, kind), fail=parser.error)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option. One that is left out is absent from the namespace, so that a config file may set it."""
    help_text = option.help
    if option.default_text and option.default is not False:
        help_text += f" (default: {option.default_text})"
    help_text = help_text.replace("%", "%%")
    arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text}
    if option.kind is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **arguments)
    elif option.repeatable:
        group.add_argument(option.flag, nargs="+", action="extend", metavar="TEXT", **arguments)
    elif option.choices:
        group.add_argument(option.flag, choices=option.choices, **arguments)
    elif option.name == "resume":  # alone, it is the latest checkpoint
        group.add_argument(option.flag, nargs="?", const="latest", metavar="CHECKPOINT", **arguments)
    else:
        kind = {int: "N", float: "X", str: "TEXT"}[option.kind]
        if option.name.endswith("_dir"):
            kind = "PATH"
        group.add_argument(option.flag, type=_parser(option), metavar=kind, **arguments)


def _parser(option: Option) -> Callable[[str], Any]:
    """Return the function that converts a text of the command line."""

    def parse(text: str) -> Any:
        try:
            return option.checked(text if option.kind is str else option.kind(text))
        except InputError as error:
            message = str(error).partition("=")[2] or str(error)
            raise argparse.ArgumentTypeError(message) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected {option.expected}") from None

    return parse


def run(args: argparse.Namespace, kind: Kind) -> None:
    """Train, and print the paths of the results on stdout.

    Settings without effect are left out. Options of the command line and of the YAML file without effect are refused.

    Args:
        args: Parsed command line.
        kind: The kind of training.

    Raises:
        InputError: An option or the data set is invalid.
        CheckpointError: A file is missing, damaged or cannot be written.
        MissingDependencyError: A package is not installed.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    values = {} if args.config is None else read_config(args.config)
    if args.config is not None and (ineffective := [name for name in values if _is_without(kind, name)]):
        raise InputError(f"--config {args.config}: train {kind.name} has no option {', '.join(ineffective)}")
    names = {option.name for option in kind.options.options()}
    set_options = {name: value for name, value in vars(args).items() if name in names}
    from_settings = {name: set_options.pop(name) for name in getattr(args, FROM_SETTINGS, ()) if name in set_options}
    values |= set_options
    with contextlib.ExitStack() as stack:
        if args.quiet:
            stack.enter_context(silenced_libraries())
        for path in _train(kind, values, from_settings, args):
            print_path(path)


def _train(
    kind: Kind, values: Mapping[str, Any], from_settings: Mapping[str, Any], args: argparse.Namespace
) -> list[Path]:
    """Train with options, and with those settings that have an effect."""
    settings = dict(from_settings)
    while True:
        try:
            options = kind.options.from_mapping({**settings, **values}, f"--config {args.config}")
            return kind.run(options, None if args.quiet else Console(quiet=False).note)
        except IneffectiveOptionError as error:  # before anything is trained
            if error.name in values or error.name not in settings:
                raise
            del settings[error.name]


def _is_without(kind: Kind, name: str) -> bool:
    return any(option.name == name and not kind.has(option) for option in kind.options.options())
