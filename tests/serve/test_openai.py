"""OpenAI's images API, called by OpenAI's own client."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image
from tests.serve.conftest import png
from tests.serve.server import Server

EXTRA = {"steps": 2, "seed": 5}
FAST: dict[str, Any] = {"quality": "low", "extra_body": EXTRA}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)


def opened(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded", "embedded-inpaint", "embedded-control"]
    assert client.models.retrieve("embedded").owned_by == "kandinsky22"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_generations_in_each_format(client: openai.OpenAI, output_format: Any) -> None:
    result = client.images.generate(
        prompt="a red circle",
        response_format="b64_json",
        output_format=output_format,
        size="128x64",
        n=2,
        **FAST,  # type: ignore[arg-type]
    )
    assert result.data is not None and len(result.data) == 2 and result.size == "128x64"
    for index, item in enumerate(result.data):
        image = opened(item.b64_json or "")
        assert (image.format, image.size) == (output_format.upper(), (128, 64))
        extra = item.model_extra or {}
        assert extra["seed"] == 5 + index and extra["recipe"]["prompt"] == "a red circle" and extra["sha256"]


def test_addresses_of_pictures(client: openai.OpenAI) -> None:
    result = client.images.generate(prompt="a red circle", model="dall-e-2", **FAST)
    assert result.data is not None and result.data[0].url is not None
    with Image.open(io.BytesIO(requests.get(result.data[0].url, timeout=10).content)) as image:
        assert image.info["kandinsky22"]


def test_streams_have_the_official_events(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, quality="low", extra_body={"steps": 120, "seed": 5}
    )
    events = list(stream)
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert {opened(event.b64_json).size for event in events} == {(128, 128)}
    plain = client.images.generate(
        prompt="a red circle", response_format="b64_json", quality="low", extra_body={"steps": 120, "seed": 5}
    )
    assert plain.data is not None
    np.testing.assert_array_equal(
        np.asarray(opened(events[-1].b64_json)), np.asarray(opened(plain.data[0].b64_json or ""))
    )


def test_edits_repaint_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    content = io.BytesIO()
    mask.save(content, "PNG")
    result = client.images.edit(
        image=("photo.png", png("blue", (128, 128))),
        mask=("mask.png", content.getvalue()),
        prompt="a red circle",
        response_format="b64_json",
        quality="low",
        extra_body={"steps": 4, "seed": 5},
    )
    assert result.data is not None
    recipe = (result.data[0].model_extra or {})["recipe"]
    assert recipe["command"] == "inpaint" and recipe["mask"]
    pixels = np.asarray(opened(result.data[0].b64_json or "")).astype(float)
    changes = np.abs(pixels - (0, 0, 255)).mean(axis=(0, 2))
    assert changes[:56].mean() > 2 * changes[72:].mean()  # the transparent half has changed


def test_edits_of_one_image_and_mixtures_of_several(client: openai.OpenAI) -> None:
    photos = [("one.png", png("blue")), ("two.png", png("green"))]
    for images, command in ((photos[:1], "img2img"), (photos, "mix")):
        stream = client.images.edit(image=images, prompt="a red circle", stream=True, **FAST)
        events = list(stream)
        assert [event.type for event in events] == ["image_edit.completed"]
        assert (events[0].model_extra or {})["recipe"]["command"] == command


def test_the_example_of_the_guide(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text("utf-8")
    (example,) = re.findall(r"^```python title=[^\n]*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("http://127.0.0.1:7822", server.address), {})
    with Image.open("picture.png") as image:
        assert image.size == (128, 128) and image.info["kandinsky22"]


def test_variations(client: openai.OpenAI) -> None:
    with pytest.warns(DeprecationWarning):
        result = client.images.create_variation(
            image=("photo.png", png("blue")), n=1, extra_body={"quality": "low", "steps": 2}
        )
    assert result.data is not None and result.data[0].url
    assert (result.data[0].model_extra or {})["recipe"]["command"] == "variations"


def test_a_cancelled_job_is_not_repeated_by_the_client(server: Server) -> None:
    """OpenAI's client repeats requests that failed with 409 or 503, unless the answer forbids it."""
    patient = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused")
    prompt = "a job that is cancelled"

    def jobs() -> list[Any]:
        return [job for job in server.get("/api/jobs?limit=50")["items"] if job["request"].get("prompt") == prompt]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(patient.images.generate, prompt=prompt, extra_body={"steps": 900})
        while not (found := jobs()):
            time.sleep(0.05)
        server.request("DELETE", f"/api/jobs/{found[0]['id']}", 200)
        with pytest.raises(openai.ConflictError):
            answer.result(60)
    assert len(jobs()) == 1


def test_a_stream_whose_client_leaves_is_cancelled(server: Server) -> None:
    prompt = "a stream whose client leaves"
    body = {"prompt": prompt, "stream": True, "partial_images": 1, "steps": 900}
    with requests.post(f"{server.address}/v1/images/generations", json=body, stream=True, timeout=60) as response:
        assert response.status_code == 200
        while not (found := [j for j in server.get("/api/jobs")["items"] if j["request"].get("prompt") == prompt]):
            time.sleep(0.05)
    assert server.wait(found[0]["id"], 60)["state"] == "cancelled"


def test_an_idempotency_key_queues_one_job(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": "a key of OpenAI's client"}
    images = [client.images.generate(prompt="a star", quality="low", extra_headers=headers) for _ in range(2)]
    first, second = [(image.data or [])[0].url for image in images]
    assert first == second
    with pytest.raises(openai.ConflictError):
        client.images.generate(prompt="another one", quality="low", extra_headers=headers)


def test_errors_are_those_of_the_api(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt="a", size="99999x1")  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match="magic"):
        client.images.generate(prompt="a", model="magic")
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(image=("x.png", b"<svg/>"), prompt="a")
    assert caught.value.status_code == 415
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", n=999)
    assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")


def test_refusals_before_any_route_have_the_fields_of_the_api(server: Server) -> None:
    client = openai.OpenAI(
        base_url=f"{server.address}/v1", api_key="unused", default_headers={"Origin": "https://other.example"}
    )
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.images.generate(prompt="a")
    assert (caught.value.code, caught.value.type) == ("wrong_origin", "invalid_request_error")
