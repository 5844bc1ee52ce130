"""Command-line options that several subcommands share, in groups, and the functions that parse their values.

The parsing functions raise `argparse.ArgumentTypeError`; argparse puts the option's name before the message.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kandinsky22.errors import describe
from kandinsky22.generation.adapters import split_weight
from kandinsky22.generation.limits import (
    DEFAULT_SUBJECT_WEIGHT,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    SIZE_LIMITS,
    is_allowed_size,
)
from kandinsky22.generation.scheduler_names import SCHEDULERS, find_scheduler_class
from kandinsky22.sampling.presets import PRESETS

T = TypeVar("T")

DEFAULT_CROP_PADDING = 32  # pixels around the mask
TEXT_SOURCES = "; - reads standard input, @FILE a file, @@ begins a text with @"
# Repeats kandinsky22.runtime.quantize.KINDS: importing that module would import torch.
QUANTIZATION_KINDS = ("int8", "int8-dynamic", "int4")


def _invalid(value: object, expected: str, advice: str | None = None) -> argparse.ArgumentTypeError:
    message = f"{describe(value)} is invalid: expected {expected}"
    return argparse.ArgumentTypeError(message if advice is None else f"{message}; {advice}")


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers in a closed range.

    Args:
        lowest: Smallest accepted integer.
        highest: Largest accepted integer; None sets no limit.
    """
    expected = f"an integer of at least {lowest}" + (f" and at most {highest}" if highest is not None else "")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _invalid(text, expected) from None
        if value < lowest or (highest is not None and value > highest):
            raise _invalid(text, expected)
        return value

    return parse


def finite_number(expected: str, lowest: float = -math.inf, highest: float = math.inf) -> Callable[[str], float]:
    """Return a parser of finite numbers in a closed range.

    Args:
        expected: Description of the accepted values for error messages.
        lowest: Smallest accepted number.
        highest: Largest accepted number.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not lowest <= value <= highest:
            raise _invalid(text, expected)
        return value

    return parse


guidance_scale = finite_number("a finite number of at least 0", 0)
fraction = finite_number("a number from 0 to 1", 0, 1)
quantile = finite_number("a number above 0 and at most 1", 1e-9, 1)
mixture_weight = finite_number("a weight, a finite number such as 0.5")


def image_path(text: str) -> Path:
    """Return the path of an image file. The file is opened later.

    Args:
        text: Path in the local file system.

    Raises:
        argparse.ArgumentTypeError: If the path is empty or an http(s) address.
    """
    if text.startswith(("http://", "https://")):
        raise _invalid(text, "the path of a local file", "download the image first, because recipes record files")
    if not text:
        raise _invalid(text, "the path of an image file")
    return Path(text)


def adapter(text: str) -> str:
    """Return the text of an adapter, whose file is found later.

    Args:
        text: FILE, FILE:WEIGHT or "none".

    Raises:
        argparse.ArgumentTypeError: If the name is empty, or the weight is beyond the range of numbers.
    """
    name, weight = split_weight(text)
    if not name.strip() or not math.isfinite(weight):
        raise _invalid(
            text, "a file, a folder or a Hub id, and after a colon its weight, such as style.safetensors:0.8"
        )
    return text


def subject_path(text: str) -> Path:
    """Return the path of the file of a learned subject. The file is read later.

    Args:
        text: Path in the local file system.

    Raises:
        argparse.ArgumentTypeError: If the path is empty.
    """
    if not text:
        raise _invalid(text, "the path of a file that kandinsky22 train subject wrote")
    return Path(text)


def image_size(text: str) -> tuple[int, int]:
    """Return (width, height) in pixels.

    Args:
        text: The size as WIDTHxHEIGHT; both sides are at least 1.

    Raises:
        argparse.ArgumentTypeError: If the text has another form, or if the size is beyond a limit of the command.
    """
    match = re.fullmatch(r"(\d{1,99})[xX](\d{1,99})", text.strip())
    if match is None or not all(int(side) for side in match.groups()):
        raise _invalid(text, "WIDTHxHEIGHT in pixels, such as 512x768")
    width, height = int(match[1]), int(match[2])
    if not is_allowed_size(width, height):
        raise _invalid(text, SIZE_LIMITS)
    return width, height


def scheduler_class(text: str) -> str:
    """Return the class name of a scheduler.

    Args:
        text: Short name or class name, in upper or lower case.

    Raises:
        argparse.ArgumentTypeError: If no scheduler has this name.
    """
    if (class_name := find_scheduler_class(text)) is None:
        raise _invalid(text, f"one of {', '.join(SCHEDULERS)}")
    return class_name


def preset_name(text: str) -> str:
    """Return the name of a preset.

    Args:
        text: Name of the preset.

    Raises:
        argparse.ArgumentTypeError: If no preset has this name.
    """
    if text not in PRESETS:
        raise _invalid(text, f"one of {', '.join(PRESETS)}")
    return text


def comma_separated(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return a parser of one or several values separated by commas; repeated values are dropped.

    Args:
        parse: Parser of a single value.
    """
    return lambda text: tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


class _StoreInterval(argparse.Action):
    """Store ``START END`` as a tuple; START must be smaller than END."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        start, end = values
        if not start < end:
            raise argparse.ArgumentError(
                self, f"{start:g} {end:g} is invalid: expected START END with START < END, such as 0.1 0.6"
            )
        setattr(namespace, self.dest, (start, end))


@dataclasses.dataclass(frozen=True)
class MixtureOption:
    """One `--text`, `--image` or `--subject` option of the subcommand `mix`.

    Attributes:
        weight: Weight on the command line; None if there is none.
        text: Text to mix in, or None.
        image: Path of the image to mix in, or None.
        subject: Path of the learned subject to mix in, or None. Exactly one of the three is set.
    """

    weight: float | None
    text: str | None = None
    image: Path | None = None
    subject: Path | None = None


class _AppendMixtureOption(argparse.Action):
    """Collect ``--text TEXT [WEIGHT]``, ``--image FILE [WEIGHT]`` and ``--subject FILE [WEIGHT]`` in their order."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        content, *weights = values
        if len(weights) > 1:
            raise argparse.ArgumentError(
                self, f"{describe(values)} is invalid: expected one value and its weight; quote texts of several words"
            )
        try:
            weight = mixture_weight(weights[0]) if weights else None
            if option == "--text":
                item = MixtureOption(weight, text=content)
            elif option == "--image":
                item = MixtureOption(weight, image=image_path(content))
            else:
                item = MixtureOption(weight, subject=subject_path(content))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), item])


def seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of one option.

    Args:
        text: Seeds separated by commas, as `join_values` writes them.

    Raises:
        argparse.ArgumentTypeError: If a seed is not an integer in range, or is repeated.
    """
    values = tuple(integer(0, MAX_SEED)(part) for part in text.split(","))
    if len(set(values)) < len(values):
        raise _invalid(text, "different seeds")
    return values


def join_values(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which ``--seed 1 2`` is ``--seed 1,2`` and ``--crop`` has a value.

    argparse would take a prompt that follows such an option as one of its values.

    Args:
        arguments: The command line.
    """
    result: list[str] = []
    follows_seed = needs_value = False
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument == "--":
            return [*result, *arguments[position:]]
        if argument == "--crop" and not following.lstrip("-").isdecimal():
            argument = f"--crop={DEFAULT_CROP_PADDING}"
        if argument == "--seed" or argument.startswith("--seed="):
            follows_seed, needs_value = True, argument == "--seed"
        elif follows_seed and not needs_value and argument.isdecimal():
            result[-1] += f",{argument}"
            continue
        else:
            follows_seed, needs_value = follows_seed and needs_value, False
        result.append(argument)
    return result


def pixel_margins(text: str) -> tuple[int, ...]:
    """Return left, top, right and bottom margin in pixels.

    Args:
        text: The margins, separated by commas.

    Raises:
        argparse.ArgumentTypeError: If the text has another form.
    """
    expected = f"LEFT,TOP,RIGHT,BOTTOM in pixels, each at most {MAX_SIDE}, such as 0,0,256,0"
    if re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*){3}", text) is None:
        raise _invalid(text, expected)
    margins = tuple(int(margin) for margin in text.split(","))
    if max(margins) > MAX_SIDE:
        raise _invalid(text, expected)
    return margins


def add_prompt(group: argparse._ArgumentGroup) -> None:
    """Add the prompt as a positional argument.

    Args:
        group: Option group of the subcommand.
    """
    group.add_argument("prompt", nargs="?", metavar="PROMPT", help=f"description of the image{TEXT_SOURCES}")


def add_subject(group: argparse._ArgumentGroup) -> None:
    """Add `--subject`, a learned subject and its weight.

    Args:
        group: Option group of the subcommand.
    """
    group.add_argument(
        "--subject",
        metavar="FILE[:WEIGHT]",
        help=(
            "a subject that `kandinsky22 train subject` learned, and its weight from 0 to 1 (default: "
            f"{DEFAULT_SUBJECT_WEIGHT:g}); the prompt has the rest of the weight"
        ),
    )


def add_image(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    """Add an option that names an image file.

    Args:
        group: Option group of the subcommand.
        name: Name of the option without dashes.
        help: Help text.
    """
    group.add_argument(f"--{name}", type=image_path, metavar="FILE", help=f"{help}; - reads standard input")


def add_strength(group: argparse._ArgumentGroup, help: str) -> None:
    """Add `--strength`, the fraction of the denoising process that runs.

    Args:
        group: Option group of the subcommand.
        help: Help text; the default value is appended.
    """
    group.add_argument("--strength", type=fraction, metavar="X", help=f"{help} (default: the model's own, else 0.3)")


def add_mixture(group: argparse._ArgumentGroup) -> None:
    """Add `--text`, `--image` and `--subject` with optional weights, all stored in `args.parts`.

    Args:
        group: Option group of the subcommand.
    """
    common: dict[str, Any] = {"dest": "parts", "action": _AppendMixtureOption, "nargs": "+"}
    group.add_argument("--text", metavar=("TEXT", "WEIGHT"), help="a text and its weight; can be repeated", **common)
    group.add_argument(
        "--image",
        metavar=("FILE", "WEIGHT"),
        help="an image and its weight; can be repeated. Weights should sum to 1; without weights, all are equal",
        **common,
    )
    group.add_argument(
        "--subject",
        metavar=("FILE", "WEIGHT"),
        help="a learned subject and its weight; can be repeated: see `kandinsky22 train subject`",
        **common,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for checkpoints, device, dtype, memory, quantization, feature caching and compilation.

    Args:
        parser: Parser of the subcommand.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="folder or Hub id of a decoder (default: the embedded model)")
    group.add_argument(
        "--prior", metavar="MODEL", help="folder or Hub id of a prior (default: the prior that belongs to --model)"
    )
    group.add_argument(
        "--lora",
        type=adapter,
        action="append",
        metavar="FILE[:WEIGHT]",
        help=(
            "apply an adapter (LoRA) of the prior, the UNet or both: a file, a folder or a Hub id, and its weight "
            "(default: 1); can be repeated; with --from, none leaves out those of the recipe"
        ),
    )
    group.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument(
        "--dtype",
        help=(
            "float32, float16, bfloat16, or auto for the fastest type of the device (default: float16 on CUDA, else "
            "float32)"
        ),
    )
    group.add_argument(
        "--low-memory",
        action="store_true",
        help=(
            "hold each network in memory (GPU memory, if a GPU is used) only while it runs: slower, the same images up "
            "to rounding"
        ),
    )
    group.add_argument(
        "--quantize",
        choices=(*QUANTIZATION_KINDS, "none"),
        help="8-bit or 4-bit weights for the prior and the UNet; changes images slightly",
    )
    group.add_argument(
        "--cache-every",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help=(
            "feature caching: run the full UNet on every N-th step, and only its outermost resolution level on the "
            "others; changes images"
        ),
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the networks' blocks on first use; intended for GPUs"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the sampling options of both stages for a single setting.

    Args:
        parser: Parser of the subcommand.
    """
    group = parser.add_argument_group("sampling", "Options that are not set use the model's own defaults.")
    group.add_argument(
        "--quality",
        type=preset_name,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: schedulers and steps of both stages; other options override it",
    )
    group.add_argument(
        "--scheduler", type=scheduler_class, metavar="NAME", help=f"decoder scheduler: {', '.join(SCHEDULERS)}"
    )
    group.add_argument("--steps", type=integer(1, MAX_STEPS), metavar="N", help="decoder steps")
    group.add_argument(
        "--guidance", type=guidance_scale, metavar="X", help="decoder guidance scale; up to 1, guidance is off"
    )
    _add_common_sampling_options(
        group,
        "seed of the noise; several seeds give one image each, and with -n each following image uses the next integer",
    )


def add_grid_options(parser: argparse.ArgumentParser, schedulers: str, steps: str) -> None:
    """Add the sampling options of both stages for a grid of schedulers, steps and guidance scales.

    Args:
        parser: Parser of the subcommand.
        schedulers: Default of `--scheduler`, separated by commas.
        steps: Default of `--steps`, separated by commas.
    """
    group = parser.add_argument_group("grid", "Each option takes one value, or several separated by commas.")
    for name, parse, default, help in (
        (
            "scheduler",
            comma_separated(scheduler_class),
            schedulers,
            f"decoder schedulers: {', '.join(SCHEDULERS)} (default: {schedulers})",
        ),
        ("steps", comma_separated(integer(1, MAX_STEPS)), steps, f"decoder steps (default: {steps})"),
        (
            "guidance",
            comma_separated(guidance_scale),
            None,
            "decoder guidance scales; up to 1, guidance is off (default: the model's own)",
        ),
    ):
        group.add_argument(f"--{name}", type=parse, dest=f"grid_{name}", default=default, metavar="A,B,...", help=help)
    description = "Options that are not set use the model's own defaults."
    _add_common_sampling_options(parser.add_argument_group("sampling", description), "seed of the noise", several=False)


def _add_common_sampling_options(group: argparse._ArgumentGroup, seed_help: str, *, several: bool = True) -> None:
    """Add the sampling options that have one value both for a single setting and for a grid."""
    group.add_argument("--negative-prompt", metavar="TEXT", help="description of what the image must not show")
    group.add_argument(
        "--prompt-weights",
        action=argparse.BooleanOptionalAction,
        help=r"brackets in prompts are weights: (stronger), (words:1.5), [weaker]; \( is a bracket",
    )
    _add_interval(
        group,
        "--guidance-interval",
        "guide only this part of the denoising process (0: pure noise, 1: finished image); the other steps cost half",
    )
    group.add_argument(
        "--guidance-rescale",
        type=fraction,
        metavar="X",
        help="0 to 1; reduces the contrast and saturation that strong guidance adds",
    )
    group.add_argument(
        "--guidance-threshold",
        type=quantile,
        metavar="X",
        help="dynamic thresholding of guided predictions at this quantile, such as 0.995",
    )
    group.add_argument(
        "--prior-scheduler", type=scheduler_class, metavar="NAME", help="prior scheduler, a name as for --scheduler"
    )
    group.add_argument("--prior-steps", type=integer(1, MAX_STEPS), metavar="N", help="prior steps")
    group.add_argument(
        "--prior-guidance", type=guidance_scale, metavar="X", help="prior guidance scale; up to 1, guidance is off"
    )
    _add_interval(group, "--prior-guidance-interval", "guide the prior only in this part of its denoising process")
    group.add_argument("--size", type=image_size, metavar="WxH", help="image size in pixels")
    add_seed(group, seed_help, several=several)


def add_seed(group: argparse._ArgumentGroup, help: str, *, several: bool = True) -> None:
    """Add `--seed`, stored as a tuple.

    Args:
        group: Option group of the subcommand.
        help: Help text; the default is appended.
        several: Whether the help shows that several seeds are accepted.
    """
    group.add_argument("--seed", type=seeds, metavar="N [N ...]" if several else "N", help=f"{help} (default: random)")


def _add_interval(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    group.add_argument(name, nargs=2, type=fraction, action=_StoreInterval, metavar=("START", "END"), help=help)


def add_output_options(group: argparse._ArgumentGroup, default: str, *, stream: bool = True) -> None:
    """Add the options for the output file, its recipe and the messages.

    Args:
        group: Option group of the subcommand.
        default: Description of the default output file.
        stream: Whether the subcommand may write its image to standard output.
    """
    stdout = ", or - for standard output" if stream else ""
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"a .png, .jpg or .webp file{stdout} (default: {default}). If it exists, the new file "
        "is NAME-2, NAME-3, ...",
    )
    group.add_argument("--force", action="store_true", help="replace existing files")
    group.add_argument(
        "--no-recipe", dest="recipe", action="store_false", help="write no recipe and no prompt into the files"
    )
    group.add_argument(
        "--json", action="store_true", help="print a line of JSON per file: path, sha256, seed, size, recipe"
    )
    group.add_argument("--open", action="store_true", help="open the finished image with the viewer of the system")
    group.add_argument(
        "-q", "--quiet", action="store_true", help="print no progress and no notes, only errors and paths"
    )


def server_address(text: str) -> str | None:
    """Return the address of a server, or None for "none", which overrides a setting.

    Args:
        text: The address.

    Raises:
        argparse.ArgumentTypeError: If it is not an http(s) address.
    """
    if text == "none":
        return None
    match = re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./-]*)?", text)
    if match is None or int((match[2] or ":80")[1:]) > 65535:
        raise _invalid(text, "the address of a server such as http://127.0.0.1:7822, or none")
    return text.rstrip("/")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that let a running server generate the images.

    Args:
        parser: Parser of the subcommand.
    """
    group = parser.add_argument_group("server", "The images are saved here, as if they had been generated here.")
    group.add_argument(
        "--server", type=server_address, metavar="URL", help="let the server at this address generate the images"
    )
    group.add_argument("--token", help="secret of the server; better in the variable KANDINSKY22_TOKEN")
