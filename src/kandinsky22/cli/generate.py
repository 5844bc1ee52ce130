"""From a request to pictures: the numbers that are left to the model, and the calls of the two stages."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from kandinsky22.cli.inputs import Inputs
from kandinsky22.cli.loading import Networks, hardware, model_digest, versions
from kandinsky22.cli.recipe import Part, Recipe
from kandinsky22.cli.request import Request
from kandinsky22.errors import KandinskyError

# What recipes and pipelines call the same numbers.
PRIOR_ARGUMENTS = {
    "prior_steps": "num_inference_steps",
    "prior_guidance": "guidance_scale",
    "prior_guidance_interval": "guidance_interval",
    "strength": "strength",
}
DECODER_ARGUMENTS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "guidance_threshold": "guidance_threshold",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "keep_pixels": "keep_pixels",
}
DECODER_PICTURES = {"image": "image", "mask": "mask_image", "hint": "hint"}


def with_defaults(request: Request, networks: Networks) -> Request:
    """The request with all numbers: what was asked for, else what this model does best, else the library's defaults."""
    numbers = {}
    for pipe, names in ((networks.prior, PRIOR_ARGUMENTS), (networks.decoder, DECODER_ARGUMENTS)):
        accepted = _arguments(pipe)
        for name, theirs in names.items():
            if getattr(request, name) is None and theirs in accepted:
                numbers[name] = pipe.generation_defaults.get(theirs, accepted[theirs].default)
    return dataclasses.replace(request, **numbers)


def _arguments(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipe.__call__).parameters)


def recipe_of(command: str, request: Request, networks: Networks) -> Recipe:
    """What is about to be done; the size is known for certain once there is a picture."""
    from kandinsky22.runtime.device import dtype_name

    asked = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    whole = networks.whole
    sees = request.prompt is None or "image" in _arguments(networks.prior)
    found = {
        "command": command,
        "model_digest": model_digest(whole, sees=sees),
        "scheduler": type(networks.decoder.scheduler).__name__,
        "prior_scheduler": type(networks.prior.scheduler).__name__,
        "guidance": float(asked["guidance"]),
        "guidance_rescale": asked["guidance_rescale"] or None,
        "prior_guidance": float(asked["prior_guidance"]),
        "width": request.width or 0,
        "height": request.height or 0,
        "device": str(networks.device),
        "dtype": dtype_name(whole.dtype),
        "hardware": hardware(networks.device),
        "versions": versions(),
    }
    return Recipe(**(asked | found))


def embed(prior: Any, request: Request, inputs: Inputs, generator: Any) -> tuple[Any, Any]:
    """The image embedding to draw, and the one to stay away from: of a prompt, of a mixture, or of a picture."""
    accepted = _arguments(prior)
    options = {theirs: getattr(request, name) for name, theirs in PRIOR_ARGUMENTS.items() if theirs in accepted}
    if request.prompt is None:
        # A picture alone is a mixture of one. Its embedding needs no steps of the prior, a negative prompt's does.
        parts = request.parts or (Part(1.0, image=request.image),)
        items = [part.text if part.image is None else inputs.pictures[part.image] for part in parts]
        weights = [part.weight for part in parts]
        options |= {"negative_prior_prompt": request.negative_prompt}
        made = prior.interpolate(items, weights, generator=generator, **options).to_tuple()
    else:
        options |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        if request.image is not None and "image" in accepted:
            options["image"] = inputs.pictures[request.image]
        made = prior(generator=generator, **options).to_tuple()
    for embedding in made:
        _check_numbers(embedding, prior, request.prior_steps)
    return made


def draw(decoder: Any, request: Request, inputs: Inputs, embeddings: tuple[Any, Any], generator: Any) -> Any:
    """The picture of two embeddings. One at a time, so that each is the same alone and in a series, to the bit."""
    from kandinsky22.inputs.images import to_pil

    accepted = _arguments(decoder)
    numbers = {theirs: getattr(request, name) for name, theirs in DECODER_ARGUMENTS.items() if theirs in accepted}
    pictures = {
        theirs: inputs.pictures[getattr(request, name)]
        for name, theirs in DECODER_PICTURES.items()
        if theirs in accepted
    }
    wanted, unwanted = embeddings
    named = {"image_embeds": wanted, "negative_image_embeds": unwanted, "output_type": "np"}
    made = decoder(generator=generator, **named, **numbers, **pictures).images
    _check_numbers(made, decoder, request.steps)
    return to_pil(made)[0]


class NotNumbers(KandinskyError):
    """What a stage ends in is NaN."""


def _check_numbers(values: Any, pipe: Any, steps: int | None) -> None:
    """Raise NotNumbers for NaN, which as a picture would be black without a word."""
    if bool((values != values).any()):  # which only NaN is
        scheduler = type(pipe.scheduler).__name__
        raise NotNumbers(
            f"{type(pipe).__name__} ends in NaN ({scheduler}, steps: {steps}), which is no picture and was not saved. "
            "Try --dtype float32 or another scheduler; if these do the same, the weights are damaged"
        )
