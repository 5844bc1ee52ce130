"""Options that several subcommands share, in groups, and the readers of their values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kandinsky22.sampling.presets import PRESETS

T = TypeVar("T")

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "unclip": "UnCLIPScheduler",
}
KINDS = ("int8", "int8-dynamic", "int4")  # of small weights
# The largest seed of which a batch of any size still is a seed to torch.
MAX_SEED = 2**63 - 1


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A reader of integers from `lowest` to `highest`."""
    wanted = f"a whole number of at least {lowest}" + (f" and at most {highest}" if highest is not None else "")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return read


def number(wanted: str, lowest: float = -math.inf, highest: float = math.inf) -> Callable[[str], float]:
    """A reader of finite numbers from `lowest` to `highest`, which messages call `wanted`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


scale = number("a number of at least 0", 0)
share = number("a number from 0 to 1", 0, 1)
quantile = number("a number above 0, at most 1", 1e-9, 1)
weight = number("a weight, a number such as 0.5")


def picture_file(text: str) -> Path:
    """Read the path of a picture."""
    if text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is an address; download the picture, for recipes name files")
    if not text:
        raise argparse.ArgumentTypeError("an empty path names no picture")
    return Path(text)


def size(text: str) -> tuple[int, int]:
    """Read WxH, in pixels, as (width, height)."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if match is None or not all(int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, such as 512x768")
    return int(match[1]), int(match[2])


def scheduler(text: str) -> str:
    """Read a scheduler's short or class name as its class name."""
    by_name = {key.lower(): value for short, value in SCHEDULERS.items() for key in (short, value)}
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"unknown scheduler {text!r}; accepted: {', '.join(SCHEDULERS)}")
    return by_name[text.lower()]


def quality(text: str) -> str:
    """Read the name of a preset."""
    if text not in PRESETS:
        raise argparse.ArgumentTypeError(f"unknown quality {text!r}; accepted: {', '.join(PRESETS)}")
    return text


def several(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A reader of one value or several with commas between, each once."""
    return lambda text: tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))


class _ReadInterval(argparse.Action):
    """Reads `START END`, parts of the way of which the second comes after the first."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        start, end = values
        if not start < end:
            raise argparse.ArgumentError(self, f"{start:g} {end:g} is no interval; write START END, such as 0.1 0.6")
        setattr(namespace, self.dest, (start, end))


@dataclasses.dataclass(frozen=True)
class Portion:
    """A text or a picture to be mixed in, with the weight that was given, if any."""

    text: str | None
    image: Path | None
    weight: float | None


class _AddPortion(argparse.Action):
    """Collects `--text TEXT [WEIGHT]` and `--image FILE [WEIGHT]` in the order they are given in."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        item, *weights = values
        if len(weights) > 1:
            raise argparse.ArgumentError(self, f"one value and its weight are accepted, not {values}; quote texts")
        try:
            heavy = weight(weights[0]) if weights else None
            made = Portion(item, None, heavy) if option == "--text" else Portion(None, picture_file(item), heavy)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), made])


def add_prompt(group: Any) -> None:
    """The prompt, as what the command line has beside options."""
    group.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shows")


def add_picture(group: Any, name: str, help: str) -> None:
    """A picture file."""
    group.add_argument(f"--{name}", type=picture_file, metavar="FILE", help=help)


def add_strength(group: Any, help: str) -> None:
    """How far to go from a picture."""
    group.add_argument("--strength", type=share, metavar="X", help=f"{help} (default: the model's own, else 0.3)")


def add_portions(group: Any) -> None:
    """Texts and pictures with their weights."""
    common: dict[str, Any] = {"dest": "parts", "action": _AddPortion, "nargs": "+"}
    group.add_argument("--text", metavar=("TEXT", "WEIGHT"), help="a text and its weight; may be repeated", **common)
    group.add_argument(
        "--image",
        metavar=("FILE", "WEIGHT"),
        help="a picture and its weight; may be repeated. Weights should sum to 1; without any, all are equal",
        **common,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which networks, where, in which precision."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="folder or Hub id of a decoder (default: the embedded model)")
    group.add_argument("--prior", metavar="MODEL", help="folder or Hub id of the prior (default: the model's own)")
    group.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument(
        "--dtype",
        help=(
            "float32, float16, bfloat16, or auto, the fastest that the device computes in (default: float32 on a CPU)"
        ),
    )
    group.add_argument(
        "--low-memory",
        action="store_true",
        help=(
            "keep networks in memory (of the GPU, if one draws) only while they work: slower, the same pictures but "
            "for rounding"
        ),
    )
    group.add_argument(
        "--quantize",
        choices=(*KINDS, "none"),
        help="weights of 8 or 4 bits for the prior and the UNet; changes pictures a little",
    )
    group.add_argument(
        "--cache-every",
        type=whole_number(1),
        metavar="N",
        help="run all of the UNet on every N-th step only, its outermost level on the others; changes pictures",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the networks' blocks when they first run; for GPUs"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What the two stages are asked to do, and by which samplers; defaults are the model's, else the library's."""
    group = parser.add_argument_group("sampling", "Not given, these are the model's own defaults.")
    group.add_argument(
        "--quality",
        type=quality,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: samplers and steps of both stages; other options win",
    )
    group.add_argument("--scheduler", type=scheduler, metavar="NAME", help=f"one of {', '.join(SCHEDULERS)}")
    group.add_argument("--steps", type=whole_number(1), metavar="N", help="decoder steps")
    group.add_argument("--guidance", type=scale, metavar="X", help="decoder guidance scale; up to 1 is none")
    add_common_sampling(group)


def add_grid_options(parser: argparse.ArgumentParser, schedulers: str, steps: str) -> None:
    """The same for a whole grid of samplers, steps and guidance, by default of these schedulers and steps."""
    group = parser.add_argument_group("grid", "One value or several, with commas between.")
    known = f"of {', '.join(SCHEDULERS)} (default: {schedulers})"
    for name, read, default, help in (
        ("scheduler", several(scheduler), schedulers, known),
        ("steps", several(whole_number(1)), steps, f"decoder steps (default: {steps})"),
        ("guidance", several(scale), None, "decoder guidance scales; up to 1 is none (default: the model's own)"),
    ):
        group.add_argument(f"--{name}", type=read, dest=f"grid_{name}", default=default, metavar="A,B,...", help=help)
    add_common_sampling(parser.add_argument_group("sampling", "Not given, these are the model's own defaults."))


def add_common_sampling(group: Any) -> None:
    """What is the same for one picture and for a grid of them."""
    group.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    way = "guide only this part of the way from noise (0) to the picture (1); the rest takes half as long"
    _add_interval(group, "--guidance-interval", way)
    group.add_argument("--guidance-rescale", type=share, metavar="X", help="0 to 1: softens what strong guidance does")
    group.add_argument(
        "--guidance-threshold", type=quantile, metavar="X", help="limits what guidance exaggerates, such as 0.995"
    )
    group.add_argument("--prior-scheduler", type=scheduler, metavar="NAME", help="one of those for --scheduler")
    group.add_argument("--prior-steps", type=whole_number(1), metavar="N", help="prior steps")
    group.add_argument("--prior-guidance", type=scale, metavar="X", help="prior guidance scale; up to 1 is none")
    _add_interval(group, "--prior-guidance-interval", "guide the prior only on this part of its way")
    group.add_argument("--size", type=size, metavar="WxH", help="picture size in pixels")
    group.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), metavar="N", help="of the first picture; 1 more for each next"
    )


def _add_interval(group: Any, name: str, help: str) -> None:
    group.add_argument(name, nargs=2, type=share, action=_ReadInterval, metavar=("START", "END"), help=help)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where pictures go and how much is said on the way."""
    group = parser.add_argument_group("output")
    group.add_argument("-n", type=whole_number(1), dest="count", metavar="N", help="pictures to draw (default: 1)")
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="a .png (default: picture.png)")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes; errors and paths only")
