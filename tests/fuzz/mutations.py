"""Mutations of bytes and of JSON documents, described by JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from tests.fuzz.values import any_json

Edit = list[Any]


def byte_edits(rng: random.Random) -> list[Edit]:
    """Return one to four edits of bytes. Positions are fractions of the length, or offsets near the start."""
    edits: list[Edit] = []
    for _ in range(rng.randrange(1, 5)):
        position: float | int = rng.randrange(200) if rng.random() < 0.5 else rng.random()
        kind = rng.choice(["flip", "set", "insert", "delete", "truncate", "zero", "repeat", "append"])
        edits.append([kind, position, rng.randrange(256), rng.choice([1, 2, 4, 8, 100, 5000])])
    return edits


def mutate_bytes(data: bytes, edits: list[Edit]) -> bytes:
    """Return bytes after edits."""
    result = bytearray(data)
    for kind, position, value, count in edits:
        at = min(int(position * len(result)) if isinstance(position, float) else position, max(len(result) - 1, 0))
        if kind == "flip" and result:
            result[at] ^= 1 << (value % 8)
        elif kind == "set" and result:
            result[at] = value
        elif kind == "insert":
            result[at:at] = bytes([value]) * count
        elif kind == "delete":
            del result[at : at + count]
        elif kind == "truncate":
            del result[at:]
        elif kind == "zero":
            end = min(at + count, len(result))
            result[at:end] = bytes(end - at)
        elif kind == "repeat":
            result[at:at] = result[at : at + count]
        elif kind == "append":
            result += bytes([value]) * count
    return bytes(result)


def json_edits(rng: random.Random, document: Any) -> list[Edit]:
    """Return one or two edits of a JSON document: values replaced, entries removed or added."""
    edits: list[Edit] = []
    for _ in range(rng.choice([1, 1, 2])):
        path = _random_path(rng, document)
        kind = rng.choices(["set", "remove", "add", "nest", "root"], [8, 2, 2, 1, 0.3])[0]
        edits.append([kind, path, any_json(rng)])
    return edits


def mutate_json(document: Any, edits: list[Edit]) -> str:
    """Return the text of a JSON document after edits."""
    holder = [copy.deepcopy(document)]
    nested = False
    for kind, path, value in edits:
        parent: Any = holder
        keys = [0, *path]
        try:
            for key in keys[:-1]:
                parent = parent[key]
            if kind == "root":
                holder[0] = value
            elif kind == "set":
                parent[keys[-1]] = value
            elif kind == "nest":
                parent[keys[-1]] = "NESTED"
                nested = True
            elif kind == "remove" and len(keys) > 1:
                del parent[keys[-1]]
            elif kind == "add" and isinstance(parent[keys[-1]], dict):
                parent[keys[-1]][value if isinstance(value, str) else "unknown"] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit removed the entry
    text = json.dumps(holder[0])
    return text.replace('"NESTED"', "[" * 5000 + "]" * 5000) if nested else text


def _random_path(rng: random.Random, document: Any) -> list[Any]:
    path: list[Any] = []
    while isinstance(document, dict | list) and document and (not path or rng.random() < 0.7):
        key = rng.choice(list(document)) if isinstance(document, dict) else rng.randrange(len(document))
        path.append(key)
        document = document[key]
    return path
