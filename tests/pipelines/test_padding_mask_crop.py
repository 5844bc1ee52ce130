"""Inpainting at the photograph's own size: the part around the mask is repainted and pasted back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from tests.pipelines.calls import small_call
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import embeds, seeded

from kandinsky22 import InputError
from kandinsky22.inputs.masks import CropRegion, MaskCrop, crop_region, mask_crops

Pipelines = Callable[..., Any]


def mask_with_box(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> PIL.Image.Image:
    """Return a black mask with a rectangle whose last column and row belong to it."""
    mask = PIL.Image.new("L", (width, height))
    PIL.ImageDraw.Draw(mask).rectangle(box, fill=value)
    return mask


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (192, 64)])
def test_regions_are_the_references(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        width, height = random.integers(20, 300, 2)
        left, top = random.integers(0, width), random.integers(0, height)
        box = (left, top, random.integers(left, width), random.integers(top, height))
        mask, padding = mask_with_box(int(width), int(height), tuple(map(int, box))), int(random.integers(0, 40))
        expected = VaeImageProcessor.get_crop_region(mask, width=size[1], height=size[0], pad=padding)
        assert np.abs(np.subtract(crop_region(mask, size, padding), expected)).max() <= 1, (mask.size, box, padding)


def test_a_region_has_the_requested_proportions_and_lies_in_the_image() -> None:
    assert crop_region(mask_with_box(100, 80, (40, 30, 49, 34)), (64, 64), 5) == CropRegion(35, 23, 55, 43)
    assert crop_region(mask_with_box(100, 80, (0, 0, 9, 4)), (64, 64)) == CropRegion(0, 0, 10, 10)
    assert crop_region(mask_with_box(100, 80, (90, 70, 99, 79)), (64, 128)) == CropRegion(80, 70, 100, 80)
    assert crop_region(mask_with_box(100, 80, (40, 0, 49, 79)), (64, 256)) == CropRegion(0, 0, 100, 80)
    assert crop_region(mask_with_box(100, 80, (40, 30, 49, 34)), (64, 64), 10**30) == CropRegion(0, 0, 100, 80)


def test_a_crop_keeps_proportions_with_a_margin() -> None:
    """A region that the image's border cuts off is centred; its border pixels fill the rest."""
    picture = PIL.Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8), 3).reshape(1, 40, 3).repeat(10, axis=0))
    crop = MaskCrop(picture, PIL.Image.new("L", (40, 10), 255), CropRegion(0, 0, 40, 10), (80, 80))
    cropped = np.asarray(crop.cropped_picture())
    assert cropped.shape == (80, 80, 3)
    assert np.array_equal(cropped[0], cropped[79])
    assert np.abs(np.asarray(crop.paste(crop.cropped_picture())).astype(int) - np.asarray(picture)).max() <= 1


@pytest.mark.parametrize("name", ["Inpaint", "InpaintCombined"])
def test_other_pixels_are_those_of_the_photograph(name: str, make_pipeline: Pipelines) -> None:
    picture, mask = photo(7, 150, 110), mask_with_box(150, 110, (60, 50, 80, 65))
    call = {**small_call(name), "image": picture, "mask_image": mask, "output_type": "pil", "padding_mask_crop": 4}
    pipe = make_pipeline(name)
    (result,) = pipe(**call, generator=seeded(1)).images
    assert result.size == picture.size
    repainted = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(result)[~repainted], np.asarray(picture)[~repainted])
    assert not np.array_equal(np.asarray(result)[repainted], np.asarray(picture)[repainted])

    # The repainted pixels are those of a call for the crop alone.
    crop = mask_crops(picture, mask, (32, 32), 4)[0]
    alone = {**call, "image": crop.cropped_picture(), "mask_image": crop.cropped_mask(), "padding_mask_crop": None}
    assert crop.paste(pipe(**alone, generator=seeded(1)).images[0]).tobytes() == result.tobytes()


def test_each_image_of_a_batch_has_its_own_crop(make_pipeline: Pipelines) -> None:
    pictures = [photo(1, 60, 44), photo(2, 50, 90)]
    masks = [mask_with_box(60, 44, (10, 10, 20, 20)), mask_with_box(50, 90, (30, 60, 45, 85))]
    call = {**small_call("Inpaint"), "output_type": "pil", "padding_mask_crop": 3, "num_images_per_prompt": 2}
    call |= {"image_embeds": embeds(2, 1), "negative_image_embeds": embeds(2, 2)}
    results = make_pipeline("Inpaint")(**{**call, "image": pictures, "mask_image": masks}).images
    assert [result.size for result in results] == [(60, 44)] * 2 + [(50, 90)] * 2
    for index, result in enumerate(results):
        kept = np.asarray(masks[index // 2]) == 0
        assert np.array_equal(np.asarray(result)[kept], np.asarray(pictures[index // 2])[kept])


def test_one_image_serves_several_embeddings(make_pipeline: Pipelines) -> None:
    call = {**small_call("Inpaint"), "output_type": "pil", "padding_mask_crop": 3, "image_embeds": embeds(2, 1)}
    call |= {"negative_image_embeds": embeds(1, 2), "image": photo(1, 60, 44)}
    masks = mask_with_box(60, 44, (10, 10, 20, 20))
    results = make_pipeline("Inpaint")(**{**call, "mask_image": masks}).images
    assert [result.size for result in results] == [(60, 44)] * 2
    assert results[0].tobytes() != results[1].tobytes()


def test_a_grey_mask_blends() -> None:
    picture, mask = PIL.Image.new("RGB", (20, 20)), mask_with_box(20, 20, (5, 5, 14, 14), value=128)
    crop = MaskCrop(picture, mask, crop_region(mask, (64, 64)), (64, 64))
    assert crop.paste(PIL.Image.new("RGB", (64, 64), (200, 200, 200))).getpixel((10, 10)) == (100, 100, 100)


def test_arrays_tensors_paths_and_masks_of_another_size(tmp_path: Path) -> None:
    picture, mask = photo(3, 40, 30), mask_with_box(40, 30, (10, 10, 19, 19))
    picture.save(tmp_path / "picture.png")
    array, grey = np.asarray(picture), np.asarray(mask)
    expected = mask_crops(picture, mask, (32, 32), 2)[0]
    signed = torch.from_numpy(array.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    for image, mask_image in [
        (array, grey),
        (array.astype(np.float32) / 255, torch.from_numpy(grey.copy())),
        (signed, grey / np.float32(255)),
        (tmp_path / "picture.png", mask.convert("RGB")),
        (picture, mask.resize((80, 60), PIL.Image.Resampling.NEAREST).resize((40, 30), PIL.Image.Resampling.NEAREST)),
    ]:
        crop = mask_crops(image, mask_image, (32, 32), 2)[0]
        assert crop.region == expected.region
        assert crop.picture.tobytes() == picture.tobytes()
        assert crop.mask.tobytes() == mask.tobytes()
    assert mask_crops(picture, np.ones((3, 4)), (32, 32), 2)[0].region == (0, 0, 40, 30)


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mask_crop": -1}, "padding_mask_crop=-1"),
        ({"padding_mask_crop": True}, "padding_mask_crop=True"),
        ({"padding_mask_crop": 1.5}, "padding_mask_crop=1.5"),
        ({"padding_mask_crop": 4, "output_type": "np"}, "output_type='np'"),
        ({"padding_mask_crop": 4, "mask_image": PIL.Image.new("L", (32, 32))}, "mask_image"),
        ({"padding_mask_crop": 4, "image": torch.zeros(1, 4, 16, 16)}, "image"),
        ({"padding_mask_crop": 4, "mask_image": [np.ones((8, 8))] * 3, "image": [photo(1)] * 2}, "mask_image"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str, make_pipeline: Pipelines) -> None:
    call = {**small_call("Inpaint"), "output_type": "pil"}
    with pytest.raises(InputError, match=f"^(len\\()?{message}"):
        make_pipeline("Inpaint")(**{**call, **arguments})
