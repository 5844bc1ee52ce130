"""Hooks of the documentation's build: drawings become part of their page, and no page may load from another host."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

DRAWING = re.compile(r"^!\[[^\]]*\]\(([^)]*drawings/[\w-]+\.svg)\)$", re.MULTILINE)
LOADED = re.compile(r"""<(?:script|img|iframe|source|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+""")
LINKED = re.compile(r"""<link\b[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+""")

log = logging.getLogger("mkdocs.hooks.docs")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Put the text of a drawing in the place of its image, so that its colours follow those of the page."""
    folder = posixpath.dirname(page.file.src_uri)

    def inline(match: re.Match[str]) -> str:
        path = Path(config.docs_dir, posixpath.normpath(posixpath.join(folder, match[1])))
        return f'<figure markdown="0">\n{path.read_text(encoding="utf-8").strip()}\n</figure>'

    return DRAWING.sub(inline, markdown)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Warn, which `--strict` makes an error, about everything that a browser would fetch from another host."""
    for match in (*LOADED.finditer(output), *LINKED.finditer(output)):
        log.warning("%s loads from another host: %s", page.file.src_uri, match[0])
    return output
