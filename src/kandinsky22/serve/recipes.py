"""Requests of the API from recipes."""

from __future__ import annotations

import json
from typing import Any

from kandinsky22.errors import InputError
from kandinsky22.generation.adapters import distilled_record
from kandinsky22.generation.image_files import embedded_recipe
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.sampling.presets import PRESETS
from kandinsky22.serve.files import open_picture
from kandinsky22.serve.gallery import Gallery
from kandinsky22.serve.settings import MODES_OF_KIND

COPIED = (
    "prompt",
    "negative_prompt",
    "strength",
    "keep_pixels",
    "crop",
    "extend",
    "steps",
    "guidance",
    "prior_steps",
    "prior_guidance",
    "prompt_weights",
    "guidance_interval",
    "prior_guidance_interval",
    "guidance_rescale",
    "guidance_threshold",
    "width",
    "height",
)
SHORT_NAMES = {class_name: name for name, class_name in SCHEDULERS.items()}


def recipe_of_file(content: bytes, max_pixels: int) -> dict[str, Any]:
    """Return the recipe in a picture file as JSON.

    Args:
        content: Bytes of the file.
        max_pixels: Largest number of pixels.

    Raises:
        InputError: If the file is not a picture, or contains no readable recipe.
    """
    with open_picture(content, max_pixels) as image:
        text = embedded_recipe(image)
    if text is None:
        raise InputError("the picture contains no recipe; kandinsky22 writes recipes into the pictures it generates")
    recipe = Recipe.from_json(text, origin="the picture")
    return dict(json.loads(recipe.to_json()))


def request_of(recipe_json: dict[str, Any], gallery: Gallery) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the request that repeats a recipe, and its input pictures.

    Args:
        recipe_json: The recipe as JSON.
        gallery: The gallery, which may have the input pictures.

    Returns:
        The request for `POST /api/jobs`, and by the name of each input {"upload": id}, {"image": id} or "missing".

    Raises:
        InputError: If the recipe belongs to no mode.
    """
    recipe = Recipe.from_json(json.dumps(recipe_json), origin="the gallery")
    mode = MODES.get(recipe.command)
    if mode is None:
        raise InputError(f"the recipe is of no mode of generation: {recipe.command!r}")
    request: dict[str, Any] = {"mode": mode.name, "seed": recipe.seeds[0]}
    if len(recipe.seeds) > 1:
        request["count"] = len(recipe.seeds)
    for name in COPIED:
        if (value := getattr(recipe, name)) is not None:
            request[name] = list(value) if isinstance(value, tuple) else value
    if (quality := _quality(recipe)) is not None:
        request["quality"] = quality
    if quality is None or PRESETS[quality].distilled:  # the adapter stands for the preset, whatever its schedulers
        for field in ("scheduler", "prior_scheduler"):
            if (class_name := getattr(recipe, field)) in SHORT_NAMES:
                request[field] = SHORT_NAMES[class_name]
            if settings := getattr(recipe, f"{field}_settings"):
                request[f"{field}_settings"] = dict(settings)
    if recipe.extend is not None and recipe.crop is None:  # extend sets the size
        request.pop("width", None)
        request.pop("height", None)
    models = [model for model in gallery.settings.models if mode.name in MODES_OF_KIND[model.kind]]
    if (model := next((each for each in models if each.location == recipe.model), None)) is not None:
        request["model"] = model.id
    inputs = _inputs(recipe, gallery)
    for name in ("image", "mask", "hint"):
        if isinstance(inputs.get(name), dict):
            request[name] = inputs[name]
    if recipe.parts is not None:
        request["parts"] = [
            {"weight": part.weight, "text": part.text}
            if part.text is not None
            else {"weight": part.weight, **_source(inputs[f"parts.{index}"])}
            for index, part in enumerate(recipe.parts)
        ]
    return request, inputs


def _quality(recipe: Recipe) -> str | None:
    """Return the preset whose schedulers a recipe has, or None. Numbers of steps and intervals stand for themselves."""
    is_distilled = distilled_record(recipe.lora, recipe.model) is not None
    settings, prior_settings = recipe.scheduler_settings or {}, recipe.prior_scheduler_settings or {}
    schedulers = (recipe.scheduler, settings, recipe.prior_scheduler, prior_settings)
    for name, preset in PRESETS.items():
        decoder, prior = preset.decoder, preset.prior
        has_intervals = all(
            getattr(recipe, field) is not None or getattr(preset, field) is None
            for field in ("guidance_interval", "prior_guidance_interval")
        )
        same_schedulers = schedulers == (decoder.scheduler, decoder.settings, prior.scheduler, prior.settings)
        if preset.distilled == is_distilled and (is_distilled or (same_schedulers and has_intervals)):
            return name
    return None


def _inputs(recipe: Recipe, gallery: Gallery) -> dict[str, Any]:
    named = {name: record for name in ("image", "mask", "hint") if (record := getattr(recipe, name)) is not None}
    named |= {f"parts.{index}": part.image for index, part in enumerate(recipe.parts or ()) if part.image is not None}
    return {name: _find(record.sha256, gallery) for name, record in named.items()}


def _find(sha256: str, gallery: Gallery) -> dict[str, str] | str:
    if gallery.store.upload_size(sha256) is not None:
        return {"upload": sha256}
    image = gallery.store.image_with_digest(sha256)
    return "missing" if image is None else {"image": image.id}


def _source(found: dict[str, str] | str) -> dict[str, str]:
    return found if isinstance(found, dict) else {}
