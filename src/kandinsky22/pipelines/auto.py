"""Pipelines by task: the class follows from the task and from the class that the checkpoint names."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Generic, TypeVar, cast

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.errors import InputError, describe
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.combined import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)

P = TypeVar("P", bound=DiffusionPipeline)


class AutoPipeline(Generic[P]):
    """Base class of the three tasks.

    Attributes:
        task: Name of the task, for messages.
        embedded_subfolder: Folder of the embedded model for this task.
        pipeline_class: The class that performs the task.
        accepted_classes: Classes that a checkpoint with suitable weights may name.
    """

    task: ClassVar[str]
    embedded_subfolder: ClassVar[str] = "decoder"
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    accepted_classes: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        raise InputError(f"{type(self).__name__} cannot be constructed: call from_pretrained or from_pipe")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> P:
        """Return the pipeline that performs this task with a checkpoint.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or "embedded".
            revision: Branch, tag or commit on the Hub; None for the default branch.
            cache_dir: Folder of the Hub cache; None for the default.
            local_files_only: Make no network request and use only cached files.
            token: Access token of the Hub; None for the stored one.
            **options: Other arguments of `DiffusionPipeline.from_pretrained`.

        Raises:
            InputError: If the checkpoint is for another task.
            CheckpointError: If files are missing or damaged.
        """
        token = options.pop("use_auth_token", None) if token is None else token
        source = CheckpointSource(
            pretrained_model_name_or_path, revision, cache_dir, token, local_files_only, cls.embedded_subfolder
        )
        folder = source.fetch(lambda files: {DiffusionPipeline.config_name} & set(files))
        return cls._pipeline_class(
            read_json(folder / DiffusionPipeline.config_name).get("_class_name")
        ).from_pretrained(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            **options,
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> P:
        """Return the pipeline that performs this task with the components of another one, shared and not copied.

        Args:
            pipeline: The other pipeline.
            **components: Components that replace or complement those of `pipeline`.

        Raises:
            InputError: If the weights of `pipeline` are for another task.
        """
        return cls._pipeline_class(type(pipeline).__name__).from_pipe(pipeline, **components)

    @classmethod
    def _pipeline_class(cls, name: Any) -> type[P]:
        if name not in cls.accepted_classes:
            class_name = name if isinstance(name, str) and name.isidentifier() else describe(name)
            raise InputError(
                f"{class_name} cannot do {cls.task}: expected weights of {', '.join(cls.accepted_classes)}"
            )
        return cast(type[P], cls.pipeline_class)


TEXT_UNET_CLASSES = (
    "KandinskyV22Pipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
)
INPAINT_UNET_CLASSES = ("KandinskyV22InpaintPipeline", "KandinskyV22InpaintCombinedPipeline")


class AutoPipelineForText2Image(AutoPipeline[KandinskyV22CombinedPipeline]):
    """Generate images from prompts."""

    task = "text to image"
    pipeline_class = KandinskyV22CombinedPipeline
    accepted_classes = TEXT_UNET_CLASSES


class AutoPipelineForImage2Image(AutoPipeline[KandinskyV22Img2ImgCombinedPipeline]):
    """Generate images from prompts and an initial image."""

    task = "image to image"
    pipeline_class = KandinskyV22Img2ImgCombinedPipeline
    accepted_classes = TEXT_UNET_CLASSES


class AutoPipelineForInpainting(AutoPipeline[KandinskyV22InpaintCombinedPipeline]):
    """Repaint the masked part of an image, from prompts."""

    task = "inpainting"
    embedded_subfolder = "inpaint"
    pipeline_class = KandinskyV22InpaintCombinedPipeline
    accepted_classes = INPAINT_UNET_CLASSES
