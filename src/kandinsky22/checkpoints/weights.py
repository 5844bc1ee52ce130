"""Weight files of one network in one folder: selection, strict reading, atomic writing.

File names are those of the published layout: `<stem>[.variant].safetensors`, or shards listed in
`<stem>.safetensors.index[.variant].json`. The same names with `.bin` are PyTorch files, which are read as tensors only.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import atomic_write, read_json, write_json
from kandinsky22.errors import CheckpointError, invalid

STEM = "diffusion_pytorch_model"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EXTENSIONS = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}  # by `use_safetensors`


# Selection


def select_weight_files(
    names: Iterable[str],
    variant: str | None = None,
    use_safetensors: bool | None = None,
    stems: Iterable[str] = (STEM,),
) -> list[str]:
    """Return the names of the files that hold a network's weights: one file, or an index followed by its shards.

    Args:
        names: Names of all files in the network's folder.
        variant: Variant of the weights, such as "fp16"; None means the weights without a variant.
        use_safetensors: True accepts safetensors files only, False `.bin` files only; None prefers safetensors.
        stems: Accepted beginnings of the file names, in order of preference.

    Returns:
        The names; an empty list if there are no such weights.
    """
    names = sorted(names)
    suffix = f".{variant}" if variant else ""
    for extension in EXTENSIONS[use_safetensors]:
        for stem in stems:
            single = f"{stem}{suffix}.{extension}"
            if single in names:
                return [single]
            # The second name is that of early releases of the library that introduced the layout.
            index_names = (f"{stem}.{extension}.index{suffix}.json", f"{stem}.{extension}{suffix}.index.json")
            tag = re.escape(suffix)
            shard = re.compile(rf"{stem}(?:{tag}-\d+-of-\d+|-\d+-of-\d+{tag})\.{extension}")
            for index_name in index_names:
                if index_name in names:
                    return [index_name, *filter(shard.fullmatch, names)]
    return []


def find_weight_files(
    folder: Path,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    fallback_folder: Path | None = None,
) -> list[Path]:
    """Return the files to read for the weights of the network in a folder.

    Args:
        folder: The network's folder.
        variant: Variant of the weights; None means the weights without a variant.
        use_safetensors: True accepts safetensors files only, False `.bin` files only; None prefers safetensors.
        fallback_folder: Folder that holds shards missing from `folder`; None if there is none.

    Raises:
        CheckpointError: If there are no weights, or if an index is damaged or lists a missing file. The message names
            the folder, what was expected and what is there.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    selected = select_weight_files(names, variant, use_safetensors)
    if not selected:
        suffix = f".{variant}" if variant else ""
        extensions = " or .".join(EXTENSIONS[use_safetensors])
        present = ", ".join(sorted(names)) or "no files"
        raise CheckpointError(f"no weights in {folder}: expected {STEM}{suffix}.{extensions}; the folder has {present}")
    if not selected[0].endswith(".json"):
        return [folder / selected[0]]
    index = folder / selected[0]
    return [_shard_path(index, shard, fallback_folder) for shard in _indexed_shards(index)]


def _indexed_shards(index: Path) -> list[str]:
    """Names of the shards that an index file lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"cannot read {index}: it has no weight_map of tensor names to files")
    return sorted(set(weight_map.values()))


def _shard_path(index: Path, shard: str, fallback_folder: Path | None) -> Path:
    """Path of a shard: next to its index, or else in the fallback folder."""
    if Path(shard).name != shard:
        raise CheckpointError(f"{index} lists a file outside its folder: {shard!r}")
    path = index.parent / shard
    if path.is_file():
        return path
    if fallback_folder is not None and (fallback_folder / shard).is_file():
        return fallback_folder / shard
    raise CheckpointError(f"missing file: {path} (listed in {index.name})")


# Reading


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over names and tensors of one file, memory-mapped where the format allows it.

    Args:
        path: A safetensors file, or a PyTorch file that contains tensors only.

    Raises:
        CheckpointError: If the file is damaged, or if it holds anything other than named tensors.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch_file(path)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: truncated or not a safetensors file ({error})") from error


def _read_pytorch_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        # Files of torch releases before 1.6 are not zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types of exceptions for damaged files
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"cannot read {path}: damaged, or contains objects other than tensors ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"cannot read {path}: it does not hold named tensors")
    yield from content.items()


# Writing


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, variant: str | None, max_shard_size: int | str, safe: bool
) -> None:
    """Write a network's weights, in several files if they are large, and delete the weights they replace.

    All files are first written under temporary names and then renamed together. Weights of the same variant and
    format that were in the folder before are replaced.

    Args:
        folder: The network's folder, which is created if it is missing.
        tensors: Weights by name.
        variant: Variant of the weights, part of the file names; None for none.
        max_shard_size: Largest size of a file: bytes, or text such as "5GB". A larger tensor gets a separate file.
        safe: Whether to write safetensors files; otherwise PyTorch files (`.bin`) are written.

    Raises:
        InputError: If `variant` cannot be part of a file name, or if `max_shard_size` is not a size.
        CheckpointError: If the folder or a file cannot be written.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise invalid("variant", variant, "letters, digits, - and _, because it is part of a file name")
    extension = "safetensors" if safe else "bin"
    shards = split_into_shards(tensors, byte_count(max_shard_size))
    files = dict(zip(_shard_names(len(shards), variant, extension), shards, strict=True))
    index_name = f"{STEM}.{extension}.index.{variant}.json" if variant else f"{STEM}.{extension}.index.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaced = set(select_weight_files([path.name for path in folder.iterdir()], variant, safe))
        _write_shards(folder, files, safe)
        written = set(files)
        if len(files) > 1:
            _write_index(folder / index_name, files)
            written.add(index_name)
        for stale in replaced - written:
            (folder / stale).unlink(missing_ok=True)
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot write weights to {folder}: {error}") from error


def byte_count(size: int | str) -> int:
    """Return the number of bytes of the argument `max_shard_size`.

    Args:
        size: Number of bytes, or text such as "500MB" or "2GiB".

    Raises:
        InputError: If `size` is anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(size).upper()) if isinstance(size, str) else None
    count = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else size
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise invalid("max_shard_size", size, "a positive number of bytes, or text such as '5GB'")
    return count


def split_into_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Return the tensors in consecutive groups, at least one, of at most a number of bytes each.

    Args:
        tensors: Tensors by name.
        max_bytes: Largest size of a group. A larger tensor gets a separate group.
    """
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor.detach()
        shard_bytes += tensor.nbytes
    return shards


def _shard_names(count: int, variant: str | None, extension: str) -> list[str]:
    """File names of `count` shards; a single one has no number."""
    stem = f"{STEM}.{variant}" if variant else STEM
    if count == 1:
        return [f"{stem}.{extension}"]
    return [f"{stem}-{number:05d}-of-{count:05d}.{extension}" for number in range(1, count + 1)]


def _write_shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]], safe: bool) -> None:
    """Write files by name, all under temporary names before any of them is renamed."""
    with contextlib.ExitStack() as stack:
        for name, shard in files.items():
            temporary = stack.enter_context(atomic_write(folder / name))
            if safe:
                contiguous = {tensor_name: tensor.contiguous() for tensor_name, tensor in shard.items()}
                save_file(contiguous, temporary, metadata={"format": "pt"})
            else:  # cloned, because torch.save writes a tensor's entire storage, which may be a mapped file
                torch.save({tensor_name: tensor.clone() for tensor_name, tensor in shard.items()}, temporary)


def _write_index(path: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the index that maps tensor names to files."""
    total_size = sum(tensor.nbytes for shard in files.values() for tensor in shard.values())
    weight_map = {tensor_name: name for name, shard in files.items() for tensor_name in shard}
    write_json(path, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
