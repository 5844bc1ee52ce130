"""`kandinsky22 compare PROMPT`: one prompt and seed over schedulers, steps and guidance, as a grid and a table."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22 import __version__
from kandinsky22.cli import options
from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.console import Console, print_path, silenced_libraries
from kandinsky22.cli.output_files import OutputFiles, OutputName, check_extension
from kandinsky22.cli.request import read_request
from kandinsky22.cli.run import report_model
from kandinsky22.cli.saving import ImageSaver, print_json_line
from kandinsky22.cli.sheets import MAX_IMAGE_SIDE, RowLabel, Sheet, render_sheet
from kandinsky22.cli.viewer import open_image_file
from kandinsky22.errors import InputError
from kandinsky22.generation import stages
from kandinsky22.generation.image_files import EXTENSIONS, PNG, check_image, find_format
from kandinsky22.generation.limits import MAX_IMAGES
from kandinsky22.generation.loading import Networks, load_networks, prepare_networks
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.request import Request
from kandinsky22.generation.scheduler_names import SCHEDULERS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from kandinsky22 import KandinskyPriorPipelineOutput

DEFAULT_SCHEDULERS, DEFAULT_STEPS = "dpm,unipc,ddim,euler-ancestral,ddpm", "2,4,8,25"
PRIOR_CLASS, DECODER_CLASS = "KandinskyV22PriorPipeline", "KandinskyV22Pipeline"
MAX_DESCRIBED_CELLS = 200  # in the grid's description; the table has all cells
NO_IMAGES = stages.DecoderImages({})
PUBLISHED_MODEL = "kandinsky-community/kandinsky-2-2-decoder"
TABLE_COLUMNS = ("scheduler", "steps", "guidance", "seconds", "evaluations", "row", "column", "file")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `compare`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "compare",
        help="generate one prompt with several schedulers, steps and guidance scales, side by side",
        description="Generate one prompt from the same noise with all combinations of schedulers, steps and guidance\n"
        "scales: a labelled grid of images, and next to it a .csv table of seconds and UNet evaluations.",
        epilog='example:\n  kandinsky22 compare "a red circle on a blue background" --steps 4,8,25 -o compare.png',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help=f"description of the images{options.TEXT_SOURCES}")
    group = parser.add_argument_group("output")
    options.add_output_options(group, "compare.png", stream=False)
    group.add_argument(
        "--pictures", action="store_true", help="also save each image of the grid as a file with its recipe"
    )
    options.add_grid_options(parser, DEFAULT_SCHEDULERS, DEFAULT_STEPS)
    options.add_model_options(parser, repeats=False)
    parser.set_defaults(run=run, fail=parser.error, source=None, count=None)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of settings.

    Attributes:
        row: Row in the grid, from 1.
        column: Column in the grid, from 1.
        request: Settings of the command with this cell's scheduler, steps and guidance scale.
        scheduler: The scheduler.
    """

    row: int
    column: int
    request: Request
    scheduler: Any

    @property
    def output_name(self) -> OutputName:
        """Name of the file of the cell's image for `--pictures`."""
        return OutputName(f"-{self.row}-{self.column}")

    @property
    def scheduler_name(self) -> str:
        """Short name of the scheduler, as on the command line."""
        class_name = type(self.scheduler).__name__
        return next(short_name for short_name, name in SCHEDULERS.items() if name == class_name)


@dataclasses.dataclass(frozen=True)
class CellResult:
    """Result of one cell.

    Attributes:
        cell: The cell.
        image: The image; None if it contained NaN.
        error: The error if the image contained NaN, else None.
        seconds: Wall-clock time from the embeddings to the image.
        evaluations: Number of UNet evaluations.
    """

    cell: Cell
    image: Image | None
    error: stages.NanError | None
    seconds: float
    evaluations: int


def run(args: argparse.Namespace) -> None:
    """Generate and save the grid and the table. Paths of finished files go to stdout, everything else to stderr.

    Args:
        args: Parsed command line.

    Raises:
        InputError: If the output, the model or an option is invalid, or if a scheduler does not support the steps.
        NanError: If a cell contains NaN; all other files are saved before, unless every cell contains NaN.
        OSError: If a file cannot be read or written.
    """
    with contextlib.ExitStack() as stack:
        if args.quiet:
            stack.enter_context(silenced_libraries())
        _run(args, Console(quiet=args.quiet))


def _run(args: argparse.Namespace, console: Console) -> None:
    inputs = CommandInputs(None)
    if len(args.seed or ()) > 1:
        args.fail("--seed takes one seed here: all images are generated from the same noise")
    count = len(args.grid_guidance or (None,)) * len(args.grid_scheduler) * len(args.grid_steps)
    if count > MAX_IMAGES:
        args.fail(f"{count} combinations of schedulers, steps and guidance scales: expected at most {MAX_IMAGES}")
    output = Path("compare.png") if args.output is None else args.output
    check_extension(output, EXTENSIONS)
    request = read_request(args, None, inputs)
    cell_names = _cell_names(args) if args.pictures else []
    files = OutputFiles(output, [*cell_names, GRID, TABLE], force=args.force, inputs=inputs.paths)
    if not args.force and files.path(GRID) != output:
        console.note(f"{output} or a file with its name exists; the grid will be {files.path(GRID)}")
    report_model(PUBLISHED_MODEL, request, console)

    networks = load_networks(request, prior_class=PRIOR_CLASS, decoder_class=DECODER_CLASS)
    for pipe in (networks.prior, networks.decoder):
        pipe.set_progress_bar_config(disable=True)
    request = stages.with_model_defaults(request, networks)
    cells = _grid_cells(args, request, networks)
    recipe = stages.build_recipe("generate", request, networks)
    saver = ImageSaver.of(args, files, find_format(output) or PNG)
    saver.check(recipe, request)
    check_image(saver.format, _largest_grid_size(cells[-1]), {})
    prepare_networks(networks, request, low_memory=args.low_memory, compile=args.compile)
    console.note(f"{len(cells)} images, seed {request.seeds[0]}")

    results = _generate_cells(networks, request, inputs, cells, console)
    errors = [result.error for result in results if result.error is not None]
    if len(errors) == len(results):
        raise errors[0]
    saved: dict[OutputName, str] = {}
    for result in results if args.pictures else ():
        if result.image is not None:
            cell_recipe = _cell_recipe(recipe, result.cell, result.image)
            path = saver.save(result.image, result.cell.output_name, cell_recipe.texts())
            saved[result.cell.output_name] = "" if path is None else path.name
    sheet = _grid_sheet(results, recipe)
    if not args.recipe:  # which asks for files that do not say what they were generated from
        sheet = dataclasses.replace(sheet, title="", subtitle="")
    grid = saver.save(render_sheet(sheet), GRID, _grid_texts(results, recipe))
    table = _csv_table(results, saved).encode()
    if (path := files.write(TABLE, table)) is not None:
        if args.json:
            print_json_line(path, table)
        else:
            print_path(path)
    if args.open and grid is not None:
        open_image_file(grid, console)
    if errors:
        raise stages.NanError(f"{len(errors)} of {len(results)} cells are marked NaN; the first: {errors[0]}")


def _check_table(path: Path) -> None:
    """Raise an error unless a file is a table of this command, which `--force` may replace."""
    header = ",".join(TABLE_COLUMNS).encode() + b"\n"
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise InputError(f"{path} is not a table of kandinsky22 compare and is not replaced; choose another -o")


GRID, TABLE = OutputName(), OutputName(extension=".csv", check_existing=_check_table)


def _cell_names(args: argparse.Namespace) -> list[OutputName]:
    """Return the names of the files of all cells."""
    row_count = len(args.grid_guidance or (None,)) * len(args.grid_scheduler)
    positions = itertools.product(range(1, row_count + 1), range(1, len(args.grid_steps) + 1))
    return [OutputName(f"-{row}-{column}") for row, column in positions]


def _largest_grid_size(last: Cell) -> tuple[int, int]:
    """Return an upper bound for the (width, height) of the grid: cells with captions, and texts around them."""
    pitch = MAX_IMAGE_SIDE + 150
    return last.column * pitch + 2000, last.row * pitch + 2000


def _grid_cells(args: argparse.Namespace, request: Request, networks: Networks) -> list[Cell]:
    """Return all cells: one row per guidance scale and scheduler, one column per number of steps.

    Raises InputError before any network runs if a scheduler does not support a number of steps.
    """
    from kandinsky22.sampling.presets import make_scheduler

    scales = args.grid_guidance or (request.guidance,)
    row_settings = [(scale, name) for scale in scales for name in args.grid_scheduler]
    cells = []
    for row, (scale, name) in enumerate(row_settings, start=1):
        for column, steps in enumerate(args.grid_steps, start=1):
            scheduler = make_scheduler(name, networks.decoder.scheduler.config, {})
            scheduler.set_timesteps(steps)
            cell_request = dataclasses.replace(request, scheduler=name, steps=steps, guidance=scale)
            cells.append(Cell(row=row, column=column, request=cell_request, scheduler=scheduler))
    return cells


def _generate_cells(
    networks: Networks, request: Request, inputs: CommandInputs, cells: Sequence[Cell], console: Console
) -> list[CellResult]:
    """Return the results of all cells. Each image equals that of `generate` with the same settings and seed.

    The prior runs once. Each cell starts from the generator state that the prior leaves behind.
    """
    import torch

    generator = torch.Generator().manual_seed(request.seeds[0])
    embeddings = stages.run_prior(networks.prior, request, inputs.images, generator)
    state_after_prior = generator.get_state()
    _warm_up(networks, cells, embeddings, generator)
    decoder = networks.decoder
    results: list[CellResult] = []
    for number, cell in enumerate(cells, start=1):
        decoder.scheduler = cell.scheduler
        generator.set_state(state_after_prior)
        image, error = None, None
        start = time.perf_counter()
        try:
            image = stages.run_decoder(decoder, cell.request, NO_IMAGES, embeddings, generator)
        except stages.NanError as nan_error:
            error = nan_error
        seconds = time.perf_counter() - start
        results.append(CellResult(cell, image, error, seconds, evaluations=decoder.num_timesteps))
        settings = f"{cell.scheduler_name}, {_steps_label(cell)}, guidance {cell.request.guidance:g}"
        suffix = ", NaN" if image is None else ""
        console.note(f"image {number} of {len(cells)}: {settings}: {seconds:.2f} s{suffix}")
    return results


def _warm_up(
    networks: Networks,
    cells: Sequence[Cell],
    embeddings: KandinskyPriorPipelineOutput,
    generator: torch.Generator,
) -> None:
    """Run one step with guidance and one without, as far as cells use them: times must not contain one-off set-up."""
    first_cells = {(cell.request.guidance or 0) > 1: cell for cell in reversed(cells)}
    for cell in first_cells.values():
        networks.decoder.scheduler = cell.scheduler
        one_step = dataclasses.replace(cell.request, steps=1)
        with contextlib.suppress(stages.NanError):
            stages.run_decoder(networks.decoder, one_step, NO_IMAGES, embeddings, generator)


def _cell_recipe(recipe: Recipe, cell: Cell, image: Image) -> Recipe:
    """Return the recipe with which `generate` repeats a cell."""
    request = cell.request
    settings: dict[str, Any] = {"scheduler": request.scheduler, "steps": request.steps, "guidance": request.guidance}
    return dataclasses.replace(recipe, seeds=request.seeds, width=image.width, height=image.height, **settings)


def _grid_sheet(results: Sequence[CellResult], recipe: Recipe) -> Sheet:
    """Return the grid with its labels; cells that contained NaN are grey."""
    column_count = results[-1].cell.column
    guidance_scales = {result.cell.request.guidance for result in results}
    subtitle = [f"seed {recipe.seeds[0]}", f"prior {recipe.prior_steps} steps", f"model {recipe.model}"]
    subtitle += [f"guidance {recipe.guidance:g}"] if len(guidance_scales) == 1 else []
    subtitle += [f"adapter {adapter.name} {adapter.weight:g}" for adapter in recipe.lora or ()]
    subtitle += [f"{name} {value}" for name, value in recipe.approximations().items()]
    title = recipe.prompt or ""
    if recipe.negative_prompt is not None:
        title += f"\nnot: {recipe.negative_prompt}"
    grey = next(result.image.point(lambda _: 128) for result in results if result.image is not None)
    return Sheet(
        title=title,
        subtitle=", ".join(subtitle),
        columns=[_steps_label(result.cell) for result in results[:column_count]],
        rows=[
            RowLabel(
                result.cell.scheduler_name,
                f"guidance {result.cell.request.guidance:g}" if len(guidance_scales) > 1 else "",
            )
            for result in results[::column_count]
        ],
        images=[result.image or grey for result in results],
        captions=[_caption(result) for result in results],
    )


def _steps_label(cell: Cell) -> str:
    return "1 step" if cell.request.steps == 1 else f"{cell.request.steps} steps"


def _caption(result: CellResult) -> str:
    """Return the time of a cell, and its number of UNet evaluations if that is not the number of steps."""
    evaluations = "" if result.evaluations == result.cell.request.steps else f", {result.evaluations} evaluations"
    return f"{'NaN, ' if result.image is None else ''}{result.seconds:.2f} s{evaluations}"


def _grid_texts(results: Sequence[CellResult], recipe: Recipe) -> dict[str, str]:
    """Return the texts of the grid's file: a description, because a grid has more than one recipe."""
    lines = [f"{recipe.prompt}, seed {recipe.seeds[0]}, model {recipe.model}, digest {recipe.model_digest}"]
    lines += [f"adapter: {adapter}" for adapter in recipe.lora or ()]
    lines += [f"{name}: {value}" for name, value in recipe.approximations().items()]
    # JPEG files hold 64 kB of texts.
    table = [_csv_table(results, {})] if len(results) <= MAX_DESCRIBED_CELLS else []
    description = "\n".join([*lines, *table])
    return {"Description": description, "Software": f"kandinsky22 {__version__}"}


def _csv_table(results: Sequence[CellResult], files: Mapping[OutputName, str]) -> str:
    """Return the table, one line per cell; the column `file` is empty for images that are not saved."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TABLE_COLUMNS)
    for result in results:
        cell, request = result.cell, result.cell.request
        file = files.get(cell.output_name, "")
        settings = [request.scheduler, request.steps, f"{request.guidance:g}"]
        writer.writerow([*settings, f"{result.seconds:.4f}", result.evaluations, cell.row, cell.column, file])
    return text.getvalue()
