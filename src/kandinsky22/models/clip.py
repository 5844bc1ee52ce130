"""CLIP's text and vision towers with their projections (Radford et al. 2021, arXiv:2103.00020).

Checkpoints name the classes of transformers. The classes here have the same layers under the same names, compute the
same, take the same arguments, and read and write the same files. Importing the modelling code of transformers takes
longer than running a tower.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import write_json
from kandinsky22.checkpoints.folder_save import FolderSave
from kandinsky22.checkpoints.weights import TRANSFORMERS_STEM, replaced_weight_files, write_weight_files
from kandinsky22.errors import invalid
from kandinsky22.models.clip_config import CLIPTextConfig, CLIPTowerConfig, CLIPVisionConfig
from kandinsky22.models.clip_layers import Encoder, TextEmbeddings, VisionEmbeddings
from kandinsky22.models.clip_methods import CLIPMethods
from kandinsky22.outputs import Output

# Early checkpoints of CLIP have this id here; their texts end at the token with the highest id.
HIGHEST_ID_ENDS = 2


# Results


@dataclasses.dataclass
class CLIPTransformerOutput(Output):
    """Result of a tower without its projection.

    Attributes:
        last_hidden_state: States of all tokens, (batch, tokens, hidden_size): normalised in the text tower.
        pooler_output: Normalised state of the token that stands for the text or image, (batch, hidden_size).
        hidden_states: Input of the first layer and output of each, (batch, tokens, hidden_size); None if not requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


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


# Towers without projection


class TextTransformer(nn.Module):
    """The text tower without its projection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the states of the tokens, and of the one that ends each text.

        Args:
            input_ids: Token ids, (batch, tokens) or (tokens,).
            attention_mask: (batch, tokens), 0 for tokens that no other token attends to; None for none.
            position_ids: Positions of the tokens; None for 0, 1, 2, ...
            output_attentions: False or None: attention weights are not available.
            output_hidden_states: Whether the states of all layers are returned; None for the config's setting.
            return_dict: Whether the result has names; False for a tuple, None for the config's setting.

        Returns:
            A `CLIPTransformerOutput`, or the tuple of its entries.

        Raises:
            InputError: There are too many tokens, or attention weights are requested.
        """
        keep_all = _keeps_all(self.config, output_attentions, output_hidden_states)
        ids = input_ids.reshape(-1, input_ids.shape[-1])
        states = self.embeddings(ids, position_ids)
        if attention_mask is None or bool(attention_mask.all()):
            hidden_states = self.encoder(states, None, True, keep_all)
        else:
            length = ids.shape[-1]
            earlier = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            attended = attention_mask.reshape(-1, length).bool()[:, None, None, :]
            hidden_states = self.encoder(states, earlier & attended, False, keep_all)
        normalised = self.final_layer_norm(hidden_states[-1])
        last = normalised[torch.arange(len(ids), device=ids.device), self._ends(ids)]
        output = CLIPTransformerOutput(normalised, last, tuple(hidden_states) if keep_all else None)
        return _as_requested(output, self.config, return_dict)

    def _ends(self, ids: Tensor) -> Tensor:
        """Return the position of the first token that ends each text, (batch,)."""
        end = self.config.eos_token_id
        return (ids if end == HIGHEST_ID_ENDS else (ids == end).int()).argmax(dim=-1)


class VisionTransformer(nn.Module):
    """The vision tower without its projection."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the name in the files
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Any:
        """Return the states of class token and patches, and the normalised one of the class token.

        Args:
            pixel_values: Normalised pixels, (batch, 3, image_size, image_size).
            output_attentions: False or None: attention weights are not available.
            output_hidden_states: Whether the states of all layers are returned; None for the config's setting.
            return_dict: Whether the result has names; False for a tuple, None for the config's setting.
            interpolate_pos_encoding: Whether images may have another size.

        Returns:
            A `CLIPTransformerOutput`, or the tuple of its entries.

        Raises:
            InputError: The images have another size, or attention weights are requested.
        """
        keep_all = _keeps_all(self.config, output_attentions, output_hidden_states)
        states = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        hidden_states = self.encoder(states, None, False, keep_all)
        pooled = self.post_layernorm(hidden_states[-1][:, 0])
        output = CLIPTransformerOutput(hidden_states[-1], pooled, tuple(hidden_states) if keep_all else None)
        return _as_requested(output, self.config, return_dict)


def _keeps_all(config: CLIPTowerConfig, output_attentions: bool | None, output_hidden_states: bool | None) -> bool:
    """Return whether the states of all layers are requested."""
    if output_attentions:
        advice = "load the tower with transformers, and pass it to the pipeline"
        raise invalid("output_attentions", output_attentions, "False: attention weights are not stored", advice)
    return bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)


def _as_requested(output: Output, config: CLIPTowerConfig, return_dict: bool | None) -> Any:
    """Return a result with names, or the tuple of its entries."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


# Towers


class CLIPTower(CLIPMethods, nn.Module):
    """Base of both towers.

    Args:
        config: Settings of the tower.

    Attributes:
        config_class: Class of the config.
        main_input_name: Name of the first argument.
        base_model_prefix: Name of the tower without its projection.
    """

    config_class: ClassVar[type[CLIPTowerConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def _stage(self, save: FolderSave, variant: str | None, max_shard_size: int | str, safe: bool) -> None:
        stage_tower(self, save, "", variant=variant, max_shard_size=max_shard_size, safe=safe)


class CLIPTextModelWithProjection(CLIPTower):
    """The text tower.

    Args:
        config: Its settings.
    """

    config_class = CLIPTextConfig
    main_input_name = "input_ids"
    base_model_prefix = "text_model"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = TextTransformer(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode texts.

        Args:
            input_ids: Token ids, (batch, tokens), with at most `max_position_embeddings` tokens.
            attention_mask: (batch, tokens), 0 for tokens that no other token attends to; None for none.
            position_ids: Positions of the tokens, (batch, tokens); None for 0, 1, 2, ...
            output_attentions: False or None: attention weights are not available.
            output_hidden_states: Whether the states of all layers are returned; None for the config's setting.
            return_dict: Whether the result has names; False for a tuple, None for the config's setting.

        Returns:
            A `CLIPTextOutput` with the embeddings and the states of the tokens, or the tuple of its entries.

        Raises:
            InputError: There are too many tokens, or attention weights are requested.
        """
        result = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states, True)
        embeds = self.text_projection(result.pooler_output)
        output = CLIPTextOutput(embeds, result.last_hidden_state, result.hidden_states)
        return _as_requested(output, self.config, return_dict)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the table of token embeddings.

        Args:
            value: The new table, an `nn.Embedding`.

        Raises:
            InputError: It has another width.
        """
        if not isinstance(value, nn.Embedding) or value.embedding_dim != self.config.hidden_size:
            raise invalid("value", value, f"an nn.Embedding of width {self.config.hidden_size}")
        self.text_model.embeddings.token_embedding = value
        self._renew_input_hook()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        **unknown: Any,
    ) -> nn.Embedding:
        """Change the number of token embeddings, as textual inversion does after new tokens.

        Args:
            new_num_tokens: Number of tokens; None for the present one.
            pad_to_multiple_of: The number of tokens is rounded up to a multiple of it; None does not round.
            mean_resizing: Whether rows that are added have the mean of the others. Otherwise they are drawn from the
                normal distribution around 0 whose standard deviation is the config's `initializer_range`.
            **unknown: Nothing: other arguments are refused.

        Returns:
            The table of token embeddings: the present one if its size does not change.

        Raises:
            InputError: An argument is invalid or unknown.
        """
        if unknown:
            accepted = "new_num_tokens, pad_to_multiple_of and mean_resizing"
            raise invalid("arguments of resize_token_embeddings", ", ".join(sorted(unknown)), accepted)
        numbers: dict[str, Any] = {"new_num_tokens": new_num_tokens, "pad_to_multiple_of": pad_to_multiple_of}
        for name, number in numbers.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise invalid(name, number, "a number of tokens, or None")
        if not isinstance(mean_resizing, bool):
            raise invalid("mean_resizing", mean_resizing, "True or False")
        old = self.get_input_embeddings()
        rows = old.weight.detach()
        length, factor = new_num_tokens or len(rows), pad_to_multiple_of or 1
        length = -(-length // factor) * factor
        if length != len(rows):
            added = rows.mean(dim=0, keepdim=True).repeat(max(0, length - len(rows)), 1)
            if not mean_resizing:
                added.normal_(0, self.config.initializer_range)
            table = nn.Embedding.from_pretrained(torch.cat([rows[:length], added]), freeze=False)
            table.weight.requires_grad_(old.weight.requires_grad)
            self.set_input_embeddings(table)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.config.vocab_size = length
        return self.get_input_embeddings()


class CLIPVisionModelWithProjection(CLIPTower):
    """The vision tower.

    Args:
        config: Its settings.
    """

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_model"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: Normalised pixels, (batch, 3, image_size, image_size).
            output_attentions: False or None: attention weights are not available.
            output_hidden_states: Whether the states of all layers are returned; None for the config's setting.
            return_dict: Whether the result has names; False for a tuple, None for the config's setting.
            interpolate_pos_encoding: Whether images may have another size: the positions are interpolated then.

        Returns:
            A `CLIPVisionOutput` with the embeddings and the states of class token and patches, or the tuple of its
            entries.

        Raises:
            InputError: The images have another size, or attention weights are requested.
        """
        result = self.vision_model(
            pixel_values, output_attentions, output_hidden_states, True, interpolate_pos_encoding
        )
        embeds = self.visual_projection(result.pooler_output)
        output = CLIPVisionOutput(embeds, result.last_hidden_state, result.hidden_states)
        return _as_requested(output, self.config, return_dict)

    def get_input_embeddings(self) -> nn.Conv2d:
        """Return the layer that embeds patches."""
        return self.vision_model.embeddings.patch_embedding


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
