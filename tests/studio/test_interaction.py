"""What a person does on the page meets events of the server: fields, keys, pointers and the connection."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from tests.studio.browser import StudioServer, Watched, scene
from tests.studio.pages import (
    drop_file,
    eventually,
    expect_picture,
    long_job,
    open_screen,
    painted,
    paste_text,
    ready_box,
    show_job,
)


def run_a_job(watched: Watched, server: StudioServer) -> None:
    """Run a job and wait until the page knows of its start and its end."""
    page = watched.page
    page.evaluate(
        """async () => {
            const { store } = await import("/studio/js/store.js");
            window.states = [];
            const note = () => window.states.push(store.info.worker.state);
            for (const name of ["worker", "info"]) store.on(name, note);
        }"""
    )
    server.make(prompt="another job", seed=1)
    # Page.wait_for_function evaluates text inside the page from the second time on, which the page's policy forbids.
    ended = "states.includes('busy') && states.lastIndexOf('ready') > states.indexOf('busy')"
    eventually(lambda: page.evaluate(ended), seconds=60)
    expect(page.locator(".queue-button")).to_have_attribute("title", "Queue: empty")


def zoom(page: Page, surface: Locator) -> float:
    """Return the width at which the surface shows its brush."""
    box = surface.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2)
    width = surface.locator("xpath=..").locator(".brush-cursor").evaluate("cursor => cursor.style.width")
    return float(width.removesuffix("px"))


# Fields


def test_typing_survives_a_job(watched: Watched, server: StudioServer) -> None:
    page, draw = watched.page, open_screen(watched, "draw")
    seed = draw.get_by_role("textbox", name="Seed")
    seed.click()
    page.keyboard.type("123")
    run_a_job(watched, server)
    page.keyboard.type("45")
    expect(draw).to_be_visible()
    expect(seed).to_have_value("12345")
    expect(seed).to_be_focused()

    draw.locator("summary").click()
    steps = draw.get_by_label("Steps", exact=True)
    steps.click()
    page.keyboard.type("2")
    run_a_job(watched, server)
    page.keyboard.type("4")
    expect(steps).to_have_value("24")
    sampler = draw.locator("select").first
    sampler.click()
    run_a_job(watched, server)
    assert sampler.evaluate("select => select.matches(':open')")
    page.keyboard.press("Escape")

    page.goto(f"{watched.address}/#compare")
    numbers = page.locator("k-compare").get_by_label("Add a number of steps")
    numbers.click()
    page.keyboard.type("3")
    run_a_job(watched, server)
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    expect(page.locator("k-compare").get_by_role("button", name="Remove 32 steps")).to_be_visible()
    expect(numbers).to_be_focused()


def test_forms_follow_other_limits_and_keep_what_is_typed(watched: Watched) -> None:
    page, draw = watched.page, open_screen(watched, "draw")
    seed = draw.get_by_role("textbox", name="Seed")
    seed.click()
    page.keyboard.type("77")
    page.route("**/api/info", answer_with_limits)
    page.evaluate("import('/studio/js/store.js').then(({ store }) => store.start())")
    expect(draw.get_by_label("Steps", exact=True)).to_have_attribute("max", "55")
    page.keyboard.type("8")
    expect(draw.get_by_role("textbox", name="Seed")).to_have_value("778")


def answer_with_limits(route: Any) -> None:
    response = route.fetch()
    info = response.json()
    info["limits"]["max_steps"] = 55
    route.fulfill(response=response, json=info)


def test_controls_keep_the_focus_when_they_are_used(watched: Watched) -> None:
    page, draw = watched.page, open_screen(watched, "draw")
    draw.locator("summary").click()
    qualities = draw.get_by_role("group", name="Quality").get_by_role("radio")
    draw.get_by_role("radio", name="Draft").focus()
    before = draw.get_by_label("Steps", exact=True).get_attribute("placeholder")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    expect(qualities.and_(page.locator(":checked"))).to_have_value("best")
    expect(qualities.and_(page.locator(":checked"))).to_be_focused()
    assert draw.get_by_label("Steps", exact=True).get_attribute("placeholder") != before

    lock = draw.get_by_role("button", name=re.compile("this seed|new seed for"))
    lock.focus()
    for pressed in ("true", "false"):
        page.keyboard.press("Enter")
        expect(lock).to_have_attribute("aria-pressed", pressed)
        expect(lock).to_be_focused()
    # What is typed is locked at once: the lock then opens again, and a press on it is not lost.
    draw.get_by_role("textbox", name="Seed").click()
    page.keyboard.type("99")
    expect(lock).to_have_attribute("aria-pressed", "true")
    lock.click()
    expect(lock).to_have_attribute("aria-pressed", "false")

    draw.get_by_role("radio", name="Custom").check(force=True)
    width, height = draw.get_by_label("Width", exact=True), draw.get_by_label("Height", exact=True)
    width.fill("160")
    page.keyboard.press("Enter")
    expect(width).to_be_focused()
    width.fill("176")
    page.keyboard.press("Tab")
    expect(height).to_be_focused()
    expect(draw.locator(".setting-note")).to_have_text(re.compile("^176 × "))


def test_chips_of_the_table_keep_the_focus(watched: Watched) -> None:
    page, compare = watched.page, open_screen(watched, "compare")
    numbers = compare.get_by_label("Add a number of steps")
    numbers.fill("12")
    compare.get_by_role("button", name="Remove 8 steps").click()  # adds 12 first: the button must still be there
    expect(compare.get_by_role("button", name="Remove 8 steps")).to_have_count(0)
    expect(compare.get_by_role("button", name="Remove 16 steps")).to_be_visible()
    expect(compare.get_by_role("button", name="Remove 12 steps")).to_be_focused()
    chip = compare.locator('.chip[data-name="dpm"]')
    chip.focus()
    page.keyboard.press("Enter")
    expect(chip).to_have_attribute("aria-pressed", "false")
    expect(chip).to_be_focused()


def test_earlier_results_are_walked_with_the_keyboard(watched: Watched, server: StudioServer) -> None:
    jobs = [server.make(prompt=f"result {number}", seed=number) for number in range(3)]
    draw = show_job(watched, "draw", *jobs)
    items = draw.locator(".film-item")
    expect(items).to_have_count(3)
    items.nth(1).focus()
    watched.page.keyboard.press("Enter")
    expect(items.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(items.nth(1)).to_be_focused()
    watched.page.keyboard.press("Tab")
    watched.page.keyboard.press("Enter")
    expect(draw.locator(".stage-picture")).to_have_attribute("src", jobs[2]["images"][0]["url"])


def test_cards_stay_while_others_come_and_go(watched: Watched) -> None:
    page, mix = watched.page, open_screen(watched, "mix")
    for text in ("one", "two"):
        paste_text(page, text)
    cards = mix.locator("[data-card]")
    words = cards.nth(0).locator("textarea")
    words.click()
    page.keyboard.press("End")
    page.keyboard.type(" re")
    drop_file(mix.locator(".table"), scene())  # its upload ends while the person writes
    expect(cards).to_have_count(3)
    page.keyboard.type("d")
    expect(words).to_have_value("one red")
    expect(words).to_be_focused()
    expect(mix.get_by_label("Weight of Card 3").first).to_have_value("1")
    cards.nth(0).locator(".number").fill("0.5")
    mix.get_by_role("button", name="Equal weights").click()
    expect(cards.nth(0).locator(".number")).to_have_value("1")

    mix.get_by_role("button", name="Remove the card: Card 1").focus()
    page.keyboard.press("Enter")
    expect(cards).to_have_count(2)
    expect(mix.get_by_role("button", name="Remove the card: Card 1")).to_be_focused()
    expect(cards.nth(0).locator("textarea")).to_have_value("two")
    mix.get_by_role("button", name="Move Card 1").focus()
    page.keyboard.press("ArrowRight")
    expect(mix.get_by_role("button", name="Move Card 2")).to_be_focused()
    expect(cards.nth(1).locator("textarea")).to_have_value("two")


def test_zoom_of_a_guide_survives_a_job(watched: Watched, server: StudioServer) -> None:
    page, guide = watched.page, open_screen(watched, "guide")
    guide.get_by_text("By hand").click()
    surface = guide.locator(".painter-canvas")
    expect(surface).to_be_visible()
    first = zoom(page, surface)
    page.keyboard.press("+")
    page.keyboard.press("+")
    eventually(lambda: zoom(page, surface) > 1.5 * first)
    closer = zoom(page, surface)
    run_a_job(watched, server)
    assert zoom(page, surface) == pytest.approx(closer)


def test_queue_keeps_the_focus(watched: Watched, server: StudioServer) -> None:
    page, _ = watched.page, open_screen(watched, "draw")
    jobs = [long_job(server), *(long_job(server, prompt=f"waiting {number}", steps=4) for number in range(2))]
    try:
        page.keyboard.press("q")
        rows = page.locator("k-queue .queue-list").first.locator("li")
        expect(rows).to_have_count(3)
        expect(page.locator("k-queue").get_by_role("button", name="Cancel all")).to_be_focused()
        cancel = rows.filter(has_text="waiting 1").get_by_role("button", name="Cancel this job")
        cancel.focus()
        server.call("DELETE", f"/api/jobs/{jobs[1]['id']}")
        expect(rows).to_have_count(2)
        expect(cancel).to_be_focused()
        page.keyboard.press("Enter")  # its row leaves the list
        expect(rows).to_have_count(1)
        assert page.evaluate("document.querySelector('k-queue').contains(document.activeElement)")
    finally:
        for job in jobs:
            server.call("DELETE", f"/api/jobs/{job['id']}")


# Connection


def test_connection_returns_to_a_page_that_was_hidden_without_it(watched: Watched, server: StudioServer) -> None:
    page = watched.page
    page.clock.install()
    gallery = open_screen(watched, "gallery")
    hide = "hidden => { Object.defineProperty(document, 'hidden', { get: () => hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    server.kill()
    expect(page.locator(".notice")).to_contain_text("does not answer")
    page.evaluate(hide, True)
    page.clock.fast_forward(61_000)
    page.wait_for_timeout(1000)
    server.start()
    page.evaluate(hide, False)
    expect(page.locator(".notice")).to_be_hidden(timeout=60_000)
    image = server.make(prompt="made after the return", seed=3)["images"][0]
    expect(gallery.locator(f"[data-image='{image['id']}']")).to_be_visible()
    watched.messages = [message for message in watched.messages if "ERR_" not in message]  # Chromium's own


# Pointers


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_a_press_on_the_picture_opens_it(server: StudioServer, browser: Any, touch: bool) -> None:
    size = {"width": 390, "height": 844} if touch else {"width": 1280, "height": 860}
    context = browser.new_context(viewport=size, has_touch=touch, is_mobile=touch, reduced_motion="reduce")
    watched = Watched(context.new_page(), server.address)
    page, viewer = watched.page, watched.page.locator("dialog.viewer")
    job = server.make(prompt="a picture to open", seed=2)
    for name in ("mix", "draw", "canvas", "guide"):
        screen = show_job(watched, name, job)
        picture = screen.locator(".stage-picture")
        expect(picture).to_have_attribute("src", job["images"][0]["url"])
        if touch:
            picture.tap()
        else:
            picture.dblclick()
        expect(viewer).to_contain_text("a picture to open")
        expect(viewer).to_have_count(1)
        page.keyboard.press("Escape")
        expect(viewer).to_have_count(0)
    context.close()
    assert not watched.messages and not watched.foreign


def test_the_picture_is_dragged_and_a_preview_is_not_opened(watched: Watched, server: StudioServer) -> None:
    page = watched.page
    draw = show_job(watched, "draw", server.make(prompt="a picture to drag", seed=2))
    expect_picture(draw)
    draw.locator(".stage-picture").drag_to(draw.locator(".picture-slot"))
    expect(draw.locator(".picture-slot.filled")).to_be_visible()
    expect(page.locator("dialog")).to_have_count(0)
    job = long_job(server)
    try:
        draw = show_job(watched, "draw", job)
        expect(draw.locator("k-stage.is-preview")).to_be_visible(timeout=60_000)
        draw.locator(".stage-picture").click()
        page.wait_for_timeout(300)
        expect(page.locator("dialog")).to_have_count(0)
    finally:
        server.call("DELETE", f"/api/jobs/{job['id']}")


# Escape


def state(server: StudioServer, job: Any) -> str:
    return str(server.call("GET", f"/api/jobs/{job['id']}")[1]["state"])


def expect_running(watched: Watched, server: StudioServer, job: Any) -> None:
    """Wait long enough for a request to cancel, and check that there was none."""
    watched.page.wait_for_timeout(300)
    assert state(server, job) in ("queued", "running")


def test_escape_closes_a_menu_and_the_queue_first(watched: Watched, server: StudioServer) -> None:
    page, done, job = watched.page, server.make(prompt="done", seed=1), long_job(server)
    try:
        watched.page.goto(f"{watched.address}/#gallery")
        board = {"title": "a strip", "columns": 1, "jobs": [job["id"]]}
        page.evaluate("board => localStorage.setItem('k22.mix', JSON.stringify({ board }))", board)
        mix = show_job(watched, "mix", done)
        expect(mix.locator('.board .cell[data-state="running"]')).to_be_visible(timeout=60_000)
        mix.get_by_role("button", name="Send to").click()
        menu = mix.get_by_role("menu")
        expect(menu).to_be_visible()
        page.keyboard.press("3")  # a menu has the keys: this one would open the canvas
        expect(mix).to_be_visible()
        page.keyboard.press("Escape")
        expect(menu).to_be_hidden()
        expect_running(watched, server, job)
        page.locator("body").press("Escape")
        eventually(lambda: state(server, job) == "cancelled")

        job = long_job(server)
        draw = show_job(watched, "draw", job)
        page.locator("body").press("q")
        expect(page.locator(".queue")).to_be_visible()
        prompt = draw.locator("textarea.prompt")
        prompt.focus()
        page.keyboard.press("Escape")
        expect(page.locator(".queue")).to_be_hidden()
        expect(prompt).to_be_focused()
        expect_running(watched, server, job)

        # An input method uses the key to drop the word that it composes.
        composing = "{ key: 'Escape', isComposing: true, bubbles: true }"
        prompt.evaluate(f"area => area.dispatchEvent(new KeyboardEvent('keydown', {composing}))")
        expect_running(watched, server, job)
        page.keyboard.press("Escape")
        eventually(lambda: state(server, job) == "cancelled")
    finally:
        server.call("DELETE", f"/api/jobs/{job['id']}")


def test_escape_ends_a_drag_first(watched: Watched, server: StudioServer) -> None:
    page, job = watched.page, long_job(server)
    try:
        mix = show_job(watched, "mix", job)
        for text in ("one", "two"):
            paste_text(page, text)
        cards = mix.locator("[data-card]")
        grip = cards.nth(0).locator(".grip").bounding_box()
        assert grip
        page.mouse.move(grip["x"] + 5, grip["y"] + 5)
        page.mouse.down()
        page.mouse.move(grip["x"] + 60, grip["y"] + 40, steps=4)
        expect(mix.locator(".card.dragged")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(mix.locator(".card.dragged")).to_have_count(0)
        page.mouse.up()
        expect_running(watched, server, job)

        canvas = show_job(watched, "canvas", job)
        drop_file(canvas.locator(".canvas-slot"), scene())
        box = ready_box(canvas)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 60, y, steps=4)
        assert painted(page) > 0
        page.keyboard.press("Escape")
        eventually(lambda: painted(page) == 0)
        page.mouse.up()
        expect(canvas.get_by_role("button", name="Undo")).to_be_disabled()

        handle = canvas.get_by_label("Extend the frame: right, pixels")
        place = handle.bounding_box()
        assert place
        page.mouse.move(place["x"] + 22, place["y"] + 22)
        page.mouse.down()
        page.mouse.move(place["x"] + 102, place["y"] + 22, steps=4)
        assert int(handle.get_attribute("aria-valuenow") or 0) > 0
        page.keyboard.press("Escape")
        expect(handle).to_have_attribute("aria-valuenow", "0")
        page.mouse.up()
        expect(handle).to_have_attribute("aria-valuenow", "0")
        expect_running(watched, server, job)
        canvas.locator("canvas").press("Escape")
        eventually(lambda: state(server, job) == "cancelled")
    finally:
        server.call("DELETE", f"/api/jobs/{job['id']}")


def test_escape_empties_a_search_first(watched: Watched) -> None:
    page, gallery = watched.page, open_screen(watched, "gallery")
    compare, search = gallery.get_by_role("button", name="Compare two"), gallery.get_by_label("Search the prompts")
    compare.click()
    search.fill("star")
    page.keyboard.press("Escape")
    expect(search).to_have_value("")
    expect(compare).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect(compare).to_have_attribute("aria-pressed", "false")
