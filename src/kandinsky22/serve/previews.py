"""Previews of latents: a linear map from latents to colours, fitted to the model's own decoder."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIT_SIDE = 128  # side of the pictures that the map is fitted to, in pixels
FIT_PICTURES = 4
MAX_SIDE = 192  # longer side of a preview in pixels
FIT_SEED = 22


class PreviewMap:
    """Linear map from latents to colours.

    A latent pixel (4 channels) stands for a square of pixels. Its mean colour is close to a linear function of the
    channels, whose coefficients come from least squares over pictures that MoVQ encodes and decodes.

    Args:
        movq: The autoencoder.
        device: Device that runs it.
    """

    def __init__(self, movq: Any, device: Any) -> None:
        import torch

        with torch.inference_mode():
            pictures = _fit_pictures().to(device=device, dtype=movq.dtype)
            latents = movq.encode(pictures).latents
            pixels = movq.decode(latents).sample.float().cpu()
            latents = latents.float().cpu()
            colours = torch.nn.functional.interpolate(pixels, size=latents.shape[-2:], mode="area")
            rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            targets = colours.permute(0, 2, 3, 1).reshape(-1, 3)
            ones = torch.ones(len(rows), 1)
            self._matrix = torch.linalg.lstsq(torch.cat([rows, ones], 1), targets).solution  # (channels + 1, 3)

    def data_url(self, latents: Tensor) -> str:
        """Return the preview of latents as a WebP file in a data URL.

        Args:
            latents: Latents of one image, (4, height, width).
        """
        import numpy as np
        from PIL import Image

        values = latents.detach().float().cpu().permute(1, 2, 0)
        colours = values @ self._matrix[:-1] + self._matrix[-1]
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels))
        scale = min(8, max(1, MAX_SIDE // max(image.size)))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=70)
        return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def _fit_pictures() -> Tensor:
    """Return pictures of smooth colours and edges in all colours, (pictures, 3, side, side) in [-1, 1]."""
    import torch

    generator = torch.Generator().manual_seed(FIT_SEED)
    coarse = torch.rand(FIT_PICTURES, 3, 8, 8, generator=generator) * 2 - 1
    size = (FIT_SIDE, FIT_SIDE)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    blocks = torch.nn.functional.interpolate(coarse.flip(0), size=size, mode="nearest")
    return torch.cat([smooth, blocks]).clamp(-1, 1)
