"""A server with the embedded model, a real Chromium, and pages that record what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from tests.studio.browser import StudioServer, Watched, find_chromium, launch, running_server

# Assertions wait this long for the page, in milliseconds: the machines of tests run other work too.
PATIENCE = 20_000
expect.set_options(timeout=PATIENCE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "no Chromium is installed: make browser"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if find_chromium() is None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    with running_server(tmp_path_factory.mktemp("studio") / "state") as running:
        running.make(prompt="a red circle on a yellow background", seed=1)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = launch(playwright)
        yield started
        started.close()


@pytest.fixture
def watched(server: StudioServer, browser: Browser) -> Iterator[Watched]:
    """A page of the studio. Its test fails if it writes errors, or requests anything of another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    watched = Watched(context.new_page(), server.address)
    yield watched
    context.close()
    assert not watched.foreign
    assert not watched.messages
