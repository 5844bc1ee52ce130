"""Attention with many tokens on CPUs: the same sums as torch's kernel, computed by oneDNN's matrix products.

torch's fused attention multiplies by a library that reaches a third of the speed of these processors, in float32 and in
bfloat16. With few tokens that matters little; at 512 x 512 it is a seventh of the UNet's step in bfloat16, and with
MoVQ's single head of 512 an eighth of decoding. Queries are processed in chunks, so the full matrix of attention
weights is never in memory.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kandinsky22.kernels import settings
from kandinsky22.kernels.linear import TENSOR_TYPES, can_multiply, onednn_linear, pack_linear_weight

WIDE_HEAD = 256  # channels per head; wider heads need fewer tokens to be faster here than in torch's kernel
MIN_TOKENS_WIDE = 256  # queries and keys of wide heads
MIN_TOKENS = 512  # queries and keys of other heads
CHUNK_WEIGHTS = 2**21  # attention weights of one head that are in memory at a time, about: eight megabytes in float32


def is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `attention` can be used for these tensors, and is faster than torch's kernel.

    Args:
        query: Tensor (batch, heads, n, width).
        key: Tensor (batch, heads, m, width).
        value: Tensor (batch, heads, m, width).
    """
    if torch.compiler.is_compiling() or not settings.current().chunked_attention:
        return False
    minimum = MIN_TOKENS_WIDE if query.shape[-1] >= WIDE_HEAD else MIN_TOKENS
    is_large = min(query.shape[-2], key.shape[-2]) >= minimum
    return is_large and can_multiply(query, key, value) and type(value) in TENSOR_TYPES


def attention(query: Tensor, key: Tensor, value: Tensor, *, rounded: bool = False) -> Tensor:
    """Return softmax(q kᵀ / √width) v (https://arxiv.org/abs/1706.03762, equation 1), without a mask.

    The products q kᵀ are float32 for every dtype, because softmax magnifies their errors.

    Args:
        query: Tensor (batch, heads, n, width), for which `is_supported` is true.
        key: Tensor (batch, heads, m, width).
        value: Tensor (batch, heads, m, width).
        rounded: Whether the products are of the dtype of the query instead, in a third of the time less: for queries
            and keys that have larger errors already.

    Returns:
        Tensor (batch, heads, n, width) of the same dtype.
    """
    batch, heads, count, width = query.shape
    out = query.new_empty(batch, count, heads, width).transpose(1, 2)
    chunk = -(-count // -(-count * key.shape[2] // CHUNK_WEIGHTS))  # chunks of about equal size
    for index in itertools.product(range(batch), range(heads)):
        queries, keys = query[index], key[index]
        if not rounded:
            queries, keys = queries.float(), keys.float()
        keys = keys * width**-0.5
        values = value[index].T.contiguous()
        if chunk < count:  # packing pays off from the second chunk on
            keys, values = pack_linear_weight(keys), pack_linear_weight(values)
        for query_chunk, out_chunk in zip(queries.split(chunk), out[index].split(chunk), strict=True):
            weights = onednn_linear(query_chunk, keys)
            torch.softmax(weights, dim=-1, out=weights)  # safe in place: each row is read before it is written
            out_chunk.copy_(onednn_linear(weights.to(query.dtype), values))
    return out
