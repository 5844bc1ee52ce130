"""Take the screenshots of the studio: python -m docs.studio.make [--out FOLDER].

A server with the embedded model runs in a temporary folder; an installed Chromium shows every screen at three widths,
light and dark. The files are WebP, because PNG files of all 36 would be four times as large.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tests.studio.browser import StudioServer, launch, running_server

SIZES = {1440: 900, 820: 1100, 390: 844}
THEMES = ("light", "dark")
PROMPTS = (
    "a large yellow star on a purple background",
    "a small red circle above a large white square on a black background",
    "a green triangle on the left on a white background",
    "a large orange square below a small blue circle on a white background",
    "a small white star above a large black circle on a green background",
    "a blue circle on an orange background",
    "a large red triangle to the right of a small yellow circle on a blue background",
    "a purple square at the top on a yellow background",
    "a white star on a red background",
    "a small green circle to the left of a large purple triangle on a yellow background",
    "a large black circle on a white background",
    "an orange star below a white circle on a blue background",
)
DONE = 'k-stage[data-state="done"]'


def drop(page: Page, selector: str, content: bytes) -> None:
    """Drop a PNG file onto an element."""
    page.locator(selector).evaluate(
        """(element, bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            for (const name of ["dragenter", "dragover", "drop"])
                element.dispatchEvent(new DragEvent(name, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(content),
    )


def run(page: Page, screen: str) -> None:
    """Press the screen's button and wait for the picture."""
    page.click(f"k-{screen} .run-row .primary")
    page.wait_for_selector(f"k-{screen} {DONE}", timeout=90_000)


def prepare_mix(page: Page, server: StudioServer) -> None:
    """Lay three cards, mix them, and make a strip."""
    page.click("text=Try an example")
    page.locator("k-mix").get_by_text("Balanced").first.click()
    run(page, "mix")
    page.click("text=More like this")
    page.locator("k-mix .card .number").nth(2).fill("-0.3")
    for index in range(2):
        page.locator("k-mix .card-choose").nth(index).click()
    page.locator("k-mix").get_by_role("button", name="Strip", exact=True).click()
    page.wait_for_selector('k-mix .cell-holder:nth-child(5) .cell[data-state="done"]', timeout=90_000)
    for index in range(2):
        page.locator("k-mix .card-choose").nth(index).click()


def prepare_draw(page: Page, server: StudioServer) -> None:
    """Draw three pictures."""
    page.locator("k-draw").get_by_text("Balanced").first.click()
    for prompt in PROMPTS[4:7]:
        page.fill("k-draw textarea.prompt", prompt)
        run(page, "draw")
        page.wait_for_timeout(300)


def prepare_canvas(page: Page, server: StudioServer) -> None:
    """Paint a mask and extend the frame."""
    _, job = server.call("GET", "/api/jobs?limit=1")
    _, content = server.call("GET", job["items"][0]["images"][0]["url"])
    drop(page, "k-canvas .canvas-slot", content)
    page.wait_for_selector("k-canvas canvas")
    page.wait_for_timeout(300)
    box = page.locator("k-canvas canvas").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for path in (((-190, 90), (-110, 110), (-150, 150), (-210, 140)),):
        page.mouse.move(x + path[0][0], y + path[0][1])
        page.mouse.down()
        for right, down in path[1:]:
            page.mouse.move(x + right, y + down, steps=6)
        page.mouse.up()
    page.get_by_label("Extend the frame: right, pixels").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("k-canvas").get_by_text("Balanced").first.click()
    page.fill("k-canvas textarea.prompt", "a green star on a blue background")
    run(page, "canvas")


def prepare_guide(page: Page, server: StudioServer) -> None:
    """Draw along the edges of a picture."""
    image = server.make(prompt="a large white star on a blue background", seed=3, quality="balanced")["images"][0]
    _, content = server.call("GET", image["url"])
    drop(page, "k-guide .guide-slot", content)
    page.locator("k-guide").get_by_text("Balanced").first.click()
    page.fill("k-guide textarea.prompt", "a large yellow star on a purple background")
    page.wait_for_timeout(300)
    run(page, "guide")


def prepare_gallery(page: Page, server: StudioServer) -> None:
    """Star two pictures."""
    for index in (2, 6):
        page.locator(".tile").nth(index).hover()
        page.locator(".tile-star").nth(index).click()


def prepare_compare(page: Page, server: StudioServer) -> None:
    """Fill the table."""
    page.fill("k-compare textarea.prompt", PROMPTS[3])
    page.click("k-compare .run-row .primary")
    page.wait_for_selector("k-compare td")
    for row in range(1, 5):
        last = f"k-compare tbody tr:nth-child({row}) td:last-child"
        page.wait_for_selector(f'{last} .cell[data-state="done"]', timeout=90_000)


PREPARATIONS: dict[str, Callable[[Page, StudioServer], None]] = {
    "compare": prepare_compare,
    "mix": prepare_mix,
    "draw": prepare_draw,
    "canvas": prepare_canvas,
    "guide": prepare_guide,
    "gallery": prepare_gallery,
}


def take(browser: Browser, server: StudioServer, folder: Path) -> None:
    """Write all screenshots."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    for screen, prepare in PREPARATIONS.items():
        page.goto(f"{server.address}/#{screen}")
        page.wait_for_selector(f"k-{screen}:not([hidden])")
        page.wait_for_timeout(500)
        prepare(page, server)
    drafts = context.storage_state()
    for width, height in SIZES.items():
        for theme in THEMES:
            shown = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=theme,  # type: ignore[arg-type]
                storage_state=drafts,
                has_touch=width < 1000,
                reduced_motion="reduce",
            )
            page = shown.new_page()
            for screen in PREPARATIONS:
                page.goto(f"{server.address}/#{screen}")
                page.wait_for_selector(f"k-{screen}:not([hidden])")
                page.wait_for_timeout(900)
                picture = Image.open(io.BytesIO(page.screenshot()))
                picture.convert("RGB").save(folder / f"{screen}-{width}-{theme}.webp", quality=82, method=6)
            shown.close()


def main() -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the screenshots")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state, running_server(Path(state) / "state") as server:
        for index, prompt in enumerate(PROMPTS):
            server.make(prompt=prompt, seed=index + 1, quality="balanced")
        with sync_playwright() as playwright:
            browser = launch(playwright)
            take(browser, server, folder)
            browser.close()
    total = sum(path.stat().st_size for path in folder.glob("*.webp"))
    print(f"{len(list(folder.glob('*.webp')))} screenshots, {total / 1e6:.2f} MB in {folder}")


if __name__ == "__main__":
    main()
