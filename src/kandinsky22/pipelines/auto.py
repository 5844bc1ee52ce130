"""Pipelines by task: the class follows from what is to be done and from what the checkpoint says it is."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.hub import Source
from kandinsky22.errors import InputError
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.combined import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)


class AutoPipeline:
    """Base of the three tasks. `serves` says which class does the task with the weights of which class."""

    task: ClassVar[str]
    embedded_part: ClassVar[str] = "decoder"
    serves: ClassVar[dict[str, type[DiffusionPipeline]]]

    def __init__(self) -> None:
        raise InputError(f"{type(self).__name__} is made by from_pretrained or from_pipe")

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
    ) -> DiffusionPipeline:
        """The pipeline that does this task with a checkpoint: a folder, a Hub id, or "embedded".

        All options are those of `DiffusionPipeline.from_pretrained`. Raises InputError if the checkpoint is for
        something else.
        """
        source = Source(pretrained_model_name_or_path, revision, cache_dir, token, local_files_only, cls.embedded_part)
        folder = source.fetch(lambda files: {DiffusionPipeline.config_name} & set(files))
        kind = cls._class_for(str(read_json(folder / DiffusionPipeline.config_name).get("_class_name")))
        return kind.from_pretrained(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            **options,
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """The pipeline that does this task with the components of another one, shared and not copied."""
        return cls._class_for(type(pipeline).__name__).from_pipe(pipeline, **components)

    @classmethod
    def _class_for(cls, name: str) -> type[DiffusionPipeline]:
        if name not in cls.serves:
            raise InputError(f"{name} cannot do {cls.task}; accepted are weights of {', '.join(cls.serves)}")
        return cls.serves[name]


TEXT_UNET = (
    "KandinskyV22Pipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
)
MASK_UNET = ("KandinskyV22InpaintPipeline", "KandinskyV22InpaintCombinedPipeline")


class AutoPipelineForText2Image(AutoPipeline):
    """Pictures from prompts."""

    task = "text to image"
    serves: ClassVar = dict.fromkeys(TEXT_UNET, KandinskyV22CombinedPipeline)


class AutoPipelineForImage2Image(AutoPipeline):
    """Pictures from prompts and a picture to start from."""

    task = "image to image"
    serves: ClassVar = dict.fromkeys(TEXT_UNET, KandinskyV22Img2ImgCombinedPipeline)


class AutoPipelineForInpainting(AutoPipeline):
    """Pictures repainted where a mask says so, from prompts."""

    task = "inpainting"
    embedded_part = "inpaint"
    serves: ClassVar = dict.fromkeys(MASK_UNET, KandinskyV22InpaintCombinedPipeline)
