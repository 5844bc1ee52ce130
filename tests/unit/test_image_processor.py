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


ZEROS = np.zeros((8, 16, 3), np.float32)
UNFIT: list[tuple[Any, str]] = [
    ([torch.zeros(3, 8, 8), torch.zeros(3, 16, 16)], r"image\[1\].shape=\(3, 16, 16\)"),
    ([torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)], r"image\[1\].shape="),
    ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], r"image\[1\].shape="),
    ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, device="meta")], r"image\[1\].device="),
    ([ZEROS, ZEROS[:, :8]], r"image\[1\].shape=\(8, 8, 3\)"),
    ([ZEROS, ZEROS[..., 0]], r"image\[1\].shape="),
    ([ZEROS, torch.zeros(3, 8, 8)], "image="),
    ([picture(), ZEROS], "image="),
    ([picture(), picture(mode="L")], r"image\[1\].mode='L'"),
    (picture(4, 40), "width of image=4 is invalid: expected at least 8"),
    (picture(40, 7), "height of image=7 is invalid: expected at least 8"),
    (ZEROS[:7], "height of image=7"),
    (torch.zeros(3, 8, 5), "width of image=5"),
    (torch.zeros(1, 1, 3, 8, 8), "image="),
    (torch.zeros(8), "image="),
    (torch.zeros(0, 3, 8, 8), "image="),
    (torch.zeros(3, 8, 8, dtype=torch.int64), "image="),
    (torch.zeros(3, 8, 8, dtype=torch.complex64), "image="),
    (torch.zeros(3, 8, 8).to_sparse(), "image.layout="),
    (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), "image=.*latents"),
    (ZEROS.astype(np.int16), "image="),
    (ZEROS.astype(object), "image="),
    (np.ma.masked_array(ZEROS, mask=ZEROS == 0), "image="),
    (np.broadcast_to(np.float32(0.5), (2**16, 2**16, 3)), "image="),
    (ZEROS + 255, r"image.max\(\)=255"),
    (torch.full((3, 8, 8), -200.0), r"image.min\(\)=-200"),
    (torch.full((3, 8, 8), float("nan")), r"image.min\(\)=nan"),
]


@pytest.mark.parametrize(("image", "message"), UNFIT, ids=[str(index) for index in range(len(UNFIT))])
def test_images_that_cannot_be_preprocessed(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        VaeImageProcessor().preprocess(image)


def test_pictures_of_different_sizes_are_refused_unless_they_are_resized() -> None:
    pictures = [picture(), picture(40, 40)]
    with pytest.raises(InputError, match=r"^image\[1\].size=\(40, 40\)"):
        VaeImageProcessor(do_resize=False).preprocess(pictures)
    with pytest.raises(InputError, match=r"^images\[1\].size=\(40, 40\)"):
        VaeImageProcessor.pil_to_numpy(pictures)
    ours, theirs = (kind().preprocess(pictures) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)
    mixed = [picture(), picture(mode="L")]
    ours, theirs = (kind(do_convert_rgb=True).preprocess(mixed) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)


def test_subclasses_of_pil_images_are_one_kind(tmp_path: Any) -> None:
    picture().save(tmp_path / "picture.png")
    opened = PIL.Image.open(tmp_path / "picture.png")
    pictures = [opened, picture()]
    assert type(opened) is not type(pictures[1])
    ours, theirs = (kind().preprocess(pictures) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("normalised", [True, False])
def test_bytes_are_pixels_and_booleans_are_zeros_and_ones(normalised: bool) -> None:
    """The reference takes them for values in [0, 1], which gives up to 509."""
    processor = VaeImageProcessor(do_normalize=normalised)
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    expected = Oracle(do_normalize=normalised).preprocess([PIL.Image.fromarray(image) for image in array])
    for image in (array, list(array), torch.from_numpy(array).permute(0, 3, 1, 2)):
        torch.testing.assert_close(processor.preprocess(image), expected)
    mask = array[..., :1] > 100
    for image in (mask, torch.from_numpy(mask).permute(0, 3, 1, 2)):
        assert processor.preprocess(image).unique().tolist() == [-1 if normalised else 0, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.longdouble, ">f4"])
def test_floats_of_all_kinds(dtype: Any) -> None:
    array = pixels((16, 24, 3))
    result = VaeImageProcessor().preprocess(array.astype(dtype))
    torch.testing.assert_close(result.float(), VaeImageProcessor().preprocess(array), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height=0"),
        ({"width": 7}, "width=7 is invalid: expected at least 8"),
        ({"width": 16.5}, "width=16.5"),
        ({"resize_mode": "cover"}, "resize_mode='cover'"),
        ({"crops_coords": (5, 5, 5, 9)}, r"crops_coords=\(5, 5, 5, 9\)"),
        ({"crops_coords": (0, 0, 8)}, "crops_coords="),
        ({"crops_coords": [(0, 0, 8, 8)]}, "crops_coords="),
        ({"crops_coords": 8}, "crops_coords=8"),
    ],
)
def test_invalid_options_of_preprocess(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        VaeImageProcessor().preprocess(picture(), **options)
    box = (8, 4, 40, 36)
    ours, theirs = (kind().preprocess(picture(), crops_coords=box) for kind in (VaeImageProcessor, Oracle))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8, "8"), (2**20, 2**20)])
def test_invalid_sizes_of_resize(size: tuple[Any, Any]) -> None:
    for image in (picture(), ZEROS[None], torch.zeros(1, 3, 8, 8)):
        with pytest.raises(InputError, match=r"^(height|width|\(height, width\))="):
            VaeImageProcessor().resize(image, *size)


@pytest.mark.parametrize(
    ("image", "flags", "message"),
    [
        (torch.zeros(2, 3, 8, 8), [True], r"len\(do_denormalize\)=1 is invalid: expected 2"),
        (torch.zeros(2, 3, 8, 8), [True] * 3, r"len\(do_denormalize\)=3"),
        (torch.zeros(2, 3, 8, 8), True, "do_denormalize=True"),
        (torch.zeros(2, 3, 8, 8), [1, 0], r"do_denormalize=\[1, 0\]"),
        (torch.zeros(3, 8, 8), None, "image="),
        (torch.zeros(0, 3, 8, 8), None, "image="),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, "image="),
    ],
)
def test_invalid_arguments_of_postprocess(image: Any, flags: Any, message: str) -> None:
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(InputError, match=f"^{message}"):
            VaeImageProcessor().postprocess(image, output_type, flags)
