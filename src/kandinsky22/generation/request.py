"""Request: the settings of one generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kandinsky22.generation.recipe import AppliedAdapter, InputFile, MixtureItem
from kandinsky22.sampling.presets import find_preset


@dataclasses.dataclass(frozen=True)
class Request:
    """Settings of one generation.

    Attributes: those of `Recipe` with the same names. None means that the model's default is used, or that the
    mode does not have the setting. `model_location`, `prior_location`, `lora_locations` and `tiny_decoder_location` are
    the files, folders or Hub ids that the names of `model`, `prior`, the adapters of `lora` and the tiny decoder stand
    for.
    """

    prompt: str | None
    negative_prompt: str | None
    image: InputFile | None
    mask: InputFile | None
    hint: InputFile | None
    parts: tuple[MixtureItem, ...] | None
    strength: float | None
    keep_pixels: bool | None
    crop: int | None
    extend: tuple[int, ...] | None
    seeds: tuple[int, ...]
    model: str
    prior: str | None
    model_location: str
    prior_location: str | None
    scheduler: str | None
    scheduler_settings: Mapping[str, Any] | None
    prior_scheduler: str | None
    prior_scheduler_settings: Mapping[str, Any] | None
    device: str
    dtype: str | None
    steps: int | None
    prior_steps: int | None
    guidance: float | None
    prior_guidance: float | None
    prompt_weights: bool | None
    guidance_interval: tuple[float, ...] | None
    guidance_rescale: float | None
    guidance_threshold: float | None
    prior_guidance_interval: tuple[float, ...] | None
    width: int | None
    height: int | None
    quantize: str | None
    cache_every: int | None
    lora: tuple[AppliedAdapter, ...] | None = None
    lora_locations: tuple[str, ...] | None = None
    tiny_decoder: InputFile | None = None
    tiny_decoder_location: str | None = None
    subject: MixtureItem | None = None
    engine: str | None = None

    def texts(self) -> list[str]:
        """Return all texts that the text encoder encodes."""
        mixed = [item.text for item in self.parts or ()]
        return [text for text in (self.prompt, self.negative_prompt, *mixed) if text is not None]


def preset_settings(quality: str, distilled_steps: int | None = None) -> dict[str, Any]:
    """Return the fields of `Request` that a preset sets, except for the distilled adapter of its model.

    Args:
        quality: Name of the preset.
        distilled_steps: Number of steps that the distilled adapter was made for; None leaves it to the preset.

    Raises:
        InputError: If no preset has this name.
    """
    preset = find_preset(quality)
    values: dict[str, Any] = {
        field: getattr(preset, field) for field in ("guidance_interval", "prior_guidance_interval")
    }
    for prefix, sampler in (("", preset.decoder), ("prior_", preset.prior)):
        values |= {
            f"{prefix}scheduler": sampler.scheduler,
            f"{prefix}scheduler_settings": dict(sampler.settings) or None,
        }
        values[f"{prefix}steps"] = sampler.steps
    if preset.guidance_scale is not None:
        values["guidance"] = preset.guidance_scale
    if preset.distilled and distilled_steps is not None:
        values["steps"] = distilled_steps
    return values
