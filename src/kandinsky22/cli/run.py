"""Run a subcommand that generates images: check the request, load the networks, generate, save with recipes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.console import Console, silenced_libraries
from kandinsky22.cli.modes import Subcommand
from kandinsky22.cli.output_files import OutputFiles, OutputName, check_extension, is_stdout
from kandinsky22.cli.request import output_path, read_request
from kandinsky22.cli.saving import ImageSaver
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.cli.terminal_images import TerminalPreview, image_protocol
from kandinsky22.cli.viewer import open_image_file
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation import stages
from kandinsky22.generation.batching import generate_series
from kandinsky22.generation.canvas import extended_size
from kandinsky22.generation.image_files import (
    EXTENSIONS,
    PNG,
    contact_sheet,
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
INPUTS = ("prompt", "image", "mask", "hint", "parts", "subject", "strength", "keep_pixels", "crop", "extend")


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


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line whose settings and files have been checked. Nothing has been loaded or sent yet.

    Attributes:
        mode: Mode of generation.
        args: Parsed command line.
        request: Its settings.
        inputs: Its input images.
        old_recipe: The recipe that is repeated, or None.
        base_images: Images that the result is generated over, by field of the request.
        files: The output files.
        names: Names of the output files.
        console: Receives notes and warnings.
        preview: Shows images while they are generated; None shows none.
    """

    mode: Mode
    args: argparse.Namespace
    request: Request
    inputs: CommandInputs
    old_recipe: Recipe | None
    base_images: Mapping[str, Image]
    files: OutputFiles
    names: Sequence[OutputName]
    console: Console
    preview: TerminalPreview | None

    @property
    def saver(self) -> ImageSaver:
        """Writer of the images."""
        return ImageSaver.of(self.args, self.files, find_format(output_path(self.args)) or PNG)

    def announce(self, number: int) -> None:
        """Print the seed of an image before it is generated.

        Args:
            number: Number of the image, from 1.
        """
        seeds = self.request.seeds
        start = f"image {number} of {len(seeds)}, " if len(seeds) > 1 else ""
        self.console.note(f"{start}seed {seeds[number - 1]}")


def _run(subcommand: Subcommand, args: argparse.Namespace, console: Console, stdout: TextIO | None) -> None:
    if args.server is None:
        path = _run_here(_check(subcommand, args, console, stdout))
    else:
        from kandinsky22.cli.remote import refuse_local_options, run_on_server

        refuse_local_options(args)
        path = run_on_server(_check(subcommand, args, console, stdout))
    if args.open and path is not None:
        open_image_file(path, console)


def _check(subcommand: Subcommand, args: argparse.Namespace, console: Console, stdout: TextIO | None) -> Command:
    mode, inputs = subcommand.mode, CommandInputs(args.source)
    check_extension(output_path(args), EXTENSIONS)
    _check_report(args)
    old_recipe = _recipe_to_repeat(mode, args)
    drop_ineffective_settings(mode, args)
    size_option = mode.base_images[0] if mode.base_images else None
    request = read_request(args, old_recipe, inputs, size_option=size_option)
    if args.quality is not None and args.steps is None:
        request = mode.with_decoder_step(request)
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
    preview = _preview(args, console)
    return Command(mode, args, request, inputs, old_recipe, base_images, files, names, console, preview)


def _run_here(command: Command) -> Path | None:
    """Generate and save the images in this process, and return the path of the last file."""
    mode, args, request, inputs = command.mode, command.args, command.request, command.inputs
    report_model(mode.published_model, request, command.console)
    networks = load_networks(
        request,
        prior_class=mode.prior_class(request),
        decoder_class=mode.decoder_class(request),
        on_first_use=not (args.low_memory or args.compile),
        used_once=len(request.seeds) == 1 and command.preview is None,  # which decodes after each step
    )
    for pipe in (networks.prior, networks.decoder):
        # None shows progress bars only if stderr is a terminal. A preview has a line of its own.
        pipe.set_progress_bar_config(disable=True if args.quiet or command.preview is not None else None)
    if command.base_images:
        base_size = next(iter(command.base_images.values())).size
        request = _with_size(request, networks.decoder, base_size, command.console)
    request = stages.with_model_defaults(request, networks)
    _report_missing_steps(mode, networks, request, command.console)
    recipe = stages.build_recipe(mode.name, request, networks)
    images = stages.prepare_images(networks.decoder, request, inputs.images)
    saver = command.saver
    saver.check(recipe, request)
    prepare_networks(networks, request, low_memory=args.low_memory, compile=args.compile)
    _report_changes(command, recipe)
    results: list[Image] = []
    path = None
    on_step = None if command.preview is None else _shown_steps(command.preview, networks, request)
    series = generate_series(Job(mode, request, inputs.images, networks, images, recipe), request.seeds, on_step)
    for number, name in enumerate(command.names[: len(request.seeds)], start=1):
        command.announce(number)
        result = next(series)
        if not recipe.model_digest:
            recipe = stages.with_digest(recipe, request, networks)
            _report_changed_weights(command, recipe)
        result_recipe = dataclasses.replace(result.recipe, model_digest=recipe.model_digest)
        if command.preview is not None:
            command.preview.show(result.image, f"seed {request.seeds[number - 1]}")
            command.preview.finish()
        path = saver.save(result.image, name, result_recipe.texts())
        results.append(result.image)
    if len(results) > 1:
        texts = stages.sized_recipe(recipe, request.seeds, results[0], request).texts()
        path = saver.save(contact_sheet(results), SHEET, texts)
    return path


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


def _check_report(args: argparse.Namespace) -> None:
    """Report a contradiction of options that say what is printed and shown."""
    settings = getattr(args, FROM_SETTINGS, ())
    if args.json and is_stdout(output_path(args)):
        args.fail("--json and -o - both write to standard output")
    if args.preview and args.quiet and "quiet" not in settings and "preview" not in settings:
        args.fail("--preview contradicts --quiet")


def _preview(args: argparse.Namespace, console: Console) -> TerminalPreview | None:
    if not args.preview or args.quiet:
        return None
    protocol = image_protocol(os.environ) if sys.stderr.isatty() else None
    if protocol is None:
        console.note("no preview: standard error is not a terminal that shows colours")
        return None
    return TerminalPreview(sys.stderr, protocol)


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


def _shown_steps(preview: TerminalPreview, networks: Networks, request: Request) -> stages.OnStep:
    """Return a callback that shows the first image of each batch after each step of the decoder."""
    from kandinsky22.generation.previews import new_previews

    previews = new_previews(networks.decoder)

    def show(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if pipe is networks.decoder:
            preview.show(previews.image(tensors["latents"][0]), f"step {step + 1} of {pipe.num_timesteps}")

    return show


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


def _report_changes(command: Command, recipe: Recipe) -> None:
    """Warn if a repeated recipe may not give the same image."""
    if command.old_recipe is None:
        return
    if changes := [*_recipe_changes(command.old_recipe, recipe), *command.inputs.changes]:
        message = f"the result may not be bit-identical to {command.args.source}: {'; '.join(changes)}"
        command.console.warn(message)


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
    return [*changes, *_weight_changes(old, new)]


def _weight_changes(old: Recipe, new: Recipe) -> list[str]:
    """Return whether the weights have changed, as far as that is known: they may not be read yet."""
    is_same_model = (old.model, old.prior, old.dtype) == (new.model, new.prior, new.dtype)
    has_changed = is_same_model and new.model_digest not in ("", old.model_digest)
    return [f"the weights of {new.model} have changed"] if has_changed else []


def _report_changed_weights(command: Command, recipe: Recipe) -> None:
    """Warn if the weights that were read for a repeated recipe are other ones."""
    if command.old_recipe is not None:
        for change in _weight_changes(command.old_recipe, recipe):
            command.console.warn(f"the result may not be bit-identical to {command.args.source}: {change}")
