"""Requests from items: modes, presets, sizes and opened images, checked before any network runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.batch.items import Item
from kandinsky22.batch.row_settings import Part, RowSettings, parse_settings
from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.errors import DeadlockError, ForkError, InputError, KandinskyError, MissingDependencyError, invalid
from kandinsky22.generation.adapters import (
    FoundAdapter,
    adapter_fields,
    find_adapter,
    find_distilled_adapter,
    split_weight,
)
from kandinsky22.generation.canvas import extended_size
from kandinsky22.generation.engine_names import TORCH
from kandinsky22.generation.input_images import SUBJECT, InputImages
from kandinsky22.generation.limits import DEFAULT_SUBJECT_WEIGHT, check_aspect_ratio, check_size
from kandinsky22.generation.model_settings import check_model_settings
from kandinsky22.generation.modes import MODES, Mode
from kandinsky22.generation.recipe import InputFile, MixtureItem
from kandinsky22.generation.request import Request, preset_settings
from kandinsky22.generation.scheduler_names import SCHEDULERS, find_scheduler_class
from kandinsky22.generation.sizes import check_aspect_ratios
from kandinsky22.generation.tiny_decoders import NO_TINY_DECODER, FoundTinyDecoder, find_tiny_decoder
from kandinsky22.sampling.presets import PRESETS

NO_ADAPTER = "none"  # value of lora that leaves out the defaults' adapters
IMAGES = ("image", "mask", "hint")
# Settings that only some modes have.
MODE_SETTINGS = ("prompt", "image", "mask", "hint", "parts", "subject", "strength", "keep_pixels", "crop", "extend")
# Fields of Request that rows set under the same name.
SAME_NAMES = (
    "prompt",
    "negative_prompt",
    "strength",
    "keep_pixels",
    "crop",
    "prior",
    "dtype",
    "steps",
    "prior_steps",
    "guidance",
    "prior_guidance",
    "guidance_interval",
    "guidance_rescale",
    "guidance_threshold",
    "prior_guidance_interval",
)


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """A checked row.

    Attributes:
        mode: Mode of the request.
        request: The request, with the seed of the row.
        inputs: The opened input images.
    """

    mode: Mode
    request: Request
    inputs: InputImages


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """What all requests of a run share.

    Attributes:
        defaults: Settings of all rows that do not set them.
        folder: Folder that relative paths of images start from.
        device: Device of the run.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    device: str = "auto"


def concerns_row(error: KandinskyError) -> bool:
    """Return whether an error is a fault of the row that was drawn: other rows may be drawn, and this one never.

    A missing package and locks of this process concern the machine. Another run may draw the same row.

    Args:
        error: The error.
    """
    return not isinstance(error, MissingDependencyError | ForkError | DeadlockError)


def build_request(item: Item, options: RequestOptions) -> RowRequest:
    """Return the request of an item. Images are opened and decoded, no network is loaded.

    Args:
        item: The item.
        options: What all requests of the run share.

    Raises:
        InputError: If the row has a fault, a setting is invalid, or an image cannot be read.
        CheckpointError: If an adapter is missing, or if a file of a learned subject is damaged.
        KandinskyError: If another thing of this row cannot be used, see `concerns_row`.
    """
    if item.fault is not None:
        raise InputError(item.fault)
    row = parse_settings({**_effective_defaults(options.defaults, item.settings), **item.settings})
    mode = _mode(row, item.settings)
    row = _without_ineffective_defaults(row, mode, item.settings)
    model = EMBEDDED if row.model is None else row.model
    for name, location in (("model", model), ("prior", row.prior)):
        _check_location(name, location)
    distilled = _distilled(row, model)
    values = _sampling_values(row, distilled)
    inputs = InputImages()
    images: dict[str, Any] = {name: _open(inputs, name, getattr(row, name), options.folder) for name in IMAGES}
    width, height = _size(row)
    request = Request(
        **images,
        **values,
        **_adapters(row, options.folder, distilled),
        **_tiny_decoder(row, options.folder),
        seeds=(item.seed,),
        parts=None if row.parts is None else _mixture(row.parts, inputs, options.folder),
        subject=None if row.subject is None else _subject(row.subject, inputs, options.folder),
        extend=row.extend if any(row.extend or ()) else None,
        model=model,
        model_location=model,
        prior_location=row.prior,
        device=options.device,
        width=width,
        height=height,
        prompt_weights=row.prompt_weights or None,
        quantize=None if row.quantize == "none" else row.quantize,
        cache_every=None if row.cache_every == 1 else row.cache_every,
        engine=None if row.engine == TORCH else row.engine,
    )
    if row.quality is not None and row.steps is None:
        request = mode.with_decoder_step(request)
    check_model_settings(request)
    _check(mode, request, inputs)
    return RowRequest(mode, request, inputs)


def _check_location(name: str, location: str | None) -> None:
    """Raise an error if a location of a model is neither a folder nor a Hub id, which has a slash."""
    if location is None or location == EMBEDDED or os.path.isdir(location):
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", location) or location.startswith((".", "~")):
        raise invalid(name, location, f"{EMBEDDED!r}, the path of a folder, or a Hub id")


def _effective_defaults(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults, without those that a setting of the row replaces under another name."""
    replaced = {"size"} if {"width", "height"} & settings.keys() else set()
    return {name: value for name, value in defaults.items() if name not in replaced}


def _without_ineffective_defaults(row: RowSettings, mode: Mode, settings: Mapping[str, Any]) -> RowSettings:
    """Return a row without defaults that concern other modes, or that require a setting which the row does not have."""
    unmet = {pair.name for pair in mode.dependent if getattr(row, pair.other) is None}
    ignored = [name for name in MODE_SETTINGS if name not in settings and (name not in mode.inputs or name in unmet)]
    return dataclasses.replace(row, **dict.fromkeys(ignored))


def _mode(row: RowSettings, settings: Mapping[str, Any]) -> Mode:
    """Return the mode of a row, which its inputs imply unless it names one."""
    name = row.mode
    if name is None:
        if row.hint is not None:
            name = "control"
        elif row.mask is not None or any(row.extend or ()):
            name = "inpaint"
        elif row.parts is not None:
            name = "mix"
        elif row.image is not None:
            name = "variations" if row.prompt is None else "img2img"
        else:
            name = "generate"
    if name not in MODES:
        raise invalid("mode", name, f"one of {', '.join(MODES)}")
    mode = MODES[name]
    if foreign := [field for field in MODE_SETTINGS if field in settings and field not in mode.inputs]:
        raise InputError(f"{', '.join(foreign)} would have no effect: mode {name} has {', '.join(mode.inputs)}")
    return mode


def strength_concerns_prior(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether a row's strength is that of the prior, which starts from the image's embedding.

    Args:
        settings: Settings of the row.
        defaults: Settings of all rows that do not set them.

    Returns:
        False also for rows that cannot be drawn.
    """
    try:
        row = parse_settings({**defaults, **settings})
        mode = _mode(row, settings)
    except InputError:
        return False
    return "strength" in mode.inputs and "image" not in mode.base_images and row.prompt is not None


def _sampling_values(row: RowSettings, distilled: FoundAdapter | None) -> dict[str, Any]:
    """Return fields of Request: the row's own ones, else those of its preset."""
    steps = None if distilled is None else distilled.steps
    preset = {} if row.quality is None else preset_settings(row.quality, steps)
    values = {name: getattr(row, name) for name in SAME_NAMES}
    values |= {name: preset.get(name) for name, value in values.items() if value is None}
    for name in ("scheduler", "prior_scheduler"):
        text = getattr(row, name)
        class_name = None if text is None else find_scheduler_class(text)
        if text is not None and class_name is None:
            raise invalid(name, text, f"one of {', '.join(SCHEDULERS)}")
        values[name] = preset.get(name) if class_name is None else class_name
        # Scheduler settings belong to one scheduler class.
        values[f"{name}_settings"] = preset.get(f"{name}_settings") if class_name is None else None
    return values


def _size(row: RowSettings) -> tuple[int | None, int | None]:
    if row.size is not None:
        match = re.fullmatch(r"\s*(\d{1,9})[xX](\d{1,9})\s*", row.size)
        if match is None:
            raise invalid("size", row.size, "WIDTHxHEIGHT in pixels, such as 512x768")
        return check_size("size", (int(match[1]), int(match[2])))
    if (row.width is None) != (row.height is None):
        raise InputError(f"width={row.width} and height={row.height} are invalid: expected both or none")
    if row.width is not None and row.height is not None:
        return check_size("size", (row.width, row.height))
    return None, None


def _open(inputs: InputImages, name: str, path: str | None, folder: Path) -> InputFile | None:
    if path is None:
        return None
    if not path or "://" in path:
        raise invalid(name, path, "the path of a local file")
    try:
        return inputs.open(name, folder / path)
    except OSError as error:
        raise InputError(f"{name}={path!r} cannot be read: {error.strerror or error}") from error


def _mixture(parts: tuple[Part, ...], inputs: InputImages, folder: Path) -> tuple[MixtureItem, ...]:
    unweighted = [part.weight is None for part in parts]
    if any(unweighted) and not all(unweighted):
        raise InputError("only some of the parts have a weight; give a weight to each of them or to none")
    return tuple(
        MixtureItem(
            weight=1 / len(parts) if part.weight is None else part.weight,
            text=part.text,
            image=_open(inputs, "image", part.image, folder),
            subject=_open(inputs, SUBJECT, part.subject, folder),
        )
        for part in parts
    )


def _subject(text: str, inputs: InputImages, folder: Path) -> MixtureItem:
    name, weight = split_weight(text)
    weight = DEFAULT_SUBJECT_WEIGHT if name == text else weight
    if not 0 <= weight <= 1:
        raise invalid(SUBJECT, text, "a file, or FILE:WEIGHT with a weight from 0 to 1")
    return MixtureItem(weight, subject=_open(inputs, SUBJECT, name, folder))


def _distilled(row: RowSettings, model: str) -> FoundAdapter | None:
    """Return the distilled adapter of the model if the row's preset has it."""
    if row.quality is None:
        return None
    if row.quality not in PRESETS:
        raise invalid("quality", row.quality, f"one of {', '.join(PRESETS)}")
    return _find_distilled_adapter(model) if PRESETS[row.quality].distilled else None


def _adapters(row: RowSettings, folder: Path, distilled: FoundAdapter | None) -> dict[str, Any]:
    """Return the fields of Request that stand for the row's adapters, whose files are read once per process."""
    texts = () if row.lora in (None, (NO_ADAPTER,)) else row.lora or ()
    own = [] if distilled is None else [distilled]
    return adapter_fields([*own, *(_find_adapter(text, str(folder)) for text in texts)])


@functools.lru_cache(maxsize=64)
def _find_adapter(text: str, folder: str) -> FoundAdapter:
    name, weight = split_weight(text)
    return find_adapter(_existing(name, folder), weight)


@functools.lru_cache(maxsize=64)
def _find_distilled_adapter(model: str) -> FoundAdapter:
    return find_distilled_adapter(model, model)


def _existing(name: str, folder: str) -> str:
    """Return a path. A relative one starts from the current folder, as on the command line, else from `folder`."""
    beside = os.path.join(folder, name)
    return beside if os.path.lexists(beside) and not os.path.lexists(name) else name


@functools.lru_cache(maxsize=64)
def _find_tiny_decoder(name: str, folder: str) -> FoundTinyDecoder:
    return find_tiny_decoder(_existing(name, folder))


def _tiny_decoder(row: RowSettings, folder: Path) -> dict[str, Any]:
    """Return the fields of Request that stand for the row's tiny decoder."""
    if row.tiny_decoder in (None, NO_TINY_DECODER):
        return {}
    found = _find_tiny_decoder(str(row.tiny_decoder), str(folder))
    return {"tiny_decoder": found.record, "tiny_decoder_location": found.location}


def _check(mode: Mode, request: Request, inputs: InputImages) -> None:
    """Raise an error if a setting is missing or has no effect, or if the size of an input image is not allowed."""
    if (missing := mode.missing_setting(request)) is not None:
        alternatives = [missing, *([mode.alternatives[missing]] if missing in mode.alternatives else [])]
        raise InputError(f"{' or '.join(alternatives)} is missing: mode {mode.name} needs it")
    if (pair := mode.ineffective_setting(request)) is not None:
        raise InputError(f"{pair.name} requires {pair.other}")
    bases = {name: inputs.images[record] for name in mode.base_images if (record := getattr(request, name)) is not None}
    if not bases:
        return
    check_aspect_ratios(bases)
    name, image = next(iter(bases.items()))
    if request.crop is not None:
        return
    if request.extend is not None:
        check_size("size with extend", extended_size(image.size, request.extend), "add crop")
    elif request.width is None:
        check_aspect_ratio(f"size of {name}", image.size, "crop it, or set size")
