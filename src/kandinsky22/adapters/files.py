"""Files of adapters: found in a folder or on the Hub, read, and written so that a file appears only when complete."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.adapters.updates import Adapter, LowRankUpdate
from kandinsky22.checkpoints.atomic_files import atomic_write, checked_save_path, open_regular_file, read_json
from kandinsky22.checkpoints.hub import DISTILLED, EMBEDDED, HUB_ID, CheckpointSource, model_folder
from kandinsky22.checkpoints.weights import (
    DIGEST,
    check_stored_once,
    indexed_files,
    read_metadata,
    read_tensors,
    select_weight_files,
)
from kandinsky22.errors import CheckpointError, describe, invalid, printable

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PICKLED_WEIGHT_NAME = "pytorch_lora_weights.bin"
WEIGHT_NAMES = (WEIGHT_NAME, "adapter_model.safetensors", PICKLED_WEIGHT_NAME, "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"  # settings next to `adapter_model.safetensors`
SETTINGS = "lora_adapter_metadata"  # entry of the header with PEFT's settings, as JSON
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
STEPS = "num_inference_steps"  # entry of the header of a distilled adapter: the number of steps to sample with
MAX_SETTINGS_CHARACTERS = 2**20

AdapterSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""A file, a folder, a Hub id, "MODEL/distilled", or tensors by name."""


@dataclasses.dataclass(frozen=True)
class AdapterTensors:
    """Tensors of an adapter, as they are stored.

    Attributes:
        origin: Name of the file or folder, for messages.
        tensors: Tensors by name.
        settings: Settings of PEFT; empty if there are none.
        paths: The files that hold the tensors; empty for tensors in memory.
    """

    origin: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paths: tuple[Path, ...] = ()


def read_adapter(
    source: AdapterSource,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> AdapterTensors:
    """Read the tensors of an adapter.

    Args:
        source: A file, a folder, a Hub id, or tensors by name.
        weight_name: Name of the file in the folder; None finds it.
        subfolder: Folder within the folder or repository; None for that itself.
        use_safetensors: True reads only safetensors files, False only pickled ones; None prefers safetensors.
        options: Options of `CheckpointSource`, for the Hub; None for the default ones.

    Returns:
        The tensors and settings, as they are stored.

    Raises:
        CheckpointError: If a file is missing or damaged.
        InputError: If an argument is invalid.
    """
    if isinstance(source, Mapping):
        return _from_memory(source)
    names: dict[str, Any] = {"weight_name": weight_name, "subfolder": subfolder}
    for name, value in names.items():
        if value is not None and (not isinstance(value, str) or not value or "\0" in value):
            raise invalid(name, value, "a name, or None")
    paths = find_adapter_files(
        source, weight_name=weight_name, subfolder=subfolder, use_safetensors=use_safetensors, options=options
    )
    tensors: dict[str, Tensor] = {}
    sources: dict[str, Path] = {}
    for path in paths:
        for name, tensor in read_tensors(path):
            check_stored_once(sources, name, path)
            # Small ones are copied: their file may be replaced while the adapter is used.
            tensors[name] = tensor.clone() if tensor.ndim < 2 or min(tensor.shape[:2]) <= 1024 else tensor
    origin = str(paths[0] if len(paths) == 1 else paths[0].parent)
    return AdapterTensors(origin, tensors, _settings(paths[0]), tuple(paths))


def _from_memory(source: Mapping[str, Any]) -> AdapterTensors:
    """Return copies of tensors that the caller holds."""
    for name, tensor in source.items():
        key: Any = name
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.is_meta:
            expected = "tensors with values, by name"
            raise invalid("pretrained_model_name_or_path_or_dict", {name: tensor}, expected)
    return AdapterTensors("the dict", {name: tensor.detach().to("cpu", copy=True) for name, tensor in source.items()})


def find_adapter_files(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Return the files of an adapter; several only for whole weights in several shards.

    Args:
        source: A file, a folder, or a Hub id; or "embedded/distilled", or "owner/name/distilled", for the distilled
            adapter of a checkpoint.
        weight_name: Name of the file in the folder; None finds it.
        subfolder: Folder within the folder or repository; None for that itself.
        use_safetensors: True finds only safetensors files, False only pickled ones; None prefers safetensors.
        options: Options of `CheckpointSource`, for the Hub; None for the default ones.

    Raises:
        CheckpointError: If there is no such file, or the folder has several and none has a known name.
        InputError: If the source is not a path.
    """
    given: Any = source
    expected = "a file, a folder, a Hub id such as 'owner/name', or a dict of tensors"
    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str) or not os.fspath(given):
        raise invalid("pretrained_model_name_or_path_or_dict", source, expected)
    if "\0" in os.fspath(given):
        raise invalid("pretrained_model_name_or_path_or_dict", source, expected)
    model = os.fspath(source).removesuffix(f"/{DISTILLED}")
    is_local = model != EMBEDDED and os.path.exists(source)
    if subfolder is None and model != os.fspath(source) and not is_local and (model == EMBEDDED or "/" in model):
        source, subfolder = model, DISTILLED
    if os.path.isfile(source):
        if weight_name is not None or subfolder is not None:
            raise invalid("weight_name", weight_name or subfolder, f"None, because {os.fspath(source)!r} is a file")
        return [Path(source)]
    text = os.fspath(source)
    if not os.path.isdir(source) and (not HUB_ID.fullmatch(text) or text.endswith(SUFFIXES)):
        raise CheckpointError(f"no adapter {text!r}: no such file or folder exists, and it is not a Hub id")
    checkpoint = CheckpointSource(source, **(options or {}))

    available: set[str] = set()

    def select(names: list[str]) -> list[str]:
        available.update(names)
        return _select(names, weight_name, use_safetensors)

    folder = model_folder(checkpoint, subfolder, lambda names: [*select(names), *({PEFT_CONFIG} & set(names))])
    # nothing was downloaded from a repository without a suitable file
    entries = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(entry for entry in entries if os.path.isfile(folder / entry))
    selected = [name for name in select(names) if name in names]
    if not selected:
        present = ", ".join(map(printable, sorted(available))) or "no files"
        raise CheckpointError(
            f"no adapter in {folder}: expected {weight_name or WEIGHT_NAME}; the folder has {present}"
            f"{'' if weight_name else '; pass weight_name='}"
        )
    if selected[0].endswith(".json"):
        return indexed_files(folder / selected[0])
    return [folder / selected[0]]


def needed_files(names: Iterable[str]) -> list[str]:
    """Return the files to read for the adapter in a folder: its weights and their settings.

    Args:
        names: Names of all files in the folder.

    Returns:
        The names of the files; an empty list if the folder contains no adapter.
    """
    names = list(names)
    selected = _select(names, None, None)
    return [*selected, *({PEFT_CONFIG} & set(names))] if selected else []


def _select(names: Iterable[str], weight_name: str | None, use_safetensors: bool | None) -> list[str]:
    """Return the files of the adapter among all files of a folder: one, or an index and its shards."""
    if weight_name is not None:
        return [weight_name]
    allowed = {None: SUFFIXES, True: SUFFIXES[:1], False: SUFFIXES[1:]}[use_safetensors]
    names = [name for name in names if name.endswith((*allowed, ".json"))]
    for known in WEIGHT_NAMES:
        if known in names:
            return [known]
    if whole := select_weight_files(names, use_safetensors=use_safetensors):
        return whole
    for suffix in allowed:
        candidates = [name for name in names if name.endswith(suffix) and "/" not in name]
        if candidates:
            return candidates if len(candidates) == 1 else []
    return []


def _settings(path: Path) -> dict[str, Any]:
    """Return PEFT's settings from the header of a file, or from the config next to it."""
    text = read_metadata(path).get(SETTINGS)
    if text is None:
        config = path.parent / PEFT_CONFIG
        return read_json(config) if path.name.startswith("adapter_model.") and config.is_file() else {}
    try:
        if len(text) > MAX_SETTINGS_CHARACTERS:
            raise ValueError(f"it has more than {MAX_SETTINGS_CHARACTERS} characters")
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {SETTINGS} in its header is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"cannot read {path}: {SETTINGS} in its header is {describe(settings)}: expected an object"
        )
    return settings


def find_distilled_files(model: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> list[Path]:
    """Return the files of the adapter in a checkpoint's folder `distilled`.

    Args:
        model: Folder or Hub id of the checkpoint, or "embedded".
        options: Options of `CheckpointSource`, for the Hub; None for the default ones.

    Raises:
        CheckpointError: If the checkpoint does not exist, or has no such adapter.
    """
    name = os.fspath(model)
    try:
        return find_adapter_files(name, subfolder=DISTILLED, options=options)
    except CheckpointError as error:
        raise CheckpointError(
            f"the model {name} has no distilled adapter, which kandinsky22 train distill writes: {error}"
        ) from error


def distilled_steps(path: Path) -> int | None:
    """Return the number of steps to sample with, according to the file of a distilled adapter.

    Args:
        path: The file.

    Returns:
        The number; None if the file does not say.

    Raises:
        CheckpointError: If the file is damaged, or its header has something else than a number.
    """
    text = read_metadata(path).get(STEPS)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= 4 or int(text) == 0:
        raise CheckpointError(
            f"cannot read {path}: {STEPS} in its header is {text!r}: expected a number from 1 to 9999"
        )
    return int(text)


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 digest of a file, 64 hexadecimal digits.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular_file(path) as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    return digest.hexdigest()


# Writing


def write_adapter(
    save_directory: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    weight_name: str | None = None,
    safe_serialization: bool = True,
    num_inference_steps: int | None = None,
) -> Path:
    """Write the adapters of one or several networks to one file, in PEFT's layout.

    The names of tensors begin with their network only if there are several.

    Args:
        save_directory: Folder, which is created if it does not exist.
        adapters: Adapters by role: "unet", "prior".
        weight_name: Name of the file; None for `WEIGHT_NAME`, or its pickled form.
        safe_serialization: Whether to write a safetensors file instead of a pickled one, which has no settings.
        num_inference_steps: Number of steps to sample with, for distilled adapters in a safetensors file; None for
            others.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: If the file cannot be written; one that was there before is unchanged then.
        InputError: If an argument is invalid, or the scale of an update cannot be stored in a pickled file.
    """
    folder = checked_save_path(save_directory)
    if not isinstance(safe_serialization, bool):
        raise invalid("safe_serialization", safe_serialization, "True or False")
    name: Any = weight_name or (WEIGHT_NAME if safe_serialization else PICKLED_WEIGHT_NAME)
    suffix = ".safetensors" if safe_serialization else ".bin"
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
        raise invalid("weight_name", weight_name, f"the name of a file that ends in {suffix}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for role, adapter in adapters.items():
        start = f"{role}." if len(adapters) > 1 else ""
        tensors |= {start + key: tensor for key, tensor in adapter_tensors(adapter).items()}
        settings |= {start + key: value for key, value in adapter_settings(adapter).items()}
    if not safe_serialization and any(
        isinstance(update, LowRankUpdate) and update.scale != 1
        for each in adapters.values()
        for update in each.values()
    ):
        raise invalid("safe_serialization", False, "True", "a pickled file has no place for alpha")
    header = {SETTINGS: json.dumps(settings, indent=2, sort_keys=True)} if settings else {}
    header |= {} if num_inference_steps is None else {STEPS: str(num_inference_steps)}
    _write_tensors(folder / name, tensors, header)
    return folder / name


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with a header, or a pickled file without, by the end of its name.

    Raises:
        CheckpointError: If the file cannot be written; one that was there before is unchanged then.
    """
    contiguous = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            if path.suffix == SUFFIXES[0]:
                save_file(contiguous, temporary, metadata={"format": "pt", **header})
            else:
                torch.save(contiguous, temporary)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def convert_adapter(folder: Path, save_directory: Path, dtype: torch.dtype) -> Path:
    """Write the adapter in a folder in another floating-point type, as one safetensors file with the same settings.

    Args:
        folder: Folder of the adapter.
        save_directory: Folder to write to, which is created if it does not exist.
        dtype: Type of the result. Values of alpha are not converted.

    Returns:
        Path of the new file.

    Raises:
        CheckpointError: If the adapter is missing or damaged, or the file cannot be written.
    """
    stored = read_adapter(folder)
    header = {name: text for name, text in read_metadata(stored.paths[0]).items() if name != DIGEST}
    if stored.settings:
        header[SETTINGS] = json.dumps(stored.settings, indent=2, sort_keys=True)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() and not name.endswith("alpha") else tensor
        for name, tensor in stored.tensors.items()
    }
    path = save_directory / WEIGHT_NAME
    _write_tensors(path, tensors, header)
    return path


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter by PEFT's names; whole weights have the network's names.

    Args:
        adapter: The adapter.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.items():
        if isinstance(update, LowRankUpdate):
            layer = name.removesuffix(".weight")
            up = update.up if update.down.ndim == 2 else update.up[:, :, None, None]
            tensors |= {f"{layer}.lora_A.weight": update.down, f"{layer}.lora_B.weight": up}
        else:
            tensors[name] = update.value
    return tensors


def adapter_settings(adapter: Adapter) -> dict[str, Any]:
    """Return the settings of PEFT that state rank and alpha of an adapter; empty if it has no low-rank updates.

    Args:
        adapter: The adapter.
    """
    low_rank = {
        name.removesuffix(".weight"): update for name, update in adapter.items() if isinstance(update, LowRankUpdate)
    }
    if not low_rank:
        return {}
    ranks = {name: update.rank for name, update in low_rank.items()}
    alphas = {name: _whole(update.alpha) for name, update in low_rank.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(low_rank),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
    }


def _whole(alpha: float) -> float:
    """Return an integer where the value is one, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha
