"""The guides' examples run as they are written there, each page's one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kandinsky22

FOLDER = Path(__file__).parents[2] / "docs" / "guides"
PAGES = [*sorted(FOLDER.glob("*.md")), *(FOLDER.parent / name for name in ("guidance.md", "schedulers.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run_as_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == text.count("```python") > 0
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback tells the page's line
        exec(compile(above + block[1], page, "exec"), names)


def test_tensors_named_for_callbacks_are_those_there_are() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (.*`.*) \|$", (FOLDER / "callbacks.md").read_text("utf-8"), re.MULTILINE))
    told = {row: set(re.findall("`(.*?)`", names)) for row, names in rows.items()}
    shown = {
        "priors": ("Prior", "PriorEmb2Emb"),
        "decoders": ("", "Img2Img"),
        "inpainting": ("Inpaint",),
        "ControlNet": ("Controlnet", "ControlnetImg2Img"),
    }
    assert told.keys() == shown.keys()
    for row, kinds in shown.items():
        for kind in kinds:
            accepted = set(getattr(kandinsky22, f"KandinskyV22{kind}Pipeline")._callback_tensor_inputs)
            assert accepted == (told[row] if row in ("priors", "decoders") else told["decoders"] | told[row])
