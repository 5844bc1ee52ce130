"""Values of command-line options: functions that parse them, and actions that store them.

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
from kandinsky22.generation.limits import MAX_SEED, MAX_SIDE, SIZE_LIMITS, is_allowed_size
from kandinsky22.generation.scheduler_names import SCHEDULERS, find_scheduler_class
from kandinsky22.sampling.presets import PRESETS

T = TypeVar("T")

DEFAULT_CROP_PADDING = 32  # pixels around the mask


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


def tiny_decoder(text: str) -> str:
    """Return where a tiny decoder is, which is found later.

    Args:
        text: A file, a folder, a Hub id or "none".

    Raises:
        argparse.ArgumentTypeError: If the text is empty.
    """
    if not text.strip():
        raise _invalid(text, "a file, a folder or a Hub id")
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


class StoreInterval(argparse.Action):
    """Store ``START END`` as a tuple; START must be smaller than END."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the interval.

        Args:
            parser: Parser of the subcommand.
            namespace: Receives the value.
            values: Values of the option.
            option: Name of the option on the command line.

        Raises:
            argparse.ArgumentError: If the interval is empty.
        """
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


class AppendMixtureOption(argparse.Action):
    """Collect ``--text TEXT [WEIGHT]``, ``--image FILE [WEIGHT]`` and ``--subject FILE [WEIGHT]`` in their order."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Append the item.

        Args:
            parser: Parser of the subcommand.
            namespace: Receives the value.
            values: Values of the option.
            option: Name of the option on the command line.

        Raises:
            argparse.ArgumentError: If there are too many values, or one is invalid.
        """
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
