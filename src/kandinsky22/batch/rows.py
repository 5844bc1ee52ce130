"""Rows of input files: JSONL, CSV, Parquet and text, read as streams. Memory does not grow with the file."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from kandinsky22.errors import InputError, MissingDependencyError, describe, invalid

STDIN = "-"
FORMATS = ("jsonl", "csv", "parquet", "text")
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
MAX_LINE_BYTES = 2**24  # of one row; a file without line breaks must not fill the memory
CHUNK_BYTES = 2**20
PARQUET_ROWS = 1024  # rows that are decoded together


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of an input file.

    Attributes:
        number: Number of the row, from 1: the line of JSONL and text files, the record of CSV and Parquet files.
        values: Values by column; empty if the row cannot be read.
        fault: Why the row cannot be read; None if it can.
    """

    number: int
    values: Mapping[str, Any]
    fault: str | None = None


@dataclasses.dataclass(frozen=True)
class RowFile:
    """An input file.

    Attributes:
        path: Path, or an address of a file system that fsspec knows, such as "s3://bucket/prompts.parquet".
        format: One of `FORMATS`.
        columns: Names of settings by name of the column that has another name.
        image_folder: Folder that relative paths of images start from; None for that of the file.
    """

    path: str
    format: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    image_folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder that relative paths of images start from: that of the file; for addresses, the current folder."""
        if self.image_folder is not None:
            return self.image_folder
        return Path() if is_address(self.path) else Path(self.path).parent

    def rows(self, columns_seen: set[str] | None = None) -> Iterator[Row]:
        """Yield the rows in their order. Blank lines of text and JSONL files are no rows, but count as lines.

        Args:
            columns_seen: Receives the names of the columns that rows have, as the file has them; None keeps none.

        Raises:
            InputError: If the file cannot be read, or is no file of its format at all.
        """
        readers = {"jsonl": _jsonl_rows, "text": _text_rows, "csv": _csv_rows, "parquet": _parquet_rows}
        try:
            with open_input(self.path) as file:
                for row in readers[self.format](file):
                    if columns_seen is not None and self.columns:
                        columns_seen |= row.values.keys() & self.named_columns
                    yield self._renamed(row)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error

    @functools.cached_property
    def named_columns(self) -> frozenset[str]:
        """Columns that `columns` names, and those that have the name of a setting that is read from another column."""
        return frozenset(self.columns) | frozenset(self.columns.values())

    def _renamed(self, row: Row) -> Row:
        if not self.columns or row.fault is not None:
            return row
        # A column with the name of a setting that is read from another column is ignored.
        renamed = {
            self.columns.get(column, column): value
            for column, value in row.values.items()
            if column in self.columns or column not in self.named_columns
        }
        return dataclasses.replace(row, values=renamed)

    def digest(self) -> str:
        """Return the SHA-256 of the file.

        Raises:
            InputError: If the file cannot be read.
        """
        sha256 = hashlib.sha256()
        try:
            with open_input(self.path) as file:
                while chunk := file.read(CHUNK_BYTES):
                    sha256.update(chunk)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return sha256.hexdigest()


def find_row_format(path: str) -> str:
    """Return the format that a file name's extension stands for.

    Args:
        path: Path or address of the file.

    Raises:
        InputError: If the extension is unknown.
    """
    extension = Path(path).suffix.lower()
    if extension not in EXTENSIONS:
        raise invalid("input", path, f"a file that ends in {', '.join(EXTENSIONS)}", "or add --input-format")
    return EXTENSIONS[extension]


def is_address(path: str) -> bool:
    """Return whether a path is an address of a file system of fsspec, such as "s3://bucket/file".

    Args:
        path: The path.
    """
    return "://" in path


def open_input(path: str) -> IO[bytes]:
    """Return a file that is open for reading.

    Args:
        path: Path or address of the file.

    Raises:
        MissingDependencyError: If the address needs fsspec, which is not installed.
        InputError: If the address cannot be opened, or the local file is a pipe or a device: rows are read twice.
        OSError: If the local file cannot be opened.
    """
    if not is_address(path):
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError(f"{path} cannot be read: it is a pipe or a device; redirect it to standard input, named -")
        return open(path, "rb")
    try:
        import fsspec
    except ImportError:
        raise MissingDependencyError(f"{path} needs fsspec: pip install kandinsky22[batch]") from None
    try:
        return cast("IO[bytes]", fsspec.open(path, "rb").open())
    except Exception as error:  # each file system has errors of its own, about missing credentials for example
        raise InputError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def spool(stream: IO[bytes], path: Path) -> None:
    """Copy standard input into a file: rows are read twice, to be checked and to be drawn.

    Args:
        stream: Standard input.
        path: The new file.
    """
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK_BYTES)


def guess_format(path: Path) -> str:
    """Return "jsonl" if the first line of a file that is not blank is a JSON object, else "text".

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        first = next((text for _, text, _ in _lines(file) if text), "")
    return "jsonl" if first.startswith("{") else "text"


def _lines(file: IO[bytes]) -> Iterator[tuple[int, str | None, str | None]]:
    """Yield number, text and fault of each line that is not blank."""
    number, is_continued = 0, False
    while line := file.readline(MAX_LINE_BYTES):
        was_continued, is_continued = is_continued, not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES
        if was_continued:
            continue
        number += 1
        if is_continued:
            yield number, None, f"it has more than {MAX_LINE_BYTES} bytes"
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, None, f"it is not UTF-8 text: {error.reason}"
            continue
        if text:
            yield number, text, None


def _text_rows(file: IO[bytes]) -> Iterator[Row]:
    for number, text, fault in _lines(file):
        yield Row(number, {} if text is None else {"prompt": text}, fault)


def _jsonl_rows(file: IO[bytes]) -> Iterator[Row]:
    for number, text, fault in _lines(file):
        if text is None:
            yield Row(number, {}, fault)
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"it is not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(number, values)
        else:
            yield Row(number, {}, f"{describe(values)} is invalid: expected a JSON object")


def _csv_rows(file: IO[bytes]) -> Iterator[Row]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_records(csv.reader(_bounded_lines(text), strict=True))
    finally:
        text.detach()  # the caller closes the file


def _bounded_lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a CSV file. A file without line breaks must not fill the memory."""
    while line := text.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(("\n", "\r")):
            raise InputError(f"a line of the CSV file has more than {MAX_LINE_BYTES} characters")
        yield line


def _csv_records(reader: Any) -> Iterator[Row]:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise InputError(f"the first line is not CSV: {error}") from error
    if any(map(has_surrogates, header or ())):
        raise InputError("the first line of the CSV file is not UTF-8 text")
    if not header or len(set(header)) < len(header):
        raise invalid("first line of the CSV file", header, "the names of the columns, each of them once")
    number = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield Row(number, {}, f"it is not CSV: {error}")
            continue
        if not fields:
            continue
        number += 1
        yield _csv_row(number, header, fields)


def _csv_row(number: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Row(number, {}, f"it has {len(fields)} fields: expected {len(header)}, as the first line has")
    if any(map(has_surrogates, fields)):
        return Row(number, {}, "it is not UTF-8 text")
    return Row(number, {name: field for name, field in zip(header, fields, strict=True) if field != ""})


def _parquet_rows(file: IO[bytes]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError("Parquet files need pyarrow: pip install kandinsky22[batch]") from None
    number = 0
    try:
        # Columns are read in pieces instead of whole row groups: memory does not depend on the file.
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK_BYTES)
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
            for values in _parquet_values(batch):
                number += 1
                if isinstance(values, str):
                    yield Row(number, {}, values)
                else:
                    yield Row(number, {name: value for name, value in values.items() if value is not None})
    except pyarrow.ArrowException as error:
        raise InputError(f"it cannot be read as Parquet after row {number}: {error}") from error


def _parquet_values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the values of each row of a batch, or why the row cannot be read: a text may be no UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for index in range(batch.num_rows):
        try:
            (values,) = batch.slice(index, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            values = f"it cannot be read: {error}"
        yield values


def has_surrogates(text: str) -> bool:
    """Return whether a text contains lone surrogates, which cannot be written as UTF-8.

    Args:
        text: The text.
    """
    return any("\ud800" <= character <= "\udfff" for character in text)
