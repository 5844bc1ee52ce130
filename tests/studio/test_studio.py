"""The studio in a real browser, with a real server and the embedded model at few steps."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error, Page, expect
from tests.studio.browser import StudioServer, Watched, mask_png, running_server, scene
from tests.studio.pages import (
    LONG,
    PROMPT,
    choose_file,
    drag,
    drop_file,
    eventually,
    expect_picture,
    newest,
    open_screen,
    painted,
    paste_text,
    press_run,
    ready_box,
    start_long_job,
)

SCREENS = ("mix", "draw", "canvas", "guide", "gallery", "compare")
FIRST_PAGE_BYTES = 150_000


def first_page(watched: Watched) -> None:
    watched.page.goto(watched.address)
    expect(watched.page.locator("k-mix .primary")).to_be_visible()
    expect(watched.page.locator("k-mix .settings .choices").first).to_be_visible()


def test_first_page_is_small(watched: Watched) -> None:
    responses = watched.collect_responses()
    first_page(watched)
    watched.page.wait_for_load_state("load")
    sizes = {response.url: len(response.body()) for response in list(responses)}
    print(f"first page: {sum(sizes.values())} bytes, {len(sizes)} files")
    assert sum(sizes.values()) < FIRST_PAGE_BYTES, sorted(sizes.items(), key=lambda item: -item[1])


def test_first_page_is_fast(watched: Watched) -> None:
    seconds: list[float] = []
    while len(seconds) < 3 or (min(seconds) > 1 and len(seconds) < 10):  # other work slows single attempts
        start = time.perf_counter()
        first_page(watched)
        seconds.append(time.perf_counter() - start)
    print(f"first page: {min(seconds):.2f} s")
    # Other work on the machine stretches the time: the limit is that of an idle one.
    share = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 1.0
    assert min(seconds) < share


def test_draw_shows_previews_and_the_result(watched: Watched, server: StudioServer) -> None:
    screen = open_screen(watched, "draw")
    screen.locator("textarea.prompt").fill(PROMPT)
    screen.get_by_role("textbox", name="Seed").fill("11")
    screen.get_by_role("textbox", name="Seed").blur()
    screen.locator("summary").click()
    screen.get_by_label("Steps", exact=True).fill("400")  # long enough to be looked at
    screen.get_by_label("Steps", exact=True).blur()
    watched.page.keyboard.press("Control+Enter")
    expect(screen.locator("k-stage.is-preview")).to_be_visible()
    assert (screen.locator(".stage-picture").get_attribute("src") or "").startswith("data:image/webp")
    expect(screen.locator(".stage-left")).to_contain_text("left")
    expect_picture(screen)
    job = newest(server)
    assert job["request"]["seed"] == 11 and job["request"]["prompt"] == PROMPT
    expect(watched.page.locator("#announcements")).to_have_text("The picture is done")


def test_draw_over_a_picture_and_vary_it(watched: Watched, server: StudioServer) -> None:
    screen = open_screen(watched, "draw")
    choose_file(watched.page, screen.locator(".slot-button"), scene())
    expect(screen.locator(".picture-slot.filled")).to_be_visible()
    screen.locator("textarea.prompt").fill("a green star on a white background")
    press_run(screen)
    expect_picture(screen)
    assert newest(server)["mode"] == "img2img"
    screen.get_by_text("Variation", exact=True).click()
    screen.locator("textarea.prompt").fill("")
    press_run(screen)
    expect(screen.locator(".film-item")).to_have_count(2)
    expect_picture(screen)
    assert newest(server)["mode"] == "variations"


def test_mixing_table(watched: Watched, server: StudioServer) -> None:
    page, screen = watched.page, open_screen(watched, "mix")
    for text in ("a red circle on a yellow background", "a blue square on a white background"):
        screen.get_by_role("button", name="Text").click()
        page.keyboard.type(text)
    cards = screen.locator("[data-card]")
    expect(cards).to_have_count(2)
    weights = screen.locator(".card .number")
    weights.nth(0).fill("1.5")
    weights.nth(1).fill("-0.5")
    expect(cards.nth(1)).to_have_class(re.compile("against"))
    expect(cards.nth(0).locator(".share")).to_have_text("150 %")
    press_run(screen)
    expect_picture(screen)
    assert [part["weight"] for part in newest(server)["request"]["parts"]] == [1.5, -0.5]

    # "More like this" returns the result as a card; dragging its picture puts it first.
    screen.get_by_role("button", name="More like this").click()
    expect(cards).to_have_count(3)
    drag(page, cards.nth(2).locator(".card-picture"), cards.nth(0), across=0.1)
    expect(cards.nth(0).locator("img")).to_be_visible()
    # Two cards joined by dragging one onto the other make a strip.
    screen.get_by_role("button", name="Equal weights").click()
    drag(page, cards.nth(1).locator(".grip"), cards.nth(2), across=0.5)
    expect(screen.locator(".board .cell")).to_have_count(5)
    expect(screen.locator('.board .cell[data-state="done"]')).to_have_count(5, timeout=120_000)
    jobs = [job for job in server.jobs() if job["group"]][:5]
    assert len({job["request"]["seed"] for job in jobs}) == 1
    assert sorted(part["weight"] for job in jobs for part in job["request"]["parts"]) == [
        0.25,
        0.25,
        0.5,
        0.5,
        0.75,
        0.75,
        1,
        1,
    ]


def test_grid_between_four_cards(watched: Watched) -> None:
    page, screen = watched.page, open_screen(watched, "mix")
    for colour in ("red", "blue", "green", "black"):
        paste_text(page, f"a {colour} circle on a white background")
    expect(screen.locator("[data-card]")).to_have_count(4)
    screen.get_by_text("3 × 3").click()
    screen.get_by_role("button", name="Grid", exact=True).click()
    expect(screen.locator(".board .cell")).to_have_count(9)
    expect(screen.locator('.board .cell[data-state="done"]')).to_have_count(9, timeout=120_000)


def frame_width(page: Page) -> float:
    """Return the width in which the canvas shows its frame."""
    left, right = (page.locator(f"k-canvas .frame-handle.at-{side}").bounding_box() for side in ("left", "right"))
    assert left and right
    return right["x"] - left["x"]


def test_canvas_repaints_under_a_mask_of_the_mouse(watched: Watched, server: StudioServer) -> None:
    page, screen = watched.page, open_screen(watched, "canvas")
    drop_file(screen.locator(".canvas-slot"), scene())
    box = ready_box(screen)
    assert painted(page) == 0
    middle_x, middle_y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle_x - 60, middle_y)
    page.mouse.down()
    page.mouse.move(middle_x + 60, middle_y, steps=5)
    page.mouse.up()
    eventually(lambda: painted(page) > 400)
    first = painted(page)
    page.keyboard.press("Control+z")
    eventually(lambda: painted(page) == 0)
    page.keyboard.press("Control+Shift+z")
    eventually(lambda: painted(page) == first)
    screen.locator("textarea.prompt").fill("a green triangle")
    press_run(screen)
    expect_picture(screen)
    request = newest(server)["request"]
    assert request["mode"] == "inpaint" and request["keep_pixels"] and request["mask"]["upload"]

    # The frame is extended by the keyboard; a soft edge blends the result.
    screen.get_by_label("Extend the frame: right, pixels").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    screen.get_by_label("Feather").first.fill("6")
    press_run(screen)
    expect(screen.locator(".film-item")).to_have_count(2)
    expect_picture(screen)
    job = newest(server)
    assert job["request"]["extend"] == [0, 0, 32, 0] and job["request"]["crop"] == 32
    assert (job["images"][0]["width"], job["images"][0]["height"]) == (160, 128)


def test_canvas_is_painted_by_touch(server: StudioServer, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    watched = Watched(context.new_page(), server.address)
    page, screen = watched.page, open_screen(watched, "canvas")
    drop_file(screen.locator(".canvas-slot"), scene())
    box = ready_box(screen)
    session = context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, *points: tuple[float, float]) -> None:
        touches = [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    touch("touchStart", (x - 40, y))
    for step in range(8):
        touch("touchMove", (x - 40 + 10 * step, y))
    touch("touchEnd")
    eventually(lambda: painted(page) > 300)
    before, width = painted(page), frame_width(page)
    # Two fingers zoom, and paint nothing.
    touch("touchStart", (x - 30, y + 40), (x + 30, y + 40))
    for step in range(6):
        touch("touchMove", (x - 30 - 8 * step, y + 40), (x + 30 + 8 * step, y + 40))
    touch("touchEnd")
    eventually(lambda: frame_width(page) > 1.3 * width)
    assert painted(page) == before
    screen.locator("textarea.prompt").fill("a green triangle")
    press_run(screen)
    expect_picture(screen)
    context.close()
    assert not watched.messages and not watched.foreign


def test_guide_by_edges_and_by_hand(watched: Watched, server: StudioServer) -> None:
    page, screen = watched.page, open_screen(watched, "guide")
    choose_file(page, screen.locator(".slot-button"), scene())
    edges = screen.locator(".guide-surface > canvas")
    expect(edges).to_be_visible()
    count = """canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, index) => index % 4 === 0 && value > 0).length;
    }"""
    eventually(lambda: edges.evaluate(count) > 100)  # the outline of the circle
    screen.get_by_label("High threshold").first.fill("255")
    eventually(lambda: edges.evaluate(count) == 0)
    screen.get_by_label("High threshold").first.fill("50")
    screen.locator("textarea.prompt").fill("a large blue circle on a white background")
    press_run(screen)
    expect_picture(screen)
    assert newest(server)["request"]["hint"]["upload"]

    screen.get_by_text("By hand").click()
    surface = screen.locator(".painter-canvas")
    expect(surface).to_be_visible()
    box = surface.bounding_box()
    assert box
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    for x, y in ((140, 40), (140, 140), (40, 140), (40, 40)):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
    page.mouse.up()
    press_run(screen)
    expect(screen.locator(".film-item")).to_have_count(2)
    expect_picture(screen)
    screen.get_by_text("Depth").click()
    expect(screen.locator(".surface-note")).to_contain_text("no depth model")


def test_gallery(watched: Watched, server: StudioServer) -> None:
    for colour in ("purple", "orange"):
        server.make(prompt=f"a {colour} square on a white background", seed=5, steps=6, scheduler="ddim")
    page, screen = watched.page, open_screen(watched, "gallery")
    search = screen.get_by_label("Search the prompts")
    page.keyboard.press("/")
    search.fill("square on a white")
    tiles = screen.locator(".tile")
    expect(tiles.filter(has_text="purple")).to_have_count(1)
    search.fill("purple square")
    expect(tiles).to_have_count(1)

    tiles.first.hover()
    screen.get_by_role("button", name="Star: a purple square").click()
    expect(screen.locator(".tile-star.starred")).to_have_count(1)
    screen.get_by_role("button", name="Open: a purple").click()
    viewer = page.locator("dialog.viewer")
    expect(viewer.locator(".recipe")).to_contain_text("DDIM")
    page.keyboard.press("Delete")
    expect(tiles).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(tiles).to_have_count(1)

    search.fill("square on a white background")
    expect(tiles.filter(has_text="orange")).to_have_count(1)
    screen.get_by_role("button", name="Compare two").click()
    tiles.filter(has_text="orange").locator(".tile-open").click()
    tiles.filter(has_text="purple").locator(".tile-open").click()
    divider = page.get_by_label("Position of the divider")
    divider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.locator(".comparison").evaluate("frame => frame.style.getPropertyValue('--divider')") == "60%"
    page.keyboard.press("Escape")

    # All settings of a picture come back, and draw the same picture again.
    tiles.filter(has_text="orange").locator(".tile-open").click()
    page.get_by_role("button", name="Recall all settings").click()
    draw = page.locator("k-draw")
    expect(draw.locator("textarea.prompt")).to_have_value("a orange square on a white background")
    expect(draw.get_by_role("textbox", name="Seed")).to_have_value("5")
    press_run(draw)
    expect_picture(draw)
    again, before = (job["images"][0]["sha256"] for job in server.jobs()[:2])
    assert again == before


def test_recall_of_a_seed_beyond_the_precision_of_the_browser(watched: Watched, server: StudioServer) -> None:
    seed = 2**63 - 2
    server.make(prompt="a large seed", seed=seed)
    page, screen = watched.page, open_screen(watched, "gallery")
    screen.locator(".tile-open").first.click()
    expect(page.locator("dialog.viewer .recipe")).to_contain_text(str(seed))
    page.keyboard.press("r")
    draw = page.locator("k-draw")
    field = draw.get_by_role("textbox", name="Seed")
    expect(field).to_have_value(str(seed))
    page.reload()
    expect(field).to_have_value(str(seed))
    press_run(draw)
    expect_picture(draw)
    again, before = (job["images"][0]["sha256"] for job in server.jobs()[:2])
    assert again == before


def test_recall_of_a_mixture_and_of_a_mask(watched: Watched, server: StudioServer) -> None:
    _, picture = server.call("POST", "/api/uploads", scene())
    _, mask = server.call("POST", "/api/uploads", mask_png())
    parts = [{"weight": 0.7, "text": "a mixed star"}, {"weight": -0.2, "upload": picture["id"]}]
    server.make(mode="mix", parts=parts)
    server.make(
        mode="inpaint", prompt="a masked star", image={"upload": picture["id"]}, mask={"upload": mask["id"]}, crop=16
    )
    page, screen = watched.page, open_screen(watched, "gallery")
    viewer = page.locator("dialog.viewer")
    screen.locator(".tile-open").nth(1).click()
    expect(viewer).to_contain_text("a mixed star")
    page.keyboard.press("r")
    mix = page.locator("k-mix")
    expect(mix.locator("[data-card]")).to_have_count(2)
    expect(mix.locator(".card .number").nth(0)).to_have_value("0.7")
    expect(mix.locator(".card .number").nth(1)).to_have_value("-0.2")
    page.keyboard.press("5")
    screen.locator(".tile-open").first.click()
    expect(viewer).to_contain_text("a masked star")
    page.keyboard.press("r")
    canvas = page.locator("k-canvas")
    expect(canvas.locator("textarea.prompt")).to_have_value("a masked star")
    expect(canvas.locator("canvas")).to_be_visible()
    eventually(lambda: painted(page) == 32 * 32)


def test_recall_of_a_guide_and_of_the_picture_under_it(watched: Watched, server: StudioServer) -> None:
    pictures = [{"upload": server.call("POST", "/api/uploads", content)[1]["id"]} for content in (scene(), mask_png())]
    server.make(mode="control", prompt="a guided star", image=pictures[0], hint=pictures[1], strength=0.65, seed=4)
    page, screen = watched.page, open_screen(watched, "gallery")
    screen.locator(".tile-open").first.click()
    expect(page.locator("dialog.viewer")).to_contain_text("a guided star")
    page.keyboard.press("r")
    guide = page.locator("k-guide")
    expect(guide.get_by_role("switch", name="Start from the picture too")).to_be_checked()
    press_run(guide)
    expect_picture(guide)
    again, before = server.jobs()[:2]
    assert {name: again["request"][name] for name in ("image", "hint", "strength", "seed")} == {
        "image": pictures[0],
        "hint": pictures[1],
        "strength": 0.65,
        "seed": 4,
    }
    assert again["images"][0]["sha256"] == before["images"][0]["sha256"]


def test_dropped_picture_restores_its_recipe(watched: Watched, server: StudioServer) -> None:
    image = server.make(prompt="a yellow star on a blue background", seed=8)["images"][0]
    _, content = server.call("GET", image["url"])
    open_screen(watched, "gallery")
    drop_file(watched.page.locator("k-gallery"), content)
    dialog = watched.page.locator("dialog.viewer")
    expect(dialog).to_contain_text("a yellow star on a blue background")
    dialog.get_by_role("button", name="Recall all settings").click()
    expect(watched.page.locator("k-draw textarea.prompt")).to_have_value("a yellow star on a blue background")
    expect(watched.page.locator("k-draw").get_by_role("textbox", name="Seed")).to_have_value("8")


def test_sampler_table(watched: Watched) -> None:
    page, screen = watched.page, open_screen(watched, "compare")
    screen.locator("textarea.prompt").fill(PROMPT)
    for name in ("dpm", "ddim"):
        screen.locator(f'.chip[data-name="{name}"]').click()
    screen.get_by_role("button", name="Remove 16 steps").click()
    press_run(screen)
    expect(screen.locator("td .cell")).to_have_count(4)
    expect(screen.locator('td .cell[data-state="done"]')).to_have_count(4, timeout=120_000)
    expect(screen.locator(".cell-note").first).to_contain_text("s")
    page.locator("td .cell-holder").nth(3).hover()
    screen.get_by_role("button", name="Draw with these settings").nth(3).click()
    expect(page.locator("k-draw textarea.prompt")).to_have_value(PROMPT)


def test_cancel_and_retry(watched: Watched, server: StudioServer) -> None:
    screen = open_screen(watched, "draw")
    start_long_job(screen)
    watched.page.locator("body").press("Escape")
    expect(screen.locator("k-stage")).to_have_attribute("data-state", "cancelled")
    job = newest(server)
    assert job["state"] == "cancelled"
    screen.get_by_role("button", name="Try again").click()
    expect(screen.locator(".stage-status")).to_contain_text(f"of {LONG}", timeout=60_000)
    watched.page.keyboard.press("q")
    queue = watched.page.locator("k-queue")
    queue.get_by_role("button", name="Cancel this job").click()
    expect(screen.locator("k-stage")).to_have_attribute("data-state", "cancelled")
    assert newest(server)["request"]["seed"] == job["request"]["seed"]


def test_positions_and_numbers_count_from_one(watched: Watched, server: StudioServer) -> None:
    screen = open_screen(watched, "draw")
    _, running = server.call("POST", "/api/jobs", {"prompt": "long", "steps": LONG, "count": 2})
    waiting = [server.call("POST", "/api/jobs", {"prompt": f"waiting {n}", "quality": "draft"})[1] for n in range(2)]
    try:
        watched.page.keyboard.press("q")
        rows = watched.page.locator("k-queue .queue-status")
        expect(rows.nth(0)).to_contain_text("picture 1 of 2", timeout=60_000)
        expect(rows.nth(1)).to_have_text("Next in the queue")
        expect(rows.nth(2)).to_have_text("1 job before this one")
        server.call("DELETE", f"/api/jobs/{running['id']}")
        expect(watched.page.locator(".queue-button")).to_have_attribute("title", "Queue: empty", timeout=60_000)
        assert [server.wait(job["id"])["state"] for job in waiting] == ["done", "done"]
        expect(screen).to_be_visible()
    finally:
        for job in (*waiting, running):
            server.call("DELETE", f"/api/jobs/{job['id']}")


def test_a_page_in_the_background_catches_up(watched: Watched, server: StudioServer) -> None:
    """After a minute it gives its connection back, and misses the events of pictures."""
    page = watched.page
    page.clock.install()
    screen = open_screen(watched, "gallery")
    expect(screen.locator(".tile").first).to_be_visible()
    hide = "hidden => { Object.defineProperty(document, 'hidden', { get: () => hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, True)
    page.clock.fast_forward(61_000)
    image = server.make(prompt="made in the background", seed=3)["images"][0]
    page.evaluate(hide, False)
    expect(screen.locator(f"[data-image='{image['id']}']")).to_be_visible()


def test_pictures_that_the_server_has_removed_leave_the_inputs(watched: Watched) -> None:
    watched.page.goto(f"{watched.address}/#gallery")
    missing = {"upload": "0" * 64, "width": 64, "height": 64}
    store = "([name, draft]) => localStorage.setItem(`k22.${name}`, JSON.stringify(draft))"
    watched.page.evaluate(store, ["draw", {"picture": missing}])
    card = {"id": 1, "weight": 1, "picture": missing}
    watched.page.evaluate(store, ["mix", {"cards": [card], "next": 2}])
    watched.page.reload()
    for name, gone in (("draw", ".picture-slot.filled"), ("mix", ".picture-card")):
        with watched.page.expect_response(lambda response: response.status == 404):
            watched.page.goto(f"{watched.address}/#{name}")
        expect(watched.page.locator(f"k-{name}")).to_be_visible()
        expect(watched.page.locator(f"k-{name} {gone}")).to_have_count(0)
    watched.messages = [message for message in watched.messages if "404" not in message]


def test_reload_in_the_middle_of_a_job(watched: Watched) -> None:
    screen = open_screen(watched, "draw")
    for attempt in range(4):
        start_long_job(screen)
        watched.page.reload()
        expect(screen.locator("textarea.prompt")).to_have_value(PROMPT)
        try:
            expect(screen.locator(".stage-status")).to_contain_text(f"of {LONG}")
            expect(screen.locator("k-stage.is-preview")).to_be_visible()
            screen.locator(".stage-progress").get_by_role("button", name="Cancel").click()
            expect(screen.locator("k-stage")).to_have_attribute("data-state", "cancelled")
            return
        except (AssertionError, Error):
            # the machine may be faster than the browser loads the page
            if attempt == 3 or screen.locator("k-stage").get_attribute("data-state") != "done":
                raise


def test_restart_of_the_server_in_the_middle_of_a_job(watched: Watched, server: StudioServer) -> None:
    screen = open_screen(watched, "draw")
    screen.locator("textarea.prompt").fill(PROMPT)
    start_long_job(screen)
    job = newest(server)
    watched.page.set_viewport_size({"width": 1280, "height": 500})
    watched.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    server.kill()
    expect(watched.page.locator(".notice")).to_contain_text("does not answer")
    expect(watched.page.locator(".notice")).to_be_in_viewport()  # wherever the page is scrolled to
    server.start()
    expect(watched.page.locator(".notice")).to_be_hidden(timeout=60_000)
    expect(screen.locator(".stage-status")).to_contain_text(f"of {LONG}", timeout=60_000)
    assert newest(server)["id"] == job["id"] and newest(server)["request"]["seed"] == job["request"]["seed"]
    screen.locator(".stage-progress").get_by_role("button", name="Cancel").click()
    expect(screen.locator("k-stage")).to_have_attribute("data-state", "cancelled")
    # Chromium itself reports requests to the absent server; everything else would be a defect.
    absent = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    watched.messages = [message for message in watched.messages if not any(name in message for name in absent)]


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_accessibility(server: StudioServer, browser: Any, theme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce")
    watched = Watched(context.new_page(), server.address)
    page, axe = watched.page, Axe()
    faults = {}

    def check(name: str) -> None:
        result = axe.run(page).response
        serious = [item for item in result["violations"] if item["impact"] in ("serious", "critical")]
        if serious:
            faults[name] = [(item["id"], [node["html"][:160] for node in item["nodes"][:3]]) for item in serious]

    for name in SCREENS:
        screen = open_screen(watched, name)
        if name == "mix":
            check("empty table")
            screen.get_by_role("button", name="Try an example").click()
        if name in ("canvas", "guide"):
            drop_file(screen.locator(".picture-slot"), scene())
            expect(screen.locator("canvas").first).to_be_visible()
        if name == "gallery":
            expect(screen.locator(".tile").first).to_be_visible()
        check(name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.keyboard.press("?")
    check("help")
    page.keyboard.press("Escape")
    page.keyboard.press("q")
    check("queue")
    page.keyboard.press("q")
    page.keyboard.press("5")
    page.locator(".tile-open").first.click()
    expect(page.locator("dialog .recipe")).to_be_visible()
    check("viewer")
    context.close()
    assert not faults
    assert not watched.messages


def test_keyboard_theme_and_drafts(watched: Watched) -> None:
    page, _ = watched.page, open_screen(watched, "mix")
    page.keyboard.press("2")
    expect(page.locator("k-draw")).to_be_visible()
    page.locator("k-draw textarea.prompt").fill("kept")
    page.locator("k-draw textarea.prompt").blur()
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    expect(page.locator("k-draw textarea.prompt")).to_have_value("kept")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("?")
    expect(page.locator("dialog.help")).to_contain_text("Keyboard shortcuts")


def test_token_is_asked_for(browser: Any, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", token="a secret token") as server:
        page = browser.new_page()
        page.goto(server.address)
        dialog = page.get_by_role("dialog", name="This server requires a token")
        dialog.get_by_label("Token").fill("another token")
        dialog.get_by_role("button").click()
        expect(dialog.get_by_role("alert")).to_have_text("The server does not accept this token.")
        dialog.get_by_label("Token").fill("a secret token")
        dialog.get_by_role("button").click()
        expect(dialog).to_have_count(0)
        expect(page.locator("k-mix .settings .choices").first).to_be_visible()
        page.close()


def test_policy_forbids_other_hosts(server: StudioServer, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    response = page.goto(server.address)
    policy = response.headers["content-security-policy"]
    assert re.match("default-src '(self|none)'", policy) and "script-src 'self'" in policy and "unsafe" not in policy
    blocked = page.evaluate("fetch('https://example.org/').then(() => 'answered', () => 'blocked')")
    assert blocked == "blocked"
    page.close()
