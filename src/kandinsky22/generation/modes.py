"""The modes of generation, each declared by its inputs and its pipeline classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from kandinsky22.generation.limits import DEFAULT_STRENGTH
from kandinsky22.generation.request import Request

MAX_PRESET_STEPS = 50  # LCMScheduler has 50 timesteps
PRIOR, PRIOR_EMB2EMB = "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"


@dataclasses.dataclass(frozen=True)
class DependentSetting:
    """A setting that has an effect only together with another one.

    Attributes:
        name: Field of `Request`.
        other: Field of `Request` that must be set too.
    """

    name: str
    other: str


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode of generation.

    Attributes:
        name: Name of the mode in recipes and on the command line.
        inputs: Fields of `Request` that the mode has and that not every mode has.
        required: Required fields of `Request`.
        decoder_class: Function from the request to the name of the decoder's pipeline class.
        prior_class: Function from the request to the name of the prior's pipeline class.
        alternatives: Required fields that another field replaces: field to field of the other one.
        dependent: Settings that have an effect only together with another one.
        base_images: Fields of the images that the result is generated over, pixel on pixel. The first one that is set
            determines the default size.
        published_model: Hub id of the published weights.
    """

    name: str
    inputs: tuple[str, ...]
    required: tuple[str, ...]
    decoder_class: Callable[[Request], str]
    prior_class: Callable[[Request], str] = lambda request: PRIOR
    alternatives: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dependent: tuple[DependentSetting, ...] = ()
    base_images: tuple[str, ...] = ()
    published_model: str = "kandinsky-community/kandinsky-2-2-decoder"

    def missing_setting(self, request: Request) -> str | None:
        """Return the first required field that is not set, or None.

        Args:
            request: The request.
        """
        for field in self.required:
            if getattr(request, field) is None and getattr(request, self.alternatives.get(field, field)) is None:
                return field
        return None

    def ineffective_setting(self, request: Request) -> DependentSetting | None:
        """Return the first setting that has no effect because another one is not set, or None.

        Args:
            request: The request.
        """
        for setting in self.dependent:
            if getattr(request, setting.name) is not None and getattr(request, setting.other) is None:
                return setting
        return None

    def with_decoder_step(self, request: Request) -> Request:
        """Return a request with the steps of a preset, increased until `strength` leaves the decoder one of them.

        Args:
            request: The request. Its number of steps is that of a preset.
        """
        strength = DEFAULT_STRENGTH if request.strength is None else request.strength
        starts_from_image = "strength" in self.inputs and "image" in self.base_images and request.image is not None
        if not starts_from_image or not strength or request.steps is None:
            return request
        numbers = range(request.steps, max(request.steps, MAX_PRESET_STEPS) + 1)
        steps = next((number for number in numbers if int(number * strength)), request.steps)
        return dataclasses.replace(request, steps=steps)


_ALL_MODES = (
    Mode(
        name="generate",
        inputs=("prompt", "subject"),
        required=("prompt",),
        decoder_class=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="img2img",
        inputs=("prompt", "image", "strength"),
        required=("prompt", "image"),
        decoder_class=lambda request: "KandinskyV22Img2ImgPipeline",
        base_images=("image",),
    ),
    Mode(
        name="inpaint",
        inputs=("prompt", "image", "mask", "keep_pixels", "crop", "extend"),
        required=("prompt", "image", "mask"),
        alternatives={"mask": "extend"},
        decoder_class=lambda request: "KandinskyV22InpaintPipeline",
        base_images=("image", "mask"),
        published_model="kandinsky-community/kandinsky-2-2-decoder-inpaint",
    ),
    Mode(
        name="control",
        inputs=("prompt", "hint", "image", "strength"),
        required=("prompt", "hint"),
        decoder_class=lambda request: f"KandinskyV22Controlnet{'' if request.image is None else 'Img2Img'}Pipeline",
        dependent=(DependentSetting("strength", "image"),),
        base_images=("hint", "image"),
        published_model="kandinsky-community/kandinsky-2-2-controlnet-depth",
    ),
    Mode(
        name="mix",
        inputs=("parts",),
        required=("parts",),
        decoder_class=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="variations",
        inputs=("image", "prompt", "strength"),
        required=("image",),
        decoder_class=lambda request: "KandinskyV22Pipeline",
        prior_class=lambda request: PRIOR if request.prompt is None else PRIOR_EMB2EMB,
        dependent=(DependentSetting("strength", "prompt"),),
    ),
)
MODES: Mapping[str, Mode] = {mode.name: mode for mode in _ALL_MODES}
