"""The prior: a causal transformer that denoises a CLIP image embedding, given a text (https://arxiv.org/abs/2204.06125).

The sequence is the text tokens, the text embedding, the timestep, the noisy image embedding and a learned query, whose
output is the prediction. Attention is causal, so nothing before the timestep depends on the step: keys and values of
the text are computed once (`encode_condition`), and each step (`denoise`) runs three tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.models.attention import Attention, KeyValue
from kandinsky22.models.base import Model
from kandinsky22.models.layers import TimeEmbedding
from kandinsky22.outputs import Output

STEP_TOKENS = 3  # timestep, noisy image embedding, query
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

    `mask` (batch, 1, 3, text + 3) is what is added to the scores of the three tokens of a step.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back. Tensor names as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        return self.net[2](self.net[0](tokens))


class GELU(nn.Module):
    """Linear, then the exact GELU (https://arxiv.org/abs/1606.08415)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

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
    config: PriorTransformerConfig

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
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
        # zeros, as in the reference: a prior says what its embeddings look like only once it is trained
        self.clip_mean = nn.Parameter(torch.zeros(1, cfg.embedding_dim))
        self.clip_std = nn.Parameter(torch.zeros(1, cfg.embedding_dim))

    def encode_condition(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> PriorCondition:
        """Everything of a step that depends on the text alone.

        Takes the text embedding (batch, embedding_dim), the text encoder's last hidden state (batch, num_embeddings,
        embedding_dim) and which of its tokens are text (batch, num_embeddings; true or 1). Tokens after the last one
        that is text in any sample are never looked at, so they are not computed.
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

        length = used + 1 + STEP_TOKENS
        scores = torch.full((length, length), MASKED, dtype=self.dtype, device=self.device).triu(1)
        padding = F.pad(MASKED * (~mask[:, :used]).to(self.dtype), (0, 1 + STEP_TOKENS))
        scores = scores + padding[:, None, None, :]
        layers = []
        for block in self.transformer_blocks:
            tokens, kv = block(tokens, scores[:, :, : used + 1, : used + 1])
            layers.append(kv)
        return PriorCondition(tuple(layers), scores[:, :, used + 1 :])

    def denoise(self, sample: Tensor, timestep: Tensor | float, condition: PriorCondition) -> Tensor:
        """The predicted image embedding (batch, embedding_dim) behind `sample` of that shape, normalised.

        `timestep` is one number for the batch or one per sample, 0 (clean) to 999.
        """
        tokens = torch.stack(
            [
                self.time_embedding(timestep).expand(len(sample), -1),
                self.proj_in(sample),
                self.prd_embedding[0].expand(len(sample), -1),
            ],
            dim=1,
        )
        tokens = tokens + self.positional_embedding[:, -STEP_TOKENS:]
        for block, past in zip(self.transformer_blocks, condition.layers, strict=True):
            tokens, _ = block(tokens, condition.mask, past)
        return self.proj_to_clip_embeddings(self.norm_out(tokens[:, -1]))

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
