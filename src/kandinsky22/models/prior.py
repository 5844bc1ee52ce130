"""The prior: a causal transformer that denoises a CLIP image embedding, given a text (https://arxiv.org/abs/2204.06125).

The sequence is the text tokens, the text embedding, the timestep, the noisy image embedding and a learned query, whose
output is the prediction. Attention is causal, therefore no token depends on those after it. Keys and values of the text
are computed once (`encode_condition`), those of the timesteps for many steps at once, and a step (`denoise`) itself
runs two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.adapters.formats import PRIOR
from kandinsky22.adapters.network_methods import NetworkAdapterMixin
from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, invalid
from kandinsky22.kernels import settings
from kandinsky22.kernels.linear import apply_linear
from kandinsky22.models.attention import Attention, KeyValue
from kandinsky22.models.base import Model
from kandinsky22.models.config_rules import MAX_LAYERS, MAX_WIDTH, Settings
from kandinsky22.models.layers import TimeEmbedding
from kandinsky22.models.modifications import find_modification
from kandinsky22.outputs import Output

STEP_TOKENS = 3  # timestep, noisy image embedding, query
TIMESTEPS_PER_BATCH = 32  # timesteps whose keys and values are computed together
MASKED = -10000.0  # added to the attention scores of padding, as in training; exactly 0 after the softmax


@dataclass(frozen=True)
class PriorTransformerConfig(Config):
    """Constructor arguments of `PriorTransformer`; the defaults are those of the published Kandinsky 2.2 prior.

    Attributes:
        num_attention_heads: Heads of each attention layer.
        attention_head_dim: Channels per head; the transformer is num_attention_heads x attention_head_dim wide.
        num_layers: Number of transformer blocks.
        embedding_dim: Width of CLIP's embeddings and text states.
        num_embeddings: Text tokens.
        additional_embeddings: Other tokens: text embedding, timestep, image embedding and query.
    """

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 1280
    num_embeddings: int = 77
    additional_embeddings: int = 4

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "time_embed_act_fn": ("silu",),
        "norm_in_type": (None,),
        "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",),
        "added_emb_type": ("prd",),
        "time_embed_dim": (None,),
        "embedding_proj_dim": (None,),
        "clip_embed_dim": (None,),
    }

    def __post_init__(self) -> None:
        settings = Settings("PriorTransformer", self)
        settings.integers(("num_layers",), MAX_LAYERS)
        settings.integers([name for name in self if name != "num_layers"])
        if self.additional_embeddings != STEP_TOKENS + 1:
            expected = f"{STEP_TOKENS + 1} (text embedding, timestep, image embedding, query)"
            name = "PriorTransformer: additional_embeddings"
            raise invalid(name, self.additional_embeddings, expected, error=ConfigError)
        width = self.num_attention_heads * self.attention_head_dim
        if width % 2 or width > MAX_WIDTH:
            name = "PriorTransformer: num_attention_heads * attention_head_dim"
            raise invalid(name, width, f"an even number, at most {MAX_WIDTH}", error=ConfigError)
        # attention and feed-forward have 12 matrices of this width; then the projections and the positions
        tokens = self.num_embeddings + self.additional_embeddings
        settings.parameters(width * (12 * self.num_layers * width + 4 * self.embedding_dim + tokens))


@dataclass
class PriorTransformerOutput(Output):
    """Result of `PriorTransformer.forward`.

    Attributes:
        predicted_image_embedding: Tensor (batch, embedding_dim), normalised.
    """

    predicted_image_embedding: Tensor


@dataclass(frozen=True)
class PriorCondition:
    """Everything of a step that depends on the text alone.

    Attributes:
        layers: Keys and values of the text's tokens, per layer.
        mask: Tensor (batch, 1, 1, text), added to the attention scores of the text's tokens.
        schedule: Timesteps that `denoise` will be called with, in order.
        timestep_kv: Keys and values, per layer, of the next timesteps of the schedule; filled by `denoise`.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor
    schedule: Sequence[float] = ()
    timestep_kv: dict[float, list[KeyValue]] = field(default_factory=dict)


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back. Tensor names as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (batch, tokens, width).

        Args:
            tokens: Tensor (batch, tokens, width).
        """
        return apply_linear(self.net[2], self.net[1](self.net[0](tokens)))


class GELU(nn.Module):
    """Linear, then the exact GELU (https://arxiv.org/abs/1606.08415)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (batch, tokens, out_dim).

        Args:
            tokens: Tensor (batch, tokens, in_dim).
        """
        return F.gelu(apply_linear(self.proj, tokens))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each as a residual."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, head_dim=head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, past: KeyValue | None = None, *, return_kv: bool = False
    ) -> Tensor | tuple[Tensor, KeyValue]:
        """Run the block, on a complete sequence or on its last tokens.

        Args:
            tokens: Tensor (batch, tokens, width).
            mask: Added to the attention scores, broadcastable to (batch, heads, tokens, past tokens + tokens); None
                masks nothing.
            past: Keys and values of earlier tokens; None for none.
            return_kv: Whether to return keys and values too; the attention layer is not called as a module then.

        Returns:
            New tokens of the same shape, and with `return_kv` the keys and values of this block's input, for later
            tokens.
        """
        normed = self.norm1(tokens)
        if not return_kv:
            tokens = tokens + self.attn1(normed, past, mask)
            return tokens + self.ff(self.norm3(tokens))
        kv = self.attn1.key_value(normed)
        tokens = tokens + self.attn1.attend(normed, kv if past is None else past.followed_by(kv), mask)
        return tokens + self.ff(self.norm3(tokens)), kv


class PriorTransformer(NetworkAdapterMixin, Model):
    """Network that predicts the clean image embedding (batch, embedding_dim) of a noisy one, from a text."""

    config_class = PriorTransformerConfig
    compiled_blocks = (TransformerBlock,)
    adapter_role = PRIOR
    positional = (
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "embedding_dim",
        "num_embeddings",
        "additional_embeddings",
        "dropout",
        "time_embed_act_fn",
        "norm_in_type",
        "embedding_proj_norm_type",
        "encoder_hid_proj_type",
        "added_emb_type",
        "time_embed_dim",
        "embedding_proj_dim",
        "clip_embed_dim",
    )
    supports_gradient_checkpointing = True
    config: PriorTransformerConfig

    def __init__(self, /, *arguments: Any, **config: Any) -> None:
        super().__init__(*arguments, **config)
        cfg = self.config
        width = cfg.num_attention_heads * cfg.attention_head_dim
        length = cfg.num_embeddings + cfg.additional_embeddings
        self.time_embedding = TimeEmbedding(width, width)
        self.proj_in = nn.Linear(cfg.embedding_dim, width)
        self.embedding_proj = nn.Linear(cfg.embedding_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(cfg.embedding_dim, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, cfg.attention_head_dim) for _ in range(cfg.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, cfg.embedding_dim)
        # zeros until training sets them, as in the reference
        self.clip_mean = nn.Parameter(torch.zeros(1, cfg.embedding_dim))
        self.clip_std = nn.Parameter(torch.zeros(1, cfg.embedding_dim))

    def encode_condition(
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        schedule: Sequence[float] = (),
    ) -> PriorCondition:
        """Return everything of a step that depends on the text alone.

        Tokens after the last one that is text in any batch item are never attended to, so they are not computed.

        Args:
            proj_embedding: Text embedding (batch, embedding_dim).
            encoder_hidden_states: Last hidden state of the text encoder (batch, num_embeddings, embedding_dim).
            attention_mask: Which of its tokens are text (batch, num_embeddings), True or 1.
            schedule: Timesteps that `denoise` will be called with, in order: those steps share more of their work.
                Other timesteps remain possible.
        """
        tokens, padding = self.text_tokens(proj_embedding, encoder_hidden_states, attention_mask)
        scores = padding + self.causal_mask(tokens.shape[1])
        layers = []
        for block in self.transformer_blocks:
            tokens, kv = block(tokens, scores, return_kv=True)
            layers.append(kv)
        return PriorCondition(tuple(layers), padding, schedule)

    def text_tokens(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of a text and of its embedding, and what is added to the attention scores of padding.

        Args:
            proj_embedding: As for `encode_condition`.
            encoder_hidden_states: As for `encode_condition`.
            attention_mask: As for `encode_condition`.

        Returns:
            Tokens (batch, tokens, width) before the first block, and a mask (batch, 1, 1, tokens).
        """
        mask = attention_mask.to(device=proj_embedding.device, dtype=torch.bool)
        used = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 0
        tokens = torch.cat(
            [
                apply_linear(self.encoder_hidden_states_proj, encoder_hidden_states[:, :used].to(self.dtype)),
                apply_linear(self.embedding_proj, proj_embedding.to(self.dtype))[:, None],
            ],
            dim=1,
        )
        positions = self.positional_embedding
        tokens = tokens + torch.cat([positions[:, :used], positions[:, -STEP_TOKENS - 1 : -STEP_TOKENS]], dim=1)
        return tokens, F.pad(MASKED * (~mask[:, :used]).to(self.dtype), (0, 1))[:, None, None, :]

    def step_tokens(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Return the tokens of a step before the first block: timestep, sample and query, (batch, 3, width).

        Args:
            sample: Noisy image embedding (batch, embedding_dim).
            timestep: One timestep from 0 to 999, or a tensor (batch,) with one per batch item.
        """
        time = self.time_embedding(timestep).expand(len(sample), -1)
        query = self.prd_embedding[0].expand(len(sample), -1)
        tokens = torch.stack([time, apply_linear(self.proj_in, sample), query], dim=1)
        return tokens + self.positional_embedding[:, -STEP_TOKENS:]

    def predicted_embedding(self, tokens: Tensor) -> Tensor:
        """Return the predicted image embedding (batch, embedding_dim), normalised, from the last block's tokens.

        Args:
            tokens: Tensor (batch, tokens, width). The last token is the query.
        """
        return apply_linear(self.proj_to_clip_embeddings, self.norm_out(tokens[:, -1]))

    def denoise(self, sample: Tensor, timestep: Tensor | float, condition: PriorCondition) -> Tensor:
        """Return the predicted image embedding (batch, embedding_dim), normalised.

        Args:
            sample: Noisy image embedding (batch, embedding_dim).
            timestep: One timestep from 0 (clean) to 999, or a tensor (batch,) with one per batch item.
            condition: Result of `encode_condition`.
        """
        query = self.prd_embedding[0].expand(len(sample), -1)
        tokens = torch.stack([apply_linear(self.proj_in, sample), query], dim=1)
        tokens = tokens + self.positional_embedding[:, 1 - STEP_TOKENS :]
        causal = F.pad(self.causal_mask(2), (1, 0))
        mask = torch.cat([condition.mask.expand(-1, -1, 2, -1), causal.expand(len(condition.mask), 1, -1, -1)], dim=3)
        timestep_kv = self._timestep_kv(timestep, condition)
        for block, text, time in zip(self.transformer_blocks, condition.layers, timestep_kv, strict=True):
            tokens, _ = block(tokens, mask, text.followed_by(time), return_kv=True)
        return self.predicted_embedding(tokens)

    def causal_mask(self, length: int) -> Tensor:
        """Return the mask (length, length) that is added to attention scores and hides later tokens.

        Args:
            length: Number of tokens.
        """
        return torch.full((length, length), MASKED, dtype=self.dtype, device=self.device).triu(1)

    def _timestep_kv(self, timestep: Tensor | float, condition: PriorCondition) -> list[KeyValue]:
        """Return the timestep token's keys and values per layer, computed for several steps of the schedule at once."""
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            return self._encode_timesteps(timestep[:, None], condition)[0]
        step, schedule = float(timestep), condition.schedule
        if step not in condition.timestep_kv:
            steps = [step]
            if step in schedule and (torch.compiler.is_compiling() or settings.current().batched_timesteps):
                index = list(schedule).index(step)
                steps = [float(t) for t in schedule[index : index + TIMESTEPS_PER_BATCH]]
            encoded = self._encode_timesteps(torch.tensor([steps], dtype=torch.float32, device=self.device), condition)
            condition.timestep_kv.clear()
            condition.timestep_kv.update(zip(steps, encoded, strict=True))
        return condition.timestep_kv[step]

    def _encode_timesteps(self, timesteps: Tensor, condition: PriorCondition) -> list[list[KeyValue]]:
        """Return keys and values of timestep tokens, per column of `timesteps` (batch or 1, steps) and layer.

        The tokens are side by side in one sequence, in which each attends to the text and to itself.
        """
        batch, steps = len(condition.mask), timesteps.shape[1]
        tokens = self.time_embedding(timesteps.flatten()).view(len(timesteps), steps, -1).expand(batch, -1, -1)
        tokens = tokens + self.positional_embedding[:, -STEP_TOKENS, None]
        others = MASKED * (1 - torch.eye(steps, dtype=self.dtype, device=self.device))
        text = condition.mask.expand(-1, -1, steps, -1)
        mask = torch.cat([text, others.expand(batch, 1, -1, -1)], dim=3)
        layers: list[KeyValue] = []
        for block, past in zip(self.transformer_blocks, condition.layers, strict=True):
            tokens, kv = block(tokens, mask, past, return_kv=True)
            layers.append(kv)
        return [[KeyValue(kv.key[:, :, i : i + 1], kv.value[:, :, i : i + 1]) for kv in layers] for i in range(steps)]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """Predict the image embedding.

        With gradients, hooks, compiled forms or replaced forwards, each module is called once with all tokens, as in
        the reference. Otherwise `encode_condition` and `denoise` compute the same in fewer operations.

        Args:
            hidden_states: Noisy image embedding (batch, embedding_dim).
            timestep: One timestep from 0 (clean) to 999, or a tensor (batch,) with one per batch item.
            proj_embedding: Text embedding (batch, embedding_dim).
            encoder_hidden_states: Last hidden state of the text encoder (batch, num_embeddings, embedding_dim).
            attention_mask: Which of its tokens are text (batch, num_embeddings), True or 1. None masks nothing: as in
                the reference, every token then attends to all others, also to later ones.
            return_dict: Whether to return a `PriorTransformerOutput` instead of a tuple.

        Returns:
            The predicted image embedding (batch, embedding_dim), normalised.

        Raises:
            InputError: `encoder_hidden_states` is None: this prior needs a text.
        """
        if encoder_hidden_states is None:
            raise invalid("encoder_hidden_states", None, "a tensor (batch, num_embeddings, embedding_dim)")
        if attention_mask is not None and self._is_fast():
            condition = self.encode_condition(proj_embedding, encoder_hidden_states, attention_mask)
            predicted = self.denoise(hidden_states, timestep, condition)
        else:
            predicted = self._complete_sequence(
                hidden_states, timestep, proj_embedding, encoder_hidden_states, attention_mask
            )
        return PriorTransformerOutput(predicted) if return_dict else (predicted,)

    def _is_fast(self) -> bool:
        """Return whether a call may leave out what no result depends on, because nothing could see the difference."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and find_modification(self) is None

    def _complete_sequence(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Return the prediction from all tokens at once, with each module called once."""
        dtype, batch = self.dtype, len(hidden_states)
        tokens = torch.cat(
            [
                apply_linear(self.encoder_hidden_states_proj, encoder_hidden_states.to(dtype)),
                apply_linear(self.embedding_proj, proj_embedding.to(dtype)).view(batch, 1, -1),
                self.time_embedding(timestep).expand(batch, -1)[:, None],
                apply_linear(self.proj_in, hidden_states).view(batch, 1, -1),
                self.prd_embedding.expand(batch, -1, -1),
            ],
            dim=1,
        )
        text, positions = encoder_hidden_states.shape[1], self.positional_embedding
        tokens = tokens + torch.cat([positions[:, :text], positions[:, -STEP_TOKENS - 1 :]], dim=1)
        mask = None
        if attention_mask is not None:
            padding = F.pad(MASKED * (1 - attention_mask.to(device=tokens.device, dtype=dtype)), (0, STEP_TOKENS + 1))
            mask = padding[:, None, None, :] + self.causal_mask(tokens.shape[1])
        for block in self.transformer_blocks:
            tokens = self.run_block(block, tokens, mask)
        return apply_linear(self.proj_to_clip_embeddings, self.norm_out(tokens)[:, -1])

    defined_forward = forward  # a subclass or a library may replace it, and the replacement is called then

    def has_own_structure(self) -> bool:
        """Return whether `encode_condition` and `denoise` can run all blocks: none was replaced by another module."""
        return all(
            type(block) is TransformerBlock and type(block.attn1) is Attention for block in self.transformer_blocks
        )

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Return embeddings in CLIP's range; the prior works on embeddings of mean 0 and deviation 1 per element.

        Args:
            prior_latents: Tensor (batch, embedding_dim), normalised.
        """
        return prior_latents * self.clip_std.to(prior_latents.device) + self.clip_mean.to(prior_latents.device)
