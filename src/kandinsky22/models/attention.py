"""Multi-head attention over tokens, with optional additional keys and values that were computed before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import attention, half_precision
from kandinsky22.kernels.linear import apply_linear
from kandinsky22.models.layers import GroupNorm, SpatialNorm, apply_norm


class KeyValue(NamedTuple):
    """Keys and values of one attention layer.

    Attributes:
        key: Tensor (batch, heads, tokens, head_dim).
        value: Tensor (batch, heads, tokens, head_dim).
    """

    key: Tensor
    value: Tensor

    def followed_by(self, other: KeyValue) -> KeyValue:
        """Return these tokens followed by those of `other`.

        Args:
            other: Keys and values of the same layer.
        """
        return KeyValue(torch.cat([self.key, other.key], dim=2), torch.cat([self.value, other.value], dim=2))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √head_dim) v (https://arxiv.org/abs/1706.03762, equation 1).

    Args:
        channels: Width of the tokens.
        head_dim: Channels per head.
        context_dim: Width of context tokens, from which `encode_context` computes additional keys and values. They
            depend on nothing else, therefore they are computed once for many calls. None for no context.
    """

    def __init__(self, channels: int, *, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        if context_dim is not None:
            self.add_k_proj = nn.Linear(context_dim, channels)
            self.add_v_proj = nn.Linear(context_dim, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], -1, self.head_dim).transpose(1, 2)

    def encode_context(self, context: Tensor) -> KeyValue:
        """Return additional keys and values.

        Args:
            context: Context tokens (batch, tokens, context_dim).
        """
        return KeyValue(
            self._heads(apply_linear(self.add_k_proj, context)), self._heads(apply_linear(self.add_v_proj, context))
        )

    def key_value(self, tokens: Tensor) -> KeyValue:
        """Return keys and values of the sequence itself.

        Args:
            tokens: Tensor (batch, tokens, channels).
        """
        return KeyValue(self._heads(apply_linear(self.to_k, tokens)), self._heads(apply_linear(self.to_v, tokens)))

    def attend(self, tokens: Tensor, kv: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Return the output for tokens that attend to keys and values, (batch, tokens, channels).

        Args:
            tokens: Tensor (batch, tokens, channels), the queries.
            kv: Keys and values to attend to.
            mask: Additive or boolean mask, broadcastable to (batch, heads, tokens, keys); None masks nothing.
        """
        query = self._heads(apply_linear(self.to_q, tokens))
        dtype = query.dtype
        if half_precision.is_slow(query, *kv):
            query, kv = query.float(), KeyValue(kv.key.float(), kv.value.float())
        if mask is None and attention.is_supported(query, *kv):
            out = attention.attention(query, *kv, rounded=getattr(self.to_q, "rounds_inputs", False))
        else:
            mask = mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask
            out = F.scaled_dot_product_attention(query, kv.key, kv.value, attn_mask=mask)
        return apply_linear(self.to_out[0], out.transpose(1, 2).flatten(2).to(dtype))

    def forward(self, tokens: Tensor, context: KeyValue | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the output for tokens that attend to the context and to each other, (batch, tokens, channels).

        Args:
            tokens: Tensor (batch, tokens, channels).
            context: Additional keys and values, before those of the tokens, or the context tokens (batch, tokens,
                context_dim) to encode them from; None for none.
            mask: Additive or boolean mask, broadcastable to (batch, heads, tokens, keys); None masks nothing.
        """
        if isinstance(context, Tensor):
            context = self.encode_context(context)
        kv = self.key_value(tokens)
        return self.attend(tokens, kv if context is None else context.followed_by(kv), mask)


class ImageAttention(Attention):
    """Attention between all spatial positions of features, after a norm, with a residual connection.

    Args:
        channels: Channels of the features.
        head_dim: Channels per head.
        eps: Added to the variance in the norm.
        groups: Groups of channels in the norm.
        context_dim: Width of context tokens; None for no context.
        latent_channels: Channels of the latents that modulate the norm of MoVQ's decoder; None for a group norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int,
        eps: float,
        groups: int = 32,
        context_dim: int | None = None,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__(channels, head_dim=head_dim, context_dim=context_dim)
        if latent_channels is None:
            self.group_norm = GroupNorm(groups, channels, eps=eps)
        else:
            self.spatial_norm = SpatialNorm(channels, latent_channels)

    def forward(
        self, features: Tensor, context: KeyValue | Tensor | None = None, latents: Tensor | None = None
    ) -> Tensor:
        """Return features (batch, channels, H, W).

        Args:
            features: Tensor (batch, channels, H, W).
            context: Additional keys and values, or the context tokens to encode them from; None for none.
            latents: Tensor (batch, latent_channels, h, w); None for layers without `latent_channels`.
        """
        normed = apply_norm(self.group_norm if latents is None else self.spatial_norm, features, latents)
        tokens = normed.flatten(2).transpose(1, 2)
        out = super().forward(tokens, context)
        return features + out.transpose(1, 2).reshape(features.shape)
