"""The prior: a causal transformer that denoises a CLIP image embedding, given a text (https://arxiv.org/abs/2204.06125).

The sequence is the text tokens, the text embedding, the timestep, the noisy image embedding and a learned query, whose
output is the prediction. Attention is causal, so no token depends on those after it: keys and values of the text are
computed once (`encode_condition`), those of the timesteps for many steps in one go, and a step (`denoise`) itself runs
two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.kernels.linear import Linear
from kandinsky22.models.attention import Attention, KeyValue
from kandinsky22.models.base import Model
from kandinsky22.models.layers import TimeEmbedding
from kandinsky22.outputs import Output

STEP_TOKENS = 3  # timestep, noisy image embedding, query
AHEAD = 32  # timesteps whose keys and values are computed together
MASKED = -10000.0  # added to the attention scores of padding, as in training; exactly 0 after the softmax


@dataclass(frozen=True)
class PriorTransformerConfig(Config):
    """Constructor arguments of PriorTransformer; the defaults are those of the published Kandinsky 2.2 prior."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 1280
    num_embeddings: int = 77
    additional_embeddings: int = 4

    only: ClassVar[dict[str, tuple[Any, ...]]] = {
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
        for name in self:
            if not isinstance(self[name], int) or self[name] < 1:
                raise ConfigError(f"PriorTransformer: {name}={self[name]!r}; accepted: a whole number from 1")
        if self.additional_embeddings != STEP_TOKENS + 1:
            raise ConfigError(
                f"PriorTransformer: additional_embeddings={self.additional_embeddings}; accepted: {STEP_TOKENS + 1} "
                "(text embedding, timestep, image embedding, query)"
            )
        if self.num_attention_heads * self.attention_head_dim % 2:
            raise ConfigError("PriorTransformer: num_attention_heads x attention_head_dim must be even")


@dataclass
class PriorTransformerOutput(Output):
    """What `forward` returns: the predicted image embedding (batch, embedding_dim), normalised."""

    predicted_image_embedding: Tensor


@dataclass(frozen=True)
class PriorCondition:
    """All that the prior needs to know of a text: keys and values per layer, and which of them count.

    `mask` (batch, 1, 1, text) is what is added to the scores of the text's tokens. `schedule` are the timesteps to
    come, in order; `ahead` holds the keys and values, per layer, of the next few of them.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor
    schedule: Sequence[float] = ()
    ahead: dict[float, list[KeyValue]] = field(default_factory=dict)


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back. Tensor names as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        return self.net[2](self.net[0](tokens))


class GELU(nn.Module):
    """Linear, then the exact GELU (https://arxiv.org/abs/1606.08415)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = Linear(in_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, out_dim)."""
        return F.gelu(self.proj(tokens))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each as a residual."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, head_dim=head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: Tensor, mask: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """New tokens (batch, tokens, width), and the keys and values they had, for those that come after them."""
        normed = self.norm1(tokens)
        own = self.attn1.key_value(normed)
        tokens = tokens + self.attn1.attend(normed, own if past is None else past.followed_by(own), mask)
        return tokens + self.ff(self.norm3(tokens)), own


class PriorTransformer(Model):
    """Predicts the image embedding behind a noisy one, from a text; embeddings have `embedding_dim` numbers."""

    config_class = PriorTransformerConfig
    compiled_blocks = (TransformerBlock,)
    config: PriorTransformerConfig

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        cfg = self.config
        width = cfg.num_attention_heads * cfg.attention_head_dim
        length = cfg.num_embeddings + cfg.additional_embeddings
        self.time_embedding = TimeEmbedding(width, width)
        self.proj_in = Linear(cfg.embedding_dim, width)
        self.embedding_proj = Linear(cfg.embedding_dim, width)
        self.encoder_hidden_states_proj = Linear(cfg.embedding_dim, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, cfg.attention_head_dim) for _ in range(cfg.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = Linear(width, cfg.embedding_dim)
        # zeros, as in the reference: a prior says what its embeddings look like only once it is trained
        self.clip_mean = nn.Parameter(torch.zeros(1, cfg.embedding_dim))
        self.clip_std = nn.Parameter(torch.zeros(1, cfg.embedding_dim))

    def encode_condition(
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        schedule: Sequence[float] = (),
    ) -> PriorCondition:
        """Everything of a step that depends on the text alone.

        Takes the text embedding (batch, embedding_dim), the text encoder's last hidden state (batch, num_embeddings,
        embedding_dim) and which of its tokens are text (batch, num_embeddings; true or 1). Tokens after the last one
        that is text in any sample are never looked at, so they are not computed. With `schedule`, the timesteps that
        `denoise` will be called with, in order, those steps share more of their work; others remain possible.
        """
        mask = attention_mask.to(device=proj_embedding.device, dtype=torch.bool)
        used = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 0
        tokens = torch.cat(
            [
                self.encoder_hidden_states_proj(encoder_hidden_states[:, :used].to(self.dtype)),
                self.embedding_proj(proj_embedding.to(self.dtype))[:, None],
            ],
            dim=1,
        )
        places = self.positional_embedding
        tokens = tokens + torch.cat([places[:, :used], places[:, -STEP_TOKENS - 1 : -STEP_TOKENS]], dim=1)

        padding = F.pad(MASKED * (~mask[:, :used]).to(self.dtype), (0, 1))[:, None, None, :]
        scores = padding + self._causal(used + 1)
        layers = []
        for block in self.transformer_blocks:
            tokens, kv = block(tokens, scores)
            layers.append(kv)
        return PriorCondition(tuple(layers), padding, schedule)

    def denoise(self, sample: Tensor, timestep: Tensor | float, condition: PriorCondition) -> Tensor:
        """The predicted image embedding (batch, embedding_dim) behind `sample` of that shape, normalised.

        `timestep` is one number for the batch or one per sample, 0 (clean) to 999.
        """
        tokens = torch.stack([self.proj_in(sample), self.prd_embedding[0].expand(len(sample), -1)], dim=1)
        tokens = tokens + self.positional_embedding[:, 1 - STEP_TOKENS :]
        own = F.pad(self._causal(2), (1, 0))
        mask = torch.cat([condition.mask.expand(-1, -1, 2, -1), own.expand(len(condition.mask), 1, -1, -1)], dim=3)
        times = self._times(timestep, condition)
        for block, text, time in zip(self.transformer_blocks, condition.layers, times, strict=True):
            tokens, _ = block(tokens, mask, text.followed_by(time))
        return self.proj_to_clip_embeddings(self.norm_out(tokens[:, -1]))

    def _causal(self, length: int) -> Tensor:
        """What is added to scores so that tokens do not see those after them, (length, length)."""
        return torch.full((length, length), MASKED, dtype=self.dtype, device=self.device).triu(1)

    def _times(self, timestep: Tensor | float, condition: PriorCondition) -> list[KeyValue]:
        """Keys and values of the timestep's token, from what was computed ahead if it is there."""
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            return self._encode_times(timestep[:, None], condition)[0]
        step = float(timestep)
        if step not in condition.ahead:
            place = list(condition.schedule).index(step) if step in condition.schedule else None
            block = [step] if place is None else [float(t) for t in condition.schedule[place : place + AHEAD]]
            encoded = self._encode_times(torch.tensor([block], device=self.device), condition)
            condition.ahead.clear()
            condition.ahead.update(zip(block, encoded, strict=True))
        return condition.ahead[step]

    def _encode_times(self, timesteps: Tensor, condition: PriorCondition) -> list[list[KeyValue]]:
        """Keys and values of timestep tokens, per column of `timesteps` (batch or 1, steps) and layer.

        They stand side by side in one sequence, in which each sees the text and itself.
        """
        batch, steps = len(condition.mask), timesteps.shape[1]
        tokens = self.time_embedding(timesteps.flatten()).view(len(timesteps), steps, -1).expand(batch, -1, -1)
        tokens = tokens + self.positional_embedding[:, -STEP_TOKENS, None]
        apart = MASKED * (1 - torch.eye(steps, dtype=self.dtype, device=self.device))
        text = condition.mask.expand(-1, -1, steps, -1)
        mask = torch.cat([text, apart.expand(batch, 1, -1, -1)], dim=3)
        layers: list[KeyValue] = []
        for block, past in zip(self.transformer_blocks, condition.layers, strict=True):
            tokens, own = block(tokens, mask, past)
            layers.append(own)
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
        """`encode_condition` and `denoise` in a row; shapes as there, `hidden_states` being the noisy embedding.

        Raises InputError without `encoder_hidden_states` or `attention_mask`: this prior is causal and reads a text.
        """
        for name, value in (("encoder_hidden_states", encoder_hidden_states), ("attention_mask", attention_mask)):
            if value is None:
                raise InputError(f"{name} is missing; accepted: a tensor, one row per sample")
        assert encoder_hidden_states is not None
        assert attention_mask is not None
        condition = self.encode_condition(proj_embedding, encoder_hidden_states, attention_mask)
        predicted = self.denoise(hidden_states, timestep, condition)
        return PriorTransformerOutput(predicted) if return_dict else (predicted,)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """The embedding in CLIP's own range: the prior works on embeddings of mean 0 and deviation 1 (per number)."""
        return prior_latents * self.clip_std.to(prior_latents.device) + self.clip_mean.to(prior_latents.device)
