"""Quantization of OpenVINO's graphs by NNCF."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kandinsky22.engines.openvino import without_reports

OUTER_LAYERS = (".*conv_in.*", ".*conv_out.*")  # few channels: nothing is gained, and all details pass through them


def quantize_graph(model: Any, samples: Sequence[tuple[Tensor, ...]]) -> Any:
    """Return a model whose weights and activations have 8 bits, except for the first and the last convolution.

    Args:
        model: The OpenVINO model.
        samples: Inputs of some calls, from which the ranges of activations follow.
    """
    nncf = _nncf()
    inputs = [[tensor.float().numpy() for tensor in sample] for sample in samples]
    with _silent():
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(patterns=list(OUTER_LAYERS), validate=False),
        )


def compress_weights(model: Any) -> Any:
    """Return a model whose weights have 8 bits. Activations keep their type.

    Args:
        model: The OpenVINO model.
    """
    nncf = _nncf()
    with _silent():
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that drops NNCF's progress bars: standard output belongs to the caller."""
    return contextlib.redirect_stdout(io.StringIO())


def _nncf() -> Any:
    with without_reports():
        import nncf

    nncf.set_log_level("ERROR")
    return nncf
