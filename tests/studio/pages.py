"""What tests of the studio do with its pages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page, expect
from tests.studio.browser import StudioServer, Watched

PROMPT = "a small white star above a large black circle on a green background"
LONG = 900  # steps of a job that is still running when the test looks at it
FILE = re.compile(r"^/api/images/.+/file$")


def open_screen(watched: Watched, name: str) -> Locator:
    """Show a screen and return it."""
    watched.page.goto(f"{watched.address}/#{name}")
    screen = watched.page.locator(f"k-{name}")
    expect(screen).to_be_visible()
    expect(watched.page.locator(".queue-button")).to_have_attribute("title", "Queue: empty")
    return screen


def press_run(screen: Locator) -> None:
    screen.locator(".run-row .primary").click()


def expect_picture(screen: Locator) -> None:
    """Wait until the stage shows a finished picture."""
    expect(screen.locator("k-stage")).to_have_attribute("data-state", "done", timeout=120_000)
    picture = screen.locator(".stage-picture")
    expect(picture).to_have_attribute("src", FILE)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def newest(server: StudioServer) -> Any:
    return server.jobs()[0]


def choose_file(page: Page, button: Locator, content: bytes, name: str = "picture.png") -> None:
    with page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def drop_file(target: Locator, content: bytes) -> None:
    """Drop a PNG file onto an element."""
    target.evaluate(
        """(element, bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            for (const name of ["dragenter", "dragover", "drop"])
                element.dispatchEvent(new DragEvent(name, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(content),
    )


def start_long_job(screen: Locator) -> None:
    """Start a drawing that takes long, and wait for its first progress."""
    screen.locator("textarea.prompt").fill(PROMPT)
    screen.locator("summary").click()
    screen.get_by_label("Steps", exact=True).fill(str(LONG))
    screen.get_by_label("Steps", exact=True).blur()
    screen.locator("select").first.select_option("ddim")
    press_run(screen)
    expect(screen.locator(".stage-status")).to_contain_text(f"of {LONG}", timeout=60_000)


def paste_text(page: Page, text: str) -> None:
    page.evaluate(
        """text => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text/plain", text);
            const options = { clipboardData, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new ClipboardEvent("paste", options));
        }""",
        text,
    )


def drag(page: Page, handle: Locator, target: Locator, *, across: float) -> None:
    """Drag with the mouse to a place across an element."""
    handle.scroll_into_view_if_needed()
    start, end = handle.bounding_box(), target.bounding_box()
    assert start and end
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=4)
    page.mouse.move(end["x"] + end["width"] * across, end["y"] + end["height"] / 2, steps=4)
    page.mouse.up()


def painted(page: Page) -> int:
    """Return the number of painted pixels of the mask."""
    return page.locator("k-canvas").evaluate(
        """screen => {
            const { context, width, height } = screen.painter;
            const { data } = context.getImageData(0, 0, width, height);
            return data.filter((value, index) => index % 4 === 3 && value > 127).length;
        }"""
    )


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds: the page draws in frames of its own."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold"
        time.sleep(0.05)


def ready_box(screen: Locator) -> Any:
    """Return the place of the surface, when its picture and its handles are drawn."""
    surface = screen.locator("canvas")
    expect(surface).to_be_visible()
    eventually(lambda: screen.locator(".frame-handle").first.evaluate("handle => handle.style.left !== ''"))
    return surface.bounding_box()


def long_job(server: StudioServer, **request: Any) -> Any:
    """Start a job that takes long."""
    return server.call("POST", "/api/jobs", {"mode": "generate", "prompt": "long", "steps": LONG, **request})[1]


def show_job(watched: Watched, screen: str, *jobs: Any) -> Locator:
    """Open a screen whose stage shows the first one of some jobs."""
    watched.page.goto(f"{watched.address}/#gallery")
    ids = [job["id"] for job in jobs]
    store = "([name, draft]) => localStorage.setItem(`k22.stage.${name}`, JSON.stringify(draft))"
    watched.page.evaluate(store, [screen, {"jobs": ids, "current": ids[0]}])
    watched.page.goto(f"{watched.address}/?{ids[0]}#{screen}")
    shown = watched.page.locator(f"k-{screen}")
    expect(shown.locator("k-stage")).not_to_have_attribute("data-state", "empty")
    return shown


def recall(watched: Watched, title: str) -> None:
    """Recall the settings of the newest picture with this title."""
    page, gallery = watched.page, open_screen(watched, "gallery")
    gallery.locator(".tile-open", has_text=title).first.click()
    expect(page.locator("dialog.viewer .recipe")).to_be_visible()
    page.evaluate("document.querySelectorAll('.toast').forEach(message => message.remove())")
    page.keyboard.press("r")
    expect(page.locator(".toast").last).to_contain_text("Settings recalled")
