"""The specification's examples on the embedded model; each docstring names the class and what was corrected.

In all of them the checkpoint is "embedded", sizes are the embedded model's, there are few steps, downloaded pictures
are replaced by drawn ones, and nothing is moved to an accelerator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from tests.pipelines.tiny import load_quietly

import kandinsky22
from kandinsky22 import InputError

EMBEDDED: Any = "embedded"
SIDE = 128
STEPS = 4


def quiet(kind: Any) -> Any:
    return load_quietly(kind, EMBEDDED)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the pictures that the examples download."""
    for name, colour, paper in (("cat.png", "red", "white"), ("starry_night.jpeg", "yellow", "navy")):
        picture = PIL.Image.new("RGB", (120, 100), paper)
        PIL.ImageDraw.Draw(picture).ellipse((30, 20, 90, 80), fill=colour)
        picture.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_not_blank(image: PIL.Image.Image, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    """Assert that a picture has this size and is not blank."""
    assert image.size == size and image.mode == "RGB"
    assert np.asarray(image).std() > 1


def test_prior_then_decoder(downloads: Path) -> None:
    """KandinskyV22PriorPipeline."""
    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    pipe_prior = quiet(KandinskyV22PriorPipeline)
    prompt = "red cat, 4k photo"
    image_emb, negative_image_emb = pipe_prior(prompt).to_tuple()

    pipe = quiet(KandinskyV22Pipeline)
    image = pipe(
        image_embeds=image_emb,
        negative_image_embeds=negative_image_emb,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
    ).images
    image[0].save("cat.png")
    assert_not_blank(PIL.Image.open("cat.png"))


def test_prior_interpolate(downloads: Path) -> None:
    """KandinskyV22PriorPipeline.interpolate; the unused import of torchvision is removed."""
    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline, load_image

    pipe_prior = quiet(KandinskyV22PriorPipeline)
    img1 = load_image("cat.png")
    img2 = load_image("starry_night.jpeg")
    images_texts = ["a cat", img1, img2]
    weights = [0.3, 0.3, 0.4]
    out = pipe_prior.interpolate(images_texts, weights)
    pipe = quiet(KandinskyV22Pipeline)
    image = pipe(
        image_embeds=out.image_embeds,
        negative_image_embeds=out.negative_image_embeds,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
    ).images[0]
    image.save("starry_cat.png")
    assert_not_blank(image)


def test_decoder(downloads: Path) -> None:
    """KandinskyV22Pipeline."""
    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    pipe_prior = quiet(KandinskyV22PriorPipeline)
    prompt = "red cat, 4k photo"
    out = pipe_prior(prompt)
    image_emb = out.image_embeds
    zero_image_emb = out.negative_image_embeds
    pipe = quiet(KandinskyV22Pipeline)
    image = pipe(
        image_embeds=image_emb,
        negative_image_embeds=zero_image_emb,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
    ).images
    image[0].save("cat.png")
    assert_not_blank(image[0])


def test_text_to_image(downloads: Path) -> None:
    """KandinskyV22CombinedPipeline; offloading is removed, because it needs an accelerator."""
    from kandinsky22 import AutoPipelineForText2Image

    pipe = quiet(AutoPipelineForText2Image)
    prompt = "A lion in galaxies, spirals, nebulae, stars, smoke, iridescent, intricate detail, octane render, 8k"
    image = pipe(prompt=prompt, num_inference_steps=STEPS).images[0]
    assert_not_blank(image)


def test_emb2emb(downloads: Path) -> None:
    """KandinskyV22PriorEmb2EmbPipeline; two classes of another model, a missing import and an unclosed string are
    corrected."""
    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorEmb2EmbPipeline, load_image

    pipe_prior = quiet(KandinskyV22PriorEmb2EmbPipeline)
    prompt = "red cat, 4k photo"
    img = load_image("cat.png")
    image_emb, negative_image_emb = pipe_prior(prompt, image=img, strength=0.2).to_tuple()

    pipe = quiet(KandinskyV22Pipeline)
    image = pipe(
        image_embeds=image_emb,
        negative_image_embeds=negative_image_emb,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
    ).images
    image[0].save("cat.png")
    assert_not_blank(image[0])


def test_emb2emb_interpolate(downloads: Path) -> None:
    """KandinskyV22PriorEmb2EmbPipeline.interpolate; a class that was not imported is replaced by the documented
    one. The result is unpacked with `to_tuple`, because unpacking it directly gives field names."""
    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorEmb2EmbPipeline, load_image

    pipe_prior = quiet(KandinskyV22PriorEmb2EmbPipeline)
    img1 = load_image("cat.png")
    img2 = load_image("starry_night.jpeg")
    images_texts = ["a cat", img1, img2]
    weights = [0.3, 0.3, 0.4]
    image_emb, zero_image_emb = pipe_prior.interpolate(images_texts, weights).to_tuple()

    pipe = quiet(KandinskyV22Pipeline)
    image = pipe(
        image_embeds=image_emb,
        negative_image_embeds=zero_image_emb,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
    ).images[0]
    image.save("starry_cat.png")
    assert_not_blank(image)


def test_image_to_image(downloads: Path) -> None:
    """KandinskyV22Img2ImgCombinedPipeline; two names of one picture are unified, and the negative prompt is passed. The
    thumbnail is not square: it is resized to the requested size."""
    from kandinsky22 import AutoPipelineForImage2Image

    pipe = quiet(AutoPipelineForImage2Image)
    prompt = "A fantasy landscape, Cinematic lighting"
    negative_prompt = "low quality, bad quality"

    original_image = PIL.Image.open("cat.png").convert("RGB")
    original_image.thumbnail((SIDE, SIDE))
    image = pipe(
        prompt=prompt, negative_prompt=negative_prompt, image=original_image, num_inference_steps=STEPS * 3
    ).images[0]
    assert_not_blank(image)


def test_inpainting(downloads: Path) -> None:
    """KandinskyV22InpaintCombinedPipeline; the negative prompt is passed."""
    from kandinsky22 import AutoPipelineForInpainting, load_image

    pipe = quiet(AutoPipelineForInpainting)
    prompt = "A fantasy landscape, Cinematic lighting"
    negative_prompt = "low quality, bad quality"

    original_image = load_image("cat.png")
    mask = np.zeros((SIDE, SIDE), dtype=np.float32)
    # Let's mask out an area above the cat's head
    mask[: SIDE // 3, SIDE // 3 : -SIDE // 3] = 1
    image = pipe(
        prompt=prompt,
        negative_prompt=negative_prompt,
        image=original_image,
        mask_image=mask,
        num_inference_steps=STEPS,
    ).images[0]
    assert_not_blank(image)


def test_offloading_without_an_accelerator_names_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three examples call `enable_model_cpu_offload()`, which fails without an accelerator."""
    pipe = kandinsky22.KandinskyV22Pipeline(unet=None, scheduler=None, movq=None)  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        pipe.enable_model_cpu_offload()
