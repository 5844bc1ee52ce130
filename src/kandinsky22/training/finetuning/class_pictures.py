"""Class pictures of DreamBooth: the decoder is trained on them too, so that it keeps drawing them.

Ruiz et al. 2022 (https://arxiv.org/abs/2208.12242) call this prior preservation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kandinsky22
from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.errors import CheckpointError, InputError, invalid
from kandinsky22.training.finetuning.data import LISTED, Example, picture_file, read_path
from kandinsky22.training.finetuning.networks import Encoders, decoder_mode, load_decoder
from kandinsky22.training.finetuning.options import SubjectOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.prior_samples import PriorSampling, Sample
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import LORA

CLASS_FOLDER = "class-pictures"
LARGEST_BATCH = 4  # pictures that are drawn together: guidance doubles them, and MoVQ decodes them in float32


@dataclass(frozen=True)
class ClassPictures:
    """Class pictures, and the image embeddings that they were drawn from.

    Attributes:
        examples: The pictures.
        embeds: Cache files of the embeddings, by name of the picture; empty if the pictures were not drawn here.
    """

    examples: list[Example]
    embeds: Mapping[str, Path]

    def with_embeddings(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries of drawn pictures with the embeddings that they were drawn from.

        The decoder draws prompts from embeddings that the prior samples. Training with the same embeddings preserves
        what it draws. Mirror images and parts have other embeddings, so entries of drawn pictures have none.

        Args:
            entries: The class pictures, without broken ones.
        """
        if not self.embeds:
            return list(entries)
        return [dataclasses.replace(entry, sampled=(self.embeds[entry.name],), variants=1) for entry in entries]


def class_pictures(training: Training, options: SubjectOptions) -> ClassPictures:
    """Return the pictures of a folder, or those of the prompts, after drawing those that are missing.

    Args:
        training: The training.
        options: Its options.

    Raises:
        InputError: The folder does not exist or contains no pictures; or prompts are given for an inpainting or hint
            decoder.
        CheckpointError: Files are missing or damaged, or cannot be written.
    """
    if options.class_data_dir is not None:
        examples = read_path(Path(options.class_data_dir), "--class-data-dir")[: options.num_class_images]
        if not examples:
            raise InputError(f"--class-data-dir {options.class_data_dir} contains no pictures")
        return ClassPictures(examples, {})
    if (mode := decoder_mode(options)) != "plain":
        advice = "name a folder of pictures with --class-data-dir"
        raise invalid(
            "--class-prompt", " ".join(options.class_prompt), f"none for a decoder of the kind {mode}", advice
        )
    return _drawn_pictures(training, options)


def _drawn_pictures(training: Training, options: SubjectOptions) -> ClassPictures:
    """Return the pictures of the prompts, after the processes have drawn those that are missing or damaged."""
    prompts = tuple(dict.fromkeys(options.class_prompt))
    samples = [
        Sample(prompts[number % len(prompts)], number // len(prompts)) for number in range(options.num_class_images)
    ]
    encoders = Encoders.load(options, "plain", training.device, training.low_dtype, latents=True, texts=False)
    zero_embed, image_digest, movq = encoders.zero_embed(), encoders.image_digest, encoders.movq
    assert movq is not None
    del encoders
    side, _ = training.sizes("plain", movq.downscale_factor, LORA)  # before anything is drawn
    embeds = [entry.path for entry in PriorSampling(training).embeddings(samples)]
    decoder = load_decoder(options, "plain", training.low_dtype, movq=False)
    pipe = kandinsky22.KandinskyV22Pipeline.from_pipe(decoder, movq=movq)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**pipe.generation_defaults, "height": side, "width": side}
    key = {
        "weights": weights_digest({"unet": pipe.unet, "movq": movq}),
        "image encoder": image_digest,  # of the negative embedding
        "scheduler": {name: repr(value) for name, value in pipe.scheduler.config.items()},
        "arguments": {name: repr(value) for name, value in arguments.items()},
        "dtype": str(training.low_dtype),
    }
    folder = training.folder / CLASS_FOLDER
    examples = [
        Example(picture_file(folder / _file_name(number, {**key, "embeds": path.name})))
        for number, path in enumerate(embeds)
    ]
    missing = [number for number, example in enumerate(examples) if not _is_whole(example)]
    if missing:
        named = list(dict.fromkeys(samples[number].prompt for number in missing))
        listed = ", ".join(map(repr, named[:LISTED])) + (", ..." if len(named) > LISTED else "")
        training.report(f"draws {len(missing)} pictures of {listed}")
    processes = training.accelerator
    processes.wait_for_everyone()  # all of them have listed the same pictures
    own = missing[processes.process_index :: processes.num_processes]
    if own:  # the names of the pictures need the decoder's weights, but not on the device
        pipe.to(training.device)
    size = min(options.train_batch_size, LARGEST_BATCH)
    for batch in (own[first : first + size] for first in range(0, len(own), size)):
        result: Any = pipe(
            image_embeds=torch.cat([training.store[embeds[number]]["embeds"] for number in batch]),
            negative_image_embeds=zero_embed.expand(len(batch), -1),
            generator=[samples[number].generator(options.seed) for number in batch],
            **arguments,
        )
        for number, image in zip(batch, result.images, strict=True):
            _write(image, Path(examples[number].picture.name))
    del pipe, decoder, movq
    training.free()
    processes.wait_for_everyone()
    names = [example.picture.name for example in examples]
    return ClassPictures(examples, dict(zip(names, embeds, strict=True)))


def _file_name(number: int, key: Mapping[str, Any]) -> str:
    """Return the name of a picture's file, with a digest of everything that the picture depends on."""
    return f"{number:05d}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.png"


def _is_whole(example: Example) -> bool:
    try:
        example.picture.open()
    except (InputError, OSError):
        return False
    return True


def _write(image: Any, path: Path) -> None:
    try:
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG")
    except OSError as error:
        raise CheckpointError(f"the class picture {path} cannot be written: {error}") from error
