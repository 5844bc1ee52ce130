"""The specification's own examples on the embedded model: each as it stands there, but for what comments name.

Everywhere the checkpoint's id is "embedded", sizes are the embedded model's, steps are few, pictures from the net are
drawn here, and there is no accelerator to move to.
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
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pictures that the examples download; the examples save theirs here too."""
    for name, colour, paper in (("cat.png", "red", "white"), ("starry_night.jpeg", "yellow", "navy")):
        picture = PIL.Image.new("RGB", (120, 100), paper)
        PIL.ImageDraw.Draw(picture).ellipse((30, 20, 90, 80), fill=colour)
        picture.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(image: PIL.Image.Image, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    """A picture with something on it."""
    assert image.size == size and image.mode == "RGB"
    assert np.asarray(image).std() > 1


def test_prior_then_decoder(net: Path) -> None:
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
    drawn(PIL.Image.open("cat.png"))


def test_prior_interpolate(net: Path) -> None:
    """KandinskyV22PriorPipeline.interpolate; without the import of torchvision, which it does not use."""
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
    drawn(image)


def test_decoder(net: Path) -> None:
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
    drawn(image[0])


def test_text_to_image(net: Path) -> None:
    """KandinskyV22CombinedPipeline; offloading only where there is an accelerator to bring networks to."""
    from kandinsky22 import AutoPipelineForText2Image

    pipe = quiet(AutoPipelineForText2Image)
    prompt = "A lion in galaxies, spirals, nebulae, stars, smoke, iridescent, intricate detail, octane render, 8k"
    image = pipe(prompt=prompt, num_inference_steps=STEPS).images[0]
    drawn(image)


def test_emb2emb(net: Path) -> None:
    """KandinskyV22PriorEmb2EmbPipeline; it named two classes of another model, a function that it did not import, and
    a checkpoint whose name never ended."""
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
    drawn(image[0])


def test_emb2emb_interpolate(net: Path) -> None:
    """KandinskyV22PriorEmb2EmbPipeline.interpolate; it used a class that it did not import, in whose place stands the
    one that it is about, and took the result apart without `to_tuple`, which gives names."""
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
    drawn(image)


def test_image_to_image(net: Path) -> None:
    """KandinskyV22Img2ImgCombinedPipeline; the picture had one name where it was read and another where it was used,
    and the negative prompt was not passed. A thumbnail is seldom square: it is drawn at the size asked for."""
    from kandinsky22 import AutoPipelineForImage2Image

    pipe = quiet(AutoPipelineForImage2Image)
    prompt = "A fantasy landscape, Cinematic lighting"
    negative_prompt = "low quality, bad quality"

    original_image = PIL.Image.open("cat.png").convert("RGB")
    original_image.thumbnail((SIDE, SIDE))
    image = pipe(
        prompt=prompt, negative_prompt=negative_prompt, image=original_image, num_inference_steps=STEPS * 3
    ).images[0]
    drawn(image)


def test_inpainting(net: Path) -> None:
    """KandinskyV22InpaintCombinedPipeline; the negative prompt was not passed."""
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
    drawn(image)


def test_offloading_without_an_accelerator_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three examples call enable_model_cpu_offload()."""
    pipe = kandinsky22.KandinskyV22Pipeline(unet=None, scheduler=None, movq=None)  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        pipe.enable_model_cpu_offload()
