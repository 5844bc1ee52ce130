"""MoVQ, the autoencoder between pixels and latents (https://arxiv.org/abs/2209.09002)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.config import Config
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.models import movq_tiling
from kandinsky22.models.attention import ImageAttention
from kandinsky22.models.base import Model
from kandinsky22.models.config_rules import MAX_CODES, MAX_LAYERS_PER_BLOCK, MAX_SIDE, Settings
from kandinsky22.models.layers import ResidualBlock
from kandinsky22.models.modifications import modified_part
from kandinsky22.models.movq_stages import Decoder, Encoder
from kandinsky22.outputs import Output
from kandinsky22.verbosity import warn_once

logger = logging.getLogger(__name__)


@dataclass
class VQEncoderOutput(Output):
    """Result of `VQModel.encode`.

    Attributes:
        latents: Tensor (batch, vq_embed_dim, H / f, W / f), not quantized.
    """

    latents: Tensor


@dataclass
class DecoderOutput(Output):
    """Result of `VQModel.decode`.

    Attributes:
        sample: Images (batch, out_channels, H, W), about in [-1, 1].
        commit_loss: Loss of the quantizer; zeros (batch,) if the latents were not quantized.
    """

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass(frozen=True)
class VQModelConfig(Config):
    """Constructor arguments of `VQModel`; the defaults are those of the published Kandinsky 2.2 autoencoder.

    Attributes:
        in_channels: Channels of the images to encode.
        out_channels: Channels of the decoded images.
        down_block_types: Type of each stage of the encoder, with ("AttnDownEncoderBlock2D") or without attention.
        up_block_types: Type of each stage of the decoder, with ("AttnUpDecoderBlock2D") or without attention.
        block_out_channels: Channels per resolution level, from full size to latent size.
        layers_per_block: Residual blocks per stage of the encoder; the decoder has one more.
        latent_channels: Channels of the latents before quantization.
        sample_size: Side of the images that the network was trained on.
        num_vq_embeddings: Number of codes in the codebook.
        norm_num_groups: Groups of channels in the encoder's norms.
        vq_embed_dim: Width of a code; None for `latent_channels`.
        scaling_factor: Stored for compatibility; Kandinsky 2.2 does not scale its latents.
        norm_type: "spatial": the decoder's norms are modulated by the latents.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    sample_size: int = 32
    num_vq_embeddings: int = 16384
    norm_num_groups: int = 32
    vq_embed_dim: int | None = 4
    scaling_factor: float = 0.18215
    norm_type: str = "spatial"

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "lookup_from_codebook": (False,),
        "force_upcast": (False,),
    }

    def __post_init__(self) -> None:
        settings = Settings("VQModel", self)
        settings.check("norm_type", self.norm_type == "spatial", "'spatial'")
        settings.integers(("sample_size",), MAX_SIDE)
        settings.integers(("layers_per_block",), MAX_LAYERS_PER_BLOCK)
        settings.integers(("in_channels", "out_channels", "latent_channels", "norm_num_groups"))
        # the reference takes the channels of its norms' input from latent_channels, so the two must agree
        code_dim = self.vq_embed_dim
        is_equal = code_dim is None or (type(code_dim) is int and code_dim == self.latent_channels)
        expected = f"latent_channels={self.latent_channels}, for which the decoder's norms are built, or None"
        settings.check("vq_embed_dim", is_equal, expected)
        settings.integers(("num_vq_embeddings",), MAX_CODES)
        settings.number("scaling_factor", highest=1e6)
        groups = self.norm_num_groups
        divisors = {"32 (the groups of the spatial norm)": 32, f"norm_num_groups={groups}": groups}
        settings.widths("block_out_channels", multiple_of=divisors)
        for name, kinds in (
            ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
            ("up_block_types", ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
        ):
            settings.stages(name, kinds, len(self.block_out_channels))
        channels, blocks = sum(width * width for width in self.block_out_channels), self.layers_per_block + 2
        settings.parameters(40 * blocks * channels + self.num_vq_embeddings * (self.vq_embed_dim or 1))


class VQModel(Model):
    """Images (batch, 3, H, W) in [-1, 1] to latents (batch, 4, H / f, W / f) and back; f is `downscale_factor`.

    Attributes:
        use_tiling: Whether images are encoded and decoded one band of rows at a time (`enable_tiling`).
        use_slicing: Whether the items of a batch are encoded and decoded one at a time (`enable_slicing`).
    """

    config_class = VQModelConfig
    compiled_blocks = (ResidualBlock, ImageAttention)
    positional = (
        "in_channels",
        "out_channels",
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "act_fn",
        "latent_channels",
        "sample_size",
        "num_vq_embeddings",
        "norm_num_groups",
        "vq_embed_dim",
        "scaling_factor",
        "norm_type",
        "mid_block_add_attention",
        "lookup_from_codebook",
        "force_upcast",
    )
    supports_gradient_checkpointing = True
    config: VQModelConfig
    use_tiling: bool = False
    use_slicing: bool = False

    def __init__(self, /, *arguments: Any, **config: Any) -> None:
        super().__init__(*arguments, **config)
        cfg = self.config
        code_dim = cfg.latent_channels if cfg.vq_embed_dim is None else cfg.vq_embed_dim
        self.encoder = Encoder(cfg)
        self.quant_conv = Conv2d(cfg.latent_channels, code_dim, 1)
        self.quantize = VectorQuantizer(cfg.num_vq_embeddings, code_dim)
        self.post_quant_conv = Conv2d(code_dim, cfg.latent_channels, 1)
        self.decoder = Decoder(cfg, code_dim)

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent along one side: 8 for the published network."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Return the latents of images, before quantization.

        Args:
            x: Images (batch, in_channels, H, W) in [-1, 1]; both sides are multiples of `downscale_factor`.
            return_dict: Whether to return a `VQEncoderOutput` instead of a tuple.

        Returns:
            Latents (batch, vq_embed_dim, H / f, W / f).
        """
        x = x.contiguous()  # rounding must not depend on the memory layout of the images
        with host_memory.reuse_buffers():
            latents = torch.cat([self.quant_conv(self._encode(part)) for part in self._slices(x)]).contiguous()
        return VQEncoderOutput(latents) if return_dict else (latents,)

    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Return the images of latents.

        Args:
            h: Latents (batch, vq_embed_dim, h, w).
            force_not_quantize: Whether to decode the latents as they are. False snaps them to the codebook first.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.

        Returns:
            Images (batch, out_channels, f h, f w), about in [-1, 1], and the quantizer's loss.
        """
        if force_not_quantize:
            codes, loss = h, h.new_zeros(h.shape[0])
        else:
            codes, loss = self.quantize(h)
        with host_memory.reuse_buffers():
            sample = torch.cat([self._decode(self.post_quant_conv(part), part) for part in self._slices(codes)])
            sample = sample.contiguous()
        return DecoderOutput(sample, loss) if return_dict else (sample, loss)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode one band of rows at a time: large images take a fraction of the memory.

        Norms still use the entire image, therefore the result is the same up to rounding (`movq_tiling.py`). Decoding
        takes about a quarter longer, because some features are computed twice. Without effect where gradients are
        needed.

        Args:
            use_tiling: False disables tiling.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode all rows at once again."""
        self.use_tiling = False

    def enable_slicing(self, use_slicing: bool = True) -> None:
        """Encode and decode the items of a batch one at a time, in the memory that one takes.

        Args:
            use_slicing: False disables slicing.
        """
        self.use_slicing = use_slicing

    def disable_slicing(self) -> None:
        """Encode and decode batches at once again."""
        self.use_slicing = False

    def _slices(self, batch: Tensor) -> Sequence[Tensor]:
        return batch.split(1) if self.use_slicing else [batch]

    def _encode(self, sample: Tensor) -> Tensor:
        return movq_tiling.encode(self.encoder, sample) if self._is_tiled(self.encoder) else self.encoder(sample)

    def _decode(self, features: Tensor, latents: Tensor) -> Tensor:
        if self._is_tiled(self.decoder):
            return movq_tiling.decode(self.decoder, features, latents)
        return self.decoder(features, latents)

    def _is_tiled(self, part: nn.Module) -> bool:
        """Return whether the encoder or decoder runs by bands of rows, which only modules as they were built can."""
        if not self.use_tiling or torch.is_grad_enabled():
            return False
        modification = modified_part(self, part)
        if modification is not None:
            warn_once(logger, f"tiling has no effect, because {modification}: images run as a whole")
        return modification is None

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Encode, quantize and decode images.

        Args:
            sample: Images (batch, in_channels, H, W) in [-1, 1].
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.

        Returns:
            Images (batch, out_channels, H, W), about in [-1, 1], and the quantizer's loss.
        """
        return self.decode(cast(VQEncoderOutput, self.encode(sample)).latents, return_dict=return_dict)


class VectorQuantizer(nn.Module):
    """The nearest entry of a codebook, with a straight-through gradient (https://arxiv.org/abs/1711.00937)."""

    commitment = 0.25
    reads_child_weights = True  # offloading moves them together, quantization leaves them alone

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        weight = torch.empty(entries, dim)
        # initialising on the meta device would import torch's compiler, which takes seconds
        self.embedding = nn.Embedding(entries, dim, _weight=weight if weight.is_meta else None)
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / entries, 1 / entries)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized latents (batch, dim, h, w) and the scalar loss that draws codes and latents together.

        The loss is the last two terms of equation 3, except that the commitment factor is at the codebook's term, as in
        the published training.

        Args:
            latents: Tensor (batch, dim, h, w).
        """
        vectors = latents.movedim(1, -1)
        nearest = torch.cdist(vectors.flatten(0, -2), self.embedding.weight).argmin(dim=1)
        codes = self.embedding(nearest).view(vectors.shape).movedim(-1, 1)
        loss = F.mse_loss(latents, codes.detach()) + self.commitment * F.mse_loss(codes, latents.detach())
        return latents + (codes - latents).detach(), loss
