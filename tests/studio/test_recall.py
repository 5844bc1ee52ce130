"""Recalled settings: all of them come back, draw the same picture again, or are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, expect
from tests.studio.browser import StudioServer, Watched, mask_png, running_server, scene
from tests.studio.pages import (
    drop_file,
    eventually,
    newest,
    open_screen,
    painted,
    press_run,
    ready_box,
    recall,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """A server with two decoders."""
    options = ("--model", "embedded", "second=embedded")
    with running_server(tmp_path_factory.mktemp("studio") / "state", options=options) as running:
        yield running


def upload(server: StudioServer, content: bytes) -> dict[str, str]:
    return {"upload": server.call("POST", "/api/uploads", content)[1]["id"]}


def run(screen: Locator, server: StudioServer) -> Any:
    """Press the screen's button and return the request of the finished job."""
    before = newest(server)["id"]
    press_run(screen)
    eventually(lambda: newest(server)["id"] != before)
    return server.wait(newest(server)["id"])["request"]


def expect_same_picture(server: StudioServer) -> None:
    """Check that the two newest jobs had the same request, and made the same picture."""
    again, before = server.jobs()[:2]
    assert again["request"] == before["request"]
    assert again["images"][0]["sha256"] == before["images"][0]["sha256"]


def test_settings_without_a_control_are_kept_until_they_are_replaced(watched: Watched, server: StudioServer) -> None:
    hidden: dict[str, Any] = {
        "model": "second",
        "guidance_interval": [0.2, 0.8],
        "guidance_threshold": 0.9,
        "scheduler_settings": {"algorithm_type": "sde-dpmsolver++"},
        "prior_scheduler_settings": {"clip_sample": True},
    }
    server.make(prompt="hidden settings", seed=7, quality="draft", steps=6, scheduler="dpm", **hidden)
    recall(watched, "hidden settings")
    expect(watched.page.locator(".toast").last).to_contain_text("Settings recalled")
    page, draw = watched.page, watched.page.locator("k-draw")
    row = draw.locator(".recalled")
    for text in ("Model: second", "Guidance interval: 0.2 \u2013 0.8", "algorithm_type sde-dpmsolver++"):
        expect(row).to_contain_text(text)
    page.reload()
    expect(row).to_contain_text("Model: second")
    run(draw, server)
    expect_same_picture(server)

    # A sampler replaces its own settings, and a quality those of all samplers. Another seed replaces none.
    draw.get_by_role("button", name="Roll a new seed").click()
    draw.locator("summary").click()
    draw.get_by_label("Sampler", exact=True).select_option("ddim")
    expect(row).not_to_contain_text("algorithm_type")
    expect(row).to_contain_text("Guidance threshold: 0.9")
    draw.get_by_role("radio", name="Balanced").check(force=True)
    expect(row.locator(".hint")).to_have_text("Model: second")
    row.get_by_role("button", name="Remove").click()
    expect(row).to_be_hidden()
    draw.get_by_role("radio", name="Draft").check(force=True)
    request = run(draw, server)
    assert request["model"] == "embedded" and not request.keys() & (hidden.keys() - {"model"})


def test_a_request_without_a_size_leaves_the_shape_of_the_form(watched: Watched, server: StudioServer) -> None:
    draw = open_screen(watched, "draw")
    draw.get_by_role("radio", name="Wide").check(force=True)
    server.make(prompt="of the default size", seed=2)
    recall(watched, "of the default size")
    run(draw, server)
    expect_same_picture(server)


def test_image_to_image_keeps_its_size_and_the_strength_of_the_server(watched: Watched, server: StudioServer) -> None:
    picture = upload(server, scene())
    server.make(mode="img2img", prompt="over a picture", image=picture, width=96, height=64, seed=3, strength=0.33)
    recall(watched, "over a picture")
    page, draw = watched.page, watched.page.locator("k-draw")
    expect(draw.get_by_role("spinbutton", name="Strength")).to_have_value("0.33")
    run(draw, server)
    expect_same_picture(server)
    # Without a strength the server takes its own: the one of the form would draw another picture.
    before = server.make(mode="img2img", prompt="without a strength", image=picture, seed=3)
    recall(watched, "without a strength")
    run(draw, server)
    assert newest(server)["images"][0]["sha256"] == before["images"][0]["sha256"]
    expect(page.locator("dialog")).to_have_count(0)


def test_canvas_sends_the_same_mask_crop_and_margins_again(watched: Watched, server: StudioServer) -> None:
    picture, mask = upload(server, scene()), upload(server, mask_png())
    masked: dict[str, Any] = {"mode": "inpaint", "image": picture, "mask": mask, "negative_prompt": "blue"}
    server.make(prompt="a cropped star", crop=16, extend=[0, 0, 20, 0], seed=5, **masked)
    recall(watched, "a cropped star")
    page, canvas = watched.page, watched.page.locator("k-canvas")
    eventually(lambda: painted(page) == 32 * 32)
    expect(canvas.locator(".recalled")).to_contain_text("Negative prompt: blue")
    expect(canvas).to_contain_text("The model sees 16 pixels around the mask")
    expect(canvas.get_by_label("Right", exact=True)).to_have_value("20")
    page.reload()
    eventually(lambda: painted(page) == 32 * 32)
    run(canvas, server)
    expect_same_picture(server)

    # A stroke makes another mask; the crop stays.
    box = ready_box(canvas)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    eventually(lambda: painted(page) > 32 * 32)
    request = run(canvas, server)
    assert request["mask"] != mask and request["crop"] == 16
    # Pixels that were kept without a crop are kept so again.
    server.make(prompt="a kept star", keep_pixels=True, seed=5, **masked)
    recall(watched, "a kept star")
    expect(canvas.locator("textarea.prompt")).to_have_value("a kept star")
    run(canvas, server)
    expect_same_picture(server)


def test_canvas_recalls_the_feather_and_does_not_blur_again(watched: Watched, server: StudioServer) -> None:
    page, canvas = watched.page, open_screen(watched, "canvas")
    drop_file(canvas.locator(".canvas-slot"), scene())
    box = ready_box(canvas)
    page.mouse.move(box["x"] + box["width"] / 2 - 80, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 80, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    hard = painted(page)
    canvas.get_by_label("Feather").first.fill("9")
    canvas.get_by_role("textbox", name="Seed").fill("4")
    canvas.locator("textarea.prompt").fill("a soft star")
    feathered = run(canvas, server)
    assert feathered["crop"] == 32
    canvas.get_by_label("Feather").first.fill("2")
    page.mouse.click(box["x"] + 60, box["y"] + 60)

    recall(watched, "a soft star")
    expect(canvas.get_by_label("Feather").first).to_have_value("9")
    eventually(lambda: painted(page) == hard)
    assert run(canvas, server) == feathered
    expect_same_picture(server)
    # The same from what was painted, once the mask is drawn again.
    canvas.get_by_label("Feather").first.fill("8")
    canvas.get_by_label("Feather").first.fill("9")
    assert run(canvas, server) == feathered

    # Another browser has the soft mask only: it is sent as it is, and not blurred.
    page.evaluate("localStorage.removeItem('k22.canvas.feathered')")
    recall(watched, "a soft star")
    expect(canvas.get_by_label("Feather").first).to_have_value("0")
    assert run(canvas, server) == feathered


def test_guide_recalls_what_has_no_control_and_keeps_the_start_after_a_reload(
    watched: Watched, server: StudioServer
) -> None:
    pictures = upload(server, scene()), upload(server, mask_png())
    server.make(
        mode="control",
        prompt="a guided circle",
        image=pictures[0],
        hint=pictures[1],
        strength=0.65,
        seed=4,
        negative_prompt="blue",
        width=96,
        height=96,
    )
    recall(watched, "a guided circle")
    page, guide = watched.page, watched.page.locator("k-guide")
    expect(guide.locator(".recalled")).to_contain_text("Negative prompt: blue · Width: 96 · Height: 96")
    page.reload()
    expect(guide.locator(".picture-slot.filled")).to_be_visible()
    run(guide, server)
    expect_same_picture(server)


def test_the_message_names_what_is_not_recalled(watched: Watched, server: StudioServer) -> None:
    picture = upload(server, scene())
    parts: list[dict[str, Any]] = [{"weight": 0.5, "text": "a named star"}, {"weight": 0.5, **picture}]
    server.make(mode="mix", parts=parts, model="second")
    page = watched.page

    def forget_second(route: Any) -> None:
        response = route.fetch()
        info = response.json()
        info["models"] = [model for model in info["models"] if model["id"] != "second"]
        route.fulfill(response=response, json=info)

    page.route("**/api/info", forget_second)
    page.route("**/api/uploads/*", lambda route: route.fulfill(status=404, json={"error": {"message": "gone"}}))
    recall(watched, "a named star")
    message = page.locator(".toast").last
    expect(message).to_have_text(
        "Settings recalled, except: picture 2 of the mixture; the model second, which this server does not have"
    )
    expect(page.locator("k-mix [data-card]")).to_have_count(1)
    expect(page.locator("k-mix .recalled")).to_be_hidden()
    watched.messages = [message for message in watched.messages if "404" not in message]
