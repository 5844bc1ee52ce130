"""One component of a pipeline: its classes, the files of a repository that it needs, and how it is loaded and saved.

`model_index.json` names the library and class of each component. Networks and schedulers are listed under "diffusers"
there, the library that defined the published layout. CLIP towers, tokenizers and image processors are listed under
"transformers".
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from kandinsky22 import models, schedulers
from kandinsky22.checkpoints.folder_save import FolderSave
from kandinsky22.checkpoints.hub import embedded_fallback_folder
from kandinsky22.checkpoints.weights import replaced_weight_files
from kandinsky22.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KandinskyError,
    VariantError,
    describe,
    printable,
)
from kandinsky22.kernels import settings
from kandinsky22.models.base import stage_network
from kandinsky22.models.clip import CLIPTower, stage_tower
from kandinsky22.pipelines import clip_files
from kandinsky22.pipelines.load_options import (
    OWN_CLASSES,
    STEMS,
    TRANSFORMERS_CLASSES,
    LoadOptions,
    component_role,
)
from kandinsky22.pipelines.network_reader import NetworkReader, is_deferring
from kandinsky22.runtime.lazy_component import LazyComponent, loaded
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.schedulers import substitutes

SCHEDULER_PROTOCOL = ("config", "set_timesteps", "step", "timesteps")
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
}


def check_component(owner: str, name: str, component: Any) -> None:
    """Check that an object can be a component. None always can: a pipeline may do without until it needs it.

    Args:
        owner: Class name of the pipeline, for messages.
        name: Name of the component.
        component: The object. A scheduler is anything with the scheduler protocol; everything else is recognised by
            class, where a compiled network counts as the network.

    Raises:
        InputError: If the object is of another kind.
    """
    if component is None:
        return
    component_class = _component_class(component)
    lineage = [f"{base.__module__.split('.')[0]}.{base.__name__}" for base in component_class.__mro__]
    role = component_role(name)
    if role in OWN_CLASSES:
        expected = f"kandinsky22.{OWN_CLASSES[role]}"
        fits = expected in lineage
    elif role in TRANSFORMERS_CLASSES:
        expected = f"transformers.{TRANSFORMERS_CLASSES[role]}"
        own = expected.replace("transformers", "kandinsky22", 1)
        # ...Fast and ...Pil are implementations of the same
        fits = any(base.startswith((expected, own)) for base in lineage)
    elif role == "scheduler":
        expected = f"a scheduler (an object with {', '.join(SCHEDULER_PROTOCOL)})"
        fits = all(hasattr(component, part) for part in SCHEDULER_PROTOCOL) and not isinstance(component, type)
    else:
        return
    if not fits:
        value = describe(component) if isinstance(component, type) else f"a {lineage[0]}"
        raise InputError(f"{owner}: {name} is {value}: expected {expected} or None")


def index_entry(name: str, component: Any) -> list[str | None]:
    """Return the [library, class] of a component in `model_index.json`.

    Args:
        name: Name of the component.
        component: The component, or None.
    """
    if component is None:
        return [None, None]
    component_class = _component_class(component)
    library = component_class.__module__.split(".")[0]
    declared = TRANSFORMERS_CLASSES.get(component_role(name), component_class.__name__)
    class_name = declared if component_class.__name__.startswith(declared) else component_class.__name__
    if library == "kandinsky22":
        library = "transformers" if component_class in clip_files.OWN_CLIP_CLASSES.values() else "diffusers"
    return [library, class_name]


def _component_class(component: Any) -> type:
    if isinstance(component, LazyComponent):
        return component.component_class
    return type(unwrapped(component))


# Files


def needed_files(names: Iterable[str], components: Iterable[str], options: LoadOptions) -> list[str]:
    """Return the files of a repository that components are loaded from.

    Args:
        names: Names of all files of the repository.
        components: Names of the components.
        options: How weights are loaded.
    """
    names, selected = list(names), []
    for component in components:
        prefix = f"{component}/"
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]]
        texts = [name for name in inside if name.endswith((".json", ".txt", ".model")) and ".index." not in name]
        selected += [prefix + name for name in [*texts, *options.weight_files(inside)]]
    return selected


def check_variant(folder: Path, components: Iterable[str], options: LoadOptions) -> None:
    """Check that at least one component has weights of the requested variant.

    Args:
        folder: Folder of the checkpoint.
        components: Names of the components that are loaded.
        options: How weights are loaded.

    Raises:
        VariantError: If none has, although some are networks.
    """
    if options.variant is None:
        return
    networks = [name for name in components if component_role(name) in (*OWN_CLASSES, *clip_files.TOWERS)]
    if networks and not any(options.for_folder(folder / name).variant for name in networks):
        raise VariantError(f"{folder} has no weights of variant {options.variant!r} for {', '.join(networks)}")


def _component_folder(name: str, folder: Path) -> Path:
    """Return the folder of a component; variants of the embedded model share some folders of its decoder."""
    component_folder = folder / name
    return (
        component_folder
        if os.path.isdir(component_folder)
        else embedded_fallback_folder(component_folder) or component_folder
    )


# Loading


def load_component(name: str, entry: Any, folder: Path, options: LoadOptions) -> Any:
    """Load a component of a checkpoint.

    Args:
        name: Name of the component.
        entry: Its entry in `model_index.json`: [library, class], or null.
        folder: Folder of the checkpoint.
        options: How weights are loaded.

    Returns:
        The component; for the image encoder a `LazyComponent`.

    Raises:
        CheckpointError: If the class is not one that this component can have, or the files do not fit it.
        ConfigError: If a setting of a network or scheduler is invalid.
    """
    component_class = _class_of_entry(name, entry, folder)
    if component_class is None:
        return None
    component_folder, role = _component_folder(name, folder), component_role(name)
    with clip_files.reading(name, component_folder):
        if not os.path.isdir(component_folder):
            raise CheckpointError(f"missing folder: {component_folder}")
        if role == "tokenizer":
            return clip_files.load_tokenizer(component_folder)
        if role == "image_processor":
            return clip_files.load_image_processor(component_folder)
        if role == "scheduler":
            return _load_scheduler(component_class, component_folder)
        reader = NetworkReader(component_class, component_folder, options.for_component(name))
        if is_deferring.get() and role != "image_encoder" and (network := reader.deferred()) is not None:
            return network
        if role == "image_encoder" and settings.current().lazy_loading:
            lazy = reader.lazy()
            if lazy is not None:
                return lazy
        return reader.load_and_record()


def _load_scheduler(scheduler_class: Any, folder: Path) -> Any:
    try:
        return scheduler_class.from_pretrained(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder / scheduler_class.config_name}: {error}") from error


def _class_of_entry(name: str, entry: Any, folder: Path) -> Any:
    """Return the class that an entry of `model_index.json` names; None if it names none.

    Only the classes that the specification names are accepted. Other ones, even of the same libraries, could run code
    of the checkpoint.
    """
    index, role = folder / "model_index.json", component_role(name)
    if entry is None or entry == [None, None]:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise CheckpointError(f"{index}: {name} is {describe(entry)}: expected [library, class], or null")
    library, class_name = entry
    if role in clip_files.CLIP_CLASSES:
        library_names, class_names = ["transformers"], list(clip_files.CLIP_CLASSES[role])
    else:
        library_names = ["diffusers", "kandinsky22"]
        class_names = [OWN_CLASSES[role]] if role in OWN_CLASSES else _scheduler_names()
    if role == "scheduler" and library in library_names and (reader := substitutes.substitute_reader(class_name)):
        return reader
    if library not in library_names or class_name not in class_names:
        reason = substitutes.reason_against(class_name) if role == "scheduler" else None
        raise CheckpointError(
            f"{index}: {name} is a {describe(f'{library}.{class_name}')}, which kandinsky22 does not have"
            f"{f', because {reason}' if reason else ''}: expected "
            f"{'one of ' if len(class_names) > 1 else ''}{', '.join(class_names)} of {library_names[0]}; "
            f"pass {name}= to replace it"
        )
    if role in clip_files.CLIP_CLASSES:
        return clip_files.OWN_CLIP_CLASSES[role]
    return getattr(models if role in OWN_CLASSES else schedulers, class_name)


def _scheduler_names() -> list[str]:
    return sorted(set(schedulers.__all__) - {"Scheduler", "SchedulerOutput"})


# Saving


def save_component(
    component: Any,
    save: FolderSave,
    name: str,
    *,
    variant: str | None,
    max_shard_size: int | str,
    safe: bool = True,
) -> None:
    """Write a component as part of the save of a pipeline.

    Args:
        component: Any component except None; a lazy one is loaded.
        save: The save.
        name: Name of the component, which is that of its folder.
        variant: Variant in the names of weight files; None for none.
        max_shard_size: Largest weight file, in bytes or as text such as "5GB".
        safe: Whether our networks are written as safetensors instead of pickled files; transformers writes safetensors.

    Raises:
        CheckpointError: If it cannot be written.
    """
    component = loaded(component)
    options: dict[str, Any] = {}
    if isinstance(component, nn.Module):
        component = unwrapped(component)
        if isinstance(component, models.Model):
            stage_network(component, save, name, variant=variant, max_shard_size=max_shard_size, safe=safe)
            save.replace(name, replaced_weight_files(variant, True))
            return
        if isinstance(component, CLIPTower):
            save.replace(name, replaced_weight_files(variant, True, STEMS))
            stage_tower(component, save, name, variant=variant, max_shard_size=max_shard_size)
            return
        options = {"variant": variant, "max_shard_size": max_shard_size}
        save.replace(name, replaced_weight_files(variant, True, STEMS))
    elif component_role(name) == "tokenizer":  # files of another tokenizer would be read too
        save.replace(name, TOKENIZER_FILES.intersection)
    folder = save.stage(name)
    try:
        component.save_pretrained(os.fspath(folder), **options)
    except KandinskyError:
        raise
    except Exception as error:  # transformers and safetensors raise many types of exceptions
        raise CheckpointError(f"cannot write {folder}: {printable(str(error))}") from error
