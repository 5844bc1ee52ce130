"""The decoder's UNet: denoises latents, given a CLIP image embedding and, in its variants, a hint or a masked image.

Everything that depends on neither the noisy latents nor the timestep is computed once (`encode_condition`): the tokens
of the image embedding, each attention layer's keys and values for them, the term that the embedding adds to the time
embedding, and the features of the hint.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.adapters.formats import UNET
from kandinsky22.adapters.network_methods import NetworkAdapterMixin
from kandinsky22.config import Config
from kandinsky22.errors import invalid
from kandinsky22.kernels.conv import Conv2d, apply_conv
from kandinsky22.models.attention import ImageAttention, KeyValue
from kandinsky22.models.base import Model
from kandinsky22.models.checkpointing import Checkpointing
from kandinsky22.models.config_rules import MAX_LAYERS_PER_BLOCK, MAX_SIDE, Settings
from kandinsky22.models.feature_cache import FeatureCache, check_levels
from kandinsky22.models.image_conditions import IMAGE_TOKENS, ImageProjection, ImageTimeEmbedding
from kandinsky22.models.layers import GroupNorm, ResidualBlock, TimeEmbedding, apply_norm, is_private
from kandinsky22.outputs import Output

CROSS_ATTENTION = {"SimpleCrossAttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
CROSS_ATTENTION |= {"SimpleCrossAttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}


@dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """Constructor arguments of `UNet2DConditionModel`; the defaults are those of the published Kandinsky 2.2 decoder.

    The inpainting variant has 9 `in_channels` (latents, masked image, mask); the hint variant has 8 and
    `addition_embed_type="image_hint"`.

    Attributes:
        sample_size: Side of the latents that the network was trained on; None for unknown.
        in_channels: Channels of the input: latents and what is concatenated to them.
        out_channels: Channels of the output: the noise and the learned variance.
        down_block_types: Type of each stage on the way down, with ("SimpleCrossAttnDownBlock2D") or without attention.
        up_block_types: Type of each stage on the way up, with ("SimpleCrossAttnUpBlock2D") or without attention.
        block_out_channels: Channels per resolution level, from latent size down.
        layers_per_block: Residual blocks per stage on the way down; on the way up there is one more.
        norm_num_groups: Groups of channels in the norms.
        norm_eps: Added to the variance in the norms.
        cross_attention_dim: Width of the image embedding's tokens.
        encoder_hid_dim: Width of the image embedding.
        attention_head_dim: Channels per attention head.
        addition_embed_type: "image", or "image_hint" for the hint variant.
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

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
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
        settings = Settings("UNet2DConditionModel", self)
        settings.integers(("sample_size",), MAX_SIDE, optional=True)
        settings.integers(("layers_per_block",), MAX_LAYERS_PER_BLOCK)
        settings.integers(("in_channels", "out_channels", "norm_num_groups", "attention_head_dim"))
        settings.integers(("cross_attention_dim", "encoder_hid_dim"))
        settings.number("norm_eps", highest=1.0)
        hints = ("image", "image_hint")
        addition: Any = self.addition_embed_type
        settings.check(
            "addition_embed_type", isinstance(addition, str) and addition in hints, " or ".join(map(repr, hints))
        )
        groups, head = self.norm_num_groups, self.attention_head_dim
        divisors = {"2": 2, f"norm_num_groups={groups}": groups, f"attention_head_dim={head}": head}
        settings.widths("block_out_channels", multiple_of=divisors)
        for name, direction in (("down_block_types", "Down"), ("up_block_types", "Up")):
            kinds = [kind for kind in CROSS_ATTENTION if direction in kind]
            settings.stages(name, kinds, len(self.block_out_channels))
        # a residual block has about 18 matrices of its width, on the way up twice as many; there are two of them with
        # one attention layer and the projection of the time embedding per layer of a stage
        channels, blocks = sum(width * width for width in self.block_out_channels), self.layers_per_block + 2
        projections = IMAGE_TOKENS * self.encoder_hid_dim * self.cross_attention_dim
        settings.parameters(60 * blocks * channels + projections)


@dataclass
class UNet2DConditionOutput(Output):
    """Result of `UNet2DConditionModel.forward`.

    Attributes:
        sample: Tensor (batch, out_channels, h, w): the predicted noise, then the learned variance.
    """

    sample: Tensor


@dataclass(frozen=True)
class UNetCondition:
    """Everything of a step that depends on neither the latents nor the timestep.

    Attributes:
        time: Tensor (batch, time_dim), added to the time embedding.
        layers: Keys and values of the image embedding's tokens per attention layer, in the order of their use; or the
            tokens themselves, for layers that encode them at each call.
        channels: Tensor (batch, n, h, w), concatenated to the noisy latents at the input; None for nothing.
    """

    time: Tensor
    layers: Iterable[KeyValue | Tensor]
    channels: Tensor | None = None


class UNet2DConditionModel(NetworkAdapterMixin, Model):
    """Network that predicts the noise in latents (batch, 4, h, w), whose sides are multiples of 2^(levels - 1)."""

    config_class = UNet2DConditionConfig
    compiled_blocks = (ResidualBlock, ImageAttention)
    adapter_role = UNET
    positional = (
        "sample_size",
        "in_channels",
        "out_channels",
        "center_input_sample",
        "flip_sin_to_cos",
        "freq_shift",
        "down_block_types",
        "mid_block_type",
        "up_block_types",
        "only_cross_attention",
        "block_out_channels",
        "layers_per_block",
        "downsample_padding",
        "mid_block_scale_factor",
        "dropout",
        "act_fn",
        "norm_num_groups",
        "norm_eps",
        "cross_attention_dim",
    )
    supports_gradient_checkpointing = True
    config: UNet2DConditionConfig

    def __init__(self, /, *arguments: Any, **config: Any) -> None:
        super().__init__(*arguments, **config)
        cfg = self.config
        widths, depth = cfg.block_out_channels, cfg.layers_per_block
        time_dim = 4 * widths[0]
        self.conv_in = Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_dim)
        self.encoder_hid_proj = ImageProjection(cfg.encoder_hid_dim, cfg.cross_attention_dim)
        hint = cfg.addition_embed_type == "image_hint"
        self.add_embedding = ImageTimeEmbedding(cfg.encoder_hid_dim, time_dim, hint=hint)

        def stage(inputs: list[int], width: int, kind: str, resample: str | None) -> UNetStage:
            attentions = len(inputs) if CROSS_ATTENTION[kind] else 0
            return UNetStage(cfg, time_dim, inputs, width, attentions=attentions, resample=resample)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            stage([before] + [width] * (depth - 1), width, kind, "down" if index < last else None)
            for index, (before, width, kind) in enumerate(
                zip((widths[0], *widths), widths, cfg.down_block_types, strict=False)
            )
        )
        self.mid_block = UNetStage(cfg, time_dim, [widths[-1]] * 2, widths[-1], attentions=1)
        # a block on the way up has a skip connection from one on the way down, whose channels add to its input
        skip_widths = [widths[0]]
        for index, width in enumerate(widths):
            skip_widths += [width] * (depth + (index < last))
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for index, (width, kind) in enumerate(zip(widths[::-1], cfg.up_block_types, strict=True)):
            inputs = [(before if i == 0 else width) + skip_widths.pop() for i in range(depth + 1)]
            self.up_blocks.append(stage(inputs, width, kind, "up" if index < last else None))
            before = width
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, widths[0], eps=cfg.norm_eps)
        self.conv_out = Conv2d(widths[0], cfg.out_channels, 3, padding=1)

    def _stages(self) -> Iterator[UNetStage]:
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield cast(UNetStage, stage)

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """Return everything of a step that depends on neither the latents nor the timestep.

        Args:
            image_embeds: Image embeddings (batch, encoder_hid_dim).
            hint: For the hint variant: image (batch, 3, 8 h, 8 w) in [-1, 1]. None for the other variants.
            channels: Tensor (batch, n, h, w) to concatenate to the latents, such as a masked image and its mask; None
                for nothing.

        Raises:
            InputError: A hint is missing, or this UNet has no use for it.
        """
        condition, tokens = self.encode_tokens(image_embeds, hint, channels)
        layers = tuple(
            cast(ImageAttention, layer).encode_context(tokens) for stage in self._stages() for layer in stage.attentions
        )
        return dataclasses.replace(condition, layers=layers)

    def encode_tokens(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> tuple[UNetCondition, Tensor]:
        """Return a condition whose layers encode the image embedding's tokens at each call, and the tokens.

        Args:
            image_embeds: Image embeddings (batch, encoder_hid_dim).
            hint: As for `encode_condition`.
            channels: As for `encode_condition`.

        Raises:
            InputError: A hint is missing, or this UNet has no use for it.
        """
        if (hint is None) == (self.config.addition_embed_type == "image_hint"):
            expected = "None" if hint is not None else "a tensor (batch, 3, height, width)"
            advice = f"this UNet has addition_embed_type={self.config.addition_embed_type!r}"
            raise invalid("hint", hint, expected, advice)
        embeds = image_embeds.to(self.dtype)
        tokens = self.encoder_hid_proj(embeds)
        if hint is not None:
            features = self.add_embedding.input_hint_block(hint.to(self.dtype))
            channels = features if channels is None else torch.cat([features, channels], dim=1)
        return UNetCondition(self.add_embedding(embeds), itertools.repeat(tokens), channels), tokens

    def denoise(
        self, sample: Tensor, timestep: Tensor | float, condition: UNetCondition, cache: FeatureCache | None = None
    ) -> Tensor:
        """Return the noise in latents, then the learned variance, (batch, out_channels, h, w).

        Args:
            sample: Noisy latents (batch, n, h, w).
            timestep: One timestep from 0 (clean) to 999, or a tensor (batch,) with one per batch item.
            condition: Result of `encode_condition`.
            cache: Features of the inner stages, of one condition and one series of steps. Where it holds features for
                this step, only its outer stages run. None runs all stages.

        Raises:
            InputError: A side of the latents is not a multiple of 2^(levels - 1), or the cache is for another batch
                size or for too many levels.
        """
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if any(side % factor for side in sample.shape[-2:]):
            expected = f"height and width that are multiples of {factor}"
            raise invalid("sample.shape", tuple(sample.shape), expected)
        outer, cached = len(self.down_blocks), None
        if cache is not None:
            check_levels(cache.levels, len(self.down_blocks))
            outer, cached = cache.levels, cache.get(len(sample))
        time = F.silu(self.time_embedding(timestep) + condition.time)
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels.to(sample.dtype)], dim=1)
        features = apply_conv(self.conv_in, sample)
        skips = [features]
        down_stages, up_stages = self.down_blocks[:outer], self.up_blocks[-outer:]
        layers = iter(condition.layers)
        for index, stage in enumerate(down_stages, start=1):
            # the last one need not be downsampled for stages that do not run
            features = stage(features, time, layers, push_skips=skips, resample=cached is None or index < outer)
        if cached is None:
            features = self._inner_stages(outer, features, time, layers, skips)
            if cache is not None:
                cache.put(features)
        else:
            features = cached
            encoded = tuple(condition.layers)
            skipped = len(encoded) - sum(len(cast(UNetStage, stage).attentions) for stage in up_stages)
            layers = iter(encoded[skipped:])
        for stage in up_stages:
            features = stage(features, time, layers, pop_skips=skips)
        normed = apply_norm(self.conv_norm_out, features, silu=True, inplace=has_private_output(self.up_blocks[-1]))
        return apply_conv(self.conv_out, normed).contiguous()

    def _inner_stages(
        self, outer: int, features: Tensor, time: Tensor, layers: Iterator[KeyValue | Tensor], skips: list[Tensor]
    ) -> Tensor:
        """Return the input of the last `outer` stages on the way up, from the output of the first `outer` ones."""
        for stage in self.down_blocks[outer:]:
            features = stage(features, time, layers, push_skips=skips)
        features = self.mid_block(features, time, layers)
        for stage in self.up_blocks[:-outer]:
            features = stage(features, time, layers, pop_skips=skips)
        return features

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: None = None,
        class_labels: None = None,
        timestep_cond: None = None,
        attention_mask: None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: None = None,
        mid_block_additional_residual: None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise, with all that depends on the image embedding computed at each call.

        Each module is called as a module, so that hooks, adapters and gradient checkpointing act as on any network.
        `encode_condition` and `denoise` compute the same in fewer operations. Arguments that must be None are those of
        the reference's class that Kandinsky 2.2 does not use.

        Args:
            sample: Noisy latents (batch, in_channels, h, w); in the hint variant (batch, 4, h, w).
            timestep: One timestep from 0 (clean) to 999, or a tensor (batch,) with one per batch item.
            encoder_hidden_states: Must be None: Kandinsky's UNet reads no text.
            class_labels: Must be None.
            timestep_cond: Must be None.
            attention_mask: Must be None.
            cross_attention_kwargs: Must be None or empty.
            added_cond_kwargs: "image_embeds" (batch, encoder_hid_dim) and, in the hint variant, "hint"
                (batch, 3, 8 h, 8 w) in [-1, 1].
            down_block_additional_residuals: Must be None.
            mid_block_additional_residual: Must be None.
            down_intrablock_additional_residuals: Must be None.
            encoder_attention_mask: Must be None.
            return_dict: Whether to return a `UNet2DConditionOutput` instead of a tuple.

        Returns:
            The predicted noise, then the learned variance, (batch, out_channels, h, w).

        Raises:
            InputError: "image_embeds" is missing, or an argument that must be None is not.
        """
        unused = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }
        for name, value in unused.items():
            if value is not None:
                raise invalid(name, value, "None", "this UNet reads added_cond_kwargs")
        if not isinstance(added_cond_kwargs, Mapping) or "image_embeds" not in added_cond_kwargs:
            names = sorted(added_cond_kwargs) if isinstance(added_cond_kwargs, Mapping) else added_cond_kwargs
            expected = "a mapping with image_embeds, a tensor (batch, encoder_hid_dim)"
            raise invalid("added_cond_kwargs", names, expected)
        condition, _ = self.encode_tokens(added_cond_kwargs["image_embeds"], added_cond_kwargs.get("hint"))
        out = self.denoise(sample, timestep, condition)
        return UNet2DConditionOutput(out) if return_dict else (out,)

    defined_forward = forward  # a subclass or a library may replace it, and the replacement is called then

    def has_own_structure(self) -> bool:
        """Return whether `encode_condition` and `denoise` can run all stages: none was replaced by another module."""
        stages = list(self._stages())
        return all(type(stage) is UNetStage for stage in stages) and all(
            type(layer) is ImageAttention for stage in stages for layer in stage.attentions
        )


class UNetStage(Checkpointing, nn.Module):
    """Residual blocks at one resolution level, the first of them followed by attention, then a change of size.

    Down, middle and up are this one class: on the way down a stage appends its outputs to a list of skip connections,
    on the way up it takes them from there.

    Args:
        cfg: Config of the network.
        time_dim: Width of the time embedding.
        inputs: Input channels of each block.
        width: Output channels of each block.
        attentions: Number of blocks that are followed by attention.
        resample: "down" or "up" changes the size by two at the end; None keeps it.
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
        self.resampler = {None: None, "down": "downsamplers", "up": "upsamplers"}[resample]
        if self.resampler is not None:
            self.add_module(self.resampler, nn.ModuleList([ResidualBlock(width, width, resample=resample, **block)]))

    def forward(
        self,
        features: Tensor,
        time: Tensor,
        layers: Iterator[KeyValue | Tensor],
        *,
        push_skips: list[Tensor] | None = None,
        pop_skips: list[Tensor] | None = None,
        resample: bool = True,
    ) -> Tensor:
        """Return features (batch, width, H', W').

        Args:
            features: Tensor (batch, channels, H, W).
            time: Activated time embedding (batch or 1, time_dim).
            layers: The condition's keys and values, or its tokens, for the next attention layers.
            push_skips: List that the outputs of blocks and resampler are appended to, on the way down.
            pop_skips: List whose last entries are concatenated to the inputs of blocks, on the way up.
            resample: Whether to change the size at the end.
        """
        for index, block in enumerate(self.resnets):
            block_input = features if pop_skips is None else torch.cat([features, pop_skips.pop()], dim=1)
            # the concatenation is a new tensor, which only hooks of the block could hold
            options = {"inplace": True} if pop_skips is not None and is_private(block) else {}
            features = self.run_block(block, block_input, time, **options)
            if index < len(self.attentions):
                features = self.run_block(self.attentions[index], features, next(layers))
            if push_skips is not None:
                push_skips.append(features)
        if self.resampler is not None and resample:
            features = self.run_block(getattr(self, self.resampler)[0], features, time)
            if push_skips is not None:
                push_skips.append(features)
        return features


def has_private_output(stage: nn.Module) -> bool:
    """Return whether the output of a stage may be overwritten: nothing but its caller holds it.

    Args:
        stage: Any module in the position of a stage.
    """
    if not (isinstance(stage, UNetStage) and is_private(stage)):
        return False
    last = [*stage.resnets, *stage.attentions] if stage.resampler is None else [getattr(stage, stage.resampler)[0]]
    return all(is_private(layer) for layer in last)
