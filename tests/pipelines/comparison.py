"""Comparison of our outputs with the reference's."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
from tests.pipelines.tiny import DECODER_SCHEDULER, difference

import kandinsky22

PIXEL_TOLERANCE = 1e-4  # absolute, for pixels in [0, 1]
EMBEDDING_TOLERANCE = 1e-5  # relative

# Class and settings of the schedulers that decoders are compared with; None leaves the checkpoint's own.
SCHEDULERS = {
    "as saved": None,
    "fixed variance": ("DDPMScheduler", {**DECODER_SCHEDULER, "variance_type": "fixed_small"}),
    # Clipped, because an unclipped random network leaves the range of latents, where MoVQ magnifies rounding errors.
    "DDIM": ("DDIMScheduler", {**DECODER_SCHEDULER, "set_alpha_to_one": False}),
}


def with_schedulers(ours: Any, theirs: Any, name: str) -> tuple[Any, Any]:
    """Return both pipelines with the named scheduler of their own library; `theirs` is copied, not changed."""
    if SCHEDULERS[name] is None:
        return ours, theirs
    kind, settings = SCHEDULERS[name]
    components = {**theirs.components, "scheduler": getattr(diffusers, kind)(**settings)}
    theirs = type(theirs)(**components)
    theirs.set_progress_bar_config(disable=True)
    ours.scheduler = getattr(kandinsky22, kind)(**settings)
    return ours, theirs


def assert_same_pictures(ours: Any, theirs: Any) -> None:
    """Assert that two batches of pictures have one type and agree to `PIXEL_TOLERANCE`."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):  # a difference of 1 / 255 may be rounded either way
        one, other = (
            np.stack([np.asarray(picture) for picture in pictures]).astype(int) for pictures in (ours, theirs)
        )
        assert np.abs(one - other).max() <= 1
        assert np.abs(one - other).mean() < 0.01
    else:
        assert ours.shape == theirs.shape
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < PIXEL_TOLERANCE


def assert_same_embeddings(ours: Any, theirs: Any) -> None:
    """Assert that two outputs of priors have one type and agree to `EMBEDDING_TOLERANCE`."""
    assert type(ours.image_embeds) is type(theirs.image_embeds)
    assert difference(ours.image_embeds, theirs.image_embeds) < EMBEDDING_TOLERANCE
    assert difference(ours.negative_image_embeds, theirs.negative_image_embeds) < EMBEDDING_TOLERANCE
