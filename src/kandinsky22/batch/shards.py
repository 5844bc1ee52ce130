"""Shards: consecutive items of a run that are drawn, stored and entered in the manifest together."""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kandinsky22.batch.formats import FORMATS, POSITION_DIGITS, shard_digest
from kandinsky22.batch.items import Item
from kandinsky22.batch.manifest import ShardEntry
from kandinsky22.batch.samples import Sample, StoredEmbedding
from kandinsky22.batch.storage import Folder, open_folder

DEFAULT_SHARD_SIZE = 100
MAX_SHARD_SIZE = 10_000  # positions in a shard have four digits, as in the archives of img2dataset
PREVIEWS, PREVIEW_SIDE = "previews", 128


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard to be drawn.

    Attributes:
        number: Number of the shard, from 0.
        items: Its items.
        embeddings: Stored embeddings by position of the item in the run, if the prior has run already.
    """

    number: int
    items: tuple[Item, ...]
    embeddings: Mapping[int, StoredEmbedding] = dataclasses.field(default_factory=dict)

    def key(self, item: Item) -> str:
        """Return the name of an item's sample: number of the shard and position in it.

        Args:
            item: One of the items.
        """
        return f"{self.number:05d}{item.index - self.items[0].index:0{POSITION_DIGITS}d}"


@dataclasses.dataclass(frozen=True)
class DrawnShard:
    """Pictures of a shard.

    Attributes:
        samples: The pictures in the order of the items.
        failed: Missing pictures, and why they are missing, by name of the sample.
    """

    samples: tuple[Sample, ...]
    failed: Mapping[str, str]


DrawShard = Callable[[ShardTask], DrawnShard]
"""Function that draws a shard: networks, or what replaces them in tests."""


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writer of finished shards.

    Attributes:
        output: Path or address of the output folder.
        format: Name of the shards' format.
        previews: Whether each shard has a contact sheet.
        worker: Name of this process in the manifest.
    """

    output: str
    format: str
    previews: bool
    worker: str

    def write(self, task: ShardTask, drawn: DrawnShard, started: float) -> ShardEntry:
        """Write a shard.

        Args:
            task: The shard.
            drawn: Its pictures.
            started: `time.monotonic()` when drawing began.

        Returns:
            The shard's entry for the manifest.

        Raises:
            InputError: If it cannot be written.
        """
        folder, format = open_folder(self.output), FORMATS[self.format]
        name = digest = None
        if drawn.samples:
            if self.previews and any(sample.image for sample in drawn.samples):
                self._write_preview(folder, task, drawn.samples)
            name = format.shard_name(task.number)
            with folder.writing(name) as path:
                format.write(drawn.samples, path)
                digest = shard_digest(path)
        return ShardEntry(
            shard=task.number,
            name=name,
            sha256=digest,
            pictures=len(drawn.samples),
            failed=dict(drawn.failed),
            seconds=round(time.monotonic() - started, 3),
            worker=self.worker,
        )

    def _write_preview(self, folder: Folder, task: ShardTask, samples: Sequence[Sample]) -> None:
        from PIL import Image

        from kandinsky22.generation.image_files import contact_sheet

        cells = []
        for sample in samples:
            cell = Image.new("RGB", (PREVIEW_SIDE, PREVIEW_SIDE), "white")
            if sample.image is not None:
                with Image.open(io.BytesIO(sample.image)) as image:
                    image.thumbnail(cell.size)
                    cell.paste(image, ((PREVIEW_SIDE - image.width) // 2, (PREVIEW_SIDE - image.height) // 2))
            cells.append(cell)
        with folder.writing(f"{PREVIEWS}/{task.number:05d}.jpg") as path:
            contact_sheet(cells).save(path, format="JPEG", quality=85)


def split_into_shards(items: Iterable[Item], size: int, skip: Callable[[int], bool]) -> Iterator[ShardTask]:
    """Yield the shards of a run. Only one of them is in memory.

    Args:
        items: The items in their order.
        size: Number of items per shard.
        skip: Function that returns whether the shard of a number is left out.
    """
    for number, group in itertools.groupby(items, key=lambda item: item.index // size):
        if skip(number):
            for _ in group:
                pass
            continue
        yield ShardTask(number, tuple(group))


def json_value(value: Any) -> Any:
    """Return a value of a row as JSON has it; objects of other libraries become texts.

    Args:
        value: The value.
    """
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
