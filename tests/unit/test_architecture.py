"""The building's rules: who may know whom, how large it may grow, how fast it must open."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kandinsky22

ROOT = Path(kandinsky22.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py"))

# A room may import the rooms named here, itself, and the common ground; never the other way round.
COMMON = {"errors", "config", "outputs", "files", "weights", "randomness"}
MAY_KNOW = {
    "models": {"hub", "runtime"},
    "schedulers": {"hub"},
    "inputs": set[str](),
    "guidance": {"inputs", "schedulers"},
    "stepping": {"inputs", "schedulers"},
    "runtime": set[str](),
    "hub": {"embedded"},
    "embedded": set[str](),
    "components": {"models", "schedulers", "runtime", "hub"},
    "composite": {"components", "models", "hub"},
    "pipelines": {"models", "schedulers", "guidance", "inputs", "runtime", "hub", "embedded", "components"}
    | {"composite", "stepping"},
    "training": {"pipelines", "models", "schedulers", "inputs", "runtime", "hub", "embedded"},
    "cli": {"pipelines", "models", "schedulers", "inputs", "runtime", "hub", "embedded", "training", "quality"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it; `from kandinsky22 import X` counts as the module that has X."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            names.add(module)
            if module == "kandinsky22":
                names.update(f"kandinsky22.{kandinsky22._MODULE_OF.get(a.name, a.name)}" for a in node.names)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    allowed = MAY_KNOW.get(room, set()) | COMMON | {room}
    known = {name.split(".")[1] for name in imported_names(path) if name.startswith("kandinsky22.")} - {"__version__"}
    assert known <= allowed, f"{room} may not import {sorted(known - allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_uses_the_reference_or_outgrows_its_purpose(path: Path) -> None:
    assert not any(name.split(".")[0] == "diffusers" for name in imported_names(path))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_pipelines_stay_small() -> None:
    """What they have in common stands once: all ten classes, their loop and their inputs' checks."""
    room = [path for path in MODULES if room_of(path) == "pipelines"]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in room) < 1400


@pytest.mark.parametrize("name", kandinsky22.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kandinsky22, name) is not None
    assert name in dir(kandinsky22)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="KandinskyV99"):
        kandinsky22.KandinskyV99  # noqa: B018


@pytest.mark.parametrize("module", ["kandinsky22", "kandinsky22.cli.main", "kandinsky22.config"])
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'PIL', 'huggingface_hub', 'safetensors', 'tqdm'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
