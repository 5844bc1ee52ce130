"""CLIP's text and vision towers with their projections (Radford et al. 2021, arXiv:2103.00020).

Checkpoints name the classes of transformers. The classes here have the same layers under the same names, compute the
same, and read and write the same files. Importing the modelling code of transformers takes longer than running a tower.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.checkpoints.folder_save import FolderSave, folder_save
from kandinsky22.checkpoints.weights import (
    TRANSFORMERS_STEM,
    check_save_arguments,
    replaced_weight_files,
    write_weight_files,
)
from kandinsky22.errors import invalid
from kandinsky22.models.clip_config import ACTIVATIONS, CLIPTextConfig, CLIPTowerConfig, CLIPVisionConfig
from kandinsky22.outputs import Output

# Early checkpoints of CLIP have this id here; their texts end at the token with the highest id.
HIGHEST_ID_ENDS = 2


# Layers


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
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

    def forward(self, states: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return new states.

        Args:
            states: Tensor (batch, tokens, width).
            mask: True where a token attends to another, broadcastable to (batch, heads, tokens, tokens); None for all.
            causal: Whether tokens attend to themselves and earlier ones only.
        """
        states = states + self.self_attn(self.layer_norm1(states), mask, causal)
        output: Tensor = states + self.mlp(self.layer_norm2(states))
        return output


class Encoder(nn.Module):
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
            results = [*(results if keep_all else ()), layer(results[-1], mask, causal)]
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

    def forward(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Return embeddings, (batch, tokens, hidden_size).

        Args:
            ids: Token ids, (batch, tokens).
            positions: Positions of the tokens, (batch, tokens); None for 0, 1, 2, ...

        Raises:
            InputError: There are too many tokens.
        """
        length, longest = ids.shape[-1], self.position_embedding.num_embeddings
        if length > longest:
            raise invalid("input_ids.shape[-1]", length, f"at most {longest} tokens")
        if positions is None:
            positions = torch.arange(length, device=ids.device)
        output: Tensor = self.token_embedding(ids) + self.position_embedding(positions)
        return output


class VisionEmbeddings(nn.Module):
    """Embeddings of square patches after a class token, with positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = _embedding_table((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings of the class token and all patches, (batch, 1 + patches, hidden_size).

        Args:
            pixels: Tensor (batch, 3, image_size, image_size).

        Raises:
            InputError: The images have another size.
        """
        side = self.image_size
        if tuple(pixels.shape[-2:]) != (side, side):
            raise invalid("pixel_values", pixels, f"pixels of shape (batch, 3, {side}, {side})")
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        output: Tensor = tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        return output


class TextTransformer(nn.Module):
    """The text tower without its projection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, keep_all: bool
    ) -> list[Tensor]:
        """Return the states after the last layer, (batch, tokens, hidden_size), or all states.

        Args:
            ids: Token ids, (batch, tokens).
            attention_mask: (batch, tokens), 0 for tokens that no other token attends to; None for none.
            positions: Positions of the tokens; None for 0, 1, 2, ...
            keep_all: Whether the outputs of all layers are returned, after the input of the first.
        """
        states = self.embeddings(ids, positions)
        if attention_mask is None or bool(attention_mask.all()):
            return list(self.encoder(states, None, True, keep_all))
        length = ids.shape[-1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        return list(self.encoder(states, earlier & attention_mask.bool()[:, None, None, :], False, keep_all))


class VisionTransformer(nn.Module):
    """The vision tower without its projection."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the name in the files
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor, keep_all: bool) -> list[Tensor]:
        """Return the states after the last layer, (batch, 1 + patches, hidden_size), or all states.

        Args:
            pixels: Tensor (batch, 3, image_size, image_size).
            keep_all: Whether the outputs of all layers are returned, after the input of the first.
        """
        return list(self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None, False, keep_all))


# Towers


@dataclasses.dataclass
class CLIPTextOutput(Output):
    """Result of the text tower.

    Attributes:
        text_embeds: Embeddings of the texts, (batch, projection_dim).
        last_hidden_state: Normalised states of all tokens, (batch, tokens, hidden_size).
        hidden_states: Input of the first layer and output of each, (batch, tokens, hidden_size); None if not requested.
    """

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class CLIPVisionOutput(Output):
    """Result of the vision tower.

    Attributes:
        image_embeds: Embeddings of the images, (batch, projection_dim).
        last_hidden_state: States of the class token and all patches, (batch, 1 + patches, hidden_size).
        hidden_states: Input of the first layer and output of each; None if not requested.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTower(nn.Module):
    """Base of both towers.

    Args:
        config: Settings of the tower.

    Attributes:
        config_class: Class of the config.
    """

    config_class: ClassVar[type[CLIPTowerConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Return the number of parameter elements."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config and weights under the file names of transformers, all together or, if it fails, nothing.

        Args:
            save_directory: Folder to write to.
            variant: Variant in the names of the weight files, such as "fp16"; None for none.
            max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
            safe_serialization: Whether to write safetensors instead of pickled files.

        Raises:
            CheckpointError: The folder cannot be written.
            InputError: An argument is invalid.
        """
        folder = checked_save_path(save_directory)
        check_save_arguments(variant, max_shard_size, safe_serialization)
        with folder_save(folder) as save:
            stage_tower(self, save, "", variant=variant, max_shard_size=max_shard_size, safe=safe_serialization)


class CLIPTextModelWithProjection(CLIPTower):
    """The text tower.

    Args:
        config: Its settings.
    """

    config_class = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = TextTransformer(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> CLIPTextOutput:
        """Encode texts.

        Args:
            input_ids: Token ids, (batch, tokens), with at most `max_position_embeddings` tokens.
            attention_mask: (batch, tokens), 0 for tokens that no other token attends to; None for none.
            position_ids: Positions of the tokens, (batch, tokens); None for 0, 1, 2, ...
            output_hidden_states: Whether the states of all layers are returned.

        Returns:
            The embeddings, and the states of the tokens.

        Raises:
            InputError: There are too many tokens.
        """
        hidden_states = self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)
        normalised = self.text_model.final_layer_norm(hidden_states[-1])
        last = normalised[torch.arange(len(input_ids), device=input_ids.device), self._ends(input_ids)]
        states = tuple(hidden_states) if output_hidden_states else None
        return CLIPTextOutput(self.text_projection(last), normalised, states)

    def _ends(self, ids: Tensor) -> Tensor:
        """Return the position of the first token that ends each text, (batch,)."""
        end = self.config.eos_token_id
        return (ids if end == HIGHEST_ID_ENDS else (ids == end).int()).argmax(dim=-1)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.text_model.embeddings.token_embedding


class CLIPVisionModelWithProjection(CLIPTower):
    """The vision tower.

    Args:
        config: Its settings.
    """

    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool = False) -> CLIPVisionOutput:
        """Encode images.

        Args:
            pixel_values: Normalised pixels, (batch, 3, image_size, image_size).
            output_hidden_states: Whether the states of all layers are returned.

        Returns:
            The embeddings, and the states of class token and patches.

        Raises:
            InputError: The images have another size.
        """
        hidden_states = self.vision_model(pixel_values, output_hidden_states)
        pooled = self.vision_model.post_layernorm(hidden_states[-1][:, 0])
        states = tuple(hidden_states) if output_hidden_states else None
        return CLIPVisionOutput(self.visual_projection(pooled), hidden_states[-1], states)


def stage_tower(
    tower: CLIPTower,
    save: FolderSave,
    subfolder: str,
    *,
    variant: str | None,
    max_shard_size: int | str,
    safe: bool = True,
) -> None:
    """Write config and weights of a tower as part of a save.

    Args:
        tower: The tower.
        save: The save.
        subfolder: Folder of the tower in the saved folder; empty for that folder itself.
        variant: Variant in the names of the weight files; None for none.
        max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
        safe: Whether to write safetensors instead of pickled files.

    Raises:
        CheckpointError: If a file cannot be written.
    """
    folder, stem = save.stage(subfolder), TRANSFORMERS_STEM[safe]
    write_weight_files(folder, tower.state_dict(), variant=variant, max_shard_size=max_shard_size, safe=safe, stem=stem)
    save.replace(subfolder, replaced_weight_files(variant, safe, [stem]))
    entries = {**tower.config.to_dict(), "architectures": [type(tower).__name__]}
    entries["torch_dtype"] = str(tower.dtype).removeprefix("torch.")
    write_json(folder / "config.json", entries, flush=False)
