"""`kandinsky22 compare PROMPT`: one prompt and seed over schedulers, steps and guidance, as a picture and a table."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22 import __version__
from kandinsky22.checkpoints.atomic_files import written_whole
from kandinsky22.cli import generate, options
from kandinsky22.cli.draw import Teller, introduce
from kandinsky22.cli.inputs import Inputs
from kandinsky22.cli.loading import Networks, load_networks, settle
from kandinsky22.cli.pictures import check_writable, save_png
from kandinsky22.cli.recipe import Recipe
from kandinsky22.cli.request import Request, read_request
from kandinsky22.cli.sheets import Sheet, labelled_sheet
from kandinsky22.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULERS, STEPS = "dpm,unipc,ddim,euler-ancestral,ddpm", "2,4,8,25"
CLASSES = "KandinskyV22PriorPipeline", "KandinskyV22Pipeline"
PUBLISHED = "kandinsky-community/kandinsky-2-2-decoder"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="draw one prompt with several samplers, steps and guidance scales, side by side",
        description="Draw one prompt from the same noise over schedulers x steps x guidance: a labelled picture of\n"
        "all, and beside it a .csv with the seconds and the network evaluations of each.",
        epilog='example:\n  kandinsky22 compare "a red circle on a blue background" --steps 4,8,25 -o compare.png',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the pictures show")
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", default=Path("compare.png"), help="a .png (default: compare.png)"
    )
    group.add_argument("--pictures", action="store_true", help="keep each picture too, as a file with its recipe")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes; errors and paths only")
    options.add_grid_options(parser, SCHEDULERS, STEPS)
    options.add_model_options(parser)
    parser.set_defaults(run=run, source=None, count=None)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture of the grid: where it stands, its request and the scheduler that draws it."""

    row: int
    column: int
    request: Request
    scheduler: Any
    path: Path

    @property
    def name(self) -> str:
        """What the command calls the scheduler."""
        own = type(self.scheduler).__name__
        return next(short for short, kind in options.SCHEDULERS.items() if kind == own)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A cell's picture, the seconds from its embedding to its pixels, and how often the network was asked.

    A cell that ended in NaN has `image` None.
    """

    cell: Cell
    image: Image | None
    seconds: float
    evaluations: int


def run(args: argparse.Namespace) -> None:
    """Draw the grid; paths go to stdout, everything else to stderr."""
    say, inputs = Teller(args.quiet), Inputs(None)
    request, table = read_request(args, None, inputs), args.output.with_suffix(".csv")
    check_writable([args.output])
    if table.is_dir():
        raise InputError(f"{table}: is a folder; the table goes there, choose another output with -o")
    introduce(PUBLISHED, request, say)
    networks = load_networks(CLASSES, request)
    for pipe in (networks.prior, networks.decoder):
        pipe.set_progress_bar_config(disable=True)
    request = generate.with_defaults(request, networks)
    cells = _cells(args, request, networks)
    if args.pictures:
        check_writable([cell.path for cell in cells])
    recipe = generate.recipe_of("generate", request, networks)
    settle(networks, request, low_memory=args.low_memory, compiled=args.compile)
    say(f"{len(cells)} pictures, seed {request.seeds[0]}")
    drawn, failed = _draw(networks, request, inputs, cells, say)
    if len(failed) == len(drawn):
        raise failed[0]
    for one in drawn if args.pictures else ():
        if one.image is not None:
            save_png(one.image, one.cell.path, _recipe(recipe, one.cell, one.image).text_entries())
            print(one.cell.path, flush=True)
    save_png(labelled_sheet(_sheet(drawn, recipe)), args.output, _description(drawn, recipe))
    print(args.output, flush=True)
    with written_whole(table) as temporary:
        temporary.write_text(_csv(drawn, args.pictures), encoding="utf-8")
    print(table, flush=True)
    if failed:
        raise generate.NotNumbers(f"{len(failed)} of {len(drawn)} cells are marked NaN; the first: {failed[0]}")


def _cells(args: argparse.Namespace, request: Request, networks: Networks) -> list[Cell]:
    """All cells, one row for each scale and scheduler, one column for each number of steps; raises InputError for what
    a scheduler cannot do, before anything is drawn."""
    from kandinsky22.sampling.presets import make_scheduler

    scales = args.grid_guidance or (request.guidance,)
    pairs = [(scale, name) for scale in scales for name in args.grid_scheduler]
    cells = []
    for row, (scale, name) in enumerate(pairs, start=1):
        for column, steps in enumerate(args.grid_steps, start=1):
            scheduler = make_scheduler(name, networks.decoder.scheduler.config, {})
            scheduler.set_timesteps(steps)
            asked = dataclasses.replace(request, scheduler=name, steps=steps, guidance=scale)
            path = args.output.with_name(f"{args.output.stem}-{row}-{column}.png")
            cells.append(Cell(row, column, asked, scheduler, path))
    return cells


def _draw(
    networks: Networks, request: Request, inputs: Inputs, cells: Sequence[Cell], say: Teller
) -> tuple[list[Drawn], list[generate.NotNumbers]]:
    """All pictures, each as `generate` draws it with the same seed: the prior runs once, and leaves the generator as it
    would before each. And the errors of those that ended in NaN."""
    import torch

    generator = torch.Generator().manual_seed(request.seeds[0])
    embeddings = generate.embed(networks.prior, request, inputs, generator)
    left = generator.get_state()
    decoder = networks.decoder
    drawn: list[Drawn] = []
    failed: list[generate.NotNumbers] = []
    # What is set up at first use, with guidance or without, is not to be counted for the first cell of its kind.
    for cell in {(cell.request.guidance or 0) > 1: cell for cell in reversed(cells)}.values():
        decoder.scheduler = cell.scheduler
        with contextlib.suppress(generate.NotNumbers):
            generate.draw(decoder, dataclasses.replace(cell.request, steps=1), inputs, embeddings, generator)
    for number, cell in enumerate(cells, start=1):
        decoder.scheduler = cell.scheduler
        generator.set_state(left)
        begun = time.perf_counter()
        image = None
        try:
            image = generate.draw(decoder, cell.request, inputs, embeddings, generator)
        except generate.NotNumbers as error:
            failed.append(error)
        seconds = time.perf_counter() - begun
        drawn.append(Drawn(cell, image, seconds, decoder.num_timesteps))
        settings = f"{cell.name}, {_steps(cell)}, guidance {cell.request.guidance:g}"
        say(f"picture {number} of {len(cells)}: {settings}: {seconds:.2f} s{', NaN' if image is None else ''}")
    return drawn, failed


def _recipe(recipe: Recipe, cell: Cell, image: Image) -> Recipe:
    """The recipe with which `generate` draws this cell again."""
    asked, (width, height) = cell.request, image.size
    own: dict[str, Any] = {"scheduler": asked.scheduler, "steps": asked.steps, "guidance": asked.guidance}
    return dataclasses.replace(recipe, seeds=asked.seeds, width=width, height=height, **own)


def _sheet(drawn: Sequence[Drawn], recipe: Recipe) -> Sheet:
    """The grid with its labels."""
    last = drawn[-1].cell
    scales = {one.cell.request.guidance for one in drawn}
    columns = [_steps(one.cell) for one in drawn[: last.column]]
    firsts = drawn[:: last.column]
    rows = [(one.cell.name, f"guidance {one.cell.request.guidance:g}" if len(scales) > 1 else "") for one in firsts]
    notes = [_note(one) for one in drawn]
    about = [f"seed {recipe.seeds[0]}", f"prior {recipe.prior_steps} steps", f"model {recipe.model}"]
    about += [f"guidance {recipe.guidance:g}"] if len(scales) == 1 else []
    about += [f"{name} {value}" for name, value in recipe.sped_up().items()]
    title = recipe.prompt or ""
    if recipe.negative_prompt is not None:
        title += f"\nnot: {recipe.negative_prompt}"
    pictures = [one.image for one in drawn]
    blank = next(image.point(lambda _: 128) for image in pictures if image is not None)
    return Sheet(title, ", ".join(about), columns, rows, [image or blank for image in pictures], notes)


def _steps(cell: Cell) -> str:
    return "1 step" if cell.request.steps == 1 else f"{cell.request.steps} steps"


def _note(one: Drawn) -> str:
    """What a picture took."""
    asked = "" if one.evaluations == one.cell.request.steps else f", {one.evaluations} evaluations"
    return f"{'NaN, ' if one.image is None else ''}{one.seconds:.2f} s{asked}"


def _description(drawn: Sequence[Drawn], recipe: Recipe) -> dict[str, str]:
    """What the grid's file says of itself. It has no recipe: no single one would draw it."""
    lines = [f"{recipe.prompt}, seed {recipe.seeds[0]}, model {recipe.model}, digest {recipe.model_digest}"]
    lines += [f"{name}: {value}" for name, value in recipe.sped_up().items()]
    return {"Description": "\n".join([*lines, _csv(drawn, False)]), "Software": f"kandinsky22 {__version__}"}


def _csv(drawn: Sequence[Drawn], kept: bool) -> str:
    """The table, one line a picture; `file` is empty unless pictures are kept."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scheduler", "steps", "guidance", "seconds", "evaluations", "row", "column", "file"])
    for one in drawn:
        asked, file = one.cell.request, one.cell.path.name if kept and one.image is not None else ""
        cost = [f"{one.seconds:.4f}", one.evaluations, one.cell.row, one.cell.column]
        writer.writerow([asked.scheduler, asked.steps, f"{asked.guidance:g}", *cost, file])
    return text.getvalue()
