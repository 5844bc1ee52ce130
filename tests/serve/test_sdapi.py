"""The API of the Stable Diffusion web UI, called by a client that was written for it."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image
from tests.serve.conftest import png
from tests.serve.server import Server

SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "cfg_scale": 2.0}


@pytest.fixture(scope="module")
def api(server: Server) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DPM++ 2M")


def picture(color: str = "blue", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.open(io.BytesIO(png(color, size)))


def test_txt2img(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(prompt="a red circle", negative_prompt="blue", seed=7, n_iter=2, **SMALL)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [7, 8]
    assert result.info["recipes"][0]["scheduler"] == "DPMSolverMultistepScheduler"
    again = api.txt2img(prompt="a red circle", negative_prompt="blue", seed=8, **SMALL)
    np.testing.assert_array_equal(np.asarray(result.images[1]), np.asarray(again.image))
    info = api.png_info(result.image)
    assert info.info.startswith("a red circle") and info.parameters["seeds"] == [7]


def test_img2img_and_inpainting(api: webuiapi.WebUIApi) -> None:
    result = api.img2img(images=[picture()], prompt="a red star", denoising_strength=0.5, seed=7, **SMALL)
    assert result.info["recipes"][0]["command"] == "img2img" and result.info["recipes"][0]["strength"] == 0.5
    painted = api.img2img(
        images=[picture()], mask_image=picture("white"), prompt="a red star", inpaint_full_res=False, seed=7, **SMALL
    )
    assert painted.info["recipes"][0]["command"] == "inpaint"


def test_settings_without_effect_are_named(api: webuiapi.WebUIApi) -> None:
    result = api.img2img(
        images=[picture()],
        mask_image=picture("white"),
        prompt="a red star",
        sampler_name="DPM++ 2M Karras",
        mask_blur=4,
        override_settings={"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "embedded-inpaint"},
        **SMALL,
    )
    expected = {"mask_blur", "sampler_name", "denoising_strength", "override_settings.CLIP_stop_at_last_layers"}
    assert expected <= set(result.info["ignored"])
    assert "override_settings.sd_model_checkpoint" not in result.info["ignored"]
    assert result.info["recipes"][0]["scheduler"] == "DPMSolverMultistepScheduler"
    assert result.info["infotexts"] == [result.image.info["parameters"]]


def test_lists_and_options(api: webuiapi.WebUIApi) -> None:
    assert "Euler a" in api.util_get_sampler_names()
    assert api.util_get_model_names()[0] == "embedded"
    api.util_set_model("embedded")
    assert api.util_get_current_model() == "embedded"
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.get_upscalers() == api.get_hypernetworks() == api.get_prompt_styles() == api.get_loras() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    api.refresh_checkpoints()


def test_progress_and_interrupt(api: webuiapi.WebUIApi) -> None:
    results: list[Any] = []
    long = {**SMALL, "steps": 400}
    thread = threading.Thread(target=lambda: results.append(api.txt2img(prompt="a star", seed=7, **long)))
    thread.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        progress = api.get_progress()
        if progress["state"]["sampling_steps"] == 400 and progress["current_image"]:
            break
        time.sleep(0.05)
    assert progress["state"]["sampling_steps"] == 400
    api.interrupt()
    thread.join(60)
    assert results[0].info["interrupted"] is True


def test_errors(api: webuiapi.WebUIApi, server: Server) -> None:
    with pytest.raises(RuntimeError, match="404"):
        api.txt2img(prompt="a", sampler_name="Magic", **SMALL)
    error = server.post("/sdapi/v1/options", {"sd_model_checkpoint": "magic"}, 422)["error"]
    assert error["message"].startswith("sd_model_checkpoint='magic' is invalid: expected 'embedded' or")
    body = {"prompt": "a", "init_images": ["https://example.org/x.png"]}
    error = server.post("/sdapi/v1/img2img", body, 422)["error"]
    assert "downloads nothing" in error["message"]
