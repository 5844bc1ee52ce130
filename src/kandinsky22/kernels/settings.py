"""Settings of the optimisations: which of them are used, per thread and per task.

    with optimisations(winograd=False):
        image = pipe("a red cat", ...)

The environment variable ``KANDINSKY22_DISABLE`` (names of fields separated by commas, or ``all``) sets the defaults of
a process. It is read once, when an optimisation is first considered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

ENVIRONMENT_VARIABLE = "KANDINSKY22_DISABLE"


@dataclasses.dataclass(frozen=True)
class Optimisations:
    """Switches of the optimisations. None changes results, except for rounding in float32 and bfloat16.

    Attributes:
        packed_linear: Linear layers multiply by a copy of their weight in oneDNN's layout.
        packed_conv: Convolutions use a copy of their weight in oneDNN's layout, over channels-last features. False also
            switches off `winograd` and `fused_upsample`.
        onednn_linear: Linear layers whose weight is not packed multiply by oneDNN instead of torch.
        float32_products: On x86 CPUs that do not multiply half precision, its layers compute in float32.
        winograd: 3x3 convolutions of large float32 features use Winograd's method, F(4x4, 3x3).
        free_winograd_weights: Winograd weights are freed when a pipeline goes from one network to the next.
        fused_upsample: A nearest-neighbour upsampling and the 3x3 convolution after it run as four 2x2 convolutions.
        fused_group_norm: Group norm, modulation and SiLU run in one pass over the features.
        chunked_attention: Attention with many tokens multiplies by oneDNN, a chunk of queries at a time.
        buffer_pool: Buffers of 32 MB and more are reused while a pipeline or MoVQ runs.
        drop_mapped_pages: Pages of weights mapped from a file leave memory once a copy has been made of them.
        lazy_loading: The prior's image encoder is read when it is first used.
        zero_embed_cache: The embedding of an all-zero image is stored in a file.
        text_cache: The last text encodings are stored in memory.
        batched_timesteps: The prior computes keys and values of several timesteps at once.
    """

    packed_linear: bool = True
    packed_conv: bool = True
    onednn_linear: bool = True
    float32_products: bool = True
    winograd: bool = True
    free_winograd_weights: bool = True
    fused_upsample: bool = True
    fused_group_norm: bool = True
    chunked_attention: bool = True
    buffer_pool: bool = True
    drop_mapped_pages: bool = True
    lazy_loading: bool = True
    zero_embed_cache: bool = True
    text_cache: bool = True
    batched_timesteps: bool = True


NAMES = tuple(field.name for field in dataclasses.fields(Optimisations))

_active: ContextVar[Optimisations | None] = ContextVar("kandinsky22_optimisations", default=None)


def current() -> Optimisations:
    """Return the settings that are active in this thread or task.

    Code that `torch.compile` traces must check `torch.compiler.is_compiling()` first: context variables cannot be
    traced.
    """
    active = _active.get()
    return _process_default() if active is None else active


def optimisations(**changes: bool) -> contextlib.AbstractContextManager[Optimisations]:
    """Return a context manager that replaces settings while it is active.

    Other threads are not affected, and threads started inside begin with the process's defaults. Context managers can
    be nested: fields that are not named stay as they are outside.

    Args:
        **changes: New values of fields of `Optimisations`, such as ``winograd=False``.

    Raises:
        TypeError: A name is not a field of `Optimisations`, or a value is not a bool.
    """
    for name, value in changes.items():
        if name not in NAMES:
            raise TypeError(f"optimisations() has no field {name!r}: expected names among {', '.join(NAMES)}")
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is invalid: expected True or False")
    return _replaced(changes)


@contextlib.contextmanager
def _replaced(changes: dict[str, bool]) -> Iterator[Optimisations]:
    settings = dataclasses.replace(current(), **changes)
    token = _active.set(settings)
    try:
        yield settings
    finally:
        _active.reset(token)


@functools.cache
def _process_default() -> Optimisations:
    """Return all optimisations except those that the environment variable names."""
    names = [name.strip() for name in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if name.strip()]
    disabled = set(NAMES) if "all" in names else set(names) & set(NAMES)
    if unknown := [name for name in names if name not in (*NAMES, "all")]:
        warnings.warn(
            f"{ENVIRONMENT_VARIABLE} names unknown optimisations, which are ignored: {', '.join(unknown)}; "
            f"expected names among {', '.join(NAMES)}, or all",
            stacklevel=2,
        )
    return Optimisations(**dict.fromkeys(disabled, False))
