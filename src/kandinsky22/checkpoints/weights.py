"""Weight files of one network in one folder: selection, strict reading, atomic writing.

File names are those of the published layout: `<stem>[.variant].safetensors`, or shards listed in
`<stem>.safetensors.index[.variant].json`. The same names with `.bin` are PyTorch files, which are read as tensors only.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import open_regular_file, read_json, write_json
from kandinsky22.checkpoints.fingerprint import tensors_digest
from kandinsky22.checkpoints.folder_save import ReplacedFiles, folder_save
from kandinsky22.checkpoints.load_arguments import check_variant_name
from kandinsky22.errors import CheckpointError, describe, invalid, printable

STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = {True: "model", False: "pytorch_model"}  # of safetensors and of pickled files
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DIGEST = "digest"  # entry of a shard's metadata, equal to that in the index if both are of one save
STORED_FLOATS = {"float16", "bfloat16", "float32", "float64"} | {
    f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
}
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
    names = _regular_files(folder)
    selected = select_weight_files(names, variant, use_safetensors)
    if not selected:
        suffix = f".{variant}" if variant else ""
        extensions = " or .".join(EXTENSIONS[use_safetensors])
        present = ", ".join(map(printable, sorted(names))) or "no files"
        raise CheckpointError(f"no weights in {folder}: expected {STEM}{suffix}.{extensions}; the folder has {present}")
    if not selected[0].endswith(".json"):
        return [folder / selected[0]]
    return indexed_files(folder / selected[0], fallback_folder)


def _regular_files(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if os.path.isfile(folder / name)]
    except OSError:  # missing, unreadable, or not a folder
        return []


def indexed_files(index: Path, fallback_folder: Path | None = None) -> list[Path]:
    """Return the files that an index lists.

    Args:
        index: The index.
        fallback_folder: Folder that holds files missing next to the index; None if there is none.

    Raises:
        CheckpointError: If the index is damaged, if it lists a file that is missing, in another folder or of another
            format, or if a file is not of the save that has written the index.
    """
    content = read_json(index)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"cannot read {index}: it has no weight_map of tensor names to files")
    digests = metadata.get("digests") if isinstance(metadata, dict) else None
    extension = ".safetensors" if ".safetensors." in index.name else ".bin"
    paths = []
    for shard in sorted(set(weight_map.values())):
        path = _shard_path(index, shard, extension, fallback_folder)
        _check_digest(index, path, digests.get(shard) if isinstance(digests, dict) else None)
        paths.append(path)
    if not paths:
        raise CheckpointError(f"cannot read {index}: its weight_map is empty")
    return paths


def _shard_path(index: Path, shard: str, extension: str, fallback_folder: Path | None) -> Path:
    """Path of a shard: next to its index, or else in the fallback folder."""
    if Path(shard).name != shard or shard in ("", "..") or "\\" in shard or "\0" in shard:
        raise CheckpointError(f"{index} lists a file outside its folder: {shard!r}")
    if not shard.endswith(extension):
        raise CheckpointError(f"{index} lists a file of another format: {shard!r}")
    for folder in (index.parent, fallback_folder):
        try:
            if folder is not None and (folder / shard).is_file():
                return folder / shard
        except (OSError, ValueError) as error:  # a name that no file can have
            raise CheckpointError(f"{index} lists {shard!r}: {error}") from error
    raise CheckpointError(f"missing file: {printable(str(index.parent / shard))} (listed in {index.name})")


def _check_digest(index: Path, path: Path, expected: Any) -> None:
    """Check that a shard and its index are of one save. Files of other programs hold no digests and are not checked."""
    if expected is None or path.suffix != ".safetensors":
        return
    with _opened_safetensors(path) as file:
        digest = (file.metadata() or {}).get(DIGEST)
    if digest is not None and digest != expected:
        raise CheckpointError(f"{path} is not of the save that has written {index.name}: copy or save the model again")


# Reading


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over names and tensors of one file, memory-mapped where the format allows it.

    Args:
        path: A safetensors file, or a PyTorch file that contains tensors only.

    Raises:
        CheckpointError: If the file is damaged, or if it holds anything other than named dense tensors with values.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; none for a file of another format.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if path.suffix != ".safetensors":
        return {}
    with _opened_safetensors(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[Any]:
    try:
        with open_regular_file(path):  # the library would wait for the other end of a pipe
            pass
        file: Any = safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: truncated or not a safetensors file ({printable(str(error))})")


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            try:
                tensor = file.get_tensor(name)
            except Exception as error:  # types that this release of torch does not have
                raise _unreadable(path, error) from error
            _check_tensor(path, name, tensor)
            yield name, tensor


def _read_pytorch_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with open_regular_file(path) as file:
            # Files of torch releases before 1.6 are not zip archives and cannot be mapped.
            is_archive = zipfile.is_zipfile(file)
            if is_archive and _unpacked_size(file) > os.fstat(file.fileno()).st_size:
                raise ValueError("it is compressed, which files of torch are not")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # torch raises many types of exceptions for damaged files
        reason = printable(str(error).strip().split("\n")[0])
        raise CheckpointError(
            f"cannot read {path}: damaged, or contains objects other than tensors ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"cannot read {path}: it does not hold named tensors")
    for name, tensor in content.items():
        _check_tensor(path, name, tensor)
        yield name, tensor.detach()


def _unpacked_size(file: IO[bytes]) -> int:
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _check_tensor(path: Path, name: Any, tensor: Tensor) -> None:
    """Check that a tensor is dense, with values, and real, and that its name is a text."""
    if not isinstance(name, str):
        raise CheckpointError(f"cannot read {path}: it has a tensor named {describe(name)}, which is not a text")
    problem = (
        "sparse"
        if tensor.layout is not torch.strided
        else "nested"
        if tensor.is_nested
        else "quantized by torch"
        if tensor.is_quantized
        else "without values, on the meta device"
        if tensor.is_meta
        else "complex"
        if tensor.is_complex()
        else f"of {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.is_floating_point() and str(tensor.dtype).removeprefix("torch.") not in STORED_FLOATS
        else None
    )
    if problem:
        raise CheckpointError(f"cannot read {path}: tensor {describe(name)} is {problem}: expected dense real numbers")


def check_weights(files: Iterable[Path]) -> None:
    """Check the weight files of a network that another library will read, without reading the values.

    Args:
        files: One file, or an index followed by its shards.

    Raises:
        CheckpointError: If a file is damaged or missing, if an index lists files of another folder, if a tensor is
            stored twice, or if one that is not a list of positions has no floating-point values.
    """
    paths = list(files)
    if paths and paths[0].suffix == ".json":
        paths = indexed_files(paths[0])
    sources: dict[str, Path] = {}
    for path in paths:
        for name, tensor in read_tensors(path):
            check_stored_once(sources, name, path)
            # Early releases of transformers stored the constant positions of tokens.
            if not tensor.is_floating_point() and not name.endswith("position_ids"):
                raise CheckpointError(
                    f"cannot read {path}: tensor {describe(name)} is of {str(tensor.dtype).removeprefix('torch.')}: "
                    "expected a floating-point type"
                )


def check_stored_once(sources: dict[str, Path], name: str, path: Path) -> None:
    """Record that a file stores a tensor.

    Args:
        sources: The file of each tensor, to which this one is added.
        name: Name of the tensor.
        path: The file.

    Raises:
        CheckpointError: If another file stores it too.
    """
    if name in sources:
        raise CheckpointError(f"{path} stores tensor {describe(name)}, as {sources[name].name} does: save again")
    sources[name] = path


# Writing


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, variant: str | None, max_shard_size: int | str, safe: bool
) -> None:
    """Write a network's weights, in several files if they are large, and delete the weights they replace.

    All files appear together (`folder_save`). Weights of the same variant and format that were in the folder before
    are replaced.

    Args:
        folder: The network's folder, which is created if it is missing.
        tensors: Weights by name.
        variant: Variant of the weights, part of the file names; None for none.
        max_shard_size: Largest size of a file: bytes, or text such as "5GB". A larger tensor gets a separate file.
        safe: Whether to write safetensors files; otherwise PyTorch files (`.bin`) are written.

    Raises:
        InputError: If an argument is invalid.
        CheckpointError: If the folder or a file cannot be written.
    """
    check_save_arguments(variant, max_shard_size, safe)
    with folder_save(folder) as save:
        write_weight_files(save.stage(), tensors, variant=variant, max_shard_size=max_shard_size, safe=safe)
        save.replace("", replaced_weight_files(variant, safe))


def write_weight_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    variant: str | None,
    max_shard_size: int | str,
    safe: bool,
    stem: str = STEM,
) -> None:
    """Write a network's weights into an empty folder, such as that of a temporary copy or of a `FolderSave`.

    Args:
        folder: The folder.
        tensors: Weights by name.
        variant: Variant of the weights, part of the file names; None for none.
        max_shard_size: Largest size of a file: bytes, or text such as "5GB". A larger tensor gets a separate file.
        safe: Whether to write safetensors files; otherwise PyTorch files (`.bin`) are written.
        stem: Beginning of the file names.

    Raises:
        InputError: If `max_shard_size` is not a size.
        CheckpointError: If a tensor has no values, or if a file cannot be written.
    """
    extension = "safetensors" if safe else "bin"
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "on the meta device, without values" if tensor.is_meta else "sparse"
            raise CheckpointError(f"cannot write weights to {folder}: tensor {describe(name)} is {kind}")
    shards = split_into_shards(tensors, byte_count(max_shard_size))
    files = dict(zip(_shard_names(stem, len(shards), variant, extension), shards, strict=True))
    try:
        digests = {name: _write_shard(folder / name, shard, len(files), safe) for name, shard in files.items()}
        if len(files) > 1:
            tag = f".{variant}" if variant else ""
            _write_index(folder / f"{stem}.{extension}.index{tag}.json", files, digests if safe else {})
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot write weights to {folder}: {error}") from error


def check_save_arguments(variant: Any, max_shard_size: Any, safe_serialization: Any) -> None:
    """Check arguments of `save_pretrained`.

    Args:
        variant: Variant of the weights, part of the file names; None for none.
        max_shard_size: Largest size of a file.
        safe_serialization: Whether to write safetensors files.

    Raises:
        InputError: If one of them is invalid.
    """
    check_variant_name(variant)
    byte_count(max_shard_size)
    if not isinstance(safe_serialization, bool):
        raise invalid("safe_serialization", safe_serialization, "True or False")


def replaced_weight_files(variant: str | None, safe: bool, stems: Iterable[str] = (STEM,)) -> ReplacedFiles:
    """Return a function that selects the files of a folder which new weights of a variant and format replace.

    Args:
        variant: Variant of the new weights; None for none.
        safe: Whether they are safetensors files.
        stems: Beginnings of the names that weight files of the network may have.
    """
    stems, extension = tuple(stems), "safetensors" if safe else "bin"
    tag = re.escape(f".{variant}") if variant else ""
    single = rf"{tag}\.{extension}"
    shard = rf"(?:{tag}-\d+-of-\d+|-\d+-of-\d+{tag})\.{extension}"
    index = rf"\.{extension}(?:\.index{tag}|{tag}\.index)\.json"
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, stems))})(?:{single}|{shard}|{index})")
    return lambda files: filter(pattern.fullmatch, files)


def byte_count(size: int | str) -> int:
    """Return the number of bytes of the argument `max_shard_size`.

    Args:
        size: Number of bytes, or text such as "500MB" or "2GiB".

    Raises:
        InputError: If `size` is anything else.
    """
    count = 0
    try:
        if isinstance(size, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", size.upper())
            count = int(Fraction(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
        elif not isinstance(size, bool):
            count = operator.index(size)
    except (TypeError, ValueError, OverflowError):  # ValueError: beyond Python's limit of digits
        count = 0
    if count < 1:
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


def _shard_names(stem: str, count: int, variant: str | None, extension: str) -> list[str]:
    """File names of `count` shards; a single one has no number."""
    stem = f"{stem}.{variant}" if variant else stem
    if count == 1:
        return [f"{stem}.{extension}"]
    return [f"{stem}-{number:05d}-of-{count:05d}.{extension}" for number in range(1, count + 1)]


def _write_shard(path: Path, shard: Mapping[str, Tensor], count: int, safe: bool) -> str:
    """Write one of `count` files; return the digest that it stores, empty if it stores none."""
    if not safe:  # cloned, because torch.save writes a tensor's entire storage, which may be a mapped file
        torch.save({name: tensor.clone() for name, tensor in shard.items()}, path)
        return ""
    contiguous = {name: tensor.contiguous() for name, tensor in shard.items()}
    digest = tensors_digest(contiguous) if count > 1 else ""
    metadata = {"format": "pt", DIGEST: digest} if digest else {"format": "pt"}
    path.touch()
    mode = path.stat().st_mode
    save_file(contiguous, path, metadata=metadata)
    if path.stat().st_mode != mode:
        path.chmod(mode)  # safetensors makes files that only their owner can read
    if digest:
        _sort_metadata(path, digest)
    return digest


def _sort_metadata(path: Path, digest: str) -> None:
    """Order the metadata of a file, which safetensors writes in random order: equal weights give equal files."""
    entries = [f'"{DIGEST}":"{digest}"', '"format":"pt"']
    ordered, swapped = (f'{{"__metadata__":{{{",".join(order)}}}'.encode() for order in (entries, entries[::-1]))
    with open(path, "r+b") as file:
        file.seek(8)  # after the length of the header
        if file.read(len(swapped)) == swapped:
            file.seek(8)
            file.write(ordered)


def _write_index(path: Path, files: Mapping[str, Mapping[str, Tensor]], digests: Mapping[str, str]) -> None:
    """Write the index that maps tensor names to files."""
    total_size = sum(tensor.nbytes for shard in files.values() for tensor in shard.values())
    weight_map = {tensor_name: name for name, shard in files.items() for tensor_name in shard}
    metadata = {"total_size": total_size, **({"digests": dict(digests)} if digests else {})}
    write_json(path, {"metadata": metadata, "weight_map": weight_map}, flush=False)
