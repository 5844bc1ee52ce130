"""Training pictures and their captions: folders, CSV files, webdataset shards and data sets of the Hub.

Reading a data set opens no picture: an `Example` holds a source of bytes, the caption and the files that belong to it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.Image import Image

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import images, sources
from kandinsky22.requirements import require
from kandinsky22.training.finetuning.option import IneffectiveOptionError
from kandinsky22.training.finetuning.options import TrainingOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("file_name", "image", "img", "picture", "path", "jpg", "png", "webp", "jpeg")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
HINT_COLUMN, MASK_COLUMN = "hint", "mask"
LISTED = 5  # names that a message lists


@dataclass(frozen=True)
class PictureBytes:
    """Where the bytes of a picture are.

    Attributes:
        name: Name for messages.
        read: Function that returns the bytes; it raises OSError if they cannot be read.
    """

    name: str
    read: Callable[[], bytes]

    def digest(self) -> str:
        """Return the SHA-256 digest of the bytes, 64 hexadecimal digits.

        Raises:
            OSError: They cannot be read.
        """
        return hashlib.sha256(self.read()).hexdigest()

    def decode(self) -> Image:
        """Return the picture, upright, in its original mode, thus with its transparency.

        Raises:
            InputError: The bytes are no picture.
            OSError: They cannot be read.
        """
        return sources.decode_image(self.name, self.read(), self.name)

    def open(self) -> Image:
        """Return the picture, upright, in RGB.

        Raises:
            InputError: The bytes are no picture.
            OSError: They cannot be read.
        """
        return images.convert_mode(self.name, self.decode())


@dataclass(frozen=True)
class Example:
    """One training picture.

    Attributes:
        picture: The picture.
        caption: Its caption; None if it has none.
        hint: Its hint; None if it has none.
        mask: Its mask, white where the picture is repainted; None if it has none.
    """

    picture: PictureBytes
    caption: str | None = None
    hint: PictureBytes | None = None
    mask: PictureBytes | None = None


def read_examples(options: TrainingOptions) -> list[Example]:
    """Return the examples of the data set that options name.

    Args:
        options: Options of the training.

    Raises:
        InputError: There is no such data set, it has no picture, or it has captions without pictures.
        MissingDependencyError: The package `datasets` is needed and not installed.
    """
    if options.dataset_name is not None:
        examples = _hub_examples(options)
        where = f"--dataset-name {options.dataset_name}"
    else:
        path = Path(options.train_data_dir or "")
        examples = read_path(path, "--train-data-dir", options.image_column, options.caption_column)
        where = f"--train-data-dir {path}"
    if not examples:
        raise InputError(f"{where} holds no pictures: expected files named *{', *'.join(SUFFIXES)}")
    return examples[: options.max_train_samples]


def read_path(
    path: Path, argument: str, image_column: str | None = None, caption_column: str | None = None
) -> list[Example]:
    """Return the examples in a folder, a CSV file or webdataset shards.

    Args:
        path: The folder or file.
        argument: Name of the option that holds it, for messages.
        image_column: Column of file names; None for the usual names.
        caption_column: Column of captions; None for the usual names.

    Raises:
        InputError: There is no such folder or file, or captions have no pictures.
    """
    if path.is_dir():
        for name in ("metadata.jsonl", "metadata.csv"):
            if (path / name).is_file():
                return _table_examples(path / name, image_column, caption_column)
        if shards := sorted(path.glob("*.tar")):
            return _shard_examples(shards, image_column, caption_column)
        for name, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column is not None:
                raise IneffectiveOptionError(name, f"on {path}, a folder without a table")
        return _folder_examples(path)
    if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        return _table_examples(path, image_column, caption_column)
    if path.suffix.lower() == ".tar" and path.is_file():
        return _shard_examples([path], image_column, caption_column)
    raise invalid(argument, str(path), "a folder, a CSV or JSON Lines file, or a .tar shard that exists")


def picture_file(path: Path) -> PictureBytes:
    """Return the source of a picture in a file, with the path as its name.

    Args:
        path: The file.
    """
    return PictureBytes(str(path), path.read_bytes)


# Folders


def _folder_examples(folder: Path) -> list[Example]:
    """Return the pictures of a folder and its subfolders, with the .txt, .hint.* and .mask.* files next to them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    pictures: dict[Path, list[Path]] = {}  # by their paths without suffix, as the files next to them
    captions: dict[Path, list[Path]] = {}
    hints: dict[Path, list[Path]] = {}
    masks: dict[Path, list[Path]] = {}
    for path in files:
        stem, suffix = path.with_suffix(""), path.suffix.lower()
        if suffix == ".txt":
            captions.setdefault(stem, []).append(path)
        elif suffix in SUFFIXES and stem.suffix in (".hint", ".mask"):
            (hints if stem.suffix == ".hint" else masks).setdefault(stem.with_suffix(""), []).append(path)
        elif suffix in SUFFIXES:
            pictures.setdefault(stem, []).append(path)
    for kind, others in (("captions", captions), ("hints", hints), ("masks", masks)):
        _check_orphans(
            [path.name for stem in sorted(others.keys() - pictures) for path in others[stem]], str(folder), kind
        )
        for stem, paths in others.items():
            _check_unambiguous(pictures[stem], paths, folder)
    return [
        Example(
            picture_file(path),
            _read_caption(captions[stem][0]) if stem in captions else None,
            picture_file(hints[stem][0]) if stem in hints else None,
            picture_file(masks[stem][0]) if stem in masks else None,
        )
        for stem, paths in pictures.items()
        for path in paths
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"caption {path} cannot be read as text in UTF-8: {error}") from error


def _check_orphans(names: Sequence[str], where: str, kind: str = "captions") -> None:
    """Raise an error if captions, hints or masks have no pictures."""
    if names:
        listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
        raise InputError(f"{where} holds {len(names)} {kind} without pictures: {listed}")


def _check_unambiguous(pictures: Sequence[Path], others: Sequence[Path], folder: Path) -> None:
    """Raise an error unless one caption, hint or mask belongs to one picture."""
    if len(pictures) > 1 or len(others) > 1:
        names, owners = (" and ".join(path.name for path in paths) for paths in (others, pictures))
        verb = "belongs" if len(others) == 1 else "belong"
        raise InputError(
            f"{folder}: {names} {verb} to {owners}: expected one such file and one picture; rename the others"
        )


# Tables


def _table_examples(path: Path, image_column: str | None, caption_column: str | None) -> list[Example]:
    """Return the pictures that a table lists, by paths relative to it."""
    rows = list(_csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path))
    if not rows:
        return []
    columns = {name for row in rows for name in row}
    image = _column(path, columns, image_column, IMAGE_COLUMNS, "--image-column")
    caption = _column(path, columns, caption_column, CAPTION_COLUMNS, "--caption-column", required=False)
    assert image is not None
    examples, orphans = [], []
    for row in rows:
        name = row.get(image)
        if not isinstance(name, str) or not os.path.isfile(path.parent / name):
            orphans.append(str(name))
            continue
        hint, mask = (_listed_file(path, row, key) for key in (HINT_COLUMN, MASK_COLUMN))
        examples.append(
            Example(
                picture_file(path.parent / name),
                _text(row.get(caption)) if caption else None,
                hint,
                mask,
            )
        )
    _check_orphans(orphans, str(path))
    return examples


def _listed_file(table: Path, row: Mapping[str, Any], column: str) -> PictureBytes | None:
    """Return the file that a row names in a column; None if it names none."""
    name = row.get(column)
    if name in (None, ""):
        return None
    if not isinstance(name, str) or not os.path.isfile(table.parent / name):
        raise invalid(f"{column} in {table}", name, "the path of a file, relative to the table")
    return picture_file(table.parent / name)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at other separators, which strings may contain
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object with file_name and text")
        yield row


def _column(
    where: Path | str,
    columns: Iterable[str],
    requested: str | None,
    usual: Sequence[str],
    option: str,
    *,
    required: bool = True,
) -> str | None:
    """Return the name of a column: the requested one, or the first usual one."""
    present = set(columns)
    if requested is not None and requested not in present:
        raise invalid(option, requested, f"one of the columns of {where}: {', '.join(sorted(map(str, present)))}")
    name = requested or next((name for name in usual if name in present), None)
    if name is None and required:
        found = ", ".join(sorted(map(str, present)))
        raise InputError(f"{where} has no column {' or '.join(usual[:2])} but {found}: name it with {option}")
    return name


def _text(value: Any) -> str | None:
    """Return a caption; of several captions of one picture the first."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value.strip() if isinstance(value, str) and value.strip() else None


# Shards


def _shard_examples(shards: Sequence[Path], image_column: str | None, caption_column: str | None) -> list[Example]:
    """Return the samples of webdataset shards: members whose names agree up to the first dot belong together."""
    examples: list[Example] = []
    for shard in shards:
        samples: dict[str, dict[str, PictureBytes]] = {}
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.isfile():
                        stem, _, extension = Path(member.name).name.partition(".")
                        key = str(Path(member.name).with_name(stem))
                        read = functools.partial(_read_range, shard, member.offset_data, member.size)
                        part = PictureBytes(f"{shard}:{member.name}", read)
                        earlier = samples.setdefault(key, {}).get(extension.lower(), part)
                        if earlier.name != part.name:  # a later member of the same name replaces the earlier one
                            raise InputError(f"{earlier.name} and {member.name} are the same member: rename one")
                        samples[key][extension.lower()] = part
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{shard} is not a complete tar file: {error}") from error
        orphans = [key for key, parts in samples.items() if _shard_picture(parts, image_column) is None]
        _check_orphans(orphans, str(shard))
        examples += [_shard_example(parts, image_column, caption_column) for parts in samples.values()]
    return examples


def _shard_picture(parts: Mapping[str, PictureBytes], image_column: str | None) -> PictureBytes | None:
    names = (image_column,) if image_column else tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
    present = [name for name in names if name in parts]
    if len(present) > 1:
        listed = ", ".join(present)
        raise InputError(f"{parts[present[0]].name} has several pictures, {listed}: name one with --image-column")
    return parts[present[0]] if present else None


def _shard_example(parts: Mapping[str, PictureBytes], image_column: str | None, caption_column: str | None) -> Example:
    picture = _shard_picture(parts, image_column)
    assert picture is not None
    caption = None
    if "json" in parts:
        try:
            content = json.loads(parts["json"].read())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{parts['json'].name} is not JSON: {error}") from error
        names = (caption_column,) if caption_column else CAPTION_COLUMNS
        if isinstance(content, dict):
            caption = next((text for name in names if (text := _text(content.get(name)))), None)
    if "txt" in parts and (caption_column in (None, "txt")):
        caption = parts["txt"].read().decode("utf-8", "replace").strip()
    return Example(picture, caption, _shard_companion(parts, "hint"), _shard_companion(parts, "mask"))


def _shard_companion(parts: Mapping[str, PictureBytes], kind: str) -> PictureBytes | None:
    """Return the hint or the mask of a sample; None if it has none."""
    present = [part for name, part in parts.items() if name.startswith(f"{kind}.")]
    if len(present) > 1:
        raise InputError(f"{' and '.join(part.name for part in present)}: expected one {kind}")
    return present[0] if present else None


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


# Data sets of the Hub


def _hub_examples(options: TrainingOptions) -> list[Example]:
    datasets = require("datasets", "--dataset-name")
    name = options.dataset_name
    try:
        table = datasets.load_dataset(name, options.dataset_config_name, split=options.split)
    except Exception as error:  # the package raises many types, also those of its HTTP client
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--dataset-name {name} cannot be loaded: {reason or type(error).__name__}") from error
    where = f"--dataset-name {name}"
    image = _column(where, table.column_names, options.image_column, IMAGE_COLUMNS, "--image-column")
    caption = _column(
        where, table.column_names, options.caption_column, CAPTION_COLUMNS, "--caption-column", required=False
    )
    pictures = [column for column in (image, HINT_COLUMN, MASK_COLUMN) if column in table.column_names]
    for column in pictures:
        table = table.cast_column(column, datasets.Image(decode=False))
    captions = table[caption] if caption else [None] * len(table)

    def source(column: str | None, row: int) -> PictureBytes | None:
        if column is None or column not in pictures:
            return None
        return PictureBytes(f"{name}[{row}]", functools.partial(_cell_bytes, table, column, row))

    return [
        Example(picture, _text(captions[row]), source(HINT_COLUMN, row), source(MASK_COLUMN, row))
        for row in range(len(table))
        if (picture := source(image, row)) is not None
    ]


def _cell_bytes(table: Any, column: str, row: int) -> bytes:
    cell = table[row][column]
    if cell is None:
        raise OSError("the cell is empty")
    content = cell.get("bytes")
    return bytes(content) if content is not None else Path(os.fspath(cell["path"])).read_bytes()


def picture_size(source: PictureBytes) -> tuple[int, int]:
    """Return the width and height of a picture, upright, from its header alone.

    Args:
        source: The picture.

    Raises:
        InputError: The bytes are no picture.
        OSError: They cannot be read.
    """
    content = source.read()
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # orientations that exchange the sides
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{source.name} is not a picture of a known format") from error
    except Exception as error:  # PIL raises many types for damaged files
        raise InputError(f"{source.name} is not a picture: {error}") from error
    return (height, width) if turned else (width, height)
