"""Stages of a training: pictures are prepared, encoders unloaded, and a network gets its objective and its samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

import kandinsky22
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.hub import CheckpointSource, model_folder
from kandinsky22.errors import InputError, invalid
from kandinsky22.models import UNet2DConditionModel
from kandinsky22.schedulers import Scheduler
from kandinsky22.training.finetuning import preparation, samples
from kandinsky22.training.finetuning.batches import split_held_out
from kandinsky22.training.finetuning.data import Example
from kandinsky22.training.finetuning.frames import buckets
from kandinsky22.training.finetuning.losses import LossWeights
from kandinsky22.training.finetuning.networks import (
    DECODER_CLASSES,
    EMBEDDED_SUBFOLDERS,
    Encoders,
    checked_unet,
    decoder_mode,
    load_decoder,
    load_prior,
)
from kandinsky22.training.finetuning.objectives import DecoderObjective
from kandinsky22.training.finetuning.options import FROM_PRIOR
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.prior_samples import PriorSampling
from kandinsky22.training.finetuning.prior_stages import PriorStages
from kandinsky22.training.finetuning.run import Stage, Stream
from kandinsky22.training.finetuning.training_base import COMPONENTS, LORA


@dataclass(frozen=True)
class DecoderData:
    """What a decoder is trained on.

    Attributes:
        entries: Pictures to train on.
        held_out: Pictures to validate with.
        zero_embed: Embedding (1, D) of the all-zero image.
        side: Side of the square bucket in pixels.
        latent_channels: Channels of the latents.
        prompts: Image embedding and negative embedding per validation prompt.
        image_digest: Fingerprint of the image encoder.
        preserved: Class pictures, with the embeddings of the encoder.
    """

    entries: list[Entry]
    held_out: list[Entry]
    zero_embed: Tensor
    side: int
    latent_channels: int
    prompts: list[tuple[Tensor, Tensor]]
    image_digest: str
    preserved: list[Entry] = field(default_factory=list)


class Training(PriorStages):
    """Stages of a training; `TrainingBase` describes arguments and attributes."""

    # Decoders

    def decoder_data(
        self, examples: Sequence[Example], mode: str, kind: str, preserved: Sequence[Example] = ()
    ) -> DecoderData:
        """Encode pictures for a decoder, and unload the encoders.

        Args:
            examples: The pictures.
            mode: Kind of decoder.
            kind: `LORA`, `FULL` or the method of a subject.
            preserved: Class pictures.

        Returns:
            What the decoder is trained on.

        Raises:
            InputError: A size does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        options = self.options
        embeddings = self.prompt_embeddings() if options.validation_prompt and mode == "plain" else []
        encoders = Encoders.load(options, mode, self.device, self.low_dtype, latents=True, texts=False)
        assert encoders.movq is not None
        side, sizes = self.sizes(mode, encoders.movq.downscale_factor, kind)
        job = preparation.DecoderJob(encoders, options, mode, sizes)
        entries = preparation.prepare(examples, job, self.cache, self.accelerator, self.report)
        others = preparation.prepare(preserved, job, self.cache, self.accelerator, self.report) if preserved else []
        channels, digest, zero_embed = (
            encoders.movq.config.latent_channels,
            encoders.image_digest,
            encoders.zero_embed(),
        )
        del encoders, job
        self.free()
        if options.image_embeds == FROM_PRIOR:
            entries = PriorSampling(self).with_embeddings(entries)
        training, held_out = split_held_out(entries, options.validation_images, options.seed)
        self.report(f"{len(training)} pictures to train on, {len(held_out)} held out, {_listed_sizes(entries)}")
        return DecoderData(training, held_out, zero_embed, side, channels, embeddings, digest, others)

    def sizes(self, mode: str, factor: int, kind: str) -> tuple[int, list[tuple[int, int]]]:
        """Return the side of the square bucket, and all buckets.

        Args:
            mode: Kind of decoder.
            factor: Pixels per latent.
            kind: `LORA`, `FULL` or the method of a subject.

        Raises:
            InputError: The size or an option of adapters does not fit the network.
        """
        options = self.options
        source = CheckpointSource(options.model, options.revision, embedded_subfolder=EMBEDDED_SUBFOLDERS[mode])
        config = read_json(model_folder(source, "unet", lambda names: ["config.json"]) / "config.json")
        if kind == LORA:  # without weights, so that a mistake is reported before pictures are encoded
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(config)
            self._add_adapters(unet)
        multiple = factor * 2 ** (len(config["block_out_channels"]) - 1)
        sample_size = config.get("sample_size")
        if options.resolution is None and sample_size is None:
            raise InputError("--resolution is required: the config of the unet has no sample_size")
        side = options.resolution or int(sample_size or 0) * factor
        if side % multiple:
            raise invalid("--resolution", side, f"a multiple of {multiple} for this model")
        return side, buckets(side, multiple, aspects=options.aspect_buckets)

    def decoder_objective(self, data: DecoderData, scheduler: Any, mode: str) -> DecoderObjective:
        """Return the objective of a decoder.

        Args:
            data: What it is trained on.
            scheduler: Its scheduler.
            mode: Kind of decoder.
        """
        options = self.options
        return DecoderObjective(
            data.entries,
            data.held_out,
            self.store,
            scheduler,
            data.zero_embed,
            mode=mode,
            weights=LossWeights(options.snr_gamma, options.vlb_weight),
            condition_dropout=options.condition_dropout,
            seed=options.seed,
            device=self.device,
        )

    def load_unet(self, data: DecoderData, mode: str, kind: str) -> Any:
        """Return the decoder's pipeline without MoVQ, after checking that its UNet fits the pictures.

        Args:
            data: What it is trained on.
            mode: Kind of decoder.
            kind: `LORA` for a frozen UNet, or `FULL`.

        Raises:
            InputError: The UNet is of another kind, or for other embeddings.
        """
        pipe = load_decoder(self.options, mode, self._dtype(kind), movq=False)
        unet = checked_unet(pipe, mode, data.latent_channels)
        width = data.zero_embed.shape[1]
        if unet.config.encoder_hid_dim != width:
            raise InputError(
                f"--prior has image embeddings of {width} elements, and the decoder reads "
                f"{unet.config.encoder_hid_dim}: expected the prior that belongs to --model"
            )
        return pipe

    def decoder_stage(self, examples: Sequence[Example], kind: str) -> Stage:
        """Return the stage that trains a decoder.

        Args:
            examples: The pictures.
            kind: `LORA` or `FULL`.

        Raises:
            InputError: An option does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        mode = decoder_mode(self.options)
        data = self.decoder_data(examples, mode, kind)
        pipe = self.load_unet(data, mode, kind)
        unet = pipe.unet
        signature = self.signature(kind, unet, data.entries, mode=mode)
        self.make_trainable(unet, kind)
        objective = self.decoder_objective(data, pipe.scheduler, mode)
        return Stage(
            name="decoder",
            network=unet,
            streams=[Stream(objective, self.plan(data.entries))],
            write_results=self.writer(unet, kind, "unet"),
            signature=signature,
            draw_samples=self.decoder_sheet(data, objective, unet, mode),
        )

    def decoder_sheet(
        self,
        data: DecoderData,
        objective: DecoderObjective,
        unet: Any,
        mode: str,
        drawing: samples.DecoderSamples | None = None,
    ) -> Callable[[], Image]:
        """Return the function that draws a sheet of samples: of prompts if there are any, else of pictures.

        Args:
            data: What the decoder is trained on.
            objective: Its objective.
            unet: The UNet in training.
            mode: Kind of decoder.
            drawing: Draws the samples; None draws them as the checkpoint's pipeline does.
        """
        drawing = drawing or samples.DecoderSamples(self.options, mode, unet, self.device)
        if data.prompts:
            return functools.partial(samples.prompts_sheet, drawing, data.prompts, (data.side, data.side))
        return functools.partial(samples.pictures_sheet, drawing, objective, data.held_out or data.entries, self.store)

    # Results

    def save_pipeline(
        self,
        name: str,
        network: nn.Module,
        *,
        scheduler: Scheduler | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a pipeline with a network that was trained entirely.

        Args:
            name: "prior" or "decoder".
            network: The network.
            scheduler: Its scheduler; None keeps that of the checkpoint.
            defaults: Its generation defaults; None keeps those of the checkpoint.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if name == "prior":
            others = load_prior(self.options, torch.float32, *(each for each in COMPONENTS if each != "prior"))
            pipe: Any = kandinsky22.KandinskyV22PriorPipeline.from_pipe(others, prior=network)
        else:
            mode = decoder_mode(self.options)
            movq = load_decoder(self.options, mode, torch.float32, movq=True)
            pipe = getattr(kandinsky22, DECODER_CLASSES[mode]).from_pipe(movq, unet=network)
        if scheduler is not None:
            pipe.scheduler = scheduler
        if defaults is not None:
            pipe.generation_defaults = defaults
        pipe.to("cpu")
        pipe.save_pretrained(self.folder / name)


def _listed_sizes(entries: Sequence[Entry]) -> str:
    sizes = sorted({entry.size for entry in entries})
    return ", ".join(f"{width}x{height}" for width, height in sizes)
