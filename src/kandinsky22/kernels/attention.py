"""Attention with wide heads or many tokens on CPUs: the same sums as torch's, by oneDNN's products.

torch multiplies within its attention by a library that computes at a third of what these processors can, in float32 and
in bfloat16. With few tokens that matters little; at 512 x 512 it is a seventh of the UNet's step in bfloat16, and with
MoVQ's one head of 512 an eighth of decoding. Some queries are dealt with at a time, so the full matrix of weights is
never in memory.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kandinsky22.kernels.linear import PLAIN, can_multiply, packed_matrix, product

WIDE = 256  # width of a head from which on
FEW = 256  # tokens are enough for this to be faster than torch's own attention
MANY = 512  # tokens that are enough for narrower heads
WEIGHTS = 2**21  # of one head that are in memory at a time, about: eight megabytes

enabled = True
"""False switches this off: torch's own attention is used instead."""


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` can be used for these tensors, and is worth it."""
    enough = FEW if query.shape[-1] >= WIDE else MANY
    large = enabled and not torch.compiler.is_compiling() and min(query.shape[-2], key.shape[-2]) >= enough
    return large and can_multiply(query, key, value) and type(value) in PLAIN


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(width)) v for queries (batch, heads, n, width), keys and values (batch, heads, m, width).

    Products with keys are float32 whatever the type, for softmax magnifies their errors.
    """
    batch, heads, count, width = query.shape
    out = query.new_empty(batch, count, heads, width).transpose(1, 2)
    chunk = -(-count // -(-count * key.shape[2] // WEIGHTS))  # as equal as can be
    for place in itertools.product(range(batch), range(heads)):
        queries, keys = query[place].float(), key[place].float() * width**-0.5
        values = value[place].T.contiguous()
        if chunk < count:  # used more than once
            keys, values = packed_matrix(keys), packed_matrix(values)
        for few, rows in zip(queries.split(chunk), out[place].split(chunk), strict=True):
            weights = product(few, keys)
            torch.softmax(weights, dim=-1, out=weights)  # row by row, each number of which is read before it is written
            rows.copy_(product(weights.to(query.dtype), values))
    return out
