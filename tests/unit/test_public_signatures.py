"""Public signatures are stable: parameter names, kinds and defaults equal those in `public_signatures.json`.

New classes, functions, methods and settings may be added freely. A deliberate change of a recorded signature is
recorded with `python tests/unit/test_public_signatures.py`, which makes it visible in review.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import kandinsky22

RECORD = Path(__file__).with_name("public_signatures.json")


def signature_of(function: Any) -> str:
    """Return the parameters of a callable with their kinds and defaults, without annotations and addresses."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def signatures_of(name: str) -> dict[str, str]:
    """Return what can be called or set under a public name.

    For a class that is its constructor, its public methods and properties, and the settings of its config class, which
    the constructor accepts as keywords. Methods inherited from other libraries are left out. Exceptions are recorded
    by their base classes, which is what callers catch.
    """
    public = getattr(kandinsky22, name)
    if not inspect.isclass(public):
        return {name: signature_of(public) if callable(public) else type(public).__name__}
    if issubclass(public, Exception):
        return {"bases": ", ".join(base.__name__ for base in public.__mro__[1:-2])}
    signatures = {"__init__": signature_of(public)}
    if hasattr(public, "config_class"):
        for field in dataclasses.fields(public.config_class):
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            signatures[f"config_class.{field.name}"] = default
    for base in public.__mro__:
        if base.__module__.partition(".")[0] != "kandinsky22":
            continue
        for method, static in vars(base).items():
            if method in signatures or (method.startswith("_") and method != "__call__"):
                continue
            if isinstance(static, property):
                signatures[method] = "property"
                if static.fset is not None:
                    signatures[f"{method}.setter"] = "property"
            elif callable(value := getattr(public, method)) and not inspect.isclass(value):
                signatures[method] = signature_of(value)
    return dict(sorted(signatures.items()))


RECORDED: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def test_no_recorded_name_is_missing() -> None:
    assert len(RECORDED) > 40
    assert RECORDED.keys() <= set(kandinsky22.__all__)


@pytest.mark.parametrize("name", RECORDED)
def test_signatures_equal_the_record(name: str) -> None:
    current = signatures_of(name)
    assert {method: current.get(method, "missing") for method in RECORDED[name]} == RECORDED[name]


if __name__ == "__main__":
    signatures = {name: signatures_of(name) for name in sorted(kandinsky22.__all__)}
    RECORD.write_text(json.dumps(signatures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
