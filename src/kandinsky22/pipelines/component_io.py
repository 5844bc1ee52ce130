"""One component of a pipeline: its classes, the files of a repository that it needs, and how it is loaded and saved.

`model_index.json` names the library and class of each component. Networks and schedulers are listed under "diffusers"
there, the library that defined the published layout. CLIP towers, tokenizers and image processors come from
transformers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky22 import models, schedulers
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.fingerprint import TensorSample, weight_samples
from kandinsky22.checkpoints.folder_save import FolderSave
from kandinsky22.checkpoints.hub import embedded_fallback_folder
from kandinsky22.checkpoints.load_arguments import check_use_safetensors, check_variant_name
from kandinsky22.checkpoints.pinned_files import PinnedFiles
from kandinsky22.checkpoints.weights import STEM, TRANSFORMERS_STEM, replaced_weight_files, select_weight_files
from kandinsky22.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KandinskyError,
    VariantError,
    describe,
    invalid,
    printable,
)
from kandinsky22.kernels import settings
from kandinsky22.models.base import checked_dtype, stage_network
from kandinsky22.models.clip import CLIPTower, stage_tower
from kandinsky22.pipelines import clip_files
from kandinsky22.pipelines.embedding_cache import encoder_files_digest
from kandinsky22.runtime.lazy_component import LazyComponent, loaded
from kandinsky22.runtime.network_state import record_source, state_of, unwrapped
from kandinsky22.runtime.prepared import PACKED_FILE
from kandinsky22.sampling.presets import PRIOR_PREFIX
from kandinsky22.schedulers import substitutes

OWN_CLASSES = {"prior": "PriorTransformer", "unet": "UNet2DConditionModel", "movq": "VQModel"}
TRANSFORMERS_CLASSES = {role: names[0] for role, names in clip_files.CLIP_CLASSES.items()}
DEFERRED_BYTES = 2**28  # networks with smaller files are read at once
SCHEDULER_PROTOCOL = ("config", "set_timesteps", "step", "timesteps")
STEMS = (STEM, *TRANSFORMERS_STEM.values())  # names of weight files: ours, then those of transformers
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
}


_defers: ContextVar[bool] = ContextVar("kandinsky22_deferred_weights", default=False)


@contextlib.contextmanager
def deferred_weights() -> Iterator[None]:
    """Return a context manager in which pipelines are loaded without the weights of large networks.

    `OffloadMixin.load_on_first_use` has to be called before such a pipeline is used.
    """
    token = _defers.set(True)
    try:
        yield
    finally:
        _defers.reset(token)


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
        names = _file_names(folder)
        has_variant = self.variant and select_weight_files(names, self.variant, self.use_safetensors, STEMS)
        return self if has_variant else replace(self, variant=None)


def component_role(name: str) -> str:
    """Return the role of a component: its name without the prefix of a prior's component.

    Args:
        name: Name of a component, such as "prior_text_encoder".
    """
    return name if name in OWN_CLASSES or name in TRANSFORMERS_CLASSES else name.removeprefix(PRIOR_PREFIX)


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


def _file_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error


def _component_folder(name: str, folder: Path) -> Path:
    """Return the folder of a component; variants of the embedded model share some folders of its decoder."""
    component_folder = folder / name
    return (
        component_folder
        if os.path.isdir(component_folder)
        else embedded_fallback_folder(component_folder) or component_folder
    )


def _weight_paths(folder: Path, options: LoadOptions) -> list[Path]:
    return [folder / name for name in options.weight_files(_file_names(folder))]


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
            return clip_files.load_tokenizer(component_class, component_folder)
        if role == "image_processor":
            return clip_files.load_image_processor(component_folder)
        if role == "scheduler":
            return _load_scheduler(component_class, component_folder)
        reader = NetworkReader(component_class, component_folder, options.for_component(name))
        if _defers.get() and role != "image_encoder" and (network := reader.deferred()) is not None:
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
        return clip_files.clip_class(role, class_name)
    return getattr(models if role in OWN_CLASSES else schedulers, class_name)


def _scheduler_names() -> list[str]:
    return sorted(set(schedulers.__all__) - {"Scheduler", "SchedulerOutput"})


class NetworkReader:
    """Reads a network of a checkpoint, now and again later, from files that are opened when the reader is made.

    Args:
        network_class: Class of the network.
        folder: Folder of the network.
        options: How weights are loaded.

    Raises:
        CheckpointError: If a file is missing or cannot be opened.
    """

    def __init__(self, network_class: type[nn.Module], folder: Path, options: LoadOptions) -> None:
        self._class = network_class
        self._options = options.for_folder(folder)
        # Without weights, the network's own reading reports what the folder has.
        paths = _network_files(folder, self._options)
        self._files = PinnedFiles(folder, paths) if paths else None
        self._folder = folder
        self._digest: str | None = None
        self._keeps_samples = _defers.get()
        self._samples: list[TensorSample] | None = None

    def lazy(self) -> LazyComponent | None:
        """Return the network as a component that is loaded on first use.

        The result is None if the files look damaged, so that eager loading reports the error.
        """
        if self._files is None:
            return None
        network_class: Any = self._class
        with self._files.folder() as folder:
            try:
                config = clip_files.tower_config(network_class, folder)
            except KandinskyError:
                return None
            files = [folder / path.name for path in self._files.paths if path.name != "config.json"]
            if not clip_files.is_readable_tower(network_class, config, files):
                return None
        self._name_origin(config)
        dtype = torch.float32 if self._options.torch_dtype is None else self._options.torch_dtype
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        return LazyComponent(
            network_class,
            config,
            self._deferred_or_loaded if self._keeps_samples else self.load_and_record,
            files=tuple(path for path in self._files.paths if path.name != "config.json"),
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            files_digest=self.digest,
        )

    def deferred(self) -> nn.Module | None:
        """Return the network with its weights on the meta device; they are read when it is onloaded.

        The files' headers are read and checked. The result is None for a network that is small, quantized or has no
        weights.
        """
        if self._files is None or sum(os.path.getsize(path) for path in self._files.paths) < DEFERRED_BYTES:
            return None
        network = self.load(replace(self._options, torch_dtype="auto"))  # which maps the weights, without reading them
        if state_of(network).quantization is not None:
            return None
        dtype = checked_dtype(self._options.torch_dtype)
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, dtype=dtype or parameter.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        is_own = isinstance(network, models.Model)
        dtype = next(network.parameters()).dtype
        if not is_own:
            network.config.dtype = dtype
        digest = None if is_own else self.digest()
        record_source(
            network,
            self._load_sampled,
            files_digest=digest,
            dtype=dtype,
            samples=lambda: self._samples,
            deferred=True,
        )
        return network

    def _deferred_or_loaded(self) -> nn.Module:
        return self.deferred() or self.load_and_record()

    def _load_sampled(self) -> nn.Module:
        network = self.load()
        if self._samples is None and self._keeps_samples:
            self._samples = weight_samples(network)
        return network

    def load_and_record(self) -> nn.Module:
        """Load the network, and record how it is read again.

        Returns:
            The network.
        """
        network = self._load_sampled()
        if issubclass(self._class, models.Model):
            record_source(network, self.load, samples=lambda: self._samples)
        else:
            dtype = next(network.parameters()).dtype
            digest = self.digest()
            record_source(network, self.load, files_digest=digest, dtype=dtype, samples=lambda: self._samples)
        return network

    def load(self, options: LoadOptions | None = None) -> nn.Module:
        """Load the network.

        Args:
            options: How weights are loaded; None for the reader's own options.

        Returns:
            The network.

        Raises:
            CheckpointError: If the files do not fit the class.
        """
        options = options or self._options
        if self._files is None:
            return self._load_from(self._folder, options)
        with self._files.folder() as folder, clip_files.reading(self._class.__name__, folder):
            network = self._load_from(folder, options)
        self._name_origin(network)
        self._name_origin(getattr(network, "config", None))
        return network

    def _load_from(self, folder: Path, options: LoadOptions) -> nn.Module:
        if issubclass(self._class, models.Model):
            return self._class.from_pretrained(folder, **vars(options))
        tower_class: Any = self._class
        return clip_files.load_tower(tower_class, folder, _weight_paths(folder, options), options.torch_dtype)

    def digest(self) -> str | None:
        """Return the digest of the weight files (`embedding_cache.encoder_files_digest`); None if they are small."""
        if self._files is None:
            return None
        if self._digest is None:
            with self._files.folder() as folder:
                self._digest = encoder_files_digest(tuple(_weight_paths(folder, self._options)))
        return self._digest

    def _name_origin(self, named: Any) -> None:
        """Replace the name of the temporary folder by that of the checkpoint."""
        assert self._files is not None
        for attribute in ("_name_or_path", "name_or_path"):
            if isinstance(vars(named).get(attribute) if hasattr(named, "__dict__") else None, str):
                setattr(named, attribute, str(self._files.origin))


def _network_files(folder: Path, options: LoadOptions) -> list[Path]:
    """Return the config and the weight files of a network; an empty list if it has no weights.

    Shards that the embedded model shares with its decoder are in the decoder's folder.
    """
    selected = options.weight_files(_file_names(folder))
    if not selected:
        return []
    names = ["config.json", PACKED_FILE, *selected]
    if selected[0].endswith(".json"):
        weight_map = read_json(folder / selected[0]).get("weight_map")
        listed = weight_map.values() if isinstance(weight_map, dict) else []
        names += [name for name in listed if isinstance(name, str) and Path(name).name == name]
    folders = [folder, *filter(None, [embedded_fallback_folder(folder)])]
    paths = (next((place / name for place in folders if os.path.isfile(place / name)), None) for name in names)
    return list(dict.fromkeys(path for path in paths if path is not None))


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
