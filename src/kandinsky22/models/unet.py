"""The decoder's UNet: denoises latents, given a CLIP image embedding and, in its variants, a hint or a masked picture.

All that depends on neither the noisy latents nor the timestep is computed once (`encode_condition`): the tokens of the
image embedding, each attention layer's keys and values for them, their part of the time embedding, the hint's features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.kernels.linear import Linear
from kandinsky22.models.attention import ImageAttention, KeyValue
from kandinsky22.models.base import Model
from kandinsky22.models.feature_cache import FeatureCache, check_levels
from kandinsky22.models.layers import GroupNorm, ResidualBlock, TimeEmbedding
from kandinsky22.outputs import Output

IMAGE_TOKENS = 32  # an image embedding becomes this many tokens (published network)

CROSS_ATTENTION = {"SimpleCrossAttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
CROSS_ATTENTION |= {"SimpleCrossAttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}


@dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """Constructor arguments of UNet2DConditionModel; the defaults are those of the published Kandinsky 2.2 decoder.

    The inpainting variant has 9 `in_channels` (latents, masked picture, mask), the hint variant has 8 and
    `addition_embed_type="image_hint"`.
    """

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 8
    down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",)
    block_out_channels: tuple[int, ...] = (384, 768, 1152, 1536)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    encoder_hid_dim: int = 1280
    attention_head_dim: int = 64
    addition_embed_type: str = "image"

    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0.0,),
        "act_fn": ("silu",),
        "transformer_layers_per_block": (1,),
        "encoder_hid_dim_type": ("image_proj",),
        "resnet_time_scale_shift": ("scale_shift",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "addition_embed_type_num_heads": (64,),
    }

    def __post_init__(self) -> None:
        widths, groups, head = self.block_out_channels, self.norm_num_groups, self.attention_head_dim
        if self.addition_embed_type not in ("image", "image_hint"):
            raise ConfigError(
                f"UNet2DConditionModel: addition_embed_type={self.addition_embed_type!r} is not part of Kandinsky 2.2; "
                "accepted: 'image' or 'image_hint'"
            )
        for name, word in (("down_block_types", "Down"), ("up_block_types", "Up")):
            types = getattr(self, name)
            known = [kind for kind in CROSS_ATTENTION if word in kind]
            if unknown := [kind for kind in types if kind not in known]:
                raise ConfigError(f"UNet2DConditionModel: {name} has {unknown[0]!r}; accepted: {' or '.join(known)}")
            if len(types) != len(widths):
                raise ConfigError(
                    f"UNet2DConditionModel: {name} has {len(types)} entries, block_out_channels has {len(widths)}; "
                    "give one of each per level"
                )
        for name in ("layers_per_block", "attention_head_dim", "cross_attention_dim", "encoder_hid_dim"):
            if not isinstance(self[name], int) or self[name] < 1:
                raise ConfigError(f"UNet2DConditionModel: {name}={self[name]!r}; accepted: a whole number from 1")
        if bad := [width for width in widths if width % groups or width % head or width % 2]:
            raise ConfigError(
                f"UNet2DConditionModel: block_out_channels has {bad[0]}, which must be even and a multiple "
                f"of norm_num_groups={groups} and of attention_head_dim={head}"
            )


@dataclass
class UNet2DConditionOutput(Output):
    """What `forward` returns: (batch, out_channels, h, w), the predicted noise and the learned variance."""

    sample: Tensor


@dataclass(frozen=True)
class UNetCondition:
    """All that the UNet needs to know of a condition.

    `time` (batch, time_dim) is added to the time embedding; `layers` holds the keys and values of each attention layer
    in the order of their use; `channels` (batch, n, h, w), if any, stands beside the noisy latents at the input.
    """

    time: Tensor
    layers: tuple[KeyValue, ...]
    channels: Tensor | None = None


class UNet2DConditionModel(Model):
    """Predicts the noise in latents (batch, 4, h, w), whose sides are multiples of 2^(levels - 1)."""

    config_class = UNet2DConditionConfig
    compiled_blocks = (ResidualBlock, ImageAttention)
    config: UNet2DConditionConfig

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        cfg = self.config
        widths, depth = cfg.block_out_channels, cfg.layers_per_block
        time_dim = 4 * widths[0]
        self.conv_in = Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_dim)
        self.encoder_hid_proj = ImageTokens(cfg.encoder_hid_dim, cfg.cross_attention_dim)
        hint = cfg.addition_embed_type == "image_hint"
        self.add_embedding = ImageTimeEmbedding(cfg.encoder_hid_dim, time_dim, hint=hint)

        def level(before: list[int], width: int, kind: str, resample: str | None) -> Level:
            attentions = len(before) if CROSS_ATTENTION[kind] else 0
            return Level(cfg, time_dim, before, width, attentions=attentions, resample=resample)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            level([before] + [width] * (depth - 1), width, kind, "down" if index < last else None)
            for index, (before, width, kind) in enumerate(
                zip((widths[0], *widths), widths, cfg.down_block_types, strict=False)
            )
        )
        self.mid_block = Level(cfg, time_dim, [widths[-1]] * 2, widths[-1], attentions=1)
        # each block on the way up also takes what a block on the way down left: its width adds to the input's
        skips = [widths[0]]
        for index, width in enumerate(widths):
            skips += [width] * (depth + (index < last))
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for index, (width, kind) in enumerate(zip(widths[::-1], cfg.up_block_types, strict=True)):
            inputs = [(before if i == 0 else width) + skips.pop() for i in range(depth + 1)]
            self.up_blocks.append(level(inputs, width, kind, "up" if index < last else None))
            before = width
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, widths[0], eps=cfg.norm_eps)
        self.conv_out = Conv2d(widths[0], cfg.out_channels, 3, padding=1)

    def _levels(self) -> Iterator[Level]:
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield cast(Level, level)

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """Everything of a step that depends on neither the latents nor the timestep.

        Takes image embeddings (batch, encoder_hid_dim); for the hint variant the `hint` (batch, 3, 8 h, 8 w) in
        [-1, 1]; `channels` (batch, n, h, w) to stand beside the latents, such as a masked picture and its mask.
        Raises InputError when a hint is missing or not wanted.
        """
        if (hint is None) == (self.config.addition_embed_type == "image_hint"):
            state, wanted = ("missing", "a tensor (batch, 3, height, width)") if hint is None else ("given", "None")
            raise InputError(f"hint is {state}; this UNet ({self.config.addition_embed_type!r}) accepts: {wanted}")
        embeds = image_embeds.to(self.dtype)
        tokens = self.encoder_hid_proj(embeds)
        layers = tuple(
            cast(ImageAttention, layer).encode_context(tokens) for level in self._levels() for layer in level.attentions
        )
        if hint is not None:
            features = self.add_embedding.input_hint_block(hint.to(self.dtype))
            channels = features if channels is None else torch.cat([features, channels], dim=1)
        return UNetCondition(self.add_embedding(embeds), layers, channels)

    def denoise(
        self, sample: Tensor, timestep: Tensor | float, condition: UNetCondition, cache: FeatureCache | None = None
    ) -> Tensor:
        """(batch, out_channels, h, w): the noise in latents `sample` (batch, n, h, w), then the learned variance.

        `timestep` is one number for the batch or one per sample, 0 (clean) to 999. A `cache` belongs to one condition
        and one series of steps; where it recalls features, only its outer levels run. Raises InputError for sides that
        the network cannot halve often enough, or a cache of other rows or too many levels.
        """
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if any(side % factor for side in sample.shape[-2:]):
            raise InputError(f"sample is {tuple(sample.shape)}; accepted: sides that are multiples of {factor}")
        outer, kept = len(self.down_blocks), None
        if cache is not None:
            check_levels(cache.levels, len(self.down_blocks))
            outer, kept = cache.levels, cache.recall(len(sample))
        time = F.silu(self.time_embedding(timestep) + condition.time)
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels.to(sample.dtype)], dim=1)
        features = self.conv_in(sample)
        skips = [features]
        down, up = self.down_blocks[:outer], self.up_blocks[-outer:]
        layers = iter(condition.layers)
        for index, level in enumerate(down, start=1):
            # nothing needs to be halved for levels that do not run
            features = level(features, time, layers, left=skips, resampled=kept is None or index < outer)
        if kept is None:
            features = self._inner_levels(outer, features, time, layers, skips)
            if cache is not None:
                cache.keep(features)
        else:
            features = kept
            unused = len(condition.layers) - sum(len(cast(Level, level).attentions) for level in up)
            layers = iter(condition.layers[unused:])
        for level in up:
            features = level(features, time, layers, taken=skips)
        return self.conv_out(self.conv_norm_out(features, activated=True, spent=True)).contiguous()

    def _inner_levels(
        self, outer: int, features: Tensor, time: Tensor, layers: Iterator[KeyValue], skips: list[Tensor]
    ) -> Tensor:
        """What enters the last `outer` levels on the way up, from what the first `outer` ones made."""
        for level in self.down_blocks[outer:]:
            features = level(features, time, layers, left=skips)
        features = self.mid_block(features, time, layers)
        for level in self.up_blocks[:-outer]:
            features = level(features, time, layers, taken=skips)
        return features

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor],
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """`encode_condition` and `denoise` in a row, `added_cond_kwargs` holding "image_embeds" and, if used, "hint".

        `encoder_hidden_states` is there for the reference's callers: Kandinsky's UNet reads no text.
        """
        if "image_embeds" not in added_cond_kwargs:
            given = ", ".join(added_cond_kwargs) or "nothing"
            raise InputError(f"added_cond_kwargs holds {given}; it needs image_embeds (batch, encoder_hid_dim)")
        if encoder_hidden_states is not None:
            raise InputError("encoder_hidden_states is given; accepted: None, this UNet reads added_cond_kwargs")
        condition = self.encode_condition(added_cond_kwargs["image_embeds"], added_cond_kwargs.get("hint"))
        out = self.denoise(sample, timestep, condition)
        return UNet2DConditionOutput(out) if return_dict else (out,)


class Level(nn.Module):
    """Residual blocks at one size, the first of them followed by attention, then half or twice the size if asked.

    Down, middle and up are this one class: on the way down a level leaves its results in a list, on the way up it
    takes them from there.
    """

    def __init__(
        self,
        cfg: UNet2DConditionConfig,
        time_dim: int,
        inputs: list[int],
        width: int,
        *,
        attentions: int,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        block: dict[str, Any] = {"eps": cfg.norm_eps, "groups": cfg.norm_num_groups, "time_dim": time_dim}
        self.resnets = nn.ModuleList(ResidualBlock(before, width, **block) for before in inputs)
        self.attentions = nn.ModuleList(
            ImageAttention(
                width,
                head_dim=cfg.attention_head_dim,
                eps=1e-5,
                groups=cfg.norm_num_groups,
                context_dim=cfg.cross_attention_dim,
            )
            for _ in range(attentions)
        )
        self.resample = {None: None, "down": "downsamplers", "up": "upsamplers"}[resample]
        if self.resample is not None:
            resampler = ResidualBlock(width, width, resample=resample, **block)
            self.add_module(self.resample, nn.ModuleList([resampler]))

    def forward(
        self,
        features: Tensor,
        time: Tensor,
        layers: Iterator[KeyValue],
        *,
        left: list[Tensor] | None = None,
        taken: list[Tensor] | None = None,
        resampled: bool = True,
    ) -> Tensor:
        """Features (batch, width, H', W'); `time` is the activated time embedding, `layers` the condition's next
        keys and values; results are appended to `left`, inputs completed from the end of `taken`. Without `resampled`
        the size stays as it is."""
        for index, block in enumerate(self.resnets):
            given = features if taken is None else torch.cat([features, taken.pop()], dim=1)
            features = block(given, time, spent=taken is not None)
            if index < len(self.attentions):
                features = self.attentions[index](features, next(layers))
            if left is not None:
                left.append(features)
        if self.resample is not None and resampled:
            features = getattr(self, self.resample)[0](features, time)
            if left is not None:
                left.append(features)
        return features


class ImageTokens(nn.Module):
    """An image embedding as tokens to attend to."""

    def __init__(self, embed_dim: int, token_dim: int) -> None:
        super().__init__()
        self.image_embeds = Linear(embed_dim, IMAGE_TOKENS * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        """(batch, 32, token_dim) from (batch, embed_dim)."""
        return self.norm(self.image_embeds(embeds).view(len(embeds), IMAGE_TOKENS, -1))


class ImageTimeEmbedding(nn.Module):
    """An image embedding as an addition to the time embedding, and with `hint` a picture as four latent channels."""

    def __init__(self, embed_dim: int, time_dim: int, *, hint: bool) -> None:
        super().__init__()
        self.image_proj = Linear(embed_dim, time_dim)
        self.image_norm = nn.LayerNorm(time_dim)
        if hint:
            # (in, out, stride) of the published network: three halvings, to the latents' size
            widths = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2))
            layers: list[nn.Module] = []
            for before, after, stride in widths:
                layers += [Conv2d(before, after, 3, padding=1, stride=stride), nn.SiLU()]
            self.input_hint_block = nn.Sequential(*layers, Conv2d(256, 4, 3, padding=1))

    def forward(self, embeds: Tensor) -> Tensor:
        """(batch, time_dim) from (batch, embed_dim)."""
        return self.image_norm(self.image_proj(embeds))
