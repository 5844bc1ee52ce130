"""Weights of one network in one folder: which files hold them, read lean and strictly, written whole.

File names are the published layout's: `<stem>[.variant].safetensors`, or shards listed in
`<stem>.safetensors.index[.variant].json`; the same with `.bin`, which is only ever read as plain tensors.
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

from kandinsky22.checkpoints.atomic_files import read_json, write_json, written_whole
from kandinsky22.errors import CheckpointError, InputError

STEM = "diffusion_pytorch_model"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def weight_files(
    names: Iterable[str],
    variant: str | None = None,
    use_safetensors: bool | None = None,
    stems: Iterable[str] = (STEM,),
) -> list[str]:
    """The file that holds a network's weights, or an index followed by its shards, among the files of a folder.

    Safetensors come first unless `use_safetensors` is False; with True nothing else counts. Empty if there is none.
    """
    names = sorted(names)
    extensions = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    dotted = f".{variant}" if variant else ""
    for extension in extensions:
        for stem in stems:
            single = f"{stem}{dotted}.{extension}"
            if single in names:
                return [single]
            # The second form of each was written by early releases of the published layout's first library.
            indices = (f"{stem}.{extension}.index{dotted}.json", f"{stem}.{extension}{dotted}.index.json")
            tag = re.escape(dotted)
            shard = re.compile(rf"{stem}(?:{tag}-\d+-of-\d+|-\d+-of-\d+{tag})\.{extension}")
            for index in indices:
                if index in names:
                    return [index, *filter(shard.fullmatch, names)]
    return []


def find_weights(
    folder: Path, variant: str | None = None, use_safetensors: bool | None = None, shared: Path | None = None
) -> list[Path]:
    """The files to read in `folder`, those of its shards that it leaves to another one in the folder `shared`.

    Raises CheckpointError that says what was looked for and what is there.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    chosen = weight_files(names, variant, use_safetensors)
    if not chosen:
        dotted = f".{variant}" if variant else ""
        wanted = {None: "safetensors or .bin", True: "safetensors", False: "bin"}[use_safetensors]
        there = ", ".join(sorted(names)) or "nothing"
        raise CheckpointError(f"no weights in {folder}: looked for {STEM}{dotted}.{wanted}; found {there}")
    if not chosen[0].endswith(".json"):
        return [folder / chosen[0]]
    index = folder / chosen[0]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"cannot read {index}: it has no weight_map of tensor names to files")
    files = []
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} points outside its folder: {shard!r}")
        elsewhere = None if shared is None else shared / shard
        if shard in names or elsewhere is None or not elsewhere.is_file():
            elsewhere = folder / shard
        if not elsewhere.is_file():
            raise CheckpointError(f"missing file: {elsewhere} (listed in {index.name})")
        files.append(elsewhere)
    return files


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file, memory-mapped; raises CheckpointError naming the file if it is damaged."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: truncated or not a safetensors file ({error})") from error
        return
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises nearly anything for damaged files
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot read {path}: damaged, or more than plain tensors ({reason})") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"cannot read {path}: it does not hold named tensors")
    yield from content.items()


def byte_count(size: int | str) -> int:
    """Bytes in a size such as 5000000, "500MB" or "2GiB"; raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(size).upper()) if isinstance(size, str) else None
    count = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else size
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"max_shard_size={size!r} is not a size; accepted: bytes as a number, or text such as '5GB'")
    return count


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, variant: str | None, max_shard_size: int | str, safe: bool
) -> None:
    """Write tensors in shards of at most `max_shard_size` (a single larger tensor gets its own).

    All files are written under temporary names first and renamed together. Weights of the same variant and format
    that were in the folder before are replaced. Raises CheckpointError naming the place if it cannot be written.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise InputError(f"variant={variant!r} cannot be part of a file name; accepted: letters, digits, - and _")
    extension = "safetensors" if safe else "bin"
    shards: list[dict[str, Tensor]] = [{}]
    limit, filled = byte_count(max_shard_size), 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.detach()
        filled += tensor.nbytes
    stem = f"{STEM}.{variant}" if variant else STEM
    count = len(shards)
    numbers = [""] if count == 1 else [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    places = {f"{stem}{number}.{extension}": shard for number, shard in zip(numbers, shards, strict=True)}
    index = f"{STEM}.{extension}.index.{variant}.json" if variant else f"{STEM}.{extension}.index.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = set(weight_files([path.name for path in folder.iterdir()], variant, safe))
        with contextlib.ExitStack() as stack:
            for file, shard in places.items():
                temporary = stack.enter_context(written_whole(folder / file))
                if safe:
                    plain = {name: tensor.contiguous() for name, tensor in shard.items()}
                    save_file(plain, temporary, metadata={"format": "pt"})
                else:  # cloned, for torch.save writes whole storages, and a mapped tensor's storage may be its file
                    torch.save({name: tensor.clone() for name, tensor in shard.items()}, temporary)
        if count > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            weight_map = {name: file for file, shard in places.items() for name in shard}
            write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for stale in before - set(places) - ({index} if count > 1 else set()):
            (folder / stale).unlink(missing_ok=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write weights to {folder}: {error}") from error
