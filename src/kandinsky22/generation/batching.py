"""Several requests in one batch: the prior's rows together, then the decoder's.

Each image has a generator of its own, which draws the prior's noise and then the decoder's, exactly as for an image
that is generated alone. Results differ from those only by the rounding of larger matrix products; a batch of one gives
the same bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kandinsky22.generation import stages
from kandinsky22.generation.memory_errors import is_out_of_memory
from kandinsky22.generation.modes import PRIOR, Mode
from kandinsky22.generation.request import Request
from kandinsky22.generation.session import GeneratedImage, Job

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

# Fields of Request that may differ between the requests of a batch, as long as all of them set the field or none does.
VARYING_FIELDS = ("prompt", "negative_prompt", "seeds", "image", "mask", "hint", "parts")
# Embeddings are small: several batches of the decoder share one batch of the prior.
PRIOR_BATCHES = 8
NORMAL_BLOCK = 16  # torch draws normal numbers in blocks of 16; for other lengths, two draws are not one longer draw
SERIES_BATCH = 8  # images of one request that run together on a GPU


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Result of the prior for one image.

    Attributes:
        positive: Image embedding, (1, embedding_dim).
        negative: Negative image embedding, (1, embedding_dim).
        generator: Source of the decoder's noise, in the state in which the prior has left it.
    """

    positive: Tensor
    negative: Tensor
    generator: torch.Generator


def batch_key(mode: Mode, request: Request) -> tuple[object, ...]:
    """Return the settings that all requests of a batch share.

    Sizes that follow from input images are known only to jobs, see `job_key`.

    Args:
        mode: Mode of the request.
        request: The request.
    """
    fixed = (
        json.dumps(value, sort_keys=True, default=dataclasses.asdict)
        if isinstance(value, dict | list | tuple)
        else value
        for field in dataclasses.fields(request)
        if field.name not in VARYING_FIELDS
        for value in (getattr(request, field.name),)
    )
    return (mode.name, *(getattr(request, name) is None for name in VARYING_FIELDS), *fixed)


def job_key(job: Job) -> tuple[object, ...]:
    """Return what all jobs of a batch share: the settings, and the size of the result.

    Args:
        job: The job.
    """
    return (job.recipe.command, *batch_key(job.mode, job.request))


def encode_batch(jobs: Sequence[Job], seeds: Sequence[int], on_step: stages.OnStep | None = None) -> list[Embeddings]:
    """Return the embeddings of several jobs.

    Prompts run as one batch. Mixtures, variations, and negative prompts whose noise would differ in a batch run one
    after the other.

    Args:
        jobs: Jobs with equal keys.
        seeds: One seed per job.
        on_step: Called after each step; None calls nothing.

    Raises:
        NanError: If an embedding contains NaN.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(jobs) == 1 or not _has_batched_prior(jobs[0]):
        results: list[Any] = [
            stages.run_prior(job.networks.prior, job.request, job.inputs, generator, on_step)
            for job, generator in zip(jobs, generators, strict=True)
        ]
        return [
            Embeddings(result.image_embeds, result.negative_image_embeds, generator)
            for result, generator in zip(results, generators, strict=True)
        ]
    prior, request = jobs[0].networks.prior, jobs[0].request
    options = stages.prior_options(prior, request)
    negatives = [job.request.negative_prompt for job in jobs]
    with stages.nan_errors(prior, request.prior_steps):
        result = prior(
            prompt=[job.request.prompt for job in jobs],
            negative_prompt=None if request.negative_prompt is None else negatives,
            generator=generators,
            callback_on_step_end=on_step,
            **options,
        )
    rows = zip(result.image_embeds.split(1), result.negative_image_embeds.split(1), generators, strict=True)
    return [Embeddings(*row) for row in rows]


def _has_batched_prior(job: Job) -> bool:
    """Return whether jobs of this kind give the prior the same noise in a batch as alone."""
    if job.request.prompt is None or job.request.subject is not None or type(job.networks.prior).__name__ != PRIOR:
        return False
    if job.request.negative_prompt is None:
        return True
    # The noise of a prompt and its negative prompt is one draw of a single image, and two draws in a batch.
    return int(job.networks.prior.prior.config.embedding_dim) % NORMAL_BLOCK == 0


def decode_batch(
    jobs: Sequence[Job], embeddings: Sequence[Embeddings], on_step: stages.OnStep | None = None
) -> list[Image]:
    """Return the images of several jobs, from the embeddings of `encode_batch`.

    Args:
        jobs: Jobs with equal keys.
        embeddings: Embeddings per job. Their generators advance.
        on_step: Called after each step; None calls nothing.

    Raises:
        NanError: If an image contains NaN.
    """
    import torch

    from kandinsky22.inputs.images import array_to_pil

    decoder, request = jobs[0].networks.decoder, jobs[0].request
    with stages.nan_errors(decoder, request.steps):
        pixels = decoder(
            image_embeds=torch.cat([item.positive for item in embeddings]),
            negative_image_embeds=torch.cat([item.negative for item in embeddings]),
            generator=[item.generator for item in embeddings],
            output_type="np",
            callback_on_step_end=on_step,
            **stages.decoder_options(decoder, request),
            **_decoder_images(jobs),
        ).images
    return [job.images.finish(image) for job, image in zip(jobs, array_to_pil(pixels), strict=True)]


def _decoder_images(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the decoder's input images by argument: one for all jobs where they share it, else one per job."""
    images = {}
    for argument, first in jobs[0].images.arguments.items():
        listed = [job.images.arguments[argument] for job in jobs]
        images[argument] = first if all(image is first for image in listed) else listed
    return images


def generate_batch(
    jobs: Sequence[Job], seeds: Sequence[int], on_step: stages.OnStep | None = None
) -> list[GeneratedImage]:
    """Return one image per job. Their recipes contain the size of the batch.

    Args:
        jobs: Jobs with equal keys.
        seeds: One seed per job.
        on_step: Called after each step of both stages; None calls nothing.

    Raises:
        NanError: If a result contains NaN.
    """
    images = decode_batch(jobs, encode_batch(jobs, seeds, on_step), on_step)
    return [
        finished(job, seed, image, batch_size=len(jobs)) for job, seed, image in zip(jobs, seeds, images, strict=True)
    ]


def finished(job: Job, seed: int, image: Image, *, batch_size: int) -> GeneratedImage:
    """Return an image with its recipe.

    Args:
        job: The job.
        seed: Seed of the image.
        image: The image.
        batch_size: Largest number of images that ran together.
    """
    recipe = stages.sized_recipe(job.recipe, (seed,), image, job.request)
    return GeneratedImage(image, dataclasses.replace(recipe, batch_size=batch_size if batch_size > 1 else None))


def generate_series(job: Job, seeds: Sequence[int], on_step: stages.OnStep | None = None) -> Iterator[GeneratedImage]:
    """Yield the images of one job for several seeds, in batches on a GPU and one after the other on a CPU.

    On CPUs, images of a series are bit-identical to those of their seeds alone, and batches would save little. A batch
    for which the memory does not suffice runs again as two.

    Args:
        job: The job.
        seeds: Seeds of the images.
        on_step: Called after each step of both stages; None calls nothing.

    Raises:
        NanError: If a result contains NaN.
    """
    size = 1 if job.networks.device.type == "cpu" else SERIES_BATCH
    start = 0
    while start < len(seeds):
        chunk = seeds[start : start + size]
        try:
            if len(chunk) == 1:
                images = [job.generate(chunk[0], on_step)]
            else:
                images = generate_batch([job] * len(chunk), chunk, on_step)
        except Exception as error:
            if len(chunk) == 1 or not is_out_of_memory(error):
                raise
            size = len(chunk) // 2
            continue
        yield from images
        start += len(chunk)
