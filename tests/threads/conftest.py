"""The tiny checkpoints of the pipelines' tests."""

from __future__ import annotations

from tests.pipelines.conftest import (
    checkpoints,
    combined,
    decoder,
    make_pipeline,
    mode_folder,
    mode_oracles,
    oracles,
    prior,
    reference,
)

__all__ = [
    "checkpoints",
    "combined",
    "decoder",
    "make_pipeline",
    "mode_folder",
    "mode_oracles",
    "oracles",
    "prior",
    "reference",
]
