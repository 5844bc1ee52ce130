"""Adapters of a request: found, recorded with their digests, and applied to the networks."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import DISTILLED, EMBEDDED_ADAPTER
from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.generation.recipe import AppliedAdapter

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class FoundAdapter:
    """An adapter whose files were found.

    Attributes:
        record: What the recipe records of it.
        location: The file, folder or Hub id that it is read from.
        paths: Its files.
        change: Message about a file that differs from the recipe's record; None if it does not.
        steps: Number of steps that a distilled adapter was made for; None if it does not say, and for others.
    """

    record: AppliedAdapter
    location: str
    paths: tuple[Path, ...]
    change: str | None = None
    steps: int | None = None


def split_weight(text: str) -> tuple[str, float]:
    """Return name and weight of an adapter.

    Args:
        text: NAME or NAME:WEIGHT. The colons of drive letters and of names that exist belong to the name.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or len(name) < 2 or not NUMBER.fullmatch(weight) or os.path.lexists(text):
        return text, 1.0
    return name, float(weight)


def find_adapter(name: str, weight: float) -> FoundAdapter:
    """Return an adapter that the user names.

    Args:
        name: A file, a folder or a Hub id.
        weight: Its weight.

    Raises:
        CheckpointError: If there is no such adapter.
    """
    return _found(AppliedAdapter(name, "", weight), name)


def find_distilled_adapter(model: str, location: str) -> FoundAdapter:
    """Return the adapter in a checkpoint's folder `distilled`, with which it samples in a few unguided steps.

    Args:
        model: Name of the checkpoint, which the recipe records.
        location: Its folder or Hub id, or "embedded".

    Raises:
        CheckpointError: If the checkpoint does not exist or has no such adapter.
    """
    from kandinsky22.adapters.files import distilled_steps, find_distilled_files

    path = find_distilled_files(location)[0]
    found = _found(AppliedAdapter(f"{model}/{DISTILLED}", "", 1.0), f"{location}/{DISTILLED}")
    return dataclasses.replace(found, steps=distilled_steps(path))


def distilled_record(adapters: Iterable[AppliedAdapter] | None, model: str) -> AppliedAdapter | None:
    """Return the distilled adapter of a model among the adapters of a recipe, or None.

    Its name is "MODEL/distilled".

    Args:
        adapters: Adapters of the recipe; None for none.
        model: Model of the recipe.
    """
    return next((adapter for adapter in adapters or () if adapter.name == f"{model}/{DISTILLED}"), None)


def adapter_fields(found: Sequence[FoundAdapter]) -> dict[str, Any]:
    """Return the fields of `Request` that stand for adapters.

    Args:
        found: The adapters.
    """
    return {
        "lora": tuple(adapter.record for adapter in found) or None,
        "lora_locations": tuple(adapter.location for adapter in found) or None,
    }


def find_recorded_adapter(record: AppliedAdapter, recipe_source: Path | None) -> FoundAdapter:
    """Return an adapter that a recipe names, from a file with the recorded digest wherever there is one.

    It is searched at its recorded path, then relative to the folder of the image whose recipe is repeated.

    Args:
        record: The recipe's record.
        recipe_source: The image whose recipe is repeated; None for a recipe without image.

    Raises:
        InputError: If the file is missing.
        CheckpointError: If it cannot be read.
    """
    existing = existing_locations(record.name, recipe_source)
    try:
        found = [_found(record, name) for name in existing or [record.name]]
    except CheckpointError as error:
        if existing:
            raise
        other = "--quality" if record.name.endswith(f"/{DISTILLED}") else "one with --lora"
        raise InputError(
            f"{recipe_source} was generated with the adapter {record.name}, which is missing ({error}); restore it, or "
            f"pass another {other}"
        ) from error
    current = next((each for each in found if each.record.sha256 == record.sha256), found[0])
    if current.record.sha256 == record.sha256:
        return current
    return dataclasses.replace(current, change=f"the adapter {current.location} has changed")


def existing_locations(name: str, recipe_source: Path | None) -> list[str]:
    """Return where a file or folder that a recipe names may be: its path, then next to the image of the recipe.

    Args:
        name: The recorded path.
        recipe_source: The image whose recipe is repeated; None for a recipe without image.

    Returns:
        Those that exist.
    """
    if name == EMBEDDED_ADAPTER:
        return []
    folder = Path() if recipe_source is None else recipe_source.parent
    recorded = Path(name)
    candidates = dict.fromkeys(map(str, (recorded, folder / recorded, folder / recorded.name)))
    return [candidate for candidate in candidates if os.path.exists(candidate)]


def _found(record: AppliedAdapter, location: str) -> FoundAdapter:
    from kandinsky22.adapters.files import file_digest, find_adapter_files

    paths = find_adapter_files(location)
    digests = [file_digest(path) for path in paths]
    # the files of one adapter in several shards have one digest, that of their digests
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return FoundAdapter(dataclasses.replace(record, sha256=digest), location, tuple(paths))


def apply_adapters(
    pipe: Any, adapters: tuple[AppliedAdapter, ...], locations: tuple[str, ...], *, permanently: bool
) -> None:
    """Apply adapters to the networks of a pipeline.

    Args:
        pipe: Pipeline of prior and decoder.
        adapters: The adapters.
        locations: The file, folder or Hub id of each.
        permanently: Whether they become part of the weights, which can be quantized then.

    Raises:
        CheckpointError: If one does not fit the networks.
        InputError: If a network cannot take one.
    """
    names = [f"adapter {number}" for number in range(1, len(adapters) + 1)]
    for name, location in zip(names, locations, strict=True):
        pipe.load_lora_weights(location, adapter_name=name)
    pipe.set_adapters(names, [adapter.weight for adapter in adapters])
    if permanently:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
