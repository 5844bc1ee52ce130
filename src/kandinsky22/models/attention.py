"""The only attention: over tokens, with optional extra keys and values that were computed beforehand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import attention
from kandinsky22.kernels.linear import Linear
from kandinsky22.models.layers import GroupNorm, SpatialNorm


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each of shape (batch, heads, tokens, head_dim)."""

    key: Tensor
    value: Tensor

    def followed_by(self, other: KeyValue) -> KeyValue:
        """These tokens first, then those of `other`."""
        return KeyValue(torch.cat([self.key, other.key], dim=2), torch.cat([self.value, other.value], dim=2))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k' / sqrt(head_dim)) v (https://arxiv.org/abs/1706.03762).

    With `context_dim` the layer can also turn context tokens into additional keys and values (`encode_context`), which
    depend on nothing else and so are computed once for many calls.
    """

    def __init__(self, channels: int, *, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        if context_dim is not None:
            self.add_k_proj = Linear(context_dim, channels)
            self.add_v_proj = Linear(context_dim, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], -1, self.head_dim).transpose(1, 2)

    def encode_context(self, context: Tensor) -> KeyValue:
        """Additional keys and values from context tokens (batch, tokens, context_dim)."""
        return KeyValue(self._heads(self.add_k_proj(context)), self._heads(self.add_v_proj(context)))

    def key_value(self, tokens: Tensor) -> KeyValue:
        """Keys and values of tokens (batch, tokens, channels) of the sequence itself."""
        return KeyValue(self._heads(self.to_k(tokens)), self._heads(self.to_v(tokens)))

    def attend(self, tokens: Tensor, kv: KeyValue, mask: Tensor | None = None) -> Tensor:
        """The result for `tokens` (batch, tokens, channels) looking at `kv`, under an additive or boolean mask."""
        query = self._heads(self.to_q(tokens))
        if mask is None and attention.suits(query, *kv):
            out = attention.attention(query, *kv)
        else:
            out = F.scaled_dot_product_attention(query, kv.key, kv.value, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor, context: KeyValue | None = None, mask: Tensor | None = None) -> Tensor:
        """Every token (batch, tokens, channels) looks at the context, if any, and at all tokens."""
        kv = self.key_value(tokens)
        return self.attend(tokens, kv if context is None else context.followed_by(kv), mask)


class ImageAttention(Attention):
    """Attention between all places of a feature map (batch, channels, height, width), normalised first, as a residual.

    `latent_channels` selects the latent-conditioned norm of MoVQ's decoder instead of a plain group norm.
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

    def forward(self, features: Tensor, context: KeyValue | None = None, latents: Tensor | None = None) -> Tensor:
        """Features of the same shape; `latents` (batch, latent_channels, h, w) goes to the latent-conditioned norm."""
        normed = self.group_norm(features) if latents is None else self.spatial_norm(features, latents)
        tokens = normed.flatten(2).transpose(1, 2)
        out = super().forward(tokens, context)
        return features + out.transpose(1, 2).reshape(features.shape)
