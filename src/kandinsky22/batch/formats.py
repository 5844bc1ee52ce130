"""Formats of shards: a folder of PNG files, a webdataset archive, or a Parquet file. Equal samples give equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.batch.samples import EMBEDDING, GENERATOR, Sample, StoredEmbedding
from kandinsky22.errors import InputError, MissingDependencyError

METADATA_FILE = "metadata.jsonl"  # the name by which image folders of `datasets` have metadata
SHARD_FOLDER = re.compile(r"\.?(\d{5,})(\..*)?")  # name of a shard that is a folder, finished or temporary
POSITION_DIGITS = 4  # of the position in a shard, after the shard's number
SAMPLE_EXTENSIONS = ("png", EMBEDDING, GENERATOR)  # of the files of a sample in such a folder


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """A format of shards.

    Attributes:
        name: Name on the command line.
        extension: Extension of shards; "" for folders.
        write: Function (samples, path) that writes a shard.
        read: Function (path) that yields the samples of a shard.
    """

    name: str
    extension: str
    write: Callable[[Sequence[Sample], Path], None]
    read: Callable[[Path], Iterator[Sample]]

    def shard_name(self, number: int) -> str:
        """Return the name of a shard.

        Args:
            number: Number of the shard.
        """
        return f"{number:05d}{self.extension}"


def to_json(value: Mapping[str, Any]) -> str:
    """Return JSON on one line.

    Args:
        value: The object.
    """
    return json.dumps(value, ensure_ascii=False)


# A folder of PNG files


def is_shard_file(folder_name: str, name: str) -> bool:
    """Return whether a file is one that the format `files` writes into the folder of a shard.

    All other files in that folder are the user's.

    Args:
        folder_name: Name of the shard's folder, which is finished or has a temporary name.
        name: Name of the file.
    """
    if name == METADATA_FILE:
        return True
    match, (key, _, extension) = SHARD_FOLDER.fullmatch(folder_name), name.partition(".")
    if match is None or extension not in SAMPLE_EXTENSIONS:
        return False
    return key.isdecimal() and key.startswith(match[1]) and len(key) == len(match[1]) + POSITION_DIGITS


def _write_folder(samples: Sequence[Sample], path: Path) -> None:
    path.mkdir()
    with (path / METADATA_FILE).open("w", encoding="utf-8") as metadata:
        for sample in samples:
            named = {} if sample.image is None else {"file_name": f"{sample.key}.png"}
            metadata.write(to_json({**named, **_flat(sample.metadata)}) + "\n")
            if sample.image is not None:
                (path / f"{sample.key}.png").write_bytes(sample.image)
            for extension, content in ({} if sample.embedding is None else sample.embedding.files()).items():
                (path / f"{sample.key}.{extension}").write_bytes(content)


def _read_folder(path: Path) -> Iterator[Sample]:
    with (path / METADATA_FILE).open(encoding="utf-8") as lines:
        for line in lines:
            metadata = _nested(json.loads(line))
            metadata.pop("file_name", None)
            key = metadata["key"]
            files = {name: path / f"{key}.{name}" for name in (EMBEDDING, GENERATOR)}
            stored = {name: file.read_bytes() for name, file in files.items() if file.exists()}
            image = path / f"{key}.png"
            yield Sample(
                key,
                metadata,
                image.read_bytes() if image.exists() else None,
                StoredEmbedding.from_files(stored) if stored else None,
            )


# Objects in metadata differ from row to row: as JSON texts, tables have one type per column.
OBJECTS = ("settings", "columns", "recipe")


def _flat(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_json(value) if name in OBJECTS else value for name, value in metadata.items()}


def _nested(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: json.loads(value) if name in OBJECTS and isinstance(value, str) else value
        for name, value in metadata.items()
    }


# Webdataset archives


def _write_tar(samples: Sequence[Sample], path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            _add(archive, f"{sample.key}.json", to_json(sample.metadata).encode())
            if sample.image is not None:
                _add(archive, f"{sample.key}.png", sample.image)
            for extension, content in ({} if sample.embedding is None else sample.embedding.files()).items():
                _add(archive, f"{sample.key}.{extension}", content)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, owner and permissions are constants
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _read_tar(path: Path) -> Iterator[Sample]:
    with tarfile.open(path, "r:") as archive:
        key, files = None, {}
        for entry in archive:
            own_key, _, extension = entry.name.partition(".")
            if own_key != key and key is not None:
                yield _sample_of_files(key, files)
                files = {}
            key, stream = own_key, archive.extractfile(entry)
            files[extension] = b"" if stream is None else stream.read()
        if key is not None:
            yield _sample_of_files(key, files)


def _sample_of_files(key: str, files: Mapping[str, bytes]) -> Sample:
    embedding = StoredEmbedding.from_files(files) if EMBEDDING in files else None
    return Sample(key, json.loads(files["json"]), files.get("png"), embedding)


# Parquet files


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError("Parquet files need pyarrow: pip install kandinsky22[batch]") from None
    return pyarrow


def _schema(arrow: Any, *, images: bool, embeddings: bool) -> Any:
    """Return the columns of a shard. Their metadata let `datasets` decode the images."""
    fields = [
        ("key", arrow.string(), "string"),
        ("id", arrow.string(), "string"),
        ("row", arrow.int64(), "int64"),
        ("prompt", arrow.string(), "string"),
        ("negative_prompt", arrow.string(), "string"),
        ("seed", arrow.uint64(), "uint64"),
        ("width", arrow.int32(), "int32"),
        ("height", arrow.int32(), "int32"),
        *((name, arrow.string(), "string") for name in OBJECTS),
        *([("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]), None)] if images else []),
        *(
            [
                ("image_embedding", arrow.list_(arrow.float32()), "list"),
                ("negative_image_embedding", arrow.list_(arrow.float32()), "list"),
                ("generator_state", arrow.binary(), "binary"),
            ]
            if embeddings
            else []
        ),
    ]
    kinds = {
        None: {"_type": "Image"},
        "list": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"},
    }
    features = {name: kinds.get(kind, {"dtype": kind, "_type": "Value"}) for name, _, kind in fields}
    description = json.dumps({"info": {"features": features}})
    return arrow.schema([(name, kind) for name, kind, _ in fields], metadata={"huggingface": description})


def _write_parquet(samples: Sequence[Sample], path: Path) -> None:
    arrow = _pyarrow()
    images, embeddings = (any(value is not None for value in column) for column in _columns(samples))
    schema = _schema(arrow, images=images, embeddings=embeddings)
    rows = []
    for sample in samples:
        row = _flat(sample.metadata)
        row["image"] = {"bytes": sample.image, "path": f"{sample.key}.png"}
        if sample.embedding is not None:
            row["image_embedding"], row["negative_image_embedding"] = sample.embedding.vectors.tolist()
            row["generator_state"] = sample.embedding.generator_state.tobytes()
        rows.append({name: row.get(name) for name in schema.names})
    # Pictures are compressed already.
    arrow.parquet.write_table(arrow.Table.from_pylist(rows, schema), path, compression="zstd", use_dictionary=False)


def _columns(samples: Iterable[Sample]) -> tuple[list[Any], list[Any]]:
    return [sample.image for sample in samples], [sample.embedding for sample in samples]


def _read_parquet(path: Path) -> Iterator[Sample]:
    import numpy as np

    for batch in _pyarrow().parquet.ParquetFile(path).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            image = (row.pop("image", None) or {}).get("bytes")
            vectors = row.pop("image_embedding", None), row.pop("negative_image_embedding", None)
            state = row.pop("generator_state", None)
            embedding = None
            if state is not None:
                embedding = StoredEmbedding(np.array(vectors, np.float32), np.frombuffer(state, np.uint8))
            yield Sample(row["key"], _nested(row), image, embedding)


FORMATS: Mapping[str, ShardFormat] = {
    format.name: format
    for format in (
        ShardFormat("files", "", _write_folder, _read_folder),
        ShardFormat("webdataset", ".tar", _write_tar, _read_tar),
        ShardFormat("parquet", ".parquet", _write_parquet, _read_parquet),
    )
}


def read_shard(format: ShardFormat, path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard.

    Args:
        format: Format of the shard.
        path: The shard.

    Raises:
        InputError: If the shard is missing or damaged.
    """
    try:
        yield from format.read(path)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error


def shard_digest(path: Path) -> str:
    """Return the SHA-256 of a shard: of the file, or of the names and digests of the files that its format writes.

    Args:
        path: The shard, which is finished or has a temporary name.
    """
    if not path.is_dir():
        return _file_digest(path)
    files = sorted(file for file in path.iterdir() if is_shard_file(path.name, file.name) and file.is_file())
    lines = [f"{_file_digest(file)}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest()
