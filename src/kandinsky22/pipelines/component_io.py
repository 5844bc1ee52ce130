"""One component of a pipeline: which classes it may be, how it is stored, loaded and saved.

`model_index.json` names each component's library and class. Networks and schedulers go by "diffusers" there, the name
that the published layout uses for them; towers, tokenizers and image processors come from transformers.
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
from kandinsky22.checkpoints.hub import shared_folder
from kandinsky22.checkpoints.weights import STEM, weight_files
from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.linear import make_direct
from kandinsky22.pipelines.embedding_cache import name_files
from kandinsky22.runtime import lazy_component
from kandinsky22.runtime.disk_offload import remember

OWN = {"prior": "PriorTransformer", "unet": "UNet2DConditionModel", "movq": "VQModel"}
BORROWED = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_processor": "CLIPImageProcessor",
}
SCHEDULER_PROTOCOL = ("config", "set_timesteps", "step", "timesteps")
STEMS = (STEM, "model", "pytorch_model")  # ours, then those of transformers
PRIOR_PREFIX = "prior_"  # of the prior's components in pipelines that hold prior and decoder


@dataclass(frozen=True)
class Stored:
    """How weights are wanted: `torch_dtype` as in `Model.from_pretrained`, which variant, which format."""

    torch_dtype: Any = None
    variant: str | None = None
    use_safetensors: bool | None = None

    def weights(self, names: Iterable[str]) -> list[str]:
        """The weight files to use among the files of one component; those without the variant if it has none."""
        names = list(names)
        return weight_files(names, self.variant, self.use_safetensors, STEMS) or weight_files(
            names, None, self.use_safetensors, STEMS
        )

    def for_folder(self, folder: Path) -> Stored:
        """The same, without the variant if this folder has no weights of it."""
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        has_it = self.variant and weight_files(there, self.variant, self.use_safetensors, STEMS)
        return self if has_it else replace(self, variant=None)


def role(name: str) -> str:
    """What a component is for: its name without the prefix that tells a prior's from a decoder's."""
    return name if name in OWN or name in BORROWED else name.removeprefix(PRIOR_PREFIX)


def check_component(owner: str, name: str, component: Any) -> None:
    """Raise InputError unless `component` can be `name`. None always can: a pipeline may do without until it is used.

    A scheduler is anything with the public scheduler protocol; the rest is told by class (a compiled network counts
    as the network).
    """
    if component is None:
        return
    kind = type(getattr(component, "_orig_mod", component))
    lineage = [f"{base.__module__.split('.')[0]}.{base.__name__}" for base in kind.__mro__]
    wanted = role(name)
    if wanted in OWN:
        accepted = f"kandinsky22.{OWN[wanted]}"
        fits = accepted in lineage
    elif wanted in BORROWED:
        accepted = f"transformers.{BORROWED[wanted]}"
        fits = any(base.startswith(accepted) for base in lineage)  # ...Fast and ...Pil are the same thing
    elif wanted == "scheduler":
        accepted = f"a scheduler (an object with {', '.join(SCHEDULER_PROTOCOL)})"
        fits = all(hasattr(component, part) for part in SCHEDULER_PROTOCOL) and not isinstance(component, type)
    else:
        return
    if not fits:
        given = f"the class {component.__name__}" if isinstance(component, type) else f"a {lineage[0]}"
        raise InputError(f"{owner}: {name} is {given}; accepted: {accepted} or None")


def index_entry(name: str, component: Any) -> list[str | None]:
    """The [library, class] of a component in `model_index.json`."""
    if component is None:
        return [None, None]
    kind = type(getattr(component, "_orig_mod", component))
    library = kind.__module__.split(".")[0]
    declared = BORROWED.get(role(name), kind.__name__)
    class_name = declared if kind.__name__.startswith(declared) else kind.__name__
    return ["diffusers" if library == "kandinsky22" else library, class_name]


def needed_files(names: Iterable[str], components: Iterable[str], stored: Stored) -> list[str]:
    """Of a repository's files, those that these components are loaded from."""
    needed: list[str] = []
    names = list(names)
    for component in components:
        prefix = f"{component}/"
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]]
        settings = [n for n in inside if n.endswith((".json", ".txt", ".model")) and ".index." not in n]
        needed += [prefix + name for name in [*settings, *stored.weights(inside)]]
    return needed


def load_component(name: str, entry: Any, folder: Path, stored: Stored) -> Any:
    """The component that `entry` ([library, class]) describes, from its folder in a checkpoint.

    An image encoder is read when it is needed. Raises CheckpointError if the class is unknown or the files do not give
    it.
    """
    sleeping = (
        _sleeping(name, entry, folder, stored) if role(name) == "image_encoder" and lazy_component.enabled else None
    )
    return _read(name, entry, folder, stored) if sleeping is None else sleeping


def _read(name: str, entry: Any, folder: Path, stored: Stored) -> Any:
    component = _load(name, entry, folder, stored)
    if isinstance(component, nn.Module):
        remember(component, functools.partial(_load, name, entry, folder, stored))
        if role(name) == "image_encoder":
            place = _place(name, folder)
            name_files(component, _weights(place, stored), next(component.parameters()).dtype)
    return component


def _place(name: str, folder: Path) -> Path:
    place = folder / name
    return place if place.is_dir() else shared_folder(place) or place


def _weights(folder: Path, stored: Stored) -> list[Path]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in stored.weights(names)]


def _sleeping(name: str, entry: Any, folder: Path, stored: Stored) -> Any:
    """The network of transformers that `entry` describes, to be read when it is needed; None if its files do not look
    as they should, so that reading them now tells what is wrong."""
    import transformers

    place = _place(name, folder)
    library, class_name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    kind = getattr(transformers, str(class_name), None) if library == "transformers" else None
    files = _weights(place, stored)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and files and _readable(files)):
        return None
    try:
        config = kind.config_class.from_pretrained(os.fspath(place), local_files_only=True)  # type: ignore[attr-defined]
    except Exception:  # transformers lets anything through
        return None
    dtype = torch.float32 if stored.torch_dtype is None else stored.torch_dtype
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    network = lazy_component.asleep(kind, config, functools.partial(_read, name, entry, folder, stored))
    name_files(network, files, dtype if isinstance(dtype, torch.dtype) else None)
    return network


def _readable(files: Iterable[Path]) -> bool:
    """Whether these are safetensors, all there and whole, as far as their beginnings tell."""
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


def _load(name: str, entry: Any, folder: Path, stored: Stored) -> Any:
    place = _place(name, folder)
    if entry is None or entry == [None, None]:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise CheckpointError(f"{folder / 'model_index.json'}: {name} is {entry!r}; needed: [library, class], or null")
    library, class_name = entry
    if library == "transformers":
        return _load_borrowed(name, str(class_name), place, stored)
    for home in (models, schedulers):
        if library in ("diffusers", "kandinsky22") and class_name in home.__all__:
            options: dict[str, Any] = vars(stored.for_folder(place)) if home is models else {}
            return getattr(home, class_name).from_pretrained(place, **options)
    accepted = ", ".join(sorted({*models.__all__, *schedulers.__all__} - {"Model", "Scheduler", "SchedulerOutput"}))
    raise CheckpointError(
        f"{folder / 'model_index.json'}: {name} is a {library}.{class_name}, which kandinsky22 does not have; "
        f"pass {name}= to replace it (there are {accepted})"
    )


def _load_borrowed(name: str, class_name: str, folder: Path, stored: Stored) -> Any:
    import transformers

    if not folder.is_dir():
        raise CheckpointError(f"missing folder: {folder}")
    # Without torchvision the plain name prints a warning and then gives the same class.
    plain = f"{class_name}Pil"
    if hasattr(transformers, plain) and importlib.util.find_spec("torchvision") is None:
        class_name = plain
    kind = getattr(transformers, class_name, None)
    if kind is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no {class_name}; pass {name}=")
    options: dict[str, Any] = {"local_files_only": True}
    network, halved = isinstance(kind, type) and issubclass(kind, nn.Module), False
    if network:
        release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype = torch.float32 if stored.torch_dtype is None else stored.torch_dtype
        type_name = "dtype" if release >= (4, 56) else "torch_dtype"
        # transformers would keep in memory what it has read of the file
        halved = isinstance(dtype, torch.dtype) and dtype != torch.float32 and _in_float32(_weights(folder, stored))
        halved = halved and not getattr(kind, "_keep_in_fp32_modules", None)
        options |= {type_name: torch.float32 if halved else dtype, "output_loading_info": True}
        options |= {key: getattr(stored.for_folder(folder), key) for key in ("variant", "use_safetensors")}
        if release < (5, 0) and importlib.util.find_spec("accelerate") is not None:
            options["low_cpu_mem_usage"] = True  # later releases always build without doubling memory
    try:
        with _quiet(transformers):
            loaded = kind.from_pretrained(os.fspath(folder), **options)
    except Exception as error:  # transformers lets anything through: OSError, ValueError, SafetensorError, KeyError...
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot load {name} ({class_name}) from {folder}: {reason}") from error
    if not network:
        return loaded
    component, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} does not fit {class_name}: {len(missing)} missing: {', '.join(missing[:8])}")
    if halved:
        _convert(component, dtype)
        setattr(component.config, type_name, dtype)
    make_direct(component)
    return component.eval()


def _in_float32(files: Iterable[Path]) -> bool:
    """Whether all numbers of these files are float32, in safetensors."""
    kinds = set()
    for file in files:
        if file.suffix == ".safetensors":
            with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
                kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
        elif file.suffix != ".json":
            return False
    return "F32" in kinds and all(kind == "F32" or not kind.startswith(("F", "BF")) for kind in kinds)


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network's numbers, one tensor after the other: those that were read from a file take no memory then."""
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = host_memory.converted(tensor.data, dtype)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bars of transformers: loading from disk is not worth one bar per component."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def save_component(component: Any, folder: Path, *, variant: str | None, max_shard_size: int | str) -> None:
    """Write a component into its folder; raises CheckpointError if that is impossible."""
    component = getattr(component, "_orig_mod", component)
    options: dict[str, Any] = {}
    if isinstance(component, nn.Module):
        options = {"variant": variant, "max_shard_size": max_shard_size}
    if isinstance(component, models.Model | schedulers.Scheduler):
        component.save_pretrained(folder, **options)
        return
    # Written beside and then moved, for the weights in use may be mapped from the very files that are replaced.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            component.save_pretrained(temporary, **options)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
