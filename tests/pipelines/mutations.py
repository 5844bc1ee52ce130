"""Damage to the small files of a checkpoint: wrong types, hostile names, cut and changed bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    3,
    1.5,
    10**6,
    10**400,
    1e308,
    "",
    "x",
    "16",
    "\ud800",
    "../../etc",
    [],
    ["x"],
    [1, 2, 3],
    {},
    {"height": "x"},
    {"x": [{}]},
)
HOSTILE_NAMES = (
    "self",
    "cls",
    "__class__",
    "to_dict",
    "auto_map",
    "from_pretrained",
    "",
    "\x1b[2J",
    "vocab_file",
    "_class_name",
)


def nested(depth: int) -> Any:
    """Return lists inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a copy with one setting of a wrong type, missing, or with a hostile name."""
    mutated = dict(content)
    kind = rng.choice(("value", "value", "value", "drop", "name", "nest"))
    name = rng.choice(sorted(mutated)) if mutated else "x"
    if kind == "drop":
        mutated.pop(name, None)
    elif kind == "name":
        mutated[rng.choice(HOSTILE_NAMES)] = rng.choice(WRONG_VALUES)
    elif kind == "nest":
        mutated[name] = nested(rng.choice((3, 40, 400)))
    else:
        mutated[name] = rng.choice(WRONG_VALUES)
    return mutated


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return a copy with bytes cut off, changed, doubled or replaced."""
    start = rng.randrange(len(content) + 1)
    kind = rng.choice(("cut", "flip", "insert", "replace", "double"))
    if kind == "cut":
        return content[:start]
    if kind == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ (1 << rng.randrange(8))]) + content[start + 1 :]
    if kind == "insert":
        return content[:start] + rng.randbytes(rng.randrange(1, 5)) + content[start:]
    if kind == "double":
        return content * 2
    return rng.choice((b"", b"null", b"[]", b'"x"', b"3", b"\xff\xfe", b"{", b"[" * 100_000, b"NaN", b"{}"))


def damage(file: Path, rng: random.Random) -> None:
    """Replace a file by a damaged copy."""
    content = file.read_bytes()
    file.unlink()
    if file.suffix == ".json" and rng.random() < 0.6:
        file.write_text(json.dumps(mutate_json(json.loads(content), rng)))
    else:
        file.write_bytes(mutate_bytes(content, rng))
