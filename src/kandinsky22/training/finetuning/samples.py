"""Sheets of sample pictures that show what a training has learned so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

import kandinsky22
from kandinsky22.inputs import images
from kandinsky22.models import PriorTransformer, UNet2DConditionModel
from kandinsky22.sampling.scheduler_adapter import SchedulerAdapter, TimestepOptions, schedule_timesteps
from kandinsky22.schedulers import Scheduler
from kandinsky22.training.finetuning.batches import Draw, TensorStore
from kandinsky22.training.finetuning.networks import DECODER_CLASSES, load_decoder
from kandinsky22.training.finetuning.objectives import DecoderObjective
from kandinsky22.training.finetuning.options import TrainingOptions
from kandinsky22.training.finetuning.preparation import Entry

PICTURES_PER_SHEET = 4


class DecoderSamples:
    """Sample pictures of a decoder.

    MoVQ is loaded when the first sheet is drawn.

    Args:
        options: Options of the training.
        mode: Kind of decoder.
        unet: The UNet in training; None loads that of the checkpoint with MoVQ.
        device: Device of the networks.
        scheduler: Scheduler; None uses that of the checkpoint.
        arguments: Arguments of the pipeline that replace the checkpoint's generation defaults; None for none.
    """

    def __init__(
        self,
        options: TrainingOptions,
        mode: str,
        unet: UNet2DConditionModel | None,
        device: torch.device,
        *,
        scheduler: Scheduler | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._options, self._mode, self._unet, self._device = options, mode, unet, device
        self._scheduler, self._arguments = scheduler, dict(arguments or {})
        self._pipe: Any = None

    def pipe(self) -> Any:
        """Return the decoder's pipeline on the device."""
        if self._pipe is None:
            pipe = load_decoder(self._options, self._mode, torch.float32, movq=True)
            unet = self._unet or load_decoder(self._options, self._mode, torch.float32, movq=False).unet
            kind = getattr(kandinsky22, DECODER_CLASSES[self._mode])
            scheduler = pipe.scheduler if self._scheduler is None else self._scheduler
            self._pipe = kind.from_pipe(pipe, unet=unet.to(self._device), scheduler=scheduler)
            self._pipe.movq.to(self._device)
            self._pipe.set_progress_bar_config(disable=True)
        return self._pipe

    def draw(self, positive: Tensor, negative: Tensor, size: tuple[int, int], **arguments: Any) -> Image:
        """Return the picture of an image embedding, always with the same noise.

        Args:
            positive: Image embedding (1, D).
            negative: Negative image embedding (1, D).
            size: Width and height in pixels.
            **arguments: Further arguments of the pipeline, such as "hint".
        """
        pipe = self.pipe()
        result: Image = pipe(
            image_embeds=positive,
            negative_image_embeds=negative,
            width=size[0],
            height=size[1],
            **{
                "generator": torch.Generator().manual_seed(self._options.seed),
                **pipe.generation_defaults,
                **self._arguments,
                **arguments,
            },
        ).images[0]
        return result

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Image:
        """Return the picture of latents.

        Args:
            latents: Latents (4, h, w).
        """
        movq = self.pipe().movq
        pixels = movq.decode(latents[None].to(self._device), force_not_quantize=True)[0]
        return to_pil(pixels)


def prompts_sheet(samples: DecoderSamples, embeddings: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int]) -> Image:
    """Return a row of pictures of prompts.

    Args:
        samples: Draws pictures.
        embeddings: Image embedding and negative embedding, each (1, D), per prompt.
        size: Width and height of a picture in pixels.
    """
    pictures = [samples.draw(positive, negative, size) for positive, negative in embeddings]
    return grid(pictures, columns=len(pictures))


def pictures_sheet(
    samples: DecoderSamples, objective: DecoderObjective, entries: Sequence[Entry], store: TensorStore
) -> Image:
    """Return rows of pictures: originals, hints or masked originals, and what is drawn from their embeddings.

    Args:
        samples: Draws pictures.
        objective: Objective of the training, which knows hints and masks.
        entries: The pictures; those beyond `PICTURES_PER_SHEET`, or of another size than the first, are left out.
        store: Their tensors.
    """
    shown = [entry for entry in entries if entry.size == entries[0].size][:PICTURES_PER_SHEET]
    rows: list[list[Image]] = [[], [], []]
    for index, entry in enumerate(shown):
        tensors = store[entry.path]
        item = objective.item(Draw(index, (objective.seed, 6, index)), entry, training=False)
        original = samples.decoded(tensors["latents"][0])
        rows[0].append(original)
        arguments: dict[str, Any] = {}
        if "hint" in item:
            hint = unit_to_pil(item["hint"])
            rows[1].append(hint.resize(original.size))
            arguments["hint"] = hint
        if "mask" in item:
            mask = F.interpolate(item["mask"][None], original.size[::-1])
            white = unit_to_pil(mask[0].expand(3, -1, -1)).convert("L")
            covered = original.copy()
            covered.paste("white", mask=white)
            rows[1].append(covered)
            arguments |= {"image": original, "mask_image": white}
        rows[2].append(samples.draw(item["embeds"][None], objective.zero_embed, entry.size, **arguments))
    return grid([picture for row in rows for picture in row], columns=len(shown))


def to_pil(pixels: Tensor) -> Image:
    """Return a tensor as an image.

    Args:
        pixels: Tensor (1, 3, H, W) in [-1, 1].
    """
    converted: Any = images.to_output_type(pixels, "pil")
    image: Image = converted[0]
    return image


def unit_to_pil(pixels: Tensor) -> Image:
    """Return a tensor as an image.

    Args:
        pixels: Tensor (3, H, W) in [0, 1].
    """
    return images.array_to_pil(pixels.permute(1, 2, 0)[None].numpy())[0]


def grid(pictures: Sequence[Image], columns: int) -> Image:
    """Return pictures side by side.

    Args:
        pictures: The pictures, row by row.
        columns: Pictures per row.
    """
    return images.make_image_grid(list(pictures), len(pictures) // columns, columns)


@torch.no_grad()
def sample_prior(
    prior: PriorTransformer,
    scheduler: Scheduler,
    texts: Sequence[Mapping[str, Tensor]],
    empty: Mapping[str, Tensor],
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Return image embeddings (N, D) that the prior generates for encoded texts, as its pipeline does.

    Args:
        prior: The prior.
        scheduler: Its scheduler.
        texts: Encodings of N texts: "embeds" (D,) and "hidden" (tokens, D).
        empty: Encoding of the empty text.
        steps: Number of denoising steps.
        guidance: Guidance scale; guidance is off up to 1.
        seed: Seed of the noise.
    """
    rows = [*([empty] * len(texts) if guidance > 1 else []), *texts]
    length = max(len(row["hidden"]) for row in rows)
    hidden = torch.stack([F.pad(row["hidden"], (0, 0, 0, length - len(row["hidden"]))) for row in rows])
    mask = torch.stack([torch.arange(length) < len(row["hidden"]) for row in rows])
    embeds = torch.stack([row["embeds"] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    shape = len(texts), embeds.shape[1]
    schedule = schedule_timesteps(scheduler, TimestepOptions(steps), shape=shape, device=prior.device)
    adapter = SchedulerAdapter(schedule, generator)
    embeds_, hidden, mask = (tensor.to(prior.device) for tensor in (embeds, hidden, mask))
    condition = prior.encode_condition(embeds_, hidden, mask, schedule.timesteps.tolist())
    latents = torch.randn(shape, generator=generator).to(prior.device)
    for index, t in enumerate(schedule.timesteps):
        inputs = torch.cat([latents] * 2) if guidance > 1 else latents
        predicted = prior.denoise(inputs.to(prior.dtype), t, condition).float()
        if guidance > 1:
            unconditional, predicted = predicted.chunk(2)
            predicted = unconditional + guidance * (predicted - unconditional)
        latents = adapter.step(index, predicted, latents)
    return prior.post_process_latents(latents).float().cpu()
