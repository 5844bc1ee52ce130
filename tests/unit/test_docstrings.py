"""Public docstrings are complete: Args name every parameter, Returns and Raises are there where they apply."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "kandinsky22"
MODULES = sorted(SOURCE.rglob("*.py"))
SILENT = {"AttributeError", "NotImplementedError", "KeyError", "SystemExit", "AssertionError"}


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Yield public functions, classes and methods with their qualified names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith("_") or inner.name == "__call__"):
                    yield f"{node.name}.{inner.name}", inner


def _decorators(node: ast.FunctionDef) -> set[str]:
    return {part.strip() for each in node.decorator_list for part in re.split(r"[.(]", ast.unparse(each))}


def problems(tree: ast.Module) -> list[str]:
    """Return what is missing from the docstrings of a module's public names."""
    found = []
    for name, node in _public(tree):
        if isinstance(node, ast.FunctionDef) and _decorators(node) & {"overload", "setter"}:
            continue
        doc = ast.get_docstring(node) or ""
        if not doc:
            found.append(f"{name}: no docstring")
        elif isinstance(node, ast.FunctionDef):
            found += [f"{name}: {problem}" for problem in _function_problems(node, doc)]
    return found


def _function_problems(node: ast.FunctionDef, doc: str) -> Iterator[str]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    names = [arg.arg for arg in given if arg is not None and arg.arg not in ("self", "cls") and arg.arg[0] != "_"]
    arguments = re.search(r"^Args:\n((?:\s.*\n?|\n)*)", doc, re.M)
    documented = re.findall(r"^ {4}([\w*, ]+?)(?: \([^)]*\))?:", arguments[1] if arguments else "", re.M)
    listed = {part.strip(" *") for entry in documented for part in entry.split(",")}
    if missing := [name for name in names if name not in listed]:
        yield f"Args lack {', '.join(missing)}"
    is_property = bool(_decorators(node) & {"property", "cached_property"})
    gives = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    if (
        gives
        and not is_property
        and not re.match(r"Return|Yield", doc)
        and not re.search(r"^(Returns|Yields):", doc, re.M)
    ):
        yield "no Returns"
    raised = {
        ast.unparse(each.exc.func if isinstance(each.exc, ast.Call) else each.exc)
        for each in ast.walk(node)
        if isinstance(each, ast.Raise) and each.exc is not None
    }
    reports = "invalid" in raised or any(name[0].isupper() and name not in SILENT for name in raised)
    if reports and not re.search(r"^Raises:", doc, re.MULTILINE):
        yield f"no Raises ({', '.join(sorted(raised))})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_public_docstrings_are_complete(path: Path) -> None:
    assert not problems(ast.parse(path.read_text(encoding="utf-8")))
