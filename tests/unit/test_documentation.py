"""The documentation is complete: public names, drawings, figures of results files, names of tests."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kandinsky22
from kandinsky22.kernels.settings import Optimisations

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARKDOWN = [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
IDENTIFIER = re.compile(r"^::: (kandinsky22\.[\w.]+)$", re.MULTILINE)


def reference() -> list[str]:
    """Return the identifiers that the reference pages document."""
    return [name for page in (DOCS / "reference").glob("*.md") for name in IDENTIFIER.findall(page.read_text("utf-8"))]


def resolve(identifier: str) -> Any:
    """Return the object of an identifier; the module that defines it must be named."""
    module, _, name = identifier.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", kandinsky22.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    if name == "__version__":
        assert "kandinsky22.__version__" in (DOCS / "reference" / "index.md").read_text("utf-8")
        return
    public = getattr(kandinsky22, name)
    defined_as = getattr(public, "__name__", name)  # another one for names of older guides
    assert any(resolve(identifier) is public for identifier in reference() if defined_as in identifier)


def test_reference_pages_name_the_defining_modules_and_nothing_twice() -> None:
    identifiers = reference()
    assert len(identifiers) == len(set(identifiers))
    for identifier in identifiers:
        assert resolve(identifier).__module__ == identifier.rpartition(".")[0], identifier


def test_every_optimisation_is_described_for_users() -> None:
    page = (DOCS / "how-to" / "speed-and-memory.md").read_text("utf-8")
    described = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", page, re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(Optimisations)]
    assert described[: len(fields)] == fields


def test_drawings_are_up_to_date_and_without_overlaps() -> None:
    program = [sys.executable, str(DOCS / "drawings" / "draw.py"), "--check"]
    result = subprocess.run(program, capture_output=True, text=True, encoding="utf-8")
    assert (result.returncode, result.stderr) == (0, "")


def test_gpu_table_has_the_measured_figures() -> None:
    """The third run gives all rows but the compiled one, which is of the first run."""
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    folder = ROOT / "benchmarks" / "results" / "gpu"
    first, third = (
        [json.loads(line) for line in (folder / f"h100-2026-11-{day}.jsonl").read_text("utf-8").splitlines()]
        for day in (26, 27)
    )
    records = third + [record for record in first if record["compiled"]]
    rows = [
        f"| {r['stage']} | {r['dtype']} | {r.get('size', '')} | {r['batch']} "
        f"| {'compiled' if r['compiled'] else 'CUDA graph' if r.get('graphs') else 'eager'} "
        f"| {r['reference_ms']:.1f} | {r['ours_ms']:.1f} | {r['ratio']:.2f} | {r['reference_peak_gib']:.2f} "
        f"| {r['ours_peak_gib']:.2f} | {r['difference']:.1e} |"
        for r in records
    ]
    assert "\n".join(rows) in page


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
    for module in re.findall(r"`((?:kernels|models|runtime|pipelines|sampling|cli)/\w+\.py)`", text):
        assert (ROOT / "src" / "kandinsky22" / module).is_file(), module


def test_links_of_pages_outside_the_site_lead_to_files() -> None:
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (ROOT / target).exists(), (page.name, target)


def test_site_needs_no_other_host() -> None:
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.search(r"^  font: false\b", settings, re.MULTILINE)
    assert not re.search(r"https?://", settings)
    sys.path.insert(0, str(DOCS))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(DOCS))
    assert hooks.LOADED.search('<script src="https://host/x.js">') and hooks.LINKED.search('<link href="//host/x.css">')
    assert not hooks.LOADED.search('<script src="assets/x.js">') and not hooks.LINKED.search('<a href="https://host">')
