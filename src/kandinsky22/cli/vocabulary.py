"""Which words of a prompt the embedded model can know: it learned from captions with a closed vocabulary."""

from __future__ import annotations

import json
import re

from kandinsky22.hub import EMBEDDED, embedded_folder

_WORD = re.compile(r"[^\W\d_]+")


def unknown_words(text: str, model: str) -> list[str]:
    """The words of `text` that `model` never saw, each once, in order; none for models that saw all of the web."""
    if model != EMBEDDED:
        return []
    file = embedded_folder("prior").parent / "vocabulary.json"
    if not file.is_file():
        return []
    known = set(json.loads(file.read_text(encoding="utf-8")))
    return list(dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in known))
