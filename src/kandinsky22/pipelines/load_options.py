"""Options for loading the components of a pipeline, and the files that they select."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.load_arguments import check_use_safetensors, check_variant_name
from kandinsky22.checkpoints.weights import STEM, TRANSFORMERS_STEM, select_weight_files
from kandinsky22.errors import CheckpointError, InputError, invalid
from kandinsky22.models.base import checked_dtype
from kandinsky22.pipelines import clip_files
from kandinsky22.sampling.presets import PRIOR_PREFIX

OWN_CLASSES = {"prior": "PriorTransformer", "unet": "UNet2DConditionModel", "movq": "VQModel"}
TRANSFORMERS_CLASSES = {role: names[0] for role, names in clip_files.CLIP_CLASSES.items()}
STEMS = (STEM, *TRANSFORMERS_STEM.values())  # names of weight files: ours, then those of transformers


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading weights.

    Attributes:
        torch_dtype: Floating-point type; None for float32, "auto" for what is stored; or one of these per component
            name, where "default" stands for all others.
        variant: Variant of the weight files; None for the plain files.
        use_safetensors: Format of the weights; None prefers safetensors.
    """

    torch_dtype: Any = None
    variant: str | None = None
    use_safetensors: bool | None = None

    def checked(self) -> LoadOptions:
        """Return the options themselves.

        Raises:
            InputError: If one of them is invalid.
        """
        check_variant_name(self.variant)
        check_use_safetensors(self.use_safetensors)
        if not isinstance(self.torch_dtype, Mapping):
            checked_dtype(self.torch_dtype)
            return self
        for name, dtype in self.torch_dtype.items():
            if not isinstance(name, str):
                raise invalid("a key of torch_dtype", name, "the name of a component, or 'default'")
            try:
                checked_dtype(dtype)
            except InputError as error:
                raise InputError(str(error).replace("torch_dtype=", f"torch_dtype[{name!r}]=", 1)) from None
        return self

    def for_component(self, name: str) -> LoadOptions:
        """Return the options with the type of one component.

        Args:
            name: Name of the component.
        """
        dtypes = self.torch_dtype
        if not isinstance(dtypes, Mapping):
            return self
        default = dtypes.get(component_role(name), dtypes.get("default"))
        return replace(self, torch_dtype=dtypes.get(name, default))

    def for_prior(self) -> LoadOptions:
        """Return the options for the pipeline of the prior, whose component names have no prefix."""
        dtypes = self.torch_dtype
        if not isinstance(dtypes, Mapping):
            return self
        prefixed = {name.removeprefix(PRIOR_PREFIX): dtypes[name] for name in dtypes if name.startswith(PRIOR_PREFIX)}
        return replace(self, torch_dtype={**dtypes, **prefixed})

    def weight_files(self, names: Iterable[str]) -> list[str]:
        """Return the weight files to read, out of the files of one component.

        Args:
            names: Names of all files. Without files of the variant, the plain ones are returned.
        """
        names = list(names)
        return select_weight_files(names, self.variant, self.use_safetensors, STEMS) or select_weight_files(
            names, None, self.use_safetensors, STEMS
        )

    def for_folder(self, folder: Path) -> LoadOptions:
        """Return the options without the variant if a folder has no weights of it.

        Args:
            folder: Folder of one component.
        """
        names = file_names(folder)
        has_variant = self.variant and select_weight_files(names, self.variant, self.use_safetensors, STEMS)
        return self if has_variant else replace(self, variant=None)


def component_role(name: str) -> str:
    """Return the role of a component: its name without the prefix of a prior's component.

    Args:
        name: Name of a component, such as "prior_text_encoder".
    """
    return name if name in OWN_CLASSES or name in TRANSFORMERS_CLASSES else name.removeprefix(PRIOR_PREFIX)


def file_names(folder: Path) -> list[str]:
    """Return the names of the files in a folder, an empty list if the folder does not exist.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error


def weight_paths(folder: Path, options: LoadOptions) -> list[Path]:
    """Return the weight files of one component.

    Args:
        folder: Its folder.
        options: How weights are loaded.
    """
    return [folder / name for name in options.weight_files(file_names(folder))]
