"""The native API: jobs of every mode, events, gallery, recipes."""

from __future__ import annotations

import io
import itertools
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.serve.conftest import png
from tests.serve.server import DRAFT, Server

from kandinsky22.cli.main import main


def test_info_says_what_the_server_offers(server: Server) -> None:
    info = server.get("/api/info")
    assert [model["kind"] for model in info["models"]] == ["decoder", "inpaint", "control"]
    assert info["models"][0]["default_width"] == 128
    assert info["models"][0]["defaults"]["prior_steps"] == 25
    assert {mode["name"] for mode in info["modes"]} == {
        "generate",
        "img2img",
        "inpaint",
        "control",
        "mix",
        "variations",
    }
    assert info["worker"]["state"] in ("ready", "busy")
    assert info["device"] == "cpu"


def test_info_names_the_kinds_of_hints(server: Server) -> None:
    assert server.get("/api/info")["hints"] == ["edges"]  # this server has no depth model


def test_a_picture_equals_that_of_the_command(server: Server, tmp_path: Any) -> None:
    job = server.draw(seed=11, count=2)
    for index, image in enumerate(job["images"]):
        assert image["seed"] == 11 + index
        content = server.request("GET", image["url"], 200).content
        arguments = ["--quality", "draft", "--steps", "2", "--prior-steps", "2", "--seed", str(11 + index)]
        path = tmp_path / f"{index}.png"
        assert main(["generate", "a red circle", *arguments, "-q", "-o", str(path)]) == 0
        with Image.open(io.BytesIO(content)) as ours, Image.open(path) as theirs:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
            assert ours.info["kandinsky22"] == theirs.info["kandinsky22"]


MODES: dict[str, dict[str, Any]] = {
    "img2img": {"image": True, "strength": 0.5},
    "inpaint": {"image": True, "mask": True, "keep_pixels": True},
    "extend": {"mode": "inpaint", "image": True, "extend": [0, 0, 32, 0]},
    "control": {"hint": True},
    "variations": {"prompt": None, "image": True, "prior_steps": None},
}


@pytest.mark.parametrize("name", MODES)
def test_each_mode_generates(server: Server, name: str) -> None:
    settings = {"mode": name, **MODES[name]}
    for field in ("image", "mask", "hint"):
        if settings.get(field):
            settings[field] = {"upload": server.upload(png("white" if field == "mask" else "blue"))["id"]}
    job = server.draw(**settings)
    details = server.get(f"/api/images/{job['images'][0]['id']}")
    assert details["recipe"]["command"] == settings["mode"]
    for field in ("image", "mask", "hint"):
        if field in settings:
            assert details["inputs"][field] == settings[field]


def test_a_mixture_of_texts_uploads_and_gallery_images(server: Server) -> None:
    first = server.draw()["images"][0]
    upload = server.upload(png("green"))["id"]
    parts = [
        {"weight": 0.5, "text": "a blue star"},
        {"weight": 0.7, "upload": upload},
        {"weight": -0.2, "image": first["id"]},
    ]
    image = server.draw(mode="mix", prompt=None, parts=parts)["images"][0]
    details = server.get(f"/api/images/{image['id']}")
    assert details["inputs"] == {"parts.1": {"upload": upload}, "parts.2": {"image": first["id"]}}
    recipe = server.post("/api/recipes", status=200, data=server.request("GET", image["url"], 200).content)
    assert recipe["missing"] == []
    assert recipe["request"]["parts"] == parts
    again = server.wait(server.post("/api/jobs", recipe["request"])["id"])
    assert again["images"][0]["sha256"] == image["sha256"]


def test_events_tell_the_whole_story_and_can_be_resumed(server: Server) -> None:
    job = server.submit(steps=12, count=2)
    events = list(server.events(f"/api/jobs/{job['id']}/events"))
    names = [name for name, _, _ in events]
    assert names[0] == "state" and names[-1] == "end"
    assert {"progress", "preview", "image"} <= set(names)
    fractions = [data["fraction"] for name, data, _ in events if name == "progress"]
    assert fractions == sorted(fractions)
    assert {"prior", "decoder", "decode"} <= {data["stage"] for name, data, _ in events if name == "progress"}
    ids = [number for _, _, number in events if number is not None]
    assert ids == sorted(set(ids))
    preview = next(data for name, data, _ in events if name == "preview")
    assert preview["url"].startswith("data:image/webp;base64,")
    assert len(preview["url"]) < 20_000
    assert events[-1][1]["state"] == "done"

    half = ids[len(ids) // 2]
    resumed = server.events("/api/events", headers={"Last-Event-ID": str(half)})
    later = [number for number in ids if number > half]
    kept = {name for name, _, number in events if number in later and name != "preview"}
    received = []
    for name, data, number in resumed:
        if data.get("job") == job["id"] and number is not None:
            received.append((name, number))
            if name == "end":
                break
    assert kept == {name for name, _ in received}
    assert all(number > half for _, number in received)


def test_the_first_progress_comes_at_once(server: Server) -> None:
    """The fastest of three jobs is free of other programs."""
    server.draw(seed=1)  # the model is in memory now
    delays = []
    for seed in range(3):
        start = time.monotonic()
        job = server.submit(seed=seed)
        for name, data, _ in server.events(f"/api/jobs/{job['id']}/events"):
            if name == "progress" and data["stage"] == "prior":
                delays.append(time.monotonic() - start)
                break
        server.wait(job["id"])
    assert min(delays) < 0.3


def test_an_idempotency_key_queues_one_job(server: Server) -> None:
    headers = {"Idempotency-Key": "the same"}
    first = server.submit(headers=headers, seed=None)
    again = server.submit(200, headers=headers, seed=None)
    assert again["id"] == first["id"] and again["request"]["seed"] == first["request"]["seed"]
    server.submit(409, headers=headers, prompt="another one")
    server.wait(first["id"])


def test_jobs_are_cancelled_and_retried(server: Server) -> None:
    running = server.submit(steps=400)
    waiting = server.submit(prompt="later")
    assert server.request("DELETE", f"/api/jobs/{waiting['id']}", 200).json()["state"] == "cancelled"
    for name, _, _ in server.events(f"/api/jobs/{running['id']}/events"):
        if name == "progress":
            server.request("DELETE", f"/api/jobs/{running['id']}", 200)
            break
    assert server.wait(running["id"])["state"] == "cancelled"
    retried = server.request("POST", f"/api/jobs/{waiting['id']}/retry", 200).json()
    assert retried["state"] in ("queued", "running")
    done = server.wait(waiting["id"])
    assert done["state"] == "done" and done["request"]["seed"] == waiting["request"]["seed"]
    assert server.request("POST", f"/api/jobs/{waiting['id']}/retry").status_code == 409


def test_priorities_come_first_and_equal_ones_in_order(server: Server) -> None:
    blocker = server.submit(steps=60)
    jobs = [server.submit(prompt=f"a star {index}", priority=index % 2)["id"] for index in range(6)]
    assert server.get(f"/api/jobs/{jobs[0]}")["position"] in (3, None)
    server.wait(blocker["id"])
    started = {job: server.wait(job)["started_at"] for job in jobs}
    order = sorted(jobs, key=lambda job: started[job])
    assert order == [jobs[1], jobs[3], jobs[5], jobs[0], jobs[2], jobs[4]]


def test_the_gallery_searches_stars_deletes_and_restores(server: Server) -> None:
    image = server.draw(prompt="a purple hexagon 100% \\ _x", negative_prompt="grey")["images"][0]
    other = server.draw(prompt="another one")["images"][0]["id"]

    def found(**query: Any) -> list[str]:
        return [item["id"] for item in server.get("/api/images", params=query)["items"]]

    assert found(search="hexagon purple") == [image["id"]]
    assert found(search="100%") == [image["id"]] and found(search="_x") == [image["id"]]
    assert found(search="10%_") == []
    assert found(mode="mix", search="hexagon") == []
    assert server.request("PATCH", f"/api/images/{image['id']}", 200, json={"starred": True}).json()["starred"]
    assert found(starred=True) == [image["id"]]
    assert other in found() and image["id"] in found()
    server.request("DELETE", f"/api/images/{image['id']}", 200)
    assert image["id"] not in found() and found(trash=True) == [image["id"]]
    server.request("POST", f"/api/images/{image['id']}/restore", 200)
    assert image["id"] in found()
    pages = server.get("/api/images", params={"limit": 1})
    following = server.get("/api/images", params={"limit": 1, "cursor": pages["next"]})
    assert pages["items"][0]["id"] == other and following["items"][0]["id"] != other
    thumbnail = server.request("GET", image["thumbnail"], 200)
    assert thumbnail.headers["content-type"] == "image/webp"


def test_edges_become_an_upload(server: Server) -> None:
    image = server.draw()["images"][0]["id"]
    hint = server.post("/api/hints", {"kind": "edges", "image": {"image": image}})
    content = server.request("GET", hint["url"], 200).content
    with Image.open(io.BytesIO(content)) as edges:
        assert set(np.unique(np.asarray(edges))) == {0, 255}
    assert server.post("/api/hints", {"kind": "depth", "image": {"image": image}}, 501)["error"]["argument"] == "kind"


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": 5000}, "steps"),
    ({"scheduler": "magic"}, "scheduler"),
    ({"quality": "magic"}, "quality"),
    ({"model": "magic"}, "model"),
    ({"mode": "inpaint", "model": "embedded"}, "model"),
    ({"mode": "img2img"}, "image"),
    ({"strength": 0.5}, "strength"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"width": 64}, "height"),
    ({"width": 4096, "height": 64}, "size"),
    ({"count": 1000}, "count"),
    ({"seed": -1}, "seed"),
    ({"image": {"upload": "0" * 64}, "mode": "img2img"}, "image"),
    ({"image": {"upload": "../../etc/passwd"}, "mode": "img2img"}, "image.upload"),
    ({"guidance_interval": [0.9, 0.1]}, "guidance_interval"),
    ({"unknown": 1}, "unknown"),
]


@pytest.mark.parametrize(("change", "argument"), INVALID, ids=[str(change)[:50] for change, _ in INVALID])
def test_invalid_jobs_name_the_argument(server: Server, change: dict[str, Any], argument: str) -> None:
    error = server.post("/api/jobs", {**DRAFT, **change}, 422)["error"]
    assert error["argument"] == argument and error["code"] == "invalid_request"


def test_what_only_the_networks_can_refuse_fails_the_job(server: Server) -> None:
    uploads = [{"upload": server.upload(png("white", size))["id"]} for size in ((96, 96), (200, 64))]
    job = server.submit(mode="inpaint", image=uploads[0], mask=uploads[1])
    failed = server.wait(job["id"])
    assert failed["state"] == "failed" and "aspect ratio" in failed["error"]["message"]
    assert failed["attempts"] == 1


def test_health_metrics_and_schema(server: Server) -> None:
    assert server.get("/healthz") == {"status": "ok"}
    text = server.request("GET", "/metrics", 200).text
    assert 'kandinsky22_jobs{state="done"}' in text and "kandinsky22_http_responses_total" in text
    schema = server.get("/openapi.json")
    names = [operation["operationId"] for path in schema["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names) and not any(name.startswith("_") for name in names)
    page = server.request("GET", "/docs", 200).text
    assert "/api/jobs" in page and not list(
        itertools.chain(*(page.split(each)[1:] for each in ('src="http', 'href="http')))
    )
