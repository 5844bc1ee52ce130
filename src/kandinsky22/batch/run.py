"""A run: check all rows, draw what the manifest does not have yet, enter each finished shard."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from kandinsky22 import __version__
from kandinsky22.batch.checks import Report, check_items
from kandinsky22.batch.drawing import DrawOptions, ShardDrawer
from kandinsky22.batch.manifest import FORMAT_FIELD, Manifest, ShardEntry
from kandinsky22.batch.output_checks import check_folder, check_input, has_results
from kandinsky22.batch.ray_run import LOCAL, RayOptions, ShardSource, cluster, draw_on_ray, measure_on_ray
from kandinsky22.batch.requests import RequestOptions, concerns_row
from kandinsky22.batch.run_lock import run_lock
from kandinsky22.batch.shards import ShardWriter
from kandinsky22.batch.sources import Source, absolute_location
from kandinsky22.batch.storage import Folder, LocalFolder, open_folder
from kandinsky22.batch.workers import MakeDraw, WorkerSetup, draw_with_workers, network_draw
from kandinsky22.errors import InputError, KandinskyError, invalid

VERIFY_THREADS = 4  # digests of finished shards that are computed at the same time

Note = Callable[[str], None]
"""Function that shows one line."""


class BadRowsError(InputError):
    """Rows cannot be drawn.

    Attributes:
        report: What is wrong.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(
            f"{report.fault_count} of {report.items} pictures cannot be drawn; correct the rows, or add --skip-bad"
        )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """A run.

    Attributes:
        source: What is drawn.
        output: Path or address of the output folder.
        format: Name of the shards' format.
        shard_size: Pictures per shard.
        batch_size: Number of images that run together; None measures it.
        device: Device of the networks.
        stage: "both", "prior" or "decoder".
        keep_embeddings: Whether embeddings are stored with the pictures.
        previews: Whether each shard has a contact sheet.
        skip_bad: Whether rows that cannot be drawn are left out.
        with_recipes: Whether PNG files contain recipes.
        low_memory: Whether each network is in memory only while it runs.
        compile: Whether the networks' blocks are compiled on first use.
        workers: Number of worker processes; 1 draws in this process.
        ray: Ray cluster of the run; None draws on this machine.
    """

    source: Source
    output: str
    format: str = "files"
    shard_size: int = 100
    batch_size: int | None = None
    device: str = "auto"
    stage: str = "both"
    keep_embeddings: bool = False
    previews: bool = False
    skip_bad: bool = False
    with_recipes: bool = True
    low_memory: bool = False
    compile: bool = False
    workers: int = 1
    ray: RayOptions | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the results, JSON values by name. A run goes on only with equal ones."""
        options = self.source.options
        return {
            "input": self.source.digest(),
            "seed": options.seed,
            "pictures_per_row": options.count,
            "wildcards": options.wildcards,
            "defaults": dict(self.source.defaults),
            "columns": dict(self.source.mapped_columns),
            "format": self.format,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "device": self.device,
            "stage": self.stage,
            "keep_embeddings": self.keep_embeddings,
            "previews": self.previews,
            "skip_bad": self.skip_bad,
            "recipes": self.with_recipes,
            "low_memory": self.low_memory,
            "compile": self.compile,
        }

    def absolute(self) -> RunOptions:
        """Return the options for processes of other machines, whose current folder is another one."""
        return dataclasses.replace(self, source=self.source.absolute(), output=absolute_location(self.output))

    def draw_options(self) -> DrawOptions:
        """Return how shards are drawn, with a batch size of 1 if it is to be measured."""
        return DrawOptions(
            requests=RequestOptions(self.source.defaults, self.source.folder.absolute(), self.device),
            batch_size=self.batch_size or 1,
            stage=self.stage,
            keep_embeddings=self.keep_embeddings,
            skip_bad=self.skip_bad,
            with_recipes=self.with_recipes,
            low_memory=self.low_memory,
            compile=self.compile,
            threads=max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None,
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        pictures: Pictures in the output folder.
        drawn: Pictures that this run has drawn.
        failed: Pictures that are missing.
        seconds: Time that drawing took.
    """

    pictures: int
    drawn: int
    failed: int
    seconds: float


def run_batch(
    options: RunOptions, note: Note, make_draw: MakeDraw = network_draw, *, note_fault: Note | None = None
) -> Summary:
    """Draw every item of a source exactly once. A run that was killed goes on where it was.

    Args:
        options: The run.
        note: Shows progress and notes.
        make_draw: Function that returns the function that draws shards: networks, or what replaces them in tests.
        note_fault: Shows each row that cannot be drawn; None shows it as a note.

    Returns:
        What the run has done.

    Raises:
        BadRowsError: If rows cannot be drawn, and such rows are not skipped.
        InputError: If the input cannot be read or lies where the run writes; if the output folder is in use, cannot be
            written, contains files of another program, or belongs to a run with other settings.
        KandinskyError: If a picture cannot be drawn.
    """
    folder = open_folder(options.output)
    check_input(options.source.location, options.output)
    settings = options.settings()  # reads the input: a missing one leaves no new folder
    folder.create()
    with contextlib.ExitStack() as stack:
        if isinstance(folder, LocalFolder):
            stack.enter_context(run_lock(folder.path))
        folder.remove_temporaries()
        stack.callback(folder.remove_temporaries)
        ray = None if options.ray is None else stack.enter_context(cluster(options.ray))
        manifest = Manifest(folder)
        check_folder(options, folder, manifest)
        if options.ray is not None and options.ray.address != LOCAL:
            options = options.absolute()
        if has_results(options, folder, manifest):
            manifest.check_settings(settings)
        elif not manifest.has_settings(settings):
            manifest.forget_run()
        if manifest.damaged_lines:
            note(f"the manifest has {manifest.damaged_lines} damaged lines; their shards are drawn again")
        draw_options = options.draw_options()
        if manifest.header is None:
            report = _checked(options, draw_options, note, note_fault or note)
            draw = _with_batch_size(options, draw_options, report, note, ray)
            header: dict[str, Any] = {
                "version": __version__,
                "items": report.items,
                "bad": report.fault_count,
                "batch_size": draw.batch_size,
                "batch_pixels": draw.batch_pixels,
                "folder": str(draw.requests.folder),
                "versions": _versions(),
                "settings": settings,
            }
        else:
            _verify(manifest, folder, note)
            header = {name: value for name, value in manifest.header.items() if name != FORMAT_FIELD}
            draw = draw_options.with_batch_size(header["batch_size"], header["batch_pixels"])
            if header["versions"] != (versions := _versions()):
                note(f"warning: the run began with {header['versions']}, and goes on with {versions}")
        manifest.start(header)
        return _draw_missing(options, draw, manifest, note, make_draw, ray)


def _versions() -> dict[str, str]:
    """Return the versions that determine pixels, without importing the packages: a finished run needs none of them."""
    return {"kandinsky22": __version__} | {name: metadata.version(name) for name in ("torch", "tokenizers", "pillow")}


def _checked(options: RunOptions, draw: DrawOptions, note: Note, note_fault: Note) -> Report:
    """Return the report of the check of all rows."""
    columns = options.source.mapped_columns
    seen: set[str] = set()
    items = options.source.items(seen)
    report = check_items(items, draw.requests, lambda fault: note_fault(f"row {fault.row}: {fault.message}"))
    if absent := [column for column in columns if column not in seen]:
        raise invalid("column", ", ".join(absent), "the name of a column that a row has")
    if ignored := sorted(seen - columns.keys()):
        note(f"columns without effect, because --column reads the settings from others: {', '.join(ignored)}")
    if report.dropped_columns:
        note(f"columns without effect, not repeated in the metadata: {', '.join(report.dropped_columns)}")
    if report.unused_columns:
        note(f"columns without effect, repeated in the metadata: {', '.join(report.unused_columns)}")
    if report.wildcard_rows and options.source.options.wildcards is None:
        note(f"{report.wildcard_rows} prompts contain wildcards as plain text; --wildcards expands or samples them")
    if report.fault_count and not options.skip_bad:
        raise BadRowsError(report)
    if report.first is None:
        raise InputError("the input has no row that can be drawn")
    note(f"{report.items} pictures, {report.fault_count} of them cannot be drawn")
    return report


def _with_batch_size(options: RunOptions, draw: DrawOptions, report: Report, note: Note, ray: Any) -> DrawOptions:
    """Return the options with the batch size of the command line, of the cache, or measured now.

    If bad rows are skipped, a row that cannot be drawn leaves the measurement to the next one.
    """
    if options.batch_size is not None or options.stage == "prior":
        return draw.with_batch_size(options.batch_size or 8, None)
    from kandinsky22.batch.batch_sizes import find_batch_size

    for item in report.candidates:
        try:
            measured = find_batch_size(ShardDrawer(draw), item) if ray is None else measure_on_ray(ray, draw, item)
        except KandinskyError as error:
            if not options.skip_bad or not concerns_row(error):
                raise type(error)(f"row {item.row}: {error}") from error
            continue
        note(f"{measured.size} images of {measured.pixels} pixels run together")
        return draw.with_batch_size(measured.size, measured.pixels)
    note("the batch size could not be measured with any of the first rows; images run one by one")
    return draw.with_batch_size(1, None)


def _verify(manifest: Manifest, folder: Folder, note: Note) -> None:
    """Forget shards that are missing or have changed."""
    entries = list(manifest.entries.values())
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        digests = pool.map(lambda entry: None if entry.name is None else folder.digest(entry.name), entries)
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                note(f"shard {entry.name} {'is missing' if digest is None else 'has changed'}; it is drawn again")
                manifest.discard(entry.shard)
    note(f"{len(manifest.entries)} shards are finished")


def _draw_missing(
    options: RunOptions, draw: DrawOptions, manifest: Manifest, note: Note, make_draw: MakeDraw, ray: Any
) -> Summary:
    """Draw the shards that the manifest does not have, and enter each of them when it is on the disk."""
    finished = frozenset(manifest.entries)
    shards = ShardSource(options.source, options.shard_size, finished)
    total = manifest.header["items"] if manifest.header else 0
    pictures = sum(entry.pictures for entry in manifest.entries.values())
    failed = sum(len(entry.failed) for entry in manifest.entries.values())
    started, drawn = time.monotonic(), 0
    with contextlib.closing(_entries(options, draw, shards, make_draw, ray)) as entries:
        for entry in entries:
            manifest.add(entry)
            drawn, pictures, failed = drawn + entry.pictures, pictures + entry.pictures, failed + len(entry.failed)
            rate = drawn / max(1e-9, time.monotonic() - started)
            note(
                f"shard {entry.shard}, {entry.worker}: {entry.pictures / max(1e-9, entry.seconds):.2f} pictures/s; "
                f"{pictures + failed} of {total}, {rate:.2f} pictures/s in total"
            )
    manifest.finish()
    return Summary(pictures, drawn, failed, time.monotonic() - started)


def _entries(
    options: RunOptions, draw: DrawOptions, shards: ShardSource, make_draw: MakeDraw, ray: Any
) -> Generator[ShardEntry, None, None]:
    """Yield the entries of shards as they are finished."""
    writer = ShardWriter(options.output, options.format, options.previews, f"process {os.getpid()}")
    folder, tasks = open_folder(options.output), shards.tasks()
    lock_folder = folder.path if isinstance(folder, LocalFolder) else None
    if options.ray is not None:
        yield from draw_on_ray(ray, options.ray, shards, draw, writer, lock_folder)
        return
    if options.workers > 1:
        yield from draw_with_workers(tasks, WorkerSetup(draw, writer, lock_folder, make_draw), options.workers)
        return
    if make_draw is network_draw:
        drawer = ShardDrawer(draw)
        started = time.monotonic()
        for task, result in drawer.draw_all(tasks):
            yield writer.write(task, result, started)
            started = time.monotonic()
        return
    draw_shard = make_draw(draw)
    for task in tasks:
        started = time.monotonic()
        yield writer.write(task, draw_shard(task), started)
