"""Sources of a run: a file of rows, or the output folder of a run that has stored embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kandinsky22.batch.formats import FORMATS, read_shard, shard_digest
from kandinsky22.batch.items import Item, ItemOptions, read_items
from kandinsky22.batch.manifest import MANIFEST, Manifest
from kandinsky22.batch.requests import NO_ADAPTER, strength_concerns_prior
from kandinsky22.batch.rows import RowFile, is_address
from kandinsky22.batch.samples import Sample, StoredEmbedding
from kandinsky22.batch.shards import ShardTask, split_into_shards
from kandinsky22.batch.storage import open_folder
from kandinsky22.errors import InputError, describe, invalid
from kandinsky22.generation.adapters import split_weight
from kandinsky22.generation.engine_names import TORCH

# Settings that have had their effect when embeddings are stored.
PRIOR_SETTINGS = (
    "quality",
    "negative_prompt",
    "prompt_weights",
    "prior",
    "prior_scheduler",
    "prior_steps",
    "prior_guidance",
    "prior_guidance_interval",
)
# Settings of both stages of which a recipe has one value, and the value that stands for none.
SHARED_SETTINGS: Mapping[str, Any] = {"lora": [NO_ADAPTER], "quantize": "none", "engine": TORCH}


def absolute_location(location: str) -> str:
    """Return a path that does not depend on the current folder, or an address as it is.

    Args:
        location: The path or address.
    """
    return location if is_address(location) else str(Path(location).absolute())


def _absolute_adapter(text: str) -> str:
    return str(Path(text).absolute()) if Path(split_weight(text)[0]).exists() else text


def _comparable(value: Any, absent: Any) -> Any:
    """Return a setting of a command: None if it is the one that stands for none, adapters by their absolute paths."""
    if value == absent:
        return None
    return [_absolute_adapter(text) for text in value] if isinstance(value, list) else value


def _absolute_options(options: ItemOptions) -> ItemOptions:
    """Return options whose models and adapters are absolute where they are paths: Hub ids stay."""
    defaults = dict(options.defaults)
    for name in ("model", "prior"):
        if name in defaults and Path(defaults[name]).is_dir():
            defaults[name] = absolute_location(defaults[name])
    if "lora" in defaults:
        defaults["lora"] = [_absolute_adapter(text) for text in defaults["lora"]]
    if "tiny_decoder" in defaults and Path(defaults["tiny_decoder"]).exists():
        defaults["tiny_decoder"] = absolute_location(defaults["tiny_decoder"])
    return dataclasses.replace(options, defaults=defaults)


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Rows of a file.

    Attributes:
        file: The file.
        options: How rows become items.
    """

    file: RowFile
    options: ItemOptions

    @property
    def location(self) -> str:
        """Path or address of the input."""
        return self.file.path

    @property
    def folder(self) -> Path:
        """Folder that relative paths of images start from."""
        return self.file.folder

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of all rows that do not set them."""
        return self.options.defaults

    @property
    def mapped_columns(self) -> Mapping[str, str]:
        """Names of settings by name of the column that they are read from."""
        return self.file.columns

    def absolute(self) -> RowSource:
        """Return the source with paths that do not depend on the current folder."""
        file = dataclasses.replace(
            self.file, path=absolute_location(self.file.path), image_folder=self.folder.absolute()
        )
        return dataclasses.replace(self, file=file, options=_absolute_options(self.options))

    def digest(self) -> str:
        """Return the SHA-256 of the input."""
        return self.file.digest()

    def items(self, columns_seen: set[str] | None = None) -> Iterator[Item]:
        """Yield the items.

        Args:
            columns_seen: Receives the names of the columns that rows have, as the file has them; None keeps none.
        """
        return read_items(self.file.rows(columns_seen), self.options)

    def tasks(self, size: int, skip: Callable[[int], bool]) -> Iterator[ShardTask]:
        """Yield the shards.

        Args:
            size: Number of items per shard.
            skip: Function that returns whether the shard of a number is left out.
        """
        return split_into_shards(self.items(), size, skip)


@dataclasses.dataclass(frozen=True)
class StoredSource:
    """Embeddings that another run has stored.

    Attributes:
        location: Output folder of the other run.
        options: Its defaults are those of the new run, which replace those of the other run.
    """

    location: str
    options: ItemOptions

    @property
    def folder(self) -> Path:
        """Folder that relative paths of images start from: that of the other run's input."""
        return Path(self._header()["folder"])

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of all rows that do not set them: those of the other run, replaced by those of this one.

        Raises:
            InputError: If a setting concerns the prior.
        """
        self._check_late_settings()
        return {**self._header()["settings"]["defaults"], **self.options.defaults}

    @property
    def mapped_columns(self) -> Mapping[str, str]:
        """Names of settings by name of the column that they are read from: none."""
        return {}

    def absolute(self) -> StoredSource:
        """Return the source with paths that do not depend on the current folder."""
        return StoredSource(absolute_location(self.location), _absolute_options(self.options))

    def _check_late_settings(self) -> None:
        if late := [name for name in PRIOR_SETTINGS if name in self.options.defaults]:
            raise InputError(f"{', '.join(late)} would have no effect: the prior has run already")
        for name, absent in SHARED_SETTINGS.items():
            if (value := self.options.defaults.get(name)) is None:
                continue
            before = self._header()["settings"]["defaults"].get(name, absent)
            if _comparable(value, absent) != _comparable(before, absent):
                expected = f"{describe(before)}, with which the prior has run: recipes have one value for both"
                raise invalid(name, value, expected)

    def _header(self) -> Mapping[str, Any]:
        header = self._manifest().header
        if header is None:
            raise InputError(f"{self.location} is not the output folder of a batch: it has no {MANIFEST}")
        return header

    def _manifest(self) -> Manifest:
        return Manifest(open_folder(self.location))

    def digest(self) -> str:
        """Return the SHA-256 of all shards' digests.

        Raises:
            InputError: If the other run is not finished.
        """
        self._check_late_settings()
        manifest = self._manifest()
        pictures = sum(entry.pictures + len(entry.failed) for entry in manifest.entries.values())
        if pictures != self._header()["items"]:
            raise InputError(f"{self.location} holds {pictures} of {self._header()['items']} pictures; finish that run")
        digests = [f"{shard} {manifest.entries[shard].sha256}\n" for shard in sorted(manifest.entries)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def items(self, columns_seen: set[str] | None = None) -> Iterator[Item]:
        """Yield the items.

        Args:
            columns_seen: Stays as it is: stored items have no columns that another name can be given to.
        """
        for item, _ in self._stored():
            yield item

    def tasks(self, size: int, skip: Callable[[int], bool]) -> Iterator[ShardTask]:
        """Yield the shards, with their embeddings.

        Args:
            size: Number of items per shard.
            skip: Function that returns whether the shard of a number is left out.
        """
        window: dict[int, StoredEmbedding] = {}

        def items() -> Iterator[Item]:
            for item, embedding in self._stored():
                if not skip(item.index // size):
                    window[item.index] = embedding
                yield item

        for task in split_into_shards(items(), size, skip):
            own = {item.index: window.pop(item.index) for item in task.items}
            yield dataclasses.replace(task, embeddings=own)

    def _stored(self) -> Iterator[tuple[Item, StoredEmbedding]]:
        manifest, folder = self._manifest(), open_folder(self.location)
        format = FORMATS[self._header()["settings"]["format"]]
        index = 0
        defaults = self.defaults
        for shard in sorted(manifest.entries):
            entry = manifest.entries[shard]
            if entry.name is None:
                continue
            with folder.local_copy(entry.name) as path:
                if not path.exists() or shard_digest(path) != entry.sha256:
                    raise InputError(
                        f"shard {entry.name} of {self.location} is missing or has changed; repeat that run"
                    )
                for sample in read_shard(format, path):
                    yield self._item(index, sample, defaults)
                    index += 1

    def _item(self, index: int, sample: Sample, defaults: Mapping[str, Any]) -> tuple[Item, StoredEmbedding]:
        if sample.embedding is None:
            raise InputError(f"{self.location} has no embeddings: draw it with --keep-embeddings or --stage prior")
        values = sample.metadata
        item = Item(
            index,
            values["row"],
            values["id"],
            values["seed"],
            values["settings"],
            values["columns"],
            fault=self._late_strength(values["settings"], defaults),
        )
        return item, sample.embedding

    def _late_strength(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
        """Return a fault if the strength of the command concerns the prior of a row, which has run; None if not."""
        strength = self.options.defaults.get("strength")
        if strength is None or "strength" in settings or not strength_concerns_prior(settings, defaults):
            return None
        return f"strength={strength} would have no effect: in this row it concerns the prior, which has run already"


Source = RowSource | StoredSource
