"""Bodies of requests and responses of the native API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kandinsky22.generation.limits import MAX_SEED, MAX_SIDE, MAX_STEPS

Mode = Literal["generate", "img2img", "inpaint", "control", "mix", "variations"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
UploadId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ImageId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{22}$")]
Text = Annotated[str, Field(max_length=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Integer = Annotated[int, Field(strict=True, ge=-1_000_000, le=1_000_000)]  # otherwise 2 would become 2.0
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1000)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Interval = tuple[Fraction, Fraction]
SchedulerSettings = Annotated[
    dict[
        Annotated[str, Field(max_length=64, pattern=r"^[a-z_]+$")],
        bool | Integer | Number | Annotated[str, Field(max_length=100)],
    ],
    Field(max_length=32),
]
Margin = Annotated[int, Field(ge=0, le=MAX_SIDE)]


class Strict(BaseModel):
    """Base of request bodies: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Picture(Strict):
    """Reference to an input picture: an upload or a picture of the gallery."""

    upload: UploadId | None = None
    image: ImageId | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Picture:
        if (self.upload is None) == (self.image is None):
            raise ValueError("expected exactly one of upload and image")
        return self


class Part(Strict):
    """One text or picture of a mixture."""

    weight: Number = 1.0
    text: Text | None = None
    upload: UploadId | None = None
    image: ImageId | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Part:
        if sum(source is not None for source in (self.text, self.upload, self.image)) != 1:
            raise ValueError("expected exactly one of text, upload and image")
        return self

    def picture(self) -> Picture | None:
        """Return the reference to the picture, or None for a text."""
        return None if self.text is not None else Picture(upload=self.upload, image=self.image)


class JobRequest(Strict):
    """Settings of a job."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"mode": "generate", "prompt": "a red circle on a yellow background", "seed": 7, "quality": "balanced"},
                {"mode": "mix", "parts": [{"weight": 0.6, "text": "a red circle"}, {"weight": 0.4, "text": "a star"}]},
            ]
        },
    )

    mode: Mode = "generate"
    model: Annotated[str, Field(max_length=200)] | None = None
    prompt: Text | None = None
    negative_prompt: Text | None = None
    image: Picture | None = None
    mask: Picture | None = None
    hint: Picture | None = None
    parts: Annotated[list[Part], Field(min_length=1, max_length=64)] | None = None
    strength: Fraction | None = None
    keep_pixels: bool | None = None
    crop: Margin | None = None
    extend: tuple[Margin, Margin, Margin, Margin] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    count: Annotated[int, Field(ge=1)] = 1
    quality: Annotated[str, Field(max_length=50)] | None = None
    scheduler: Annotated[str, Field(max_length=100)] | None = None
    scheduler_settings: SchedulerSettings | None = None
    steps: Steps | None = None
    guidance: Scale | None = None
    prior_scheduler: Annotated[str, Field(max_length=100)] | None = None
    prior_scheduler_settings: SchedulerSettings | None = None
    prior_steps: Steps | None = None
    prior_guidance: Scale | None = None
    prompt_weights: bool | None = None
    guidance_interval: Interval | None = None
    prior_guidance_interval: Interval | None = None
    guidance_rescale: Fraction | None = None
    guidance_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    width: Side | None = None
    height: Side | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    group: Annotated[str, Field(max_length=200)] | None = None
    previews: bool = True

    def pictures(self) -> dict[str, Picture]:
        """Return all input pictures by name: "image", "mask", "hint", "parts.0", ..."""
        named = {name: picture for name in ("image", "mask", "hint") if (picture := getattr(self, name)) is not None}
        for index, part in enumerate(self.parts or ()):
            if (picture := part.picture()) is not None:
                named[f"parts.{index}"] = picture
        return named


class ImageInfo(BaseModel):
    """A picture of the gallery."""

    id: str
    job: str
    group: str | None
    created_at: str
    mode: str
    model: str
    title: str
    seed: int
    width: int
    height: int
    sha256: str
    starred: bool
    url: str
    thumbnail: str


class ImageDetails(ImageInfo):
    """A picture with its recipe and its inputs."""

    recipe: dict[str, Any]
    request: dict[str, Any] | None
    inputs: dict[str, Any]


class Progress(BaseModel):
    """Progress of a running job."""

    stage: Literal["loading", "prior", "decoder", "decode"]
    image: int
    images: int
    step: int
    steps: int
    fraction: float
    seconds_left: float | None


class Failure(BaseModel):
    """Why a job failed."""

    message: str
    code: str


class JobInfo(BaseModel):
    """A job."""

    id: str
    state: State
    mode: str
    request: dict[str, Any]
    group: str | None
    priority: int
    attempts: int
    position: int | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress | None
    images: list[ImageInfo]
    error: Failure | None


class UploadInfo(BaseModel):
    """An uploaded picture."""

    id: str
    width: int
    height: int
    url: str


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    items: list[JobInfo]
    next: str | None


class ImagePage(BaseModel):
    """A page of pictures, newest first."""

    items: list[ImageInfo]
    next: str | None


class ImageChange(Strict):
    """What can be changed about a picture."""

    starred: bool


class HintRequest(Strict):
    """Request to make a hint from a picture."""

    kind: Literal["edges", "depth"]
    image: Picture
    low: Annotated[float, Field(ge=0, le=2000)] | None = None
    high: Annotated[float, Field(ge=0, le=2000)] | None = None


class RecipeInfo(BaseModel):
    """Recipe of a picture file, with the request that repeats it."""

    recipe: dict[str, Any]
    request: dict[str, Any]
    missing: list[str]


class Login(Strict):
    """Body of a login."""

    token: Annotated[str, Field(max_length=1000)]


class ErrorDetails(BaseModel):
    """Description of an error."""

    message: str
    argument: str | None = None
    code: str


class ErrorBody(BaseModel):
    """Body of every error."""

    error: ErrorDetails
