"""MoVQ, the autoencoder between pixels and latents (https://arxiv.org/abs/2209.09002)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.models import movq_tiling
from kandinsky22.models.attention import ImageAttention
from kandinsky22.models.base import Model
from kandinsky22.models.layers import GroupNorm, ResidualBlock, SpatialNorm
from kandinsky22.outputs import Output

Layer = Callable[..., Tensor]  # takes features and, by name, latents
EPS = 1e-6  # of every norm of the published network


@dataclass
class VQEncoderOutput(Output):
    """What `encode` returns: latents (batch, vq_embed_dim, H / f, W / f), not quantized."""

    latents: Tensor


@dataclass
class DecoderOutput(Output):
    """What `decode` returns: pictures (batch, out_channels, H, W), about [-1, 1], and the quantizer's loss."""

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass(frozen=True)
class VQModelConfig(Config):
    """Constructor arguments of VQModel; the defaults are those of the published Kandinsky 2.2 autoencoder."""

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

    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "lookup_from_codebook": (False,),
        "force_upcast": (False,),
    }

    def __post_init__(self) -> None:
        if self.norm_type != "spatial":
            raise ConfigError(
                f"VQModel: norm_type={self.norm_type!r} is not part of Kandinsky 2.2; accepted: 'spatial'"
            )
        for name, kinds in (
            ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
            ("up_block_types", ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
        ):
            types = getattr(self, name)
            if unknown := [kind for kind in types if kind not in kinds]:
                raise ConfigError(f"VQModel: {name} has {unknown[0]!r}; accepted: {' or '.join(kinds)}")
            if len(types) != len(self.block_out_channels):
                raise ConfigError(
                    f"VQModel: {name} has {len(types)} entries, block_out_channels has {len(self.block_out_channels)}; "
                    "give one of each per level"
                )
        if bad := [width for width in self.block_out_channels if width % 32 or width % self.norm_num_groups]:
            raise ConfigError(
                f"VQModel: block_out_channels has {bad[0]}, which must be a multiple of 32 (the groups of the spatial "
                f"norm) and of norm_num_groups={self.norm_num_groups}"
            )


class VQModel(Model):
    """Pictures (batch, 3, H, W) in [-1, 1] to latents (batch, 4, H / f, W / f) and back; f is `downscale_factor`."""

    config_class = VQModelConfig
    compiled_blocks = (ResidualBlock, ImageAttention)
    config: VQModelConfig
    use_tiling: bool = False
    use_slicing: bool = False

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
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
        """Latents, before quantization, of pictures (batch, in_channels, H, W) in [-1, 1]."""
        x = x.contiguous()  # rounding is not to depend on how pictures lie in memory
        with host_memory.kept():
            latents = torch.cat([self.quant_conv(self._encoded(part)) for part in self._parts(x)]).contiguous()
        return VQEncoderOutput(latents) if return_dict else (latents,)

    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Pictures from latents (batch, vq_embed_dim, h, w), snapped to the codebook unless `force_not_quantize`."""
        if force_not_quantize:
            codes, loss = h, h.new_zeros(h.shape[0])
        else:
            codes, loss = self.quantize(h)
        with host_memory.kept():
            sample = torch.cat([self._decoded(self.post_quant_conv(part), part) for part in self._parts(codes)])
            sample = sample.contiguous()
        return DecoderOutput(sample, loss) if return_dict else (sample, loss)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode a band of rows at a time, for large pictures: in a fraction of the memory.

        Norms still see the whole picture, so the result is the same up to rounding (`movq_tiling.py`). Decoding takes about
        a quarter longer, the price of what is computed again. Without effect where gradients are wanted.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole pictures again."""
        self.use_tiling = False

    def enable_slicing(self, use_slicing: bool = True) -> None:
        """Encode and decode the pictures of a batch one after the other: in the memory of one."""
        self.use_slicing = use_slicing

    def disable_slicing(self) -> None:
        """Encode and decode batches as one again."""
        self.use_slicing = False

    def _parts(self, batch: Tensor) -> Sequence[Tensor]:
        return batch.split(1) if self.use_slicing else [batch]

    def _encoded(self, sample: Tensor) -> Tensor:
        tiled = self.use_tiling and not torch.is_grad_enabled()
        return movq_tiling.encode(self.encoder, sample) if tiled else self.encoder(sample)

    def _decoded(self, features: Tensor, latents: Tensor) -> Tensor:
        tiled = self.use_tiling and not torch.is_grad_enabled()
        return movq_tiling.decode(self.decoder, features, latents) if tiled else self.decoder(features, latents)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Encode, quantize and decode pictures (batch, in_channels, H, W) in [-1, 1]."""
        return self.decode(cast(VQEncoderOutput, self.encode(sample)).latents, return_dict=return_dict)


class VectorQuantizer(nn.Module):
    """The nearest entry of a codebook, with a straight-through gradient (https://arxiv.org/abs/1711.00937)."""

    commitment = 0.25

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        weight = torch.empty(entries, dim)
        # drawing start values on the meta device would import torch's compiler: seconds, for nothing
        self.embedding = nn.Embedding(entries, dim, _weight=weight if weight.is_meta else None)
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / entries, 1 / entries)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized latents (batch, dim, h, w) and the scalar loss that draws codes and latents together.

        The commitment factor stands at the codebook's term, as in the published training.
        """
        places = latents.movedim(1, -1)
        nearest = torch.cdist(places.flatten(0, -2), self.embedding.weight).argmin(dim=1)
        codes = self.embedding(nearest).view(places.shape).movedim(-1, 1)
        loss = F.mse_loss(latents, codes.detach()) + self.commitment * F.mse_loss(codes, latents.detach())
        return latents + (codes - latents).detach(), loss


class Level(nn.Module):
    """Blocks at one size, the first of them followed by attention, then a change of size unless it is the last level.

    `channels` lists the width before and after each block; `attentions` counts the blocks with attention.
    """

    def __init__(
        self,
        channels: list[int],
        *,
        attentions: int,
        groups: int,
        latent_channels: int | None = None,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        width = channels[-1]
        norms: dict[str, Any] = {"eps": EPS, "groups": groups, "latent_channels": latent_channels}
        self.resnets = nn.ModuleList(
            ResidualBlock(before, after, **norms) for before, after in itertools.pairwise(channels)
        )
        self.attentions = nn.ModuleList(ImageAttention(width, head_dim=width, **norms) for _ in range(attentions))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])
        self.resample = {None: None, "down": "downsamplers", "up": "upsamplers"}[resample]

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Features (batch, channels, H, W) at the next level's size."""
        return through(self.layers(spent=False), features, latents)

    def layers(self, *, spent: bool) -> Iterator[Layer]:
        """What features and latents go through, one layer after the other. The memory of features that a layer made is
        used again, if nobody else gets to see them, and that of the first ones if they are `spent`."""
        for index, block in enumerate(self.resnets):
            yield functools.partial(block, spent=spent)
            last: nn.Module = block
            if index < len(self.attentions):
                last = self.attentions[index]
                yield last
            spent = not last._forward_hooks
        if self.resample is not None:
            yield lambda features, latents: getattr(self, cast(str, self.resample))[0](features)


def through(layers: Iterable[Layer], features: Tensor, latents: Tensor | None) -> Tensor:
    """What layers, one after the other, make of features."""
    for layer in layers:
        features = layer(features, latents=latents)
    return features


def all_layers(first: nn.Module, levels: Iterable[nn.Module]) -> Iterator[Layer]:
    """The layers of levels, after what comes first: a level that was called would keep what it is given in memory.

    One that is not quite ours, or that somebody watches, is called all the same.
    """
    spent = not first._forward_hooks
    for level in levels:
        own = type(level) is Level and "forward" not in level.__dict__ and level._compiled_call_impl is None
        if own and not (level._forward_hooks or level._forward_pre_hooks):
            yield from cast(Level, level).layers(spent=spent)
            spent = True
        else:
            yield level
            spent = False


class Downsample(nn.Module):
    """Half the size by a strided convolution that looks one pixel beyond the lower right edge only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels, H / 2, W / 2)."""
        return self.conv(F.pad(features, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels, 2 H, 2 W)."""
        return self.conv(features, doubled=True)


class Encoder(nn.Module):
    """Pictures to features of the latents' size."""

    def __init__(self, cfg: VQModelConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                [before] + [width] * cfg.layers_per_block,
                attentions=cfg.layers_per_block if kind.startswith("Attn") else 0,
                groups=groups,
                resample="down" if index < len(widths) - 1 else None,
            )
            for index, (kind, before, width) in enumerate(
                zip(cfg.down_block_types, (widths[0], *widths), widths, strict=False)
            )
        )
        self.mid_block = Level([widths[-1]] * 3, attentions=1, groups=groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """(batch, latent_channels, H / f, W / f) from (batch, in_channels, H, W)."""
        layers = all_layers(self.conv_in, (*self.down_blocks, self.mid_block))
        features = through(layers, self.conv_in(sample), None)
        return self.conv_out(self.conv_norm_out(features, activated=True, spent=True))


class Decoder(nn.Module):
    """Features of the latents' size to pictures; every norm also sees the latents themselves."""

    def __init__(self, cfg: VQModelConfig, code_dim: int) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        # the reference takes the width of its norm's input from latent_channels, so both must agree
        if code_dim != cfg.latent_channels:
            raise ConfigError(
                f"VQModel: vq_embed_dim={code_dim} differs from latent_channels={cfg.latent_channels}; "
                "the decoder's norms need them equal"
            )
        self.conv_in = Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level([widths[0]] * 3, attentions=1, groups=groups, latent_channels=code_dim)
        self.up_blocks = nn.ModuleList(
            Level(
                [before] + [width] * (cfg.layers_per_block + 1),
                attentions=cfg.layers_per_block + 1 if kind.startswith("Attn") else 0,
                groups=groups,
                latent_channels=code_dim,
                resample="up" if index < len(widths) - 1 else None,
            )
            for index, (kind, before, width) in enumerate(
                zip(cfg.up_block_types, (widths[0], *widths), widths, strict=False)
            )
        )
        self.conv_norm_out = SpatialNorm(widths[-1], code_dim)
        self.conv_out = Conv2d(widths[-1], cfg.out_channels, 3, padding=1)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(batch, out_channels, H, W) from (batch, latent_channels, H / f, W / f) and latents of that size."""
        latents = latents.contiguous(memory_format=torch.channels_last)  # the norms' tables of places come like that
        layers = all_layers(self.conv_in, (self.mid_block, *self.up_blocks))
        features = through(layers, self.conv_in(features), latents)
        return self.conv_out(self.conv_norm_out(features, latents, activated=True, spent=True))
