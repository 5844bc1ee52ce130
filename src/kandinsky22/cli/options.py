"""Command-line options that several subcommands share, in groups."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kandinsky22.cli import option_values as values
from kandinsky22.generation.engine_names import ENGINES, TORCH
from kandinsky22.generation.limits import DEFAULT_SUBJECT_WEIGHT, MAX_STEPS
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.sampling.presets import PRESETS

TEXT_SOURCES = "; - reads standard input, @FILE a file, @@ begins a text with @"
# Repeats kandinsky22.runtime.quantize.KINDS: importing that module would import torch.
QUANTIZATION_KINDS = ("int8", "int8-dynamic", "int8-static", "int4")


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
    group.add_argument(f"--{name}", type=values.image_path, metavar="FILE", help=f"{help}; - reads standard input")


def add_strength(group: argparse._ArgumentGroup, help: str) -> None:
    """Add `--strength`, the fraction of the denoising process that runs.

    Args:
        group: Option group of the subcommand.
        help: Help text; the default value is appended.
    """
    group.add_argument(
        "--strength", type=values.fraction, metavar="X", help=f"{help} (default: the model's own, else 0.3)"
    )


def add_mixture(group: argparse._ArgumentGroup) -> None:
    """Add `--text`, `--image` and `--subject` with optional weights, all stored in `args.parts`.

    Args:
        group: Option group of the subcommand.
    """
    common: dict[str, Any] = {"dest": "parts", "action": values.AppendMixtureOption, "nargs": "+"}
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


def add_model_options(parser: argparse.ArgumentParser, *, repeats: bool = True) -> None:
    """Add the options for checkpoints, device, dtype, engine, memory, quantization, feature caching and compilation.

    Args:
        parser: Parser of the subcommand.
        repeats: Whether the subcommand has `--from`, whose recipe "none" overrides.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="folder or Hub id of a decoder (default: the embedded model)")
    group.add_argument(
        "--prior", metavar="MODEL", help="folder or Hub id of a prior (default: the prior that belongs to --model)"
    )
    group.add_argument(
        "--lora",
        type=values.adapter,
        action="append",
        metavar="FILE[:WEIGHT]",
        help=(
            "apply an adapter (LoRA) of the prior, the UNet or both: a file, a folder or a Hub id, and its weight "
            f"(default: 1); can be repeated; {_none_help('those', repeats=repeats)}"
        ),
    )
    group.add_argument(
        "--tiny-decoder",
        type=values.tiny_decoder,
        metavar="FILE_OR_FOLDER",
        help=(
            "decode with a network that kandinsky22 train tiny-decoder wrote, faster and less exactly: its file, its "
            f"folder, or a checkpoint that has it; {_none_help('that', repeats=repeats)}"
        ),
    )
    group.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument(
        "--dtype",
        help=(
            "float32, float16, bfloat16, or auto for the fastest type of the device (default: float16 on CUDA, that of "
            "a prepared model on CPUs, else float32)"
        ),
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        metavar="NAME",
        help=(
            f"what runs prior, UNet and MoVQ: {', '.join(ENGINES)} (default: {TORCH}); --dtype and --quantize int8 are "
            "the engine's precision too"
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
        type=values.integer(1, MAX_STEPS),
        metavar="N",
        help=(
            "feature caching: run the full UNet on every N-th step, and only its outermost resolution level on the "
            "others; changes images"
        ),
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the networks' blocks on first use; intended for GPUs"
    )


def _none_help(pronoun: str, *, repeats: bool) -> str:
    """Return what the value "none" of an option does."""
    origin = "with --from, none leaves out {} of the recipe" if repeats else "none leaves out {} of the settings file"
    return origin.format(pronoun)


def add_sampling_options(
    parser: argparse.ArgumentParser, *, seed_help: str | None = None, seed_default: str | None = None
) -> None:
    """Add the sampling options of both stages for a single setting.

    Args:
        parser: Parser of the subcommand.
        seed_help: Help of `--seed` for a subcommand that takes one seed; None for one that takes several.
        seed_default: Its default for the help; None for a random one.
    """
    group = parser.add_argument_group("sampling", "Options that are not set use the model's own defaults.")
    group.add_argument(
        "--quality",
        type=values.preset_name,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: schedulers and steps of both stages; other options override it",
    )
    group.add_argument(
        "--scheduler", type=values.scheduler_class, metavar="NAME", help=f"decoder scheduler: {', '.join(SCHEDULERS)}"
    )
    group.add_argument("--steps", type=values.integer(1, MAX_STEPS), metavar="N", help="decoder steps")
    group.add_argument(
        "--guidance", type=values.guidance_scale, metavar="X", help="decoder guidance scale; up to 1, guidance is off"
    )
    several = (
        "seed of the noise; several seeds give one image each, and with -n each following image uses the next integer"
    )
    _add_common_sampling_options(
        group,
        several if seed_help is None else seed_help,
        several=seed_help is None,
        seed_default=seed_default,
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
            values.comma_separated(values.scheduler_class),
            schedulers,
            f"decoder schedulers: {', '.join(SCHEDULERS)} (default: {schedulers})",
        ),
        ("steps", values.comma_separated(values.integer(1, MAX_STEPS)), steps, f"decoder steps (default: {steps})"),
        (
            "guidance",
            values.comma_separated(values.guidance_scale),
            None,
            "decoder guidance scales; up to 1, guidance is off (default: the model's own)",
        ),
    ):
        group.add_argument(f"--{name}", type=parse, dest=f"grid_{name}", default=default, metavar="A,B,...", help=help)
    description = "Options that are not set use the model's own defaults."
    _add_common_sampling_options(parser.add_argument_group("sampling", description), "seed of the noise", several=False)


def _add_common_sampling_options(
    group: argparse._ArgumentGroup, seed_help: str, *, several: bool = True, seed_default: str | None = None
) -> None:
    """Add the sampling options that have one value both for a single setting and for a grid."""
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help=f"description of what the image must not show{TEXT_SOURCES}"
    )
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
        type=values.fraction,
        metavar="X",
        help="0 to 1; reduces the contrast and saturation that strong guidance adds",
    )
    group.add_argument(
        "--guidance-threshold",
        type=values.quantile,
        metavar="X",
        help="dynamic thresholding of guided predictions at this quantile, such as 0.995",
    )
    group.add_argument(
        "--prior-scheduler",
        type=values.scheduler_class,
        metavar="NAME",
        help="prior scheduler, a name as for --scheduler",
    )
    group.add_argument("--prior-steps", type=values.integer(1, MAX_STEPS), metavar="N", help="prior steps")
    group.add_argument(
        "--prior-guidance",
        type=values.guidance_scale,
        metavar="X",
        help="prior guidance scale; up to 1, guidance is off",
    )
    _add_interval(group, "--prior-guidance-interval", "guide the prior only in this part of its denoising process")
    group.add_argument("--size", type=values.image_size, metavar="WxH", help="image size in pixels")
    add_seed(group, seed_help, several=several, default=seed_default)


def add_seed(group: argparse._ArgumentGroup, help: str, *, several: bool = True, default: str | None = None) -> None:
    """Add `--seed`, stored as a tuple.

    Args:
        group: Option group of the subcommand.
        help: Help text; the default is appended.
        several: Whether the help shows that several seeds are accepted.
        default: The default for the help; None for a random seed.
    """
    group.add_argument(
        "--seed",
        type=values.seeds,
        metavar="N [N ...]" if several else "N",
        help=f"{help} (default: {'random' if default is None else default})",
    )


def _add_interval(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    group.add_argument(
        name, nargs=2, type=values.fraction, action=values.StoreInterval, metavar=("START", "END"), help=help
    )


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


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that let a running server generate the images.

    Args:
        parser: Parser of the subcommand.
    """
    group = parser.add_argument_group("server", "The images are saved here, as if they had been generated here.")
    group.add_argument(
        "--server", type=values.server_address, metavar="URL", help="let the server at this address generate the images"
    )
    group.add_argument("--token", help="secret of the server; better in the variable KANDINSKY22_TOKEN")
