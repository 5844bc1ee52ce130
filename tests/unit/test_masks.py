"""Masks at latent size equal those of the reference's loops over pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import prepare_mask

from kandinsky22.inputs.masks import masks_to_tensor, unmasked_latents


@pytest.mark.parametrize("share", [0.02, 0.3, 0.98])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 4), (16, 16)])
def test_kept_latents(size: tuple[int, int], share: float) -> None:
    repainted = (torch.rand(3, 1, 8 * size[0], 8 * size[1]) < share).float()
    expected = prepare_mask(F.interpolate(1 - repainted, size))  # in place, on the result of interpolate
    before = repainted.clone()
    assert torch.equal(unmasked_latents(repainted, size), expected)
    assert torch.equal(repainted, before)


def test_one_pixel_takes_six_neighbours() -> None:
    repainted = torch.zeros(1, 1, 5, 5)
    repainted[..., 2, 2] = 1
    assert unmasked_latents(repainted, (5, 5))[0, 0].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ]


def test_masks_of_a_list_are_stacked() -> None:
    masks = masks_to_tensor("mask_image", [torch.ones(2, 4, 4), torch.zeros(4, 4), torch.eye(4)[None, None]], (4, 4))
    assert masks.shape == (4, 1, 4, 4)
    assert masks.sum(dim=(1, 2, 3)).tolist() == [16, 16, 0, 4]


def rgba(red: int, alpha: int) -> tuple[int, int, int, int]:
    return red, red, red, alpha


@pytest.mark.parametrize(
    ("red", "alpha", "expected"), [(255, 255, 1), (255, 0, 0), (0, 255, 0), (255, 120, 0), (255, 140, 1)]
)
def test_transparent_parts_are_preserved(red: int, alpha: int, expected: int) -> None:
    image = PIL.Image.new("RGBA", (4, 4), rgba(red, alpha))
    palette = PIL.Image.new("P", (4, 4))
    palette.putpalette([red] * 3)
    palette.info["transparency"] = bytes([alpha])
    kinds = [image, image.convert("LA"), palette, np.asarray(image), np.asarray(image) / 255]
    for kind in kinds:
        assert masks_to_tensor("mask", kind, (4, 4)).unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (PIL.Image.new("L", (4, 4)), "nothing is repainted"),
        (PIL.Image.new("L", (4, 4), 1), "multiply them by 255"),
        (PIL.Image.new("RGB", (4, 4), (1, 1, 1)), "multiply them by 255"),
        (PIL.Image.new("L", (4, 4), 100), "39% of white"),
        (np.zeros((4, 4)), "nothing is repainted"),
        (torch.full((4, 4), 0.3), "30% of white"),
    ],
)
def test_black_masks_are_warned_about(mask: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    masks_to_tensor("mask_image", mask, (4, 4))
    (message,) = caplog.messages
    assert message.startswith("mask_image is black everywhere")
    assert words in message


@pytest.mark.parametrize(
    "mask", [np.eye(4, dtype=np.uint8), PIL.Image.new("1", (4, 4), 1), torch.eye(4, dtype=torch.bool)]
)
def test_other_masks_are_not_warned_about(mask: Any, caplog: pytest.LogCaptureFixture) -> None:
    masks_to_tensor("mask_image", mask, (4, 4))
    assert caplog.messages == []
