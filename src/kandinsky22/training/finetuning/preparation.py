"""From pictures to cached tensors: every picture is decoded and encoded once, broken ones are named and left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kandinsky22.errors import InputError, KandinskyError
from kandinsky22.inputs import images, masks
from kandinsky22.pipelines.decoder_base import HINT_FACTOR
from kandinsky22.training.finetuning import frames
from kandinsky22.training.finetuning.cache import TensorCache
from kandinsky22.training.finetuning.data import LISTED, Example, PictureBytes, picture_size
from kandinsky22.training.finetuning.networks import Encoders
from kandinsky22.training.finetuning.options import FROM_PRIOR, TrainingOptions

Report = Callable[[str], None]
"""Receives a line of text for the person at the terminal."""


@dataclass(frozen=True)
class Entry:
    """A picture whose tensors are cached.

    Attributes:
        name: Name of the picture, for messages.
        path: Its cache file.
        size: Width and height of its bucket in pixels; (0, 0) where pictures have no size.
        variants: Number of parts and mirror images in the file.
        caption: Its caption; None if it has none.
        sampled: Cache files of image embeddings that the prior sampled for it, one of which the decoder is given; empty
            for the embedding that the encoder computed.
    """

    name: str
    path: Path
    size: tuple[int, int]
    variants: int
    caption: str | None = None
    sampled: tuple[Path, ...] = ()


class Processes(Protocol):
    """The processes of a training. They share the files.

    Attributes:
        process_index: Number of this process, from 0.
        num_processes: Number of processes.
    """

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None:
        """Wait until all processes have called this."""


class Job(Protocol):
    """How a kind of training encodes pictures."""

    def plan(self, example: Example, digest: str, size: tuple[int, int]) -> tuple[dict[str, Any], list[frames.Frame]]:
        """Return the cache key of an example, and the parts that are encoded.

        Args:
            example: The example.
            digest: Digest of the picture's bytes.
            size: Width and height of the picture.
        """

    def encode(self, example: Example, parts: Sequence[frames.Frame]) -> dict[str, Tensor]:
        """Return the tensors of an example, each with one row per part.

        Args:
            example: The example.
            parts: The parts.
        """


def prepare(
    examples: Sequence[Example], job: Job, cache: TensorCache, processes: Processes, report: Report
) -> list[Entry]:
    """Encode the examples that are not cached, shared among the processes.

    Args:
        examples: The examples.
        job: How they are encoded.
        cache: The cache.
        processes: The processes of the training.
        report: Receives a warning per broken picture, and their number.

    Returns:
        The examples that are cached now: all except broken ones.

    Raises:
        InputError: All pictures are broken.
        CheckpointError: The cache cannot be written.
    """
    planned: list[tuple[Example, Entry]] = []
    reasons: dict[str, str] = {}
    for number, example in enumerate(examples):
        try:
            digest = example.picture.digest()
            key, parts = job.plan(example, digest, picture_size(example.picture))
            entry = Entry(example.picture.name, cache.path(key), parts[0].size, len(parts), example.caption)
            if number % processes.num_processes == processes.process_index and cache.read(entry.path) is None:
                cache.write(entry.path, job.encode(example, parts))
        except (InputError, OSError) as error:
            if isinstance(error, KandinskyError) and not isinstance(error, InputError):
                raise  # the cache cannot be written
            reasons[example.picture.name] = str(error)
            continue
        planned.append((example, entry))
    processes.wait_for_everyone()
    entries = [entry for _, entry in planned if entry.path.is_file()]
    for _, entry in planned:
        if not entry.path.is_file():
            reasons[entry.name] = "it cannot be decoded"
    for name, reason in reasons.items():
        report(f"warning: {reason if name in reason else f'{name}: {reason}'}; it is left out")
    if reasons:
        report(f"{len(reasons)} of {len(examples)} pictures are broken and left out")
    if not entries:
        raise InputError(f"none of the {len(examples)} pictures can be read")
    return entries


class DecoderJob:
    """Encoding for a decoder: latents and image embeddings of parts, and their hints or masks.

    Args:
        encoders: The encoders.
        options: Options of the training.
        mode: Kind of decoder.
        sizes: Buckets (width, height).
    """

    def __init__(self, encoders: Encoders, options: TrainingOptions, mode: str, sizes: list[tuple[int, int]]) -> None:
        assert encoders.movq is not None
        self.encoders, self.options, self.mode, self.sizes = encoders, options, mode, sizes
        self.factor = encoders.movq.downscale_factor

    def plan(self, example: Example, digest: str, size: tuple[int, int]) -> tuple[dict[str, Any], list[frames.Frame]]:
        """Return the cache key of an example, and the parts that are encoded.

        Args:
            example: The example.
            digest: Digest of the picture's bytes.
            size: Width and height of the picture.

        Raises:
            InputError: Its hint is missing.
        """
        options = self.options
        bucket = frames.nearest_bucket(size, self.sizes)
        crops = options.crops_per_image if options.random_crop else None
        parts = frames.frames(digest, bucket, crops=crops, flips=options.random_flip)
        key: dict[str, Any] = {
            "kind": "decoder",
            "file": digest,
            "parts": [(part.size, part.position, part.flip) for part in parts],
            "movq": self.encoders.movq_digest,
            "image_encoder": self.encoders.image_digest,
        }
        if self.mode == "hint":
            hint = self._hint_source(example)
            key["hint"] = "edges" if hint is None else hint.digest()
        if self.mode == "inpaint" and example.mask is not None:
            key["mask"] = {"file": example.mask.digest(), "transparent": "black"}
        return key, parts

    def _hint_source(self, example: Example) -> PictureBytes | None:
        if self.options.hint_type == "edges":
            return None
        if example.hint is None:
            raise InputError(f"{example.picture.name} has no hint: add NAME.hint.png, or use --hint-type edges")
        return example.hint

    def encode(self, example: Example, parts: Sequence[frames.Frame]) -> dict[str, Tensor]:
        """Return "latents" (n, 4, h, w), "embeds" (n, D), and "hint" (n, 3, 8 h, 8 w) or "mask" (n, 1, H, W), uint8.

        Args:
            example: The example.
            parts: The parts.

        Raises:
            InputError: A picture cannot be decoded.
            OSError: A file cannot be read.
        """
        image = example.picture.open()
        cut = [part.cut(image) for part in parts]
        tensors = {
            "latents": self.encoders.latents(torch.stack([frames.to_tensor(part) for part in cut])),
            "embeds": self.encoders.image_embeds(cut),
        }
        if self.mode == "hint":
            source = self._hint_source(example)
            # Edges are computed at the size of the hint, so that they have the width that the decoder will see.
            origin = image if source is None else source.open()
            side = [
                (HINT_FACTOR * width // self.factor, HINT_FACTOR * height // self.factor)
                for width, height in (part.size for part in parts)
            ]
            cuts = [
                frames.Frame(size, part.position, part.flip).cut(origin) for size, part in zip(side, parts, strict=True)
            ]
            tensors["hint"] = torch.stack([_as_bytes(frames.edges(hint) if source is None else hint) for hint in cuts])
        if self.mode == "inpaint" and example.mask is not None:
            mask = masks.masks_to_tensor(example.mask.name, example.mask.decode(), (image.height, image.width))
            white = images.array_to_pil(mask.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy())[0]
            tensors["mask"] = torch.stack([_as_bytes(part.cut(white, nearest=True))[:1] for part in parts])
        return tensors


def _as_bytes(image: Any) -> Tensor:
    """Return an RGB image as a tensor (3, H, W) of uint8."""
    return ((frames.to_tensor(image) + 1) * 127.5).round().to(torch.uint8)


class PriorJob:
    """Encoding for the prior: image embeddings of whole pictures.

    Args:
        encoders: The encoders.
        options: Options of the training.
    """

    def __init__(self, encoders: Encoders, options: TrainingOptions) -> None:
        self.encoders, self.options = encoders, options

    def plan(self, example: Example, digest: str, size: tuple[int, int]) -> tuple[dict[str, Any], list[frames.Frame]]:
        """Return the cache key of an example, and its mirror images.

        Args:
            example: The example.
            digest: Digest of the picture's bytes.
            size: Width and height of the picture.
        """
        parts = frames.frames(digest, (0, 0), crops=None, flips=self.options.random_flip)
        flips = [part.flip for part in parts]
        return {"kind": "prior", "file": digest, "flips": flips, "image_encoder": self.encoders.image_digest}, parts

    def encode(self, example: Example, parts: Sequence[frames.Frame]) -> dict[str, Tensor]:
        """Return "embeds" (n, D).

        Args:
            example: The example.
            parts: The mirror images.

        Raises:
            InputError: The picture cannot be decoded.
            OSError: The file cannot be read.
        """
        image = example.picture.open()
        cut = [frames.Frame(image.size, flip=part.flip).cut(image) for part in parts]
        return {"embeds": self.encoders.image_embeds(cut)}


def prepare_texts(
    texts: Sequence[str], encoders: Encoders, cache: TensorCache, processes: Processes
) -> dict[str, Path]:
    """Encode the texts that are not cached, shared among the processes.

    Args:
        texts: The texts.
        encoders: The encoders.
        cache: The cache.
        processes: The processes of the training.

    Returns:
        Cache files by text.
    """
    paths = {}
    for number, text in enumerate(dict.fromkeys(texts)):
        paths[text] = path = cache.path({"kind": "text", "text": text, "text_encoder": encoders.text_digest})
        if number % processes.num_processes == processes.process_index and cache.read(path) is None:
            cache.write(path, encoders.text(text))
    processes.wait_for_everyone()
    return paths


def require_captions(examples: Sequence[Example], options: TrainingOptions) -> None:
    """Check that all pictures have captions, except broken ones, if the training reads captions.

    Args:
        examples: The examples.
        options: Options of the training.

    Raises:
        InputError: Some have none. The message names them.
    """
    if options.stage != "decoder":
        use = "which the prior is trained with"
    elif options.image_embeds == FROM_PRIOR:
        use = f"which --image-embeds {FROM_PRIOR} needs"
    else:
        return
    names = [example.picture.name for example in examples if not example.caption and _has_header(example.picture)]
    if names:
        listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
        raise InputError(f"{len(names)} of {len(examples)} pictures have no caption, {use}: {listed}")


def _has_header(picture: PictureBytes) -> bool:
    try:
        picture_size(picture)
    except (InputError, OSError):
        return False
    return True
