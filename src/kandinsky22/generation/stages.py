"""Run the two stages of a request: the prior computes image embeddings, the decoder generates an image from them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from kandinsky22.errors import KandinskyError, NotFiniteError
from kandinsky22.generation.canvas import Canvas, crop_around_mask, decoder_size, extend
from kandinsky22.generation.loading import Networks, hardware_name, model_digest, software_versions
from kandinsky22.generation.recipe import InputFile, MixtureItem, Recipe
from kandinsky22.generation.request import Request

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from kandinsky22 import KandinskyPriorPipelineOutput

OnStep: TypeAlias = "Callable[[Any, int, Any, dict[str, Any]], None]"
"""Function that is called after each step of both stages, as `callback_on_step_end` of the pipelines. It may raise an
exception to stop the generation."""

# Fields of Request and the pipeline arguments that take their values.
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
DECODER_IMAGES = {"image": "image", "mask": "mask_image", "hint": "hint"}


@dataclasses.dataclass(frozen=True)
class DecoderImages:
    """The images that the decoder receives, and what becomes of its result.

    Attributes:
        arguments: Images by name of the pipeline's argument.
        canvas: Canvas of inpainting with `--extend` or `--crop`; None if the result is saved as it is.
    """

    arguments: Mapping[str, Image]
    canvas: Canvas | None = None

    def finish(self, result: Image) -> Image:
        """Return the image that is saved.

        Args:
            result: Result of the decoder.
        """
        return result if self.canvas is None else self.canvas.finish(result)


class NanError(KandinskyError):
    """The result of a stage contains NaN."""


def with_model_defaults(request: Request, networks: Networks) -> Request:
    """Return the request with the unset sampling settings filled in.

    They come from the model's `generation_defaults`, else from the defaults of the pipelines' arguments.

    Args:
        request: Settings of the command.
        networks: The loaded networks.
    """
    values = {}
    for pipe, arguments in ((networks.prior, PRIOR_ARGUMENTS), (networks.decoder, DECODER_ARGUMENTS)):
        parameters = call_parameters(pipe)
        for field, argument in arguments.items():
            if getattr(request, field) is None and argument in parameters:
                values[field] = pipe.generation_defaults.get(argument, parameters[argument].default)
    return dataclasses.replace(request, **values)


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """Return the arguments that a pipeline's call accepts, by name.

    Args:
        pipe: Pipeline of the prior or the decoder.
    """
    return dict(inspect.signature(pipe.__call__).parameters)


def build_recipe(command: str, request: Request, networks: Networks) -> Recipe:
    """Return the recipe of a request. Width and height are 0 until an image exists, if the request does not set them.

    The fingerprint of the weights is "" if they are read when the networks first run: `with_digest` adds it then.

    Args:
        command: Name of the subcommand.
        request: Settings of the command, from `with_model_defaults`.
        networks: The loaded networks.
    """
    from kandinsky22.runtime.device import dtype_name

    recorded = {field.name for field in dataclasses.fields(Recipe)}
    fields = [field.name for field in dataclasses.fields(request) if field.name in recorded]
    requested = {name: getattr(request, name) for name in fields}
    resolved = {
        "command": command,
        "model_digest": _digest(request, networks, read_missing=False),
        "scheduler": type(networks.decoder.scheduler).__name__,
        "prior_scheduler": type(networks.prior.scheduler).__name__,
        "guidance": float(requested["guidance"]),
        "guidance_rescale": requested["guidance_rescale"] or None,
        "prior_guidance": float(requested["prior_guidance"]),
        "width": request.width or 0,
        "height": request.height or 0,
        "device": str(networks.device),
        "dtype": dtype_name(networks.combined.dtype),
        "hardware": hardware_name(networks.device),
        "versions": software_versions(request),
    }
    return Recipe(**(requested | resolved))


def with_digest(recipe: Recipe, request: Request, networks: Networks) -> Recipe:
    """Return a recipe with the fingerprint of the weights, after the networks have run.

    Args:
        recipe: Recipe from `build_recipe`, which lacks the fingerprint if the weights were not read by then.
        request: Settings of the command.
        networks: The networks.
    """
    digest = recipe.model_digest or _digest(request, networks, read_missing=True)
    return dataclasses.replace(recipe, model_digest=digest)


def _digest(request: Request, networks: Networks, *, read_missing: bool) -> str:
    uses_image_encoder = request.prompt is None or "image" in call_parameters(networks.prior)
    return model_digest(networks.combined, with_image_encoder=uses_image_encoder, read_missing=read_missing)


def prior_options(prior: Any, request: Request) -> dict[str, Any]:
    """Return the sampling arguments of a call of the prior.

    Args:
        prior: Prior pipeline.
        request: Settings of the command, from `with_model_defaults`.
    """
    parameters = call_parameters(prior)
    options = {
        argument: getattr(request, field) for field, argument in PRIOR_ARGUMENTS.items() if argument in parameters
    }
    return options | {"prompt_weights": bool(request.prompt_weights)}


def decoder_options(decoder: Any, request: Request) -> dict[str, Any]:
    """Return the sampling arguments of a call of the decoder.

    Args:
        decoder: Decoder pipeline.
        request: Settings of the command, from `with_model_defaults`.
    """
    parameters = call_parameters(decoder)
    return {
        argument: getattr(request, field) for field, argument in DECODER_ARGUMENTS.items() if argument in parameters
    }


def run_prior(
    prior: Any,
    request: Request,
    images: Mapping[InputFile, Any],
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> KandinskyPriorPipelineOutput:
    """Return the image embedding of a prompt, a mixture or an image, and the negative image embedding.

    Args:
        prior: Prior pipeline.
        request: Settings of the command, from `with_model_defaults`.
        images: The opened input images by record, and the embeddings of learned subjects.
        generator: Source of the noise.
        on_step: Called after each step; None calls nothing.

    Raises:
        NanError: If an embedding contains NaN.
    """
    options = prior_options(prior, request) | {"callback_on_step_end": on_step}
    if request.prompt is None or _subject_mixture(request) is not None:
        # An image alone is a mixture of one item. Its embedding needs no prior steps, that of a negative prompt does.
        mixture = _subject_mixture(request) or request.parts or (MixtureItem(1.0, image=request.image),)
        items = [item.text if item.file is None else images[item.file] for item in mixture]
        weights = [item.weight for item in mixture]
        options |= {"negative_prior_prompt": request.negative_prompt}
        with nan_errors(prior, request.prior_steps):
            return prior.interpolate(items, weights, generator=generator, **options)
    options |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if request.image is not None and "image" in call_parameters(prior):
        options["image"] = images[request.image]
    with nan_errors(prior, request.prior_steps):
        return prior(generator=generator, **options)


def _subject_mixture(request: Request) -> tuple[MixtureItem, ...] | None:
    """Return the prompt and the learned subject of `generate`; None without a subject that has a weight."""
    if request.subject is None or request.subject.weight == 0:
        return None
    return MixtureItem(1 - request.subject.weight, text=request.prompt), request.subject


def steps_after_strength(pipe: Any, steps: int, strength: float) -> int:
    """Return the number of network evaluations that remain of a denoising process.

    Args:
        pipe: Pipeline of the prior or the decoder.
        steps: Number of steps of the whole process.
        strength: Fraction of the steps that run, from 0 to 1.

    Raises:
        InputError: If the scheduler does not support this number of steps.
    """
    from kandinsky22.sampling.scheduler_adapter import TimestepSchedule

    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return len(TimestepSchedule(scheduler, scheduler.timesteps).after_strength(strength).timesteps)


def prepare_images(decoder: Any, request: Request, inputs: Mapping[InputFile, Any]) -> DecoderImages:
    """Return the images that the decoder receives: those of the command, extended or cropped as requested.

    Args:
        decoder: Decoder pipeline.
        request: Settings of the command with width and height.
        inputs: The opened input images by record.

    Raises:
        InputError: If a mask is black everywhere and the image is cropped around it.
    """
    parameters = call_parameters(decoder)
    images = {
        field: inputs[record]
        for field, argument in DECODER_IMAGES.items()
        if argument in parameters and (record := getattr(request, field)) is not None
    }
    canvas = None
    if request.extend is not None:
        canvas = extend(images["image"], images.get("mask"), request.extend, decoder.movq_scale_factor**2)
    elif request.crop is not None:
        canvas = Canvas(images["image"], images["mask"])
    if request.crop is not None and canvas is not None:
        size = decoder_size(decoder, request.width or decoder.default_size, request.height or decoder.default_size)
        canvas = crop_around_mask(canvas, size, request.crop)
    if canvas is not None:
        images |= {"image": canvas.image, "mask": canvas.mask}
    return DecoderImages({DECODER_IMAGES[field]: image for field, image in images.items()}, canvas)


def run_decoder(
    decoder: Any,
    request: Request,
    images: DecoderImages,
    embeddings: KandinskyPriorPipelineOutput,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> Image:
    """Return the image of one pair of embeddings.

    The batch size is 1; `kandinsky22.generation.batching` runs larger ones.

    Args:
        decoder: Decoder pipeline.
        request: Settings of the command, from `with_model_defaults`.
        images: Result of `prepare_images`.
        embeddings: Result of `run_prior`.
        generator: Source of the noise.
        on_step: Called after each step; None calls nothing.

    Raises:
        NanError: If the image contains NaN.
    """
    from kandinsky22.inputs.images import array_to_pil

    with nan_errors(decoder, request.steps):
        pixels = decoder(
            image_embeds=embeddings.image_embeds,
            negative_image_embeds=embeddings.negative_image_embeds,
            generator=generator,
            output_type="np",
            callback_on_step_end=on_step,
            **decoder_options(decoder, request),
            **images.arguments,
        ).images
    return images.finish(array_to_pil(pixels)[0])


def generate_image(
    networks: Networks,
    request: Request,
    inputs: Mapping[InputFile, Any],
    images: DecoderImages,
    seed: int,
    on_step: OnStep | None = None,
) -> Image:
    """Return the image of one seed. The prior and then the decoder draw their noise from one generator.

    Args:
        networks: The loaded networks.
        request: Settings of the generation, from `with_model_defaults`.
        inputs: The opened input images by record.
        images: Result of `prepare_images`.
        seed: Seed of the generator.
        on_step: Called after each step of both stages; None calls nothing.

    Raises:
        NanError: If an embedding or the image contains NaN.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    embeddings = run_prior(networks.prior, request, inputs, generator, on_step)
    return run_decoder(networks.decoder, request, images, embeddings, generator, on_step)


def sized_recipe(recipe: Recipe, seeds: tuple[int, ...], image: Image, request: Request) -> Recipe:
    """Return the recipe of an image: with its seeds, and its size unless a part of it was generated at another size.

    Args:
        recipe: Recipe of the request.
        seeds: Seeds of the image, or of all images of a contact sheet.
        image: The image, or the first one of a contact sheet.
        request: Settings of the generation.
    """
    width, height = image.size if request.crop is None else (request.width or 0, request.height or 0)
    return dataclasses.replace(recipe, seeds=seeds, width=width, height=height)


@contextlib.contextmanager
def nan_errors(pipe: Any, steps: int | None) -> Iterator[None]:
    """Raise NanError if a pipeline reports a result with NaN or infinity, which would be saved as a black image.

    Args:
        pipe: Pipeline that runs in the context.
        steps: Number of its steps, for the message.

    Yields:
        Nothing.

    Raises:
        NanError: If the pipeline raises NotFiniteError.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NanError(
            f"{type(pipe).__name__} produced NaN with {type(pipe.scheduler).__name__}, steps: {steps}; the result was "
            "not saved. Try --dtype float32 or another scheduler; if both give NaN, the weights are damaged"
        ) from error
