"""Layers that encode the UNet's conditions: the image embedding and the hint."""

from __future__ import annotations

from torch import Tensor, nn

from kandinsky22.kernels.conv import Conv2d
from kandinsky22.kernels.linear import apply_linear

IMAGE_TOKENS = 32  # tokens that an image embedding becomes in the published network


class ImageProjection(nn.Module):
    """Projection of an image embedding to tokens, to which the attention layers attend."""

    def __init__(self, embed_dim: int, token_dim: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(embed_dim, IMAGE_TOKENS * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        """Return tokens (batch, 32, token_dim).

        Args:
            embeds: Image embeddings (batch, embed_dim).
        """
        return self.norm(apply_linear(self.image_embeds, embeds).view(len(embeds), IMAGE_TOKENS, -1))


class ImageTimeEmbedding(nn.Module):
    """Projection of an image embedding that is added to the time embedding; with `hint`, also the hint's convolutions.

    Args:
        embed_dim: Width of the image embedding.
        time_dim: Width of the time embedding.
        hint: Whether there are convolutions that turn a hint (batch, 3, 8 h, 8 w) into four channels at latent size.
    """

    def __init__(self, embed_dim: int, time_dim: int, *, hint: bool) -> None:
        super().__init__()
        self.image_proj = nn.Linear(embed_dim, time_dim)
        self.image_norm = nn.LayerNorm(time_dim)
        if hint:
            # (in, out, stride) of the published network: three strides of two lead to latent size
            widths = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2))
            layers: list[nn.Module] = []
            for before, after, stride in widths:
                layers += [Conv2d(before, after, 3, padding=1, stride=stride), nn.SiLU()]
            self.input_hint_block = nn.Sequential(*layers, Conv2d(256, 4, 3, padding=1))

    def forward(self, embeds: Tensor) -> Tensor:
        """Return the embedding's addition to the time embedding (batch, time_dim).

        Args:
            embeds: Image embeddings (batch, embed_dim).
        """
        return self.image_norm(apply_linear(self.image_proj, embeds))
