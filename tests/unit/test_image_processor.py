"""The image processor agrees with the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as Oracle
from kandinsky22.image_processor import VaeImageProcessor

from kandinsky22 import InputError


def picture(width: int = 70, height: int = 50, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """Return a smooth picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC).convert(mode)


def pixels(shape: tuple[int, ...]) -> Any:
    """Return an array in [0, 1]."""
    return np.random.default_rng(1).random(shape, dtype=np.float32)


IMAGES = {
    "PIL": picture(),
    "PIL list": [picture(), picture(seed=1)],
    "array": pixels((40, 48, 3)),
    "arrays": pixels((2, 40, 48, 3)),
    "array list": [pixels((40, 48, 3)), pixels((40, 48, 3))],
    "tensor": torch.from_numpy(pixels((3, 40, 48))),
    "tensors": torch.from_numpy(pixels((2, 3, 40, 48))),
    "signed": torch.from_numpy(pixels((2, 3, 40, 48))) * 2 - 1,
    "latents": torch.from_numpy(pixels((2, 4, 5, 6))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("size", [(None, None), (64, 96), (33, 17)])
@pytest.mark.parametrize("options", [{}, {"resample": "bicubic", "reducing_gap": 1}, {"do_normalize": False}])
def test_preprocess(name: str, size: tuple[int | None, int | None], options: dict[str, Any]) -> None:
    ours, theirs = (kind(**options).preprocess(IMAGES[name], *size) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"do_convert_grayscale": True, "do_binarize": True, "do_normalize": False}])
def test_masks(options: dict[str, Any]) -> None:
    ours, theirs = (kind(**options).preprocess(picture(), 40, 40) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 40)])
def test_resize_modes(mode: str, size: tuple[int, int]) -> None:
    """At most one level of brightness apart: margins repeat the border here and are resized from it there."""
    ours, theirs = (
        np.asarray(kind().resize(picture(), *size, resize_mode=mode)).astype(int)
        for kind in (VaeImageProcessor, Oracle)
    )
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_postprocess(output_type: str) -> None:
    decoded = torch.randn(2, 3, 8, 8)
    ours, theirs = (
        kind().postprocess(decoded, output_type, [True, False] if output_type != "pil" else None)
        for kind in (VaeImageProcessor, Oracle)
    )
    assert np.array_equal(np.stack([np.asarray(image) for image in ours]), np.stack([np.asarray(x) for x in theirs]))


def test_overlay() -> None:
    mask = picture(seed=3, mode="L").point(lambda value: 255 if value > 128 else 0)
    crop = (10, 5, 42, 37)
    ours, theirs = (
        np.asarray(kind().apply_overlay(mask, picture(), picture(64, 64, seed=2), crop)).astype(int)
        for kind in (VaeImageProcessor, Oracle)
    )
    assert np.abs(ours - theirs).max() <= 1


def test_small_conversions() -> None:
    array = pixels((2, 4, 6, 3))
    for name, argument in [
        ("numpy_to_pt", array),
        ("pt_to_numpy", torch.from_numpy(array).permute(0, 3, 1, 2)),
        ("normalize", array),
        ("pil_to_numpy", [picture(), picture(seed=1)]),
    ]:
        assert np.array_equal(np.asarray(getattr(VaeImageProcessor, name)(argument)), getattr(Oracle, name)(argument))
    grey = VaeImageProcessor.numpy_to_pil(array[..., :1])
    assert [image.mode for image in grey] == ["L", "L"]
    assert VaeImageProcessor.blur(picture()).size == (70, 50)
    assert VaeImageProcessor.denormalize(np.array([-3.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]
    box = (30, 20, 40, 25)
    mask = PIL.Image.new("L", (70, 50))
    mask.paste(255, box)
    assert VaeImageProcessor.get_crop_region(mask, 64, 64, pad=2) == Oracle.get_crop_region(mask, 64, 64, pad=2)


def test_invalid_arguments() -> None:
    for call, message in [
        (lambda: VaeImageProcessor(resample="best"), "resample='best'"),
        (lambda: VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True), "do_convert_grayscale=True"),
        (lambda: VaeImageProcessor().preprocess("a.png"), "image='a.png'"),
        (lambda: VaeImageProcessor().preprocess([]), r"image=\[\]"),
        (lambda: VaeImageProcessor().preprocess([picture(), pixels((4, 4, 3))]), "image="),
        (lambda: VaeImageProcessor().resize(pixels((1, 4, 4, 3)), 8, 8, "fill"), "resize_mode='fill'"),
        (lambda: VaeImageProcessor().postprocess(pixels((1, 4, 4, 3))), "image="),
        (lambda: VaeImageProcessor().postprocess(torch.zeros(1, 3, 4, 4), "gif"), "output_type='gif'"),
    ]:
        with pytest.raises(InputError, match=f"^{message}"):
            call()  # type: ignore[no-untyped-call]
