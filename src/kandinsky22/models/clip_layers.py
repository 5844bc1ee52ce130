"""Layers of CLIP's towers (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.errors import invalid
from kandinsky22.kernels.half_precision import call_conv
from kandinsky22.models.checkpointing import Checkpointing
from kandinsky22.models.clip_config import ACTIVATIONS, CLIPTextConfig, CLIPTowerConfig, CLIPVisionConfig


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return new states.

        Args:
            states: Tensor (batch, tokens, width).
            mask: True where a token attends to another, broadcastable to (batch, heads, tokens, tokens); None for all.
            causal: Whether tokens attend to themselves and earlier ones only.
        """
        query, key, value = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Return new states.

        Args:
            states: Tensor (batch, tokens, width).
        """
        output: Tensor = self.fc2(self.activation(self.fc1(states)))
        return output


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return new states.

        Args:
            states: Tensor (batch, tokens, width).
            mask: True where a token attends to another, broadcastable to (batch, heads, tokens, tokens); None for all.
            causal: Whether tokens attend to themselves and earlier ones only.
        """
        states = states + self.self_attn(self.layer_norm1(states), mask, causal)
        output: Tensor = states + self.mlp(self.layer_norm2(states))
        return output


class Encoder(Checkpointing, nn.Module):
    """The layers of a tower."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, states: Tensor, mask: Tensor | None, causal: bool, keep_all: bool) -> list[Tensor]:
        """Return the output of the last layer; with `keep_all` the input of the first and the output of each.

        Args:
            states: Tensor (batch, tokens, width).
            mask: True where a token attends to another, broadcastable to (batch, heads, tokens, tokens); None for all.
            causal: Whether tokens attend to themselves and earlier ones only.
            keep_all: Whether the outputs of all layers are returned.
        """
        results = [states]
        for layer in self.layers:
            results = [*(results if keep_all else ()), self.run_block(layer, results[-1], mask, causal)]
        return results


def _embedding_table(rows: int, width: int) -> nn.Embedding:
    """Return a table that is initialised as torch does it, but not on the meta device.

    There, the normal distribution is Python code of torch, whose import takes two seconds.
    """
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class TextEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding_table(config.vocab_size, config.hidden_size)
        self.position_embedding = _embedding_table(config.max_position_embeddings, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return embeddings, (batch, tokens, hidden_size).

        Args:
            input_ids: Token ids, (batch, tokens); None with `inputs_embeds`.
            position_ids: Positions of the tokens, (batch, tokens); None for 0, 1, 2, ...
            inputs_embeds: Token embeddings in place of ids, (batch, tokens, hidden_size); None for those of the ids.

        Raises:
            InputError: There are too many tokens, or there are neither ids nor embeddings.
        """
        if input_ids is None and inputs_embeds is None:
            raise invalid("input_ids", None, "token ids, or inputs_embeds")
        tokens = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = tokens.shape[-2], self.position_embedding.num_embeddings
        if length > longest:
            raise invalid("input_ids.shape[-1]", length, f"at most {longest} tokens")
        if position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)
        output: Tensor = tokens + self.position_embedding(position_ids)
        return output


class VisionEmbeddings(nn.Module):
    """Embeddings of square patches after a class token, with positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size, self.patch_size = config.image_size, patch
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = _embedding_table((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return embeddings of the class token and all patches, (batch, 1 + patches, hidden_size).

        Args:
            pixel_values: Tensor (batch, 3, image_size, image_size).
            interpolate_pos_encoding: Whether images may have another size: the positions are interpolated then.

        Raises:
            InputError: The images have another size, or other channels.
        """
        side, channels = self.image_size, self.patch_embedding.in_channels
        if interpolate_pos_encoding:
            fits, shape = pixel_values.shape[1:2] == (channels,), f"(batch, {channels}, height, width)"
            fits &= pixel_values.ndim == 4 and min(pixel_values.shape[2:]) >= self.patch_size
        else:
            fits = tuple(pixel_values.shape[1:]) == (channels, side, side)
            shape = f"(batch, {channels}, {side}, {side})"
        if not fits:
            raise invalid("pixel_values", pixel_values, f"pixels of shape {shape}")
        patches = call_conv(self.patch_embedding, pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = torch.cat(
            [self.class_embedding.expand(len(patches), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        output: Tensor = tokens + self._positions(*pixel_values.shape[-2:])
        return output

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the embeddings of the positions in an image, interpolated for sizes other than the config's."""
        if (height, width) == (self.image_size, self.image_size):
            positions = torch.arange(self.position_embedding.num_embeddings, device=self.class_embedding.device)
            own_size: Tensor = self.position_embedding(positions)
            return own_size
        grid, own = (height // self.patch_size, width // self.patch_size), self.image_size // self.patch_size
        table = self.position_embedding.weight
        patches = table[1:].view(1, own, own, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(patches, grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:1], resized.flatten(2).transpose(1, 2)[0]])
