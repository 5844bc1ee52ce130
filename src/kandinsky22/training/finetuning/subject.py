"""Learning a subject from a few pictures: one image embedding, or adapters of the decoder (DreamBooth).

Inversion learns a point in the space of image embeddings for which the frozen decoder reproduces the pictures best.
It is textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618) in the space that this decoder reads.
DreamBooth (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242) trains on class pictures as well, so that the decoder
keeps drawing them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from kandinsky22.adapters.files import write_adapter
from kandinsky22.checkpoints.fingerprint import tensors_digest
from kandinsky22.checkpoints.subject_file import Subject, save_subject
from kandinsky22.training.finetuning import lora, preparation, samples
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.class_pictures import ClassPictures, class_pictures
from kandinsky22.training.finetuning.data import Example, read_examples
from kandinsky22.training.finetuning.losses import LossWeights
from kandinsky22.training.finetuning.networks import decoder_mode, freeze, load_prior
from kandinsky22.training.finetuning.objectives import DecoderObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import SubjectOptions
from kandinsky22.training.finetuning.preparation import Entry, Report
from kandinsky22.training.finetuning.run import Stage, Stream
from kandinsky22.training.finetuning.stages import DecoderData, Training
from kandinsky22.training.finetuning.training_base import LORA, lines_digest

FILE = "subject.safetensors"
INVERSION, DREAMBOOTH = "inversion", "dreambooth"
SAMPLES = 4  # pictures of the subject on a sheet


class SubjectVector(nn.Module):
    """A learned image embedding, in units of the standard deviation of image embeddings.

    Args:
        start: Image embedding (1, D) that learning starts at.
        std: Standard deviation (1, D) of image embeddings.
    """

    def __init__(self, start: Tensor, std: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(start))
        self.start: Tensor
        self.std: Tensor
        self.register_buffer("start", start.clone())
        self.register_buffer("std", std.clone())

    def forward(self, count: int) -> Tensor:
        """Return the embedding in several rows, (count, D).

        Args:
            count: Number of rows.
        """
        return (self.start + self.std * self.offset).expand(count, -1)


class InversionObjective(DecoderObjective):
    """Denoising of latents by a frozen decoder, given the learned embedding.

    Args:
        unet: The decoder's UNet, which is frozen.
        **arguments: Arguments of `DecoderObjective`.
    """

    def __init__(self, unet: nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unet = unet

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        batch = self.batch(draws, entries, training=training)
        condition = {**batch.condition, "image_embeds": network(len(draws))}
        return self.denoising(self.unet, dataclasses.replace(batch, condition=condition))


def train_subject(options: SubjectOptions, report: Report | None = None) -> list[Path]:
    """Learn a subject.

    Args:
        options: Options of the training.
        report: Receives lines of text for the person at the terminal; None shows nothing.

    Returns:
        The result: one file, of the embedding or of the adapters. Empty in processes other than the first.

    Raises:
        InputError: An option, or the data set, is invalid.
        CheckpointError: A file is missing, damaged or cannot be written.
        MissingDependencyError: A package is not installed.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    training = Training(options, new_accelerator(options), report)
    examples = read_examples(options)
    preparation.require_captions(examples, options)
    training.check_folders("subject")
    invert = options.method == INVERSION
    stage = _inversion(training, options, examples) if invert else _dreambooth(training, options, examples)
    training.run(stage)
    if not training.is_main:
        return []
    if not invert:
        return [write_adapter(training.folder, {"unet": lora.trained_adapter(stage.network)})]
    stage.write_results(training.folder, dict(stage.network.named_parameters()))
    return [training.folder / FILE]


# Inversion


def _inversion(training: Training, options: SubjectOptions, examples: Sequence[Example]) -> Stage:
    data = training.decoder_data(examples, "plain", INVERSION)
    pipe = training.load_unet(data, "plain", LORA)
    unet = pipe.unet.to(training.device)
    freeze(unet)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    std = load_prior(options, torch.float32, "prior").prior.clip_std.detach().float()
    deviation = tensors_digest({"std": std})[:16]
    embeds = torch.cat([training.store[entry.path]["embeds"] for entry in data.entries])
    vector = SubjectVector(embeds.mean(0, keepdim=True), std)
    objective = InversionObjective(
        unet,
        entries=data.entries,
        held_out=data.held_out,
        store=training.store,
        scheduler=pipe.scheduler,
        zero_embed=data.zero_embed,
        weights=LossWeights(options.snr_gamma, 0.0),
        condition_dropout=0.0,
        seed=options.seed,
        device=training.device,
    )

    def write(folder: Path, values: Mapping[str, Tensor]) -> None:
        offset = values["offset"].to(vector.start)
        embedding = vector.start + vector.std * offset
        save_subject(folder / FILE, Subject(embedding, data.image_digest, len(data.entries)))

    drawing = samples.DecoderSamples(options, "plain", unet, training.device)
    return Stage(
        name="subject",
        network=vector,
        streams=[Stream(objective, training.plan(data.entries))],
        write_results=write,
        signature=training.signature(INVERSION, unet, data.entries, **{"deviation of embeddings": deviation}),
        draw_samples=functools.partial(_subject_sheet, drawing, vector, data, training),
    )


def _subject_sheet(
    drawing: samples.DecoderSamples, vector: SubjectVector, data: DecoderData, training: Training
) -> Image:
    """Return the pictures that the subject is learned from, and pictures of the learned embedding."""
    shown = [entry for entry in data.entries if entry.size == data.entries[0].size][:SAMPLES]
    originals = [drawing.decoded(training.store[entry.path]["latents"][0]) for entry in shown]
    embedding = vector(1).detach().cpu()
    drawn = [
        drawing.draw(
            embedding,
            data.zero_embed,
            data.entries[0].size,
            generator=torch.Generator().manual_seed(training.options.seed + number),
        )
        for number in range(len(shown))
    ]
    return samples.grid([*originals, *drawn], columns=len(shown))


# DreamBooth


def _dreambooth(training: Training, options: SubjectOptions, examples: Sequence[Example]) -> Stage:
    mode = decoder_mode(options)
    pictures = class_pictures(training, options) if options.prior_loss_weight > 0 else ClassPictures([], {})
    data = training.decoder_data(examples, mode, LORA, pictures.examples)
    preserved = pictures.with_embeddings(data.preserved)
    pipe = training.load_unet(data, mode, LORA)
    class_signature: dict[str, Any] = {}
    if preserved:
        # The bytes of a picture that is drawn again may differ by rounding; its name does not.
        names = [Path(entry.name).name if entry.sampled else entry.path.name for entry in preserved]
        class_signature = {
            "--class-prompt": list(dict.fromkeys(options.class_prompt)),
            "number of class pictures": len(preserved),
            "class pictures": lines_digest(names),
        }
    signature = training.signature(LORA, pipe.unet, data.entries, mode=mode, **class_signature)
    training.make_trainable(pipe.unet, LORA)
    objective = training.decoder_objective(data, pipe.scheduler, mode)
    streams = [Stream(objective, training.plan(data.entries))]
    if preserved:
        class_data = dataclasses.replace(data, entries=preserved, held_out=[], prompts=[], preserved=[])
        class_objective = training.decoder_objective(class_data, pipe.scheduler, mode)
        plan = training.plan(preserved, stream=1)
        streams.append(Stream(class_objective, plan, options.prior_loss_weight, "class_"))
    return Stage(
        name="subject",
        network=pipe.unet,
        streams=streams,
        write_results=training.writer(pipe.unet, LORA, "unet"),
        signature=signature,
        draw_samples=training.decoder_sheet(data, objective, pipe.unet, mode),
    )
