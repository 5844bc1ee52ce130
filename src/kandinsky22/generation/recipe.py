"""The recipe of an image: everything that is needed to generate it again, stored as text in the image's file.

`Recipe.texts` returns the texts that are written into an image file, `read_recipe` reads them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22 import __version__
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.image_files import GALLERY_KEYWORD, RECIPE_KEYWORD, embedded_recipe
from kandinsky22.generation.limits import check_interval, check_size
from kandinsky22.generation.recipe_json import parse_fields, parse_object

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RECIPE_FORMAT = 1  # format number in the JSON


@dataclasses.dataclass(frozen=True)
class InputFile:
    """Record of an input image file.

    Attributes:
        name: Path as on the command line.
        sha256: Hexadecimal SHA-256 of the file's bytes.
    """

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.sha256}"


@dataclasses.dataclass(frozen=True)
class AppliedAdapter:
    """Record of an adapter of the networks.

    Attributes:
        name: Path or Hub id as on the command line.
        sha256: Hexadecimal SHA-256 of the file's bytes.
        weight: Factor of the adapter.
    """

    name: str
    sha256: str
    weight: float

    def __str__(self) -> str:
        return f"{self.weight:g} of {self.name}, sha256 {self.sha256}"


@dataclasses.dataclass(frozen=True)
class MixtureItem:
    """One text, image or learned subject of a mixture of embeddings.

    Attributes:
        weight: Factor of the item's embedding.
        text: The text, or None.
        image: The image file, or None.
        subject: The file of a learned subject, or None. Exactly one of `text`, `image` and `subject` is set.
    """

    weight: float
    text: str | None = None
    image: InputFile | None = None
    subject: InputFile | None = None

    def __post_init__(self) -> None:
        if [self.text, self.image, self.subject].count(None) != 2:
            raise ValueError("a mixed item is not exactly one of a text, an image and a subject")

    @property
    def file(self) -> InputFile | None:
        """The file of an image or a subject; None for a text."""
        return self.image or self.subject


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings that generated one image, or all images of a contact sheet. None marks an unused setting.

    The field names are the keys of the JSON in the image file.

    Attributes:
        seeds: One seed per image.
        model: Folder or Hub id of the decoder, or "embedded".
        model_digest: Fingerprint of the networks' weights.
        scheduler: Class name of the decoder's scheduler.
        steps: Number of decoder steps.
        prior_steps: Number of prior steps.
        guidance: Guidance scale of the decoder.
        prior_guidance: Guidance scale of the prior.
        width: Image width in pixels.
        height: Image height in pixels.
        device: Device that ran the networks.
        dtype: Name of the floating-point type.
        hardware: Name of the GPU, or architecture and instruction set of the CPU.
        versions: Versions of the software that determines the pixels, by package.
        command: Subcommand.
        prompt: The prompt.
        negative_prompt: The negative prompt.
        image: Input image of img2img, inpaint, control and variations.
        mask: Mask of inpaint.
        hint: Hint of control.
        parts: Items of mix.
        subject: Learned subject that generate mixes with the prompt, whose weight is 1 minus that of the subject.
        strength: Fraction of the denoising process that runs, from 0 to 1.
        keep_pixels: Whether inpaint copies the pixels outside the mask.
        crop: Padding of the crop around the mask that inpaint repaints, in pixels; width and height are those of the
            crop as it is generated.
        extend: Left, top, right and bottom margin that inpaint adds, in pixels.
        prior: Folder or Hub id of the prior; None for the prior that belongs to `model`.
        scheduler_settings: Scheduler settings that replace those of the checkpoint.
        prior_scheduler: Class name of the prior's scheduler.
        prior_scheduler_settings: Like `scheduler_settings`, for the prior.
        prompt_weights: Whether brackets in texts are weights.
        guidance_interval: (start, end) of guidance, as fractions of the denoising process.
        guidance_rescale: Guidance rescale factor, from 0 to 1.
        guidance_threshold: Quantile of dynamic thresholding.
        prior_guidance_interval: Like `guidance_interval`, for the prior.
        lora: Adapters of the networks.
        tiny_decoder: File, folder or Hub id of the tiny decoder, and the digest of its weights.
        quantize: Kind of quantized weights.
        cache_every: Interval of full UNet evaluations with feature caching, in steps.
        engine: What ran prior, UNet and MoVQ, such as "openvino"; None for PyTorch.
        batch_size: Largest number of images that ran together; None for an image that was generated alone. The same
            image alone is equal up to rounding.
    """

    seeds: tuple[int, ...]
    model: str
    model_digest: str
    scheduler: str
    steps: int
    prior_steps: int
    guidance: float
    prior_guidance: float
    width: int
    height: int
    device: str
    dtype: str
    hardware: str
    versions: Mapping[str, str]
    command: str = "generate"
    prompt: str | None = None
    negative_prompt: str | None = None
    image: InputFile | None = None
    mask: InputFile | None = None
    hint: InputFile | None = None
    parts: tuple[MixtureItem, ...] | None = None
    subject: MixtureItem | None = None
    strength: float | None = None
    keep_pixels: bool | None = None
    crop: int | None = None
    extend: tuple[int, ...] | None = None
    prior: str | None = None
    scheduler_settings: Mapping[str, Any] | None = None
    prior_scheduler: str | None = None
    prior_scheduler_settings: Mapping[str, Any] | None = None
    prompt_weights: bool | None = None
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float | None = None
    guidance_threshold: float | None = None
    prior_guidance_interval: tuple[float, ...] | None = None
    lora: tuple[AppliedAdapter, ...] | None = None
    tiny_decoder: InputFile | None = None
    quantize: str | None = None
    cache_every: int | None = None
    engine: str | None = None
    batch_size: int | None = None

    def to_json(self) -> str:
        """Return the recipe as JSON with its format number; fields that are None are left out."""
        entries = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps({"format": RECIPE_FORMAT, **entries}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> Recipe:
        """Return the recipe that `to_json` wrote.

        Args:
            text: The JSON.
            origin: Name of the file that contains it, for error messages.

        Raises:
            InputError: If the text is not a recipe of this format.
        """
        try:
            entries = parse_object(text)
            if entries.pop("format", None) != RECIPE_FORMAT:
                raise ValueError("another version of kandinsky22 wrote it in another format")
            recipe = cls(**parse_fields(cls, entries))
            check_size("size", (recipe.width, recipe.height))
            if len(set(recipe.seeds)) < len(recipe.seeds):  # their images would have the same name
                raise invalid("seeds", recipe.seeds, "different seeds")
            if recipe.subject is not None and not 0 <= recipe.subject.weight <= 1:
                raise invalid("subject.weight", recipe.subject.weight, "a number from 0 to 1")
            for name in ("guidance_interval", "prior_guidance_interval"):
                if (interval := getattr(recipe, name)) is not None:
                    check_interval(name, interval)
            return recipe
        except ValueError as error:
            raise InputError(f"the recipe in {origin} cannot be read: {error}") from error

    def texts(self) -> dict[str, str]:
        """Return the texts of the image file by name: the JSON, and a summary that image galleries can show."""
        return {
            RECIPE_KEYWORD: self.to_json(),
            GALLERY_KEYWORD: self._gallery_parameters(),
            "Software": f"kandinsky22 {__version__}",
        }

    def summary(self) -> list[tuple[str, str]]:
        """Return the recipe as (name, value) pairs for display."""
        inputs = {
            "prompt": self.prompt,
            "negative prompt": self.negative_prompt,
            "prompt weights": "yes" if self.prompt_weights else None,
            "image": self.image,
            "mask": self.mask,
            "hint": self.hint,
            "strength": None if self.strength is None else f"{self.strength:g}",
            "keep pixels": None if self.keep_pixels is None else "yes" if self.keep_pixels else "no",
            "crop padding": self.crop,
            "extended by": None if self.extend is None else ",".join(map(str, self.extend)),
        }
        return [
            ("command", self.command),
            *((name, str(value)) for name, value in inputs.items() if value is not None),
            *(("mixed in", f"{item.weight:g} of {item.file or item.text}") for item in self._mixed()),
            ("seed", _join(self.seeds)),
            ("size", f"{self.width}x{self.height}"),
            ("steps", f"{self.steps}, prior {self.prior_steps}"),
            ("guidance", f"{self.guidance:g}, prior {self.prior_guidance:g}"),
            *self._guidance_summary().items(),
            *self._scheduler_summary().items(),
            ("model", self.model),
            *([("prior", self.prior)] if self.prior is not None else []),
            *(("adapter", str(adapter)) for adapter in self.lora or ()),
            *self.approximations().items(),
            *([("batch size", str(self.batch_size))] if self.batch_size is not None else []),
            ("digest", self.model_digest),
            *([("engine", self.engine)] if self.engine is not None else []),
            ("device", f"{self.device}, {self.dtype}, {self.hardware}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]

    def _mixed(self) -> tuple[MixtureItem, ...]:
        """Return the items of mix, or the subject that is mixed with the prompt."""
        return self.parts or (() if self.subject is None else (self.subject,))

    def approximations(self) -> dict[str, str]:
        """Return the active options that change the image for speed or memory, by name."""
        return {
            **({} if self.quantize is None else {"quantized": self.quantize}),
            **(
                {}
                if self.tiny_decoder is None
                else {"tiny decoder": f"{self.tiny_decoder.name} ({self.tiny_decoder.sha256[:12]})"}
            ),
            **({} if self.cache_every is None else {"cached": f"all of the UNet every {self.cache_every} steps"}),
        }

    def _guidance_summary(self) -> dict[str, str]:
        """Return the active guidance options."""
        rescale, threshold = self.guidance_rescale, self.guidance_threshold
        intervals = {"guided from": self.guidance_interval, "prior guided from": self.prior_guidance_interval}
        return {
            **{name: " to ".join(f"{end:g}" for end in interval) for name, interval in intervals.items() if interval},
            **({} if rescale is None else {"guidance rescaled": f"{rescale:g}"}),
            **({} if threshold is None else {"guidance threshold": f"{threshold:g}"}),
        }

    def _scheduler_summary(self) -> dict[str, str]:
        """Return both schedulers with the settings that differ from the checkpoint's."""
        schedulers = {
            "scheduler": (self.scheduler, self.scheduler_settings),
            "prior scheduler": (self.prior_scheduler, self.prior_scheduler_settings),
        }
        return {
            name: ", ".join([class_name, *(f"{key}={value}" for key, value in (settings or {}).items())])
            for name, (class_name, settings) in schedulers.items()
            if class_name is not None
        }

    def _gallery_parameters(self) -> str:
        """Return the layout that image galleries parse: prompt, negative prompt, then all settings on one line."""
        settings = {
            "Steps": self.steps,
            "Sampler": self.scheduler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": _join(self.seeds),
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_digest[:10],
            "Model": self.model,
            **({} if self.strength is None else {"Denoising strength": f"{self.strength:g}"}),
            "Prior steps": self.prior_steps,
            "Prior CFG scale": f"{self.prior_guidance:g}",
            **({} if self.lora is None else {"Lora hashes": self._gallery_hashes()}),
            "Version": f"kandinsky22 {self.versions.get('kandinsky22', __version__)}",
        }
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt is not None else []
        return "\n".join(
            [self._subject(), *negative, ", ".join(f"{name}: {value}" for name, value in settings.items())]
        )

    def _gallery_hashes(self) -> str:
        """Return names and digests of adapters, in quotation marks because they contain commas."""
        stems = (re.sub(r'[",:\s]+', "_", Path(adapter.name).stem) for adapter in self.lora or ())
        hashes = zip(stems, self.lora or (), strict=True)
        return f'"{", ".join(f"{stem}: {adapter.sha256[:12]}" for stem, adapter in hashes)}"'

    def _subject(self) -> str:
        """Return the prompt, or what the image was generated from instead."""
        if self.prompt is not None:
            return self.prompt
        if self.parts is not None:
            return " + ".join(str(item.file.name if item.file else item.text) for item in self.parts)
        return f"{self.command} of {self.image and self.image.name}"


def read_recipe(path: Path) -> Recipe:
    """Return the recipe that an image file contains.

    Args:
        path: The image file.

    Raises:
        InputError: If the file cannot be opened, is not an image, is damaged, or contains no readable recipe.
    """
    from PIL import UnidentifiedImageError

    from kandinsky22.inputs.sources import decoded, read_bytes

    content = read_bytes("image file", str(path))
    try:
        # Text chunks after the pixels are known only after the pixels have been read.
        with decoded("image file", content) as image:
            text = embedded_recipe(image)
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image file") from None
    except Exception as error:  # PIL raises almost any class for damaged files
        raise InputError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    if text is None:
        raise InputError(f"{path} contains no recipe; kandinsky22 writes recipes into the images that it generates")
    if content.startswith(PNG_SIGNATURE) and _count_recipe_chunks(content) > 1:
        raise InputError(f"{path} contains several recipes; another program has changed the file")
    return Recipe.from_json(text, origin=str(path))


def _count_recipe_chunks(content: bytes) -> int:
    """Return the number of text chunks with recipes in a PNG file (PNG specification, section 5.3)."""
    position, count = len(PNG_SIGNATURE), 0
    while position + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind, data = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        if kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(RECIPE_KEYWORD.encode() + b"\0"):
            count += 1
        position += length + 12
    return count


def _join(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
