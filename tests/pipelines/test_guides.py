"""The documentation's Python examples run as written, those of a page one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kandinsky22

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "how-to"
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python\n" in path.read_text(encoding="utf-8")
]
# Titles of the blocks of a page that are not run.
NOT_RUN = {
    "tutorial": ["downloads 16 GB"],
    "speed-and-memory": ["needs a CUDA device", "compiling takes minutes"],
    "serve": ["needs a running server"],  # tests/serve/test_openai.py runs it
}


def test_all_pages_with_examples_are_run() -> None:
    stems = {page.stem for page in PAGES}
    assert stems >= {"README", "index", "tutorial", "callbacks", "components", "guidance", "inputs", "offloading"}
    assert stems >= {"schedulers", "speed-and-memory", "samplers-tradeoff"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run_as_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    titles = re.findall(r'^```python title="(.*)"$', text, re.MULTILINE)
    assert titles == NOT_RUN.get(page.stem, [])
    assert len(blocks) == text.count("```python") - len(titles) > 0
    for block in blocks:
        lines_above = "\n" * text.count("\n", 0, block.start(1))  # tracebacks then have the line numbers of the page
        exec(compile(lines_above + block[1], page, "exec"), names)


def test_tensors_listed_for_callbacks_are_the_accepted_ones() -> None:
    page = (GUIDES / "callbacks.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (.*`.*) \|$", page, re.MULTILINE))
    listed = {row: set(re.findall("`(.*?)`", names)) for row, names in rows.items()}
    classes = {
        "priors": ("Prior", "PriorEmb2Emb"),
        "decoders": ("", "Img2Img"),
        "inpainting": ("Inpaint",),
        "ControlNet": ("Controlnet", "ControlnetImg2Img"),
    }
    assert listed.keys() == classes.keys()
    for row, kinds in classes.items():
        for kind in kinds:
            accepted = set(getattr(kandinsky22, f"KandinskyV22{kind}Pipeline")._callback_tensor_inputs)
            assert accepted == (listed[row] if row in ("priors", "decoders") else listed["decoders"] | listed[row])
