"""Values that nobody expects, by name, so that a case can refer to them."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import itertools
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tests.pipelines.tiny import DIM, seeded


class BrokenRepr:
    """An object whose description fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no description")


class BrokenLength(list):  # type: ignore[type-arg]
    """A list whose length fails."""

    def __len__(self) -> int:
        raise RuntimeError("no length")


class Text(str):
    """A subclass of str."""


class Colour(enum.Enum):
    """An enumeration."""

    RED = 1


@dataclasses.dataclass
class Point:
    """A data class."""

    x: float = 1.0


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _self_containing() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


def _generator() -> Iterator[int]:
    yield 1


def _readonly(array: Any) -> Any:
    array.setflags(write=False)
    return array


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(1, DIM), 0.1, 0, torch.quint8)


PLAIN: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "false": lambda: False,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "one": lambda: 1,
    "two": lambda: 2,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "2**70": lambda: 2**70,
    "-2**70": lambda: -(2**70),
    "10**400": lambda: 10**400,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "-0.0": lambda: -0.0,
    "0.5": lambda: 0.5,
    "1e308": lambda: 1e308,
    "5e-324": lambda: 5e-324,
    "complex": lambda: 1j,
    "huge fraction": lambda: fractions.Fraction(10**400, 3),
    "fraction": lambda: fractions.Fraction(1, 2),
    "decimal": lambda: decimal.Decimal("0.5"),
    "decimal nan": lambda: decimal.Decimal("NaN"),
    "decimal snan": lambda: decimal.Decimal("sNaN"),
    "huge decimal": lambda: decimal.Decimal("1e999999"),
    "empty text": lambda: "",
    "text": lambda: "x",
    "text of zero": lambda: "\0",
    "surrogate": lambda: "\ud800",
    "escape": lambda: "\x1b[31mred\x1b[0m\r\n",
    "right to left": lambda: "\u202egnp",
    "long text": lambda: "a cat " * 5000,
    "subclass of text": lambda: Text("a cat"),
    "bytes": lambda: b"a cat",
    "bytearray": lambda: bytearray(b"a cat"),
    "memoryview": lambda: memoryview(b"a cat"),
    "empty list": list,
    "list of none": lambda: [None],
    "list of texts": lambda: ["a cat", "red"],
    "list of numbers": lambda: [1.0, 2.0],
    "list of huge": lambda: [10**400],
    "nested": lambda: _nested(2000),
    "self-containing": _self_containing,
    "broken length": BrokenLength,
    "tuple": lambda: (1, 2),
    "empty dict": dict,
    "dict": lambda: {"a": 1},
    "ordered dict": lambda: collections.OrderedDict(a=1),
    "set": lambda: {1, 2},
    "range": lambda: range(3),
    "endless": itertools.count,
    "generator": _generator,
    "iterator": lambda: iter([1]),
    "broken repr": BrokenRepr,
    "object": object,
    "class": lambda: dict,
    "function": lambda: len,
    "lambda": lambda: lambda: None,
    "lambda of everything": lambda: lambda *args, **kwargs: kwargs,
    "module": lambda: types,
    "enum": lambda: Colour.RED,
    "data class": Point,
    "date": lambda: datetime.date(2024, 1, 1),
    "path": lambda: Path("no/such/file"),
    "folder": lambda: Path("/"),
    "null device": lambda: Path("/dev/null"),
    "endless device": lambda: Path("/dev/zero"),
    "file": lambda: io.BytesIO(b"no picture"),
    "exception": lambda: ValueError("x"),
    "ellipsis": lambda: ...,
    "not implemented": lambda: NotImplemented,
}

ARRAYS: dict[str, Callable[[], Any]] = {
    "np.int64": lambda: np.int64(3),
    "np.float64": lambda: np.float64(0.5),
    "np.nan": lambda: np.float32("nan"),
    "np.bool": lambda: np.bool_(True),
    "np.str": lambda: np.str_("a cat"),
    "np.datetime64": lambda: np.datetime64("2024-01-01"),
    "np.float16": lambda: np.float16(0.5),
    "np.longdouble": lambda: np.longdouble("1e4000"),
    "array 0d": lambda: np.array(3),
    "array 0d float": lambda: np.array(0.5),
    "array empty": lambda: np.zeros((0, DIM), np.float32),
    "array of objects": lambda: np.full((1, DIM), None),
    "array of texts": lambda: np.array([["a"] * DIM]),
    "array of void": lambda: np.zeros((1, DIM), "V8"),
    "array of records": lambda: np.zeros((1, DIM), [("a", "f4")]),
    "array of dates": lambda: np.zeros((1, DIM), "M8[s]"),
    "array complex": lambda: np.zeros((1, DIM), np.complex128),
    "array nan": lambda: np.full((32, 32, 3), np.nan),
    "array huge values": lambda: np.full((32, 32, 3), 1e300),
    "array longdouble": lambda: np.zeros((1, DIM), np.longdouble),
    "array big-endian": lambda: np.zeros((32, 32, 3), ">f4"),
    "array read-only": lambda: _readonly(np.zeros((32, 32, 3), np.float32)),
    "array negative strides": lambda: np.zeros((32, 32, 3), np.float32)[::-1, ::-1],
    "array uint16": lambda: np.zeros((32, 32, 3), np.uint16),
    "array bool": lambda: np.zeros((32, 32), bool),
    "array one pixel": lambda: np.zeros((1, 1, 3), np.uint8),
    "array 5d": lambda: np.zeros((1, 1, 1, 1, 1)),
    "array broadcast": lambda: np.broadcast_to(np.float32(0.5), (1, 10**6, 10**6)),
    "matrix": lambda: np.matrix(np.zeros((32, 32))),
    "masked array": lambda: np.ma.masked_all((32, 32)),
    "tensor 0d": lambda: torch.tensor(3),
    "tensor 0d float": lambda: torch.tensor(0.5),
    "tensor nan": lambda: torch.full((1, DIM), float("nan")),
    "tensor huge values": lambda: torch.full((1, DIM), 3e38),
    "tensor valid embeds": lambda: torch.zeros(1, DIM),
    "tensor float64": lambda: torch.zeros(1, DIM, dtype=torch.float64),
    "tensor float64 huge": lambda: torch.full((1, DIM), 1e300, dtype=torch.float64),
    "tensor float16": lambda: torch.zeros(1, DIM, dtype=torch.float16),
    "tensor float8": lambda: torch.zeros(1, DIM).to(torch.float8_e4m3fn),
    "tensor integer": lambda: torch.zeros(1, DIM, dtype=torch.int32),
    "tensor bool": lambda: torch.zeros(1, DIM, dtype=torch.bool),
    "tensor complex": lambda: torch.zeros(1, DIM, dtype=torch.complex64),
    "tensor sparse": lambda: torch.ones(1, DIM).to_sparse(),
    "tensor sparse csr": lambda: torch.ones(1, DIM).to_sparse_csr(),
    "tensor meta": lambda: torch.zeros(1, DIM, device="meta"),
    "tensor quantized": _quantized,
    "tensor with gradient": lambda: torch.zeros(1, DIM, requires_grad=True),
    "tensor expanded": lambda: torch.zeros(1, 1).expand(1, DIM),
    "tensor huge expanded": lambda: torch.zeros(1, 1).expand(10**6, DIM * 10**3),
    "tensor transposed": lambda: torch.zeros(DIM, 1).T,
    "tensor conjugate": lambda: torch.zeros(1, DIM, dtype=torch.complex64).conj().imag,
    "tensor picture": lambda: torch.rand(1, 3, 32, 32, generator=seeded(0)),
    "tensor wide picture": lambda: torch.zeros(1, 3, 1, 4000),
    "tensor latents": lambda: torch.zeros(1, 4, 16, 16),
    "tensor huge latents": lambda: torch.full((1, 4, 16, 16), 3e38),
    "tensor empty": lambda: torch.zeros(0),
    "tensor no rows": lambda: torch.zeros(0, 3, 32, 32),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(1, DIM)),
    "dtype": lambda: torch.float16,
    "torch device": lambda: torch.device("meta"),
    "generator of torch": lambda: seeded(0),
    "module of torch": lambda: torch.nn.Linear(2, 2),
    "storage": lambda: torch.zeros(3).untyped_storage(),
}

MODES_OF_PILLOW = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "I;16",
    "La",
)
PICTURES: dict[str, Callable[[], Any]] = {
    **{f"picture {mode}": lambda mode=mode: PIL.Image.new(mode, (32, 32)) for mode in MODES_OF_PILLOW},  # type: ignore[misc]
    "picture of one pixel": lambda: PIL.Image.new("RGB", (1, 1)),
    "picture without pixels": lambda: PIL.Image.new("RGB", (0, 5)),
    "picture tall": lambda: PIL.Image.new("L", (1, 4000)),
    "picture F nan": lambda: PIL.Image.fromarray(np.full((32, 32), np.nan, np.float32)),
    "pictures": lambda: [PIL.Image.new("RGB", (32, 32)), PIL.Image.new("L", (48, 20))],
    "mask": lambda: PIL.Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)),
}

VALUES: dict[str, Callable[[], Any]] = {**PLAIN, **ARRAYS, **PICTURES}


def any_value(rng: random.Random) -> str:
    """Return the name of a value."""
    catalogue = rng.choices((PLAIN, ARRAYS, PICTURES), (3, 2, 1))[0]
    return rng.choice(list(catalogue))


# Values of JSON


NUMBERS_OF_JSON: list[Any] = [0, 1, -1, 2, 3, 7, 10**6, 10**8, 2**31, 2**63, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e300]
TEXTS_OF_JSON: list[Any] = ["", "x", "16", "true", "none", "float16", "../..", "/etc/passwd", "\x1b[31m", "\ud800"]
NAMES_OF_JSON: list[Any] = ["epsilon", "linear", "self", "__class__", "é" * 300, None, True, False]
NOT_FINITE: list[Any] = [float("inf"), float("-inf"), float("nan")]


def any_json(rng: random.Random, depth: int = 2) -> Any:
    """Return a value of JSON that a config does not expect."""
    kind = rng.random()
    if depth and kind < 0.12:
        return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.2:
        names = rng.choices(["a", "", "self", "_class_name", "0"], k=rng.randrange(3))
        return {name: any_json(rng, depth - 1) for name in names}
    return rng.choice([*NUMBERS_OF_JSON, *TEXTS_OF_JSON, *NAMES_OF_JSON, *NOT_FINITE])
