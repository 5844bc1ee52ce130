"""Other pictures that DreamBooth trains on too, so that the decoder keeps drawing them (prior preservation)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kandinsky22
from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import invalid
from kandinsky22.training.finetuning.data import Example, picture_file, read_path
from kandinsky22.training.finetuning.networks import Encoders, decoder_mode, load_decoder
from kandinsky22.training.finetuning.options import SubjectOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.prior_samples import PriorSampling, Sample
from kandinsky22.training.finetuning.stages import Training

CLASS_FOLDER = "class-pictures"


@dataclass(frozen=True)
class ClassPictures:
    """Other pictures, and the image embeddings that they were drawn from.

    Attributes:
        examples: The pictures.
        embeds: Cache files of the embeddings, by name of the picture; none for pictures that were not drawn here.
    """

    examples: list[Example]
    embeds: Mapping[str, Path]

    def with_embeddings(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries of the pictures with the embeddings that they were drawn from.

        The decoder draws prompts from embeddings that the prior samples. Given the same, it keeps what it draws.

        Args:
            entries: The pictures, without broken ones.
        """
        known = self.embeds
        return [
            dataclasses.replace(entry, sampled=(known[entry.name],)) if entry.name in known else entry
            for entry in entries
        ]


def class_pictures(training: Training, options: SubjectOptions) -> ClassPictures:
    """Return the pictures of a folder, or those of the prompts, after drawing those that are missing.

    Args:
        training: The training.
        options: Its options.

    Raises:
        InputError: There is no such folder, or the decoder is not the plain one.
        CheckpointError: Files are missing or damaged, or the cache cannot be written.
    """
    if options.class_data_dir is not None:
        examples = read_path(Path(options.class_data_dir), "--class-data-dir")
        return ClassPictures(examples[: options.num_class_images], {})
    if (mode := decoder_mode(options)) != "plain":
        advice = "name a folder of pictures with --class-data-dir"
        raise invalid("--class-prompt", options.class_prompt, f"None for a decoder of the kind {mode}", advice)
    prompts, count = options.class_prompt, options.num_class_images
    samples = [Sample(prompts[number % len(prompts)], number // len(prompts)) for number in range(count)]
    embeds = [entry.path for entry in PriorSampling(training).embeddings(samples)]
    folder = training.folder / CLASS_FOLDER
    pictures = [folder / _name(number, path, options) for number, path in enumerate(embeds)]
    if training.is_main:
        _draw_missing(training, options, samples, embeds, pictures)
    training.accelerator.wait_for_everyone()
    examples = [Example(picture_file(path)) for path in pictures]
    return ClassPictures(examples, {str(path): file for path, file in zip(pictures, embeds, strict=True)})


def _name(number: int, embeds: Path, options: SubjectOptions) -> str:
    """Return the name of a drawn picture, which tells apart pictures of other embeddings, decoders and sizes."""
    text = f"{embeds.name} {options.model} {options.revision} {options.resolution}"
    return f"{number:05d}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}.png"


def _draw_missing(
    training: Training,
    options: SubjectOptions,
    samples: Sequence[Sample],
    embeds: Sequence[Path],
    pictures: Sequence[Path],
) -> None:
    """Draw the pictures whose files do not exist, one per embedding."""
    missing = [number for number, path in enumerate(pictures) if not path.is_file()]
    if not missing:
        return
    training.report(f"draws {len(missing)} pictures of {', '.join(map(repr, options.class_prompt))}")
    encoders = Encoders.load(options, "plain", training.device, training.low_dtype, latents=True, texts=False)
    zero_embed, movq = encoders.zero_embed(), encoders.movq
    del encoders
    decoder = load_decoder(options, "plain", training.low_dtype, movq=False)
    pipe = kandinsky22.KandinskyV22Pipeline.from_pipe(decoder, movq=movq).to(training.device)
    pipe.set_progress_bar_config(disable=True)
    size = {} if options.resolution is None else {"height": options.resolution, "width": options.resolution}
    for number in missing:
        result: Any = pipe(
            image_embeds=training.store[embeds[number]]["embeds"],
            negative_image_embeds=zero_embed,
            generator=samples[number].generator(options.seed),
            **{**pipe.generation_defaults, **size},
        )
        with atomic_write(pictures[number]) as temporary:
            result.images[0].save(temporary, format="PNG")
    del pipe, decoder, movq
    training.free()
