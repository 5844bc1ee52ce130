"""Requests of generation from jobs of the API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kandinsky22.errors import invalid
from kandinsky22.generation.adapters import FoundAdapter, adapter_fields
from kandinsky22.generation.limits import MAX_SEED, check_size
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.recipe import InputFile, MixtureItem
from kandinsky22.generation.request import Request, preset_settings
from kandinsky22.generation.scheduler_names import SCHEDULERS, find_scheduler_class
from kandinsky22.sampling.presets import PRESETS, find_preset
from kandinsky22.serve.model_facts import may_be_distilled
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.settings import MODES_OF_KIND, ModelSettings, ServerSettings

DIRECT = (
    "prompt",
    "negative_prompt",
    "strength",
    "keep_pixels",
    "crop",
    "guidance",
    "prior_guidance",
    "guidance_interval",
    "prior_guidance_interval",
    "guidance_rescale",
    "guidance_threshold",
    "width",
    "height",
)
INPUTS = ("prompt", "image", "mask", "hint", "parts", "strength", "keep_pixels", "crop", "extend")
PRIOR_SETTINGS = ("prior_scheduler", "prior_steps", "prior_guidance")


def generation_request(
    job: JobRequest,
    model: ModelSettings,
    settings: ServerSettings,
    device: str,
    records: Mapping[str, InputFile],
    distilled: FoundAdapter | None = None,
) -> Request:
    """Return the request of generation that a job stands for.

    Args:
        job: The job with its seed.
        model: Its model.
        settings: Settings of the server.
        device: Device of the worker.
        records: Records of the input pictures, by the names of `JobRequest.pictures`.
        distilled: The distilled adapter that the preset of the job requires; None for checks without it.

    Raises:
        InputError: If a preset or a scheduler is unknown.
    """
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(Request)}
    values |= adapter_fields([] if distilled is None else [distilled])
    if job.quality is not None:
        values |= preset_settings(job.quality, None if distilled is None else distilled.steps)
    for field in ("scheduler", "prior_scheduler"):
        if (name := getattr(job, field)) is not None:
            # Settings of a preset belong to its scheduler.
            values |= {field: _scheduler_class(field, name), f"{field}_settings": None}
        if (own := getattr(job, f"{field}_settings")) is not None:
            values[f"{field}_settings"] = own
    for field in ("steps", "prior_steps"):
        if (steps := getattr(job, field)) is not None:
            values[field] = steps
    values |= {field: value for field in DIRECT if (value := getattr(job, field)) is not None}
    values |= {name: records[name] for name in ("image", "mask", "hint") if name in records}
    if job.parts is not None:
        values["parts"] = tuple(
            MixtureItem(part.weight, text=part.text, image=records.get(f"parts.{index}"))
            for index, part in enumerate(job.parts)
        )
    seed = job.seed or 0
    values |= {
        "extend": job.extend if job.extend is not None and any(job.extend) else None,
        "prompt_weights": job.prompt_weights or None,
        "seeds": tuple(range(seed, seed + job.count)),
        "model": model.location,
        "model_location": model.location,
        "prior": model.prior,
        "prior_location": model.prior,
        "device": device,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
    }
    request = Request(**values)
    is_preset = job.quality is not None and job.steps is None
    return MODES[job.mode].with_decoder_step(request) if is_preset else request


def check_job(job: JobRequest, settings: ServerSettings, sizes: Mapping[str, tuple[int, int]]) -> ModelSettings:
    """Return the model of a job after checking all that can be checked without networks.

    Args:
        job: The job.
        settings: Settings of the server.
        sizes: (width, height) of the input pictures, by the names of `JobRequest.pictures`.

    Raises:
        InputError: If a setting is invalid, missing, without effect or beyond a limit of the server.
    """
    model = _model(job, settings)
    mode = MODES[job.mode]
    foreign = [name for name in INPUTS if name not in mode.inputs and getattr(job, name) is not None]
    if foreign:
        raise invalid(foreign[0], _shown(getattr(job, foreign[0])), f"nothing, because mode {mode.name} has none")
    records = {name: InputFile(name, "") for name in sizes}
    request = generation_request(job, model, settings, "cpu", records)
    if (missing := mode.missing_setting(request)) is not None:
        raise invalid(missing, None, f"a value, which mode {mode.name} requires")
    if (pair := mode.ineffective_setting(request)) is not None:
        raise invalid(pair.name, getattr(request, pair.name), f"nothing unless {pair.other} is set")
    if not request.texts() and (useless := [name for name in PRIOR_SETTINGS if getattr(job, name) is not None]):
        raise invalid(useless[0], getattr(job, useless[0]), "nothing, because the prior samples only for texts")
    _check_preset(job, model)
    _check_limits(job, request, settings)
    _check_sizes(job, settings, sizes)
    return model


def batch_key(job: JobRequest, model: ModelSettings) -> str:
    """Return a key that two jobs share if they can be generated in one batch.

    Args:
        job: The job.
        model: Its model.
    """
    free = {"prompt", "negative_prompt", "seed", "count", "priority", "group", "previews", "model"}
    return json.dumps({"model": model.id, **job.model_dump(mode="json", exclude=free)}, sort_keys=True)


def title(job: JobRequest) -> str:
    """Return a line that describes a job.

    Args:
        job: The job.
    """
    if job.prompt:
        return job.prompt
    if job.parts is not None:
        return ", ".join(f"{part.weight:g} {part.text if part.text is not None else 'picture'}" for part in job.parts)
    return job.mode


def _model(job: JobRequest, settings: ServerSettings) -> ModelSettings:
    accepted = [model.id for model in settings.models if job.mode in MODES_OF_KIND[model.kind]]
    model = settings.default_model(job.mode) if job.model is None else settings.model(job.model)
    if model is None or model.id not in accepted:
        expected = " or ".join(map(repr, accepted)) if accepted else "no value: the server has no model for this mode"
        raise invalid("model", job.model, expected)
    return model


def _check_preset(job: JobRequest, model: ModelSettings) -> None:
    """Report a preset that needs a distilled adapter if the model has none."""
    if job.quality is not None and find_preset(job.quality).distilled and not may_be_distilled(model):
        others = " or ".join(repr(name) for name, preset in PRESETS.items() if not preset.distilled)
        raise invalid("quality", job.quality, f"{others}, because {model.id} has no distilled adapter")


def _scheduler_class(field: str, name: str) -> str:
    class_name = find_scheduler_class(name)
    if class_name is None:
        raise invalid(field, name, f"one of {', '.join(SCHEDULERS)}")
    return class_name


def _check_limits(job: JobRequest, request: Request, settings: ServerSettings) -> None:
    for field in ("steps", "prior_steps"):
        if (steps := getattr(request, field)) is not None and steps > settings.max_steps:
            raise invalid(field, steps, f"at most {settings.max_steps}")
    if job.count > settings.max_count:
        raise invalid("count", job.count, f"an integer from 1 to {settings.max_count}")
    if (job.seed or 0) + job.count - 1 > MAX_SEED:
        raise invalid("seed", job.seed, f"an integer up to {MAX_SEED}, also for the last of {job.count} images")
    for name in ("guidance_interval", "prior_guidance_interval"):
        if (interval := getattr(job, name)) is not None and interval[0] > interval[1]:
            raise invalid(name, interval, "a start before the end")
    for name in ("prompt", "negative_prompt"):
        _check_text(name, getattr(job, name))
    for part in job.parts or ():
        _check_text("parts", part.text)
    _check_text("group", job.group)


def _check_text(name: str, text: str | None) -> None:
    if text is not None and any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise invalid(name, text, "text without null characters and lone surrogates")


def _check_sizes(job: JobRequest, settings: ServerSettings, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Report a size beyond the limits, and pictures that do not fit together."""
    from kandinsky22.generation.canvas import extended_size

    size = None
    if (job.width is None) != (job.height is None):
        raise invalid("width" if job.width is None else "height", None, "both sides, or neither")
    if job.width is not None and job.height is not None:
        size = (job.width, job.height)
    if job.extend is not None and "image" in sizes:
        if size is not None and job.crop is None:
            raise invalid("width", job.width, "nothing, because extend sets the size, unless crop repaints a part")
        extended = extended_size(sizes["image"], job.extend)
        check_size("size", extended)
        size = extended if job.crop is None else size
    if size is not None:
        check_size("size", size)
        if max(size) > settings.max_side or size[0] * size[1] > settings.max_pixels:
            expected = f"sides up to {settings.max_side} and at most {settings.max_pixels} pixels on this server"
            raise invalid("size", f"{size[0]}x{size[1]}", expected)


def _shown(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) else "..."
