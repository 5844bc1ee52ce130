"""Attention with few, wide heads on CPUs: the same sums as torch's, by oneDNN's products.

torch multiplies within its attention by a library that computes fp32 at a third of what these processors can, and
bfloat16 no faster. With heads of 64 that matters little, with MoVQ's one head of 512 it is an eighth of decoding. A few
hundred queries are dealt with at a time, so the full matrix of weights is never in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kandinsky22.runtime.packed import ROWS, can_pack, packed_matrix, product

NARROW = 256  # width of a head below which torch's own attention is as good
FEW = 256  # tokens likewise
QUERIES = 4 * ROWS

enabled = True
"""False switches this off: torch's own attention is used instead."""


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` can be used for these tensors, and is worth it."""
    large = enabled and query.shape[-1] >= NARROW and key.shape[-2] >= FEW
    return large and can_pack(query, key, value)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(width)) v for queries (batch, heads, n, width), keys and values (batch, heads, m, width).

    Computed in float32, whatever the type.
    """
    out = query.new_empty(query.shape)  # contiguous, so that its heads are views
    for head, place in enumerate(out.flatten(0, 1)):
        queries, keys, values = (part.flatten(0, 1)[head].float() for part in (query, key, value))
        keys, values = packed_matrix(keys * query.shape[-1] ** -0.5), packed_matrix(values.T.contiguous())
        for few, rows in zip(queries.split(QUERIES), place.split(QUERIES), strict=True):
            rows.copy_(product(torch.softmax(product(few, keys), dim=-1), values))
    return out
