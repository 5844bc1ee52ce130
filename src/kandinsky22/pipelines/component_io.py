"""One component of a pipeline: its classes, the files of a repository that it needs, and how it is loaded and saved.

`model_index.json` names the library and class of each component. Networks and schedulers are listed under "diffusers"
there, the library that defined the published layout. CLIP towers, tokenizers and image processors come from
transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kandinsky22 import models, schedulers
from kandinsky22.checkpoints.hub import embedded_fallback_folder
from kandinsky22.checkpoints.weights import STEM, select_weight_files
from kandinsky22.errors import CheckpointError, InputError, describe
from kandinsky22.kernels import host_memory, settings
from kandinsky22.pipelines.embedding_cache import encoder_files_digest
from kandinsky22.runtime.lazy_component import LazyComponent, loaded
from kandinsky22.runtime.network_state import record_source, unwrap_compiled
from kandinsky22.sampling.presets import PRIOR_PREFIX

OWN_CLASSES = {"prior": "PriorTransformer", "unet": "UNet2DConditionModel", "movq": "VQModel"}
TRANSFORMERS_CLASSES = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_processor": "CLIPImageProcessor",
}
SCHEDULER_PROTOCOL = ("config", "set_timesteps", "step", "timesteps")
STEMS = (STEM, "model", "pytorch_model")  # names of weight files: ours, then those of transformers
LISTED_TENSORS = 8  # missing tensors that a message names


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading weights.

    Attributes:
        torch_dtype: Floating-point type; None for float32, "auto" for what is stored.
        variant: Variant of the weight files; None for the plain files.
        use_safetensors: Format of the weights; None prefers safetensors.
    """

    torch_dtype: Any = None
    variant: str | None = None
    use_safetensors: bool | None = None

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
        fits = any(base.startswith(expected) for base in lineage)  # ...Fast and ...Pil are implementations of the same
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
    return ["diffusers" if library == "kandinsky22" else library, class_name]


def _component_class(component: Any) -> type:
    if isinstance(component, LazyComponent):
        return component.component_class
    return type(getattr(component, "_orig_mod", component))


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
        CheckpointError: If none has, although some have weights.
    """
    if options.variant is None:
        return
    plain = replace(options, variant=None)
    networks = [name for name in components if plain.weight_files(_file_names(folder / name))]
    if networks and not any(options.for_folder(folder / name).variant for name in networks):
        raise CheckpointError(f"{folder} has no weights of variant {options.variant!r} for {', '.join(networks)}")


def _file_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _component_folder(name: str, folder: Path) -> Path:
    """Return the folder of a component; variants of the embedded model share some folders of its decoder."""
    component_folder = folder / name
    return (
        component_folder
        if component_folder.is_dir()
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
        CheckpointError: If the class is unknown, or the files do not fit it.
    """
    if component_role(name) == "image_encoder" and settings.current().lazy_loading:
        lazy = _lazy(name, entry, folder, options)
        if lazy is not None:
            return lazy
    return _load_and_record(name, entry, folder, options)


def _load_and_record(name: str, entry: Any, folder: Path, options: LoadOptions) -> Any:
    """Load a component now; a network's record then says how to read it again."""
    component = _load(name, entry, folder, options)
    if isinstance(component, nn.Module):
        load = functools.partial(_load, name, entry, folder, options)
        if component_role(name) == "image_encoder":
            files = tuple(_weight_paths(_component_folder(name, folder), options))
            dtype = next(component.parameters()).dtype
            record_source(component, load, files_digest=encoder_files_digest(files), dtype=dtype)
        else:
            record_source(component, load)
    return component


def _lazy(name: str, entry: Any, folder: Path, options: LoadOptions) -> LazyComponent | None:
    """Return a network of transformers that is loaded on first use.

    The result is None if the files look damaged, so that eager loading reports the error.
    """
    import transformers

    component_folder = _component_folder(name, folder)
    library, class_name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    network_class = getattr(transformers, str(class_name), None) if library == "transformers" else None
    files = tuple(_weight_paths(component_folder, options))
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module) and files and _readable(files)):
        return None
    config_class: Any = getattr(network_class, "config_class", None)
    try:
        config = config_class.from_pretrained(os.fspath(component_folder), local_files_only=True)
    except Exception:  # transformers raises many exception types here
        return None
    dtype = torch.float32 if options.torch_dtype is None else options.torch_dtype
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return LazyComponent(
        network_class,
        config,
        functools.partial(_load_and_record, name, entry, folder, options),
        files=files,
        dtype=dtype if isinstance(dtype, torch.dtype) else None,
    )


def _readable(files: Iterable[Path]) -> bool:
    """Return whether all files are safetensors with a valid header."""
    try:
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix != ".json":
                return False
    except (OSError, SafetensorError):
        return False
    return True


def _load(name: str, entry: Any, folder: Path, options: LoadOptions) -> Any:
    """Load a component by its entry in `model_index.json`."""
    component_folder, index = _component_folder(name, folder), folder / "model_index.json"
    if entry is None or entry == [None, None]:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise CheckpointError(f"{index}: {name} is {entry!r}: expected [library, class], or null")
    library, class_name = entry
    if library == "transformers":
        return _load_transformers(name, str(class_name), component_folder, options)
    if library in ("diffusers", "kandinsky22") and class_name in models.__all__:
        return getattr(models, class_name).from_pretrained(
            component_folder, **vars(options.for_folder(component_folder))
        )
    if library in ("diffusers", "kandinsky22") and class_name in schedulers.__all__:
        return getattr(schedulers, class_name).from_pretrained(component_folder)
    classes = ", ".join(sorted({*models.__all__, *schedulers.__all__} - {"Model", "Scheduler", "SchedulerOutput"}))
    raise CheckpointError(
        f"{index}: {name} is a {library}.{class_name}, which kandinsky22 does not have: expected one of {classes}; "
        f"pass {name}= to replace it"
    )


def _load_transformers(name: str, class_name: str, folder: Path, options: LoadOptions) -> Any:
    """Load a CLIP tower, a tokenizer or an image processor."""
    import transformers

    if not folder.is_dir():
        raise CheckpointError(f"missing folder: {folder}")
    # Without torchvision the plain name prints a warning and then gives this class.
    without_torchvision = f"{class_name}Pil"
    if hasattr(transformers, without_torchvision) and importlib.util.find_spec("torchvision") is None:
        class_name = without_torchvision
    component_class = getattr(transformers, class_name, None)
    if component_class is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no {class_name}; pass {name}=")
    if isinstance(component_class, type) and issubclass(component_class, nn.Module):
        return _load_tower(component_class, folder, options)
    return _from_pretrained(component_class, folder)


def _load_tower(network_class: Any, folder: Path, options: LoadOptions) -> nn.Module:
    """Load a CLIP tower, converted to the requested type, in evaluation mode."""
    dtype = torch.float32 if options.torch_dtype is None else options.torch_dtype
    # transformers would keep in memory what it has read of a float32 file that it converts
    convert_here = (
        isinstance(dtype, torch.dtype)
        and dtype != torch.float32
        and _stored_in_float32(_weight_paths(folder, options))
        and not getattr(network_class, "_keep_in_fp32_modules", None)
    )
    stored = options.for_folder(folder)
    network, report = _from_pretrained(
        network_class,
        folder,
        **{_dtype_argument(): torch.float32 if convert_here else dtype},
        variant=stored.variant,
        use_safetensors=stored.use_safetensors,
        output_loading_info=True,
        **_low_memory_options(),
    )
    if missing := sorted(report["missing_keys"]):
        listed = ", ".join(missing[:LISTED_TENSORS])
        raise CheckpointError(f"{folder} does not fit {network_class.__name__}: {len(missing)} missing: {listed}")
    if convert_here:
        _convert(network, dtype)
        setattr(network.config, _dtype_argument(), dtype)
    tower: nn.Module = network.eval()
    return tower


def _from_pretrained(component_class: Any, folder: Path, **options: Any) -> Any:
    """Call transformers' `from_pretrained` on a local folder; its many exception types become CheckpointError."""
    import transformers

    try:
        with _without_progress_bars(transformers):
            return component_class.from_pretrained(os.fspath(folder), local_files_only=True, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, KeyError...
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot load {component_class.__name__} from {folder}: {reason}") from error


def _transformers_release() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _dtype_argument() -> str:
    return "dtype" if _transformers_release() >= (4, 56) else "torch_dtype"


def _low_memory_options() -> dict[str, Any]:
    """Return options that avoid a second copy of the weights; releases from 5.0 never make one."""
    older = _transformers_release() < (5, 0) and importlib.util.find_spec("accelerate") is not None
    return {"low_cpu_mem_usage": True} if older else {}


def _stored_in_float32(files: Iterable[Path]) -> bool:
    """Return whether all floating-point tensors of these safetensors files are float32."""
    dtypes: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
                dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        elif file.suffix != ".json":
            return False
    return "F32" in dtypes and all(dtype == "F32" or not dtype.startswith(("F", "BF")) for dtype in dtypes)


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters one tensor at a time and drop each mapped source, so that peak memory does not double."""
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = host_memory.convert_and_drop(tensor.data, dtype)


@contextlib.contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    """Hide the progress bars of transformers: reading local files does not need one per component."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


# Saving


def save_component(component: Any, folder: Path, *, variant: str | None, max_shard_size: int | str) -> None:
    """Write a component into its folder.

    Args:
        component: Any component except None; a lazy one is loaded.
        folder: Folder of the component.
        variant: Variant in the names of weight files; None for none.
        max_shard_size: Largest weight file, in bytes or as text such as "5GB".

    Raises:
        CheckpointError: If it cannot be written.
    """
    component = loaded(component)
    options: dict[str, Any] = {}
    if isinstance(component, nn.Module):
        component = unwrap_compiled(component)
        options = {"variant": variant, "max_shard_size": max_shard_size}
    if isinstance(component, models.Model | schedulers.Scheduler):
        component.save_pretrained(folder, **options)
        return
    # Written to a temporary folder and then moved: weights in use may be mapped from the files that are replaced.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            component.save_pretrained(temporary, **options)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
