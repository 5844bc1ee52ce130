"""Masks at latent size equal those of the reference's loops over pixels."""

from __future__ import annotations

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
