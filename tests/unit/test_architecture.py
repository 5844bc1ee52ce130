"""Rules of the layout: imports point downwards, nothing imports the reference, and importing is fast."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kandinsky22
from kandinsky22._exports import MODULE_OF

ROOT = Path(kandinsky22.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Packages and modules that each of them may import, besides itself. A name that is not listed may import nothing.
GROUND = {"errors", "config", "outputs", "noise", "kernels", "verbosity", "requirements"}
FILES = GROUND | {"checkpoints", "inputs"}
NETWORKS = FILES | {"runtime", "adapters", "models", "schedulers"}
PIPELINES = NETWORKS | {"engines", "sampling", "pipelines", "embedded", "_exports"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_exports": set(),
    "embedded": set(),
    "kernels": set(),
    "config": {"errors"},
    "outputs": set(),
    "verbosity": set(),
    "requirements": {"errors"},
    "noise": {"errors", "kernels"},
    "checkpoints": GROUND,
    "inputs": GROUND,
    "schedulers": FILES,
    "runtime": FILES,
    "adapters": FILES | {"runtime"},
    "models": FILES | {"runtime", "adapters"},
    "engines": NETWORKS,
    "sampling": FILES | {"schedulers"},
    "pipelines": PIPELINES,
    "training": PIPELINES,
    "generation": PIPELINES,
    "batch": PIPELINES | {"generation"},
    "serve": PIPELINES | {"generation"},
    "cli": PIPELINES | {"generation", "training", "batch", "serve"},
    "compat": PIPELINES,
    "__init__": {"_exports", "compat"},
    "__main__": {"cli"},
}


def package_of(path: Path) -> str:
    """The top-level package or module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Every module that `path` imports, inside functions too; `from kandinsky22 import X` counts as X's module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            names.add(module)
            if module == "kandinsky22":
                names.update(f"kandinsky22.{MODULE_OF.get(alias.name, alias.name)}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    package = package_of(path)
    imported = {name.split(".")[1] for name in imported_names(path) if name.startswith("kandinsky22.")}
    upwards = imported - {"__version__", package} - MAY_IMPORT.get(package, set())
    assert not upwards, f"{package} may not import {sorted(upwards)}"


def test_the_layers_have_no_cycle() -> None:
    """Packages can be sorted so that each one imports only those before it."""
    remaining = {name: set(allowed) - {name} for name, allowed in MAY_IMPORT.items()}
    while remaining:
        ready = {name for name, allowed in remaining.items() if not allowed & remaining.keys()}
        assert ready, f"cycle among {sorted(remaining)}"
        remaining = {name: allowed for name, allowed in remaining.items() if name not in ready}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_the_reference(path: Path) -> None:
    assert not any(name.split(".")[0] == "diffusers" for name in imported_names(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_formatter_lays_out_everything(path: Path) -> None:
    assert not re.search(r"#\s*fmt:\s*(skip|off)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_object_changes_its_class(path: Path) -> None:
    assert "__class__ =" not in path.read_text(encoding="utf-8")


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {
        alias.asname: (node.module or "").removeprefix("kandinsky22.")
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == MODULE_OF


@pytest.mark.parametrize("name", kandinsky22.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(kandinsky22, name) is not None
    assert name in dir(kandinsky22)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="KandinskyV99"):
        kandinsky22.KandinskyV99  # noqa: B018


@pytest.mark.parametrize("module", ["kandinsky22", "kandinsky22.cli.main", "kandinsky22.config"])
def test_importing_is_fast(module: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'PIL', 'huggingface_hub', 'safetensors', 'tqdm'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
