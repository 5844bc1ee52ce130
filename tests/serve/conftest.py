"""One server for all tests that neither end it nor change what others made."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from tests.serve.server import Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("state")) as started:
        started.wait_ready()
        yield started


def png(color: Any = "red", size: tuple[int, int] = (96, 96), mode: str = "RGB") -> bytes:
    """Return a PNG file of one colour."""
    content = io.BytesIO()
    Image.new(mode, size, color).save(content, "PNG")
    return content.getvalue()
