"""Run a subcommand that generates images: check the request, load the networks, generate, save with recipes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.console import Console, print_path, silenced_libraries
from kandinsky22.cli.modes import Subcommand
from kandinsky22.cli.output_files import OutputFiles, OutputName, check_extension, is_stdout
from kandinsky22.cli.request import output_path, read_request
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation import stages
from kandinsky22.generation.batching import generate_series
from kandinsky22.generation.canvas import extended_size
from kandinsky22.generation.image_files import (
    EXTENSIONS,
    PNG,
    ImageFormat,
    check_image,
    contact_sheet,
    contact_sheet_size,
    encode_image,
    find_format,
)
from kandinsky22.generation.input_images import InputImages
from kandinsky22.generation.limits import check_aspect_ratio, check_size
from kandinsky22.generation.loading import Networks, load_networks, prepare_networks
from kandinsky22.generation.modes import MODES, Mode
from kandinsky22.generation.recipe import Recipe, read_recipe
from kandinsky22.generation.request import Request
from kandinsky22.generation.session import Job
from kandinsky22.generation.sizes import check_aspect_ratios, result_size

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET = OutputName("-sheet")
PRIOR_SAMPLING = ("prior_scheduler", "prior_steps", "prior_guidance", "prior_guidance_interval")
# Fields of recipes that only some subcommands have, each as an option of the same name.
INPUTS = ("prompt", "image", "mask", "hint", "parts", "strength", "keep_pixels", "crop", "extend")


def run_mode(subcommand: Subcommand, args: argparse.Namespace) -> None:
    """Generate and save the images of a command line. Paths of finished files go to stdout, everything else to stderr.

    Args:
        subcommand: The subcommand.
        args: Parsed command line.

    Raises:
        KandinskyError: If an input, the output, the model or an option is invalid, or if a result contains NaN.
        OSError: If a file cannot be read or written.
    """
    with contextlib.ExitStack() as stack:
        # Where the process has no standard output, the command has replaced it by the null device.
        console, stdout = Console(quiet=args.quiet), None if sys.__stdout__ is None else sys.stdout
        if args.quiet:
            stack.enter_context(silenced_libraries())
        if is_stdout(output_path(args)):
            # Whatever a library prints must not end up in the image.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        _run(subcommand, args, console, stdout)


def _run(subcommand: Subcommand, args: argparse.Namespace, console: Console, stdout: TextIO | None) -> None:
    mode, inputs = subcommand.mode, CommandInputs(args.source)
    check_extension(output_path(args), EXTENSIONS)
    old_recipe = _recipe_to_repeat(mode, args)
    drop_ineffective_settings(mode, args)
    size_option = mode.base_images[0] if mode.base_images else None
    request = read_request(args, old_recipe, inputs, size_option=size_option)
    subcommand.check(request, args.fail)
    _check_options(args, request)
    base_images = {
        name: inputs.images[record] for name in mode.base_images if (record := getattr(request, name)) is not None
    }
    check_aspect_ratios({f"--{name}": image for name, image in base_images.items()})
    _check_derived_size(mode, request, inputs)
    names = output_names(request.seeds)
    protected = [*inputs.paths, *([] if args.source is None else [args.source])]
    files = OutputFiles(output_path(args), names, force=args.force, inputs=protected, stdout=stdout)
    if not files.is_stream and files.path(names[0]) != output_path(args) and len(names) == 1:
        console.note(f"{output_path(args)} exists; the image will be {files.path(names[0])}; --force replaces files")
    report_model(mode.published_model, request, console)

    networks = load_networks(request, prior_class=mode.prior_class(request), decoder_class=mode.decoder_class(request))
    for pipe in (networks.prior, networks.decoder):
        # None shows progress bars only if stderr is a terminal.
        pipe.set_progress_bar_config(disable=True if args.quiet else None)
    if base_images:
        request = _with_size(request, networks.decoder, next(iter(base_images.values())).size, console)
    request = stages.with_model_defaults(request, networks)
    _report_missing_steps(mode, networks, request, console)
    recipe = stages.build_recipe(mode.name, request, networks)
    images = stages.prepare_images(networks.decoder, request, inputs.images)
    saver = ImageSaver(files, find_format(output_path(args)) or PNG, with_recipes=args.recipe)
    saver.check(recipe, request)
    prepare_networks(networks, request, low_memory=args.low_memory, compile=args.compile)
    if old_recipe is not None and (changes := [*_recipe_changes(old_recipe, recipe), *inputs.changes]):
        console.warn(f"the result may not be bit-identical to {args.source}: {'; '.join(changes)}")

    results = []
    series = generate_series(Job(mode, request, inputs.images, networks, images, recipe), request.seeds)
    for number, (seed, name) in enumerate(zip(request.seeds, names, strict=False), start=1):
        console.note(f"image {number} of {len(request.seeds)}, seed {seed}" if len(names) > 1 else f"seed {seed}")
        result = next(series)
        saver.save(result.image, name, result.recipe.texts())
        results.append(result.image)
    if len(results) > 1:
        saver.save(
            contact_sheet(results), SHEET, stages.sized_recipe(recipe, request.seeds, results[0], request).texts()
        )


# Checks before the networks are loaded


def output_names(seeds: Sequence[int]) -> list[OutputName]:
    """Return the name of each output file: `--output` itself, or one file per seed and a contact sheet.

    Args:
        seeds: Seeds of the images, at least one.
    """
    if len(seeds) == 1:
        return [OutputName()]
    return [*(OutputName(f"-seed{seed}") for seed in seeds), SHEET]


def _recipe_to_repeat(mode: Mode, args: argparse.Namespace) -> Recipe | None:
    source: Path | None = args.source
    if source is None:
        return None
    recipe = read_recipe(source)
    if recipe.command != mode.name:
        if recipe.command not in MODES:
            raise invalid(f"command in the recipe of {source}", recipe.command, "the name of a subcommand")
        # The message is a command to run: nothing in a file's name may be more than an argument.
        advice = shlex.join(["kandinsky22", recipe.command, "--from", str(source)])
        raise InputError(f"{source} was generated by another subcommand; run: {advice}")
    # Inputs that the subcommand lacks cannot come from it: somebody has edited the recipe.
    if foreign := [name for name in INPUTS if getattr(recipe, name) is not None and not hasattr(args, name)]:
        raise InputError(f"the recipe in {source} cannot be read: {mode.name} has no {', '.join(foreign)}")
    return recipe


def drop_ineffective_settings(mode: Mode, args: argparse.Namespace) -> None:
    """Reset options that settings have filled in and that would be an error on this command line.

    Args:
        mode: Mode of the subcommand.
        args: Parsed command line.
    """
    has_text = getattr(args, "prompt", None) is not None or args.negative_prompt is not None
    has_text |= any(item.text is not None for item in getattr(args, "parts", None) or ())
    ineffective = {
        **{field: not has_text and args.source is None for field in PRIOR_SAMPLING},
        **{item.name: getattr(args, item.other) is None and args.source is None for item in mode.dependent},
        "count": args.seed is not None and len(args.seed) > 1,
        "size": getattr(args, "extend", None) is not None and getattr(args, "crop", None) is None,
    }
    for name in getattr(args, FROM_SETTINGS, ()):
        if ineffective.get(name):
            setattr(args, name, None)


def _check_options(args: argparse.Namespace, request: Request) -> None:
    """Report options of the command line that contradict each other or have no effect."""
    options = [f"--{field.replace('_', '-')}" for field in PRIOR_SAMPLING if getattr(args, field) is not None]
    if options and not request.texts():
        args.fail(f"{', '.join(options)} would have no effect: the prior samples only for texts, and there is no text")
    if args.seed is not None and len(args.seed) > 1 and args.count not in (None, len(args.seed)):
        args.fail(f"-n {args.count} contradicts --seed, which has {len(args.seed)} seeds")
    if args.size is not None and request.extend is not None and request.crop is None:
        args.fail("--size would have no effect: --extend sets the size, unless --crop repaints only a part")


def _check_derived_size(mode: Mode, request: Request, inputs: InputImages) -> None:
    """Report an input image whose size or aspect ratio would give the result a size beyond the limits."""
    option = next((name for name in mode.base_images if getattr(request, name) is not None), None)
    if option is None or request.crop is not None:
        return
    size = inputs.images[getattr(request, option)].size
    if request.extend is not None:
        check_size("size with --extend", extended_size(size, request.extend), "add --crop")
    elif request.width is None:
        check_aspect_ratio(f"size of --{option}", size, "crop it, or add --size")


def report_model(published_model: str, request: Request, console: Console) -> None:
    """Print the model in use, and warn about unknown words and unusual mixture weights.

    Args:
        published_model: Hub id of the published weights for the subcommand.
        request: Settings of the command.
        console: Receives the messages.
    """
    if request.model == EMBEDDED:
        from kandinsky22.training.captions import unknown_words

        console.note(f"using the small embedded model; for the published weights add --model {published_model}")
        if words := unknown_words(" ".join(request.texts())):
            console.warn(f"the embedded model was not trained on these words: {', '.join(words)}")
    if request.parts and abs(total := sum(item.weight for item in request.parts)) - 1 > 1e-6:
        console.warn(f"the weights sum to {total:g}; decoders are trained on embeddings that correspond to a sum of 1")


# Steps between loading and generating


def _with_size(request: Request, decoder: Any, base_size: tuple[int, int], console: Console) -> Request:
    """Return the request with the size that is generated for a base image, and print it if it is another one."""
    size = result_size(request, decoder, base_size)
    if request.crop is None and request.extend is None and base_size != size:
        sizes = f"input size {base_size[0]}x{base_size[1]}, output size {size[0]}x{size[1]}"
        console.note(f"{sizes}; --size sets another one")
    return dataclasses.replace(request, width=size[0], height=size[1])


def _report_missing_steps(mode: Mode, networks: Networks, request: Request, console: Console) -> None:
    """Warn if `--strength` leaves no step, before any network runs."""
    pipe, steps = networks.decoder, request.steps
    if request.strength is None or steps is None:
        return
    if "strength" not in stages.call_parameters(pipe):
        pipe, steps = networks.prior, request.prior_steps
    if steps is None or stages.steps_after_strength(pipe, steps, request.strength):
        return
    effect = "the image is only encoded and decoded" if pipe is networks.decoder else "the prompt has no effect"
    console.warn(f"--strength {request.strength:g} leaves no step of {steps}: {effect}")


def _recipe_changes(old: Recipe, new: Recipe) -> list[str]:
    """Return descriptions of what differs from an earlier recipe, other than options."""
    changes = [
        f"{name} was {version}, is {new.versions.get(name, 'missing')}"
        for name, version in old.versions.items()
        if new.versions.get(name) != version
    ]
    if old.batch_size is not None:
        changes.append(f"it was generated in a batch of up to {old.batch_size}")
    if old.hardware != new.hardware:
        changes.append(f"hardware was {old.hardware}, is {new.hardware}")
    is_same_model = (old.model, old.prior, old.dtype) == (new.model, new.prior, new.dtype)
    if is_same_model and old.model_digest != new.model_digest:
        changes.append(f"the weights of {new.model} have changed")
    return changes


# Generating and saving


@dataclasses.dataclass(frozen=True)
class ImageSaver:
    """Writer of images with their recipes.

    Attributes:
        files: The output files.
        format: Format of the files.
        with_recipes: Whether recipes are written into the files.
    """

    files: OutputFiles
    format: ImageFormat
    with_recipes: bool

    def check(self, recipe: Recipe, request: Request) -> None:
        """Raise an error, before any network runs, if the format cannot hold the images or their recipes.

        Args:
            recipe: Recipe of the command.
            request: Settings of the command.

        Raises:
            InputError: If the format has a limit that the images exceed.
        """
        size = (request.width or 1, request.height or 1)
        count = len(request.seeds)
        sheet = dataclasses.replace(recipe, seeds=request.seeds)
        check_image(
            self.format,
            contact_sheet_size(size, count) if count > 1 else size,
            sheet.texts() if self.with_recipes else {},
        )

    def save(self, image: Image, name: OutputName, texts: Mapping[str, str]) -> Path | None:
        """Write an image and print its path.

        Args:
            image: The image.
            name: Name of the file.
            texts: The recipe and other texts, written into the file unless recipes are not wanted.

        Returns:
            Path of the file, or None for standard output.

        Raises:
            InputError: If the file cannot be written.
        """
        path = self.files.write(name, encode_image(image, self.format, texts if self.with_recipes else {}))
        if path is not None:
            print_path(path)
        return path
