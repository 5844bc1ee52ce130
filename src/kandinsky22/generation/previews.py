"""Previews of latents during sampling.

A tiny decoder gives the picture itself. Without one, a linear map from latents to colours is fitted to the model's own
decoder.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from kandinsky22.models import TinyDecoder

FIT_SIDE = 16  # side of the pictures that the map is fitted to, in latent pixels
FIT_PICTURES = 4
MAX_SIDE = 192  # longer side of a preview in pixels
FIT_SEED = 22


class Previews:
    """Previews of latents, at any size."""

    def image(self, latents: Tensor) -> Image:
        """Return the preview of latents.

        Args:
            latents: Latents of one image, (4, height, width).
        """
        raise NotImplementedError

    def data_url(self, latents: Tensor) -> str:
        """Return the preview of latents as a WebP file in a data URL.

        Args:
            latents: Latents of one image, (4, height, width).
        """
        from PIL.Image import Resampling

        image = self.image(latents)
        scale = min(8, max(1, MAX_SIDE // max(image.size)))
        image = image.resize((image.width * scale, image.height * scale), Resampling.BICUBIC)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=70)
        return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def new_previews(decoder: Any) -> Previews:
    """Return the best previews of a decoder: by its tiny decoder if it has one in memory, else by a linear map.

    An offloaded tiny decoder would move the UNet's weights at each step, to make room for its own.

    Args:
        decoder: Pipeline of the decoder.
    """
    from kandinsky22.runtime.device_offload import offload_of

    network = decoder.tiny_decoder
    if network is not None and offload_of(network) is None:
        return DecodedPreviews(network)
    return PreviewMap(decoder.movq, decoder.device)


class DecodedPreviews(Previews):
    """Previews by a tiny decoder, with one pixel per pixel of the image.

    Args:
        network: The tiny decoder.
    """

    def __init__(self, network: TinyDecoder) -> None:
        self._network = network

    def image(self, latents: Tensor) -> Image:
        """Return the preview of latents.

        Args:
            latents: Latents of one image, (4, height, width).
        """
        import torch

        with torch.no_grad():
            rows = latents[None].to(device=self._network.device, dtype=self._network.dtype)
            return _to_image(self._network(rows)[0].float().cpu().permute(1, 2, 0))


class PreviewMap(Previews):
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
            # MoVQ halves the size once per resolution level, except at the last one.
            side = FIT_SIDE * 2 ** (len(movq.config.block_out_channels) - 1)
            pictures = _fit_pictures(side).to(device=device, dtype=movq.dtype)
            latents = movq.encode(pictures).latents
            pixels = movq.decode(latents).sample.float().cpu()
            latents = latents.float().cpu()
            colours = torch.nn.functional.interpolate(pixels, size=latents.shape[-2:], mode="area")
            rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            targets = colours.permute(0, 2, 3, 1).reshape(-1, 3)
            ones = torch.ones(len(rows), 1)
            self._matrix = torch.linalg.lstsq(torch.cat([rows, ones], 1), targets).solution  # (channels + 1, 3)

    def image(self, latents: Tensor) -> Image:
        """Return the preview of latents, with one pixel per latent pixel.

        Args:
            latents: Latents of one image, (4, height, width).
        """
        values = latents.detach().float().cpu().permute(1, 2, 0)
        return _to_image(values @ self._matrix[:-1] + self._matrix[-1])


def _to_image(colours: Tensor) -> Image:
    """Return colours (height, width, 3), about in [-1, 1], as an image; NaN is grey."""
    import numpy as np
    import PIL.Image

    pixels = ((colours / 2 + 0.5).nan_to_num(0.5).clamp(0, 1) * 255).round().byte().numpy()
    return PIL.Image.fromarray(np.ascontiguousarray(pixels))


def _fit_pictures(side: int) -> Tensor:
    """Return pictures of smooth colours and edges in all colours, (pictures, 3, side, side) in [-1, 1]."""
    import torch

    generator = torch.Generator().manual_seed(FIT_SEED)
    coarse = torch.rand(FIT_PICTURES, 3, 8, 8, generator=generator) * 2 - 1
    size = (side, side)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    blocks = torch.nn.functional.interpolate(coarse.flip(0), size=size, mode="nearest")
    return torch.cat([smooth, blocks]).clamp(-1, 1)
