"""Which options of `TrainingOptions` and its subclasses have no effect in some trainings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

Ineffective: TypeAlias = tuple[str, tuple[str, ...]]
"""Where options have no effect, as the end of a sentence, and their names."""

OF_THE_HUB = ("dataset_config_name", "split")
OF_PICTURES = (
    *(*OF_THE_HUB, "image_column", "caption_column", "aspect_buckets"),
    *("random_flip", "random_crop", "crops_per_image", "hint_type"),
)
OF_DECODERS = (
    *("mode", "hint_type", "aspect_buckets", "random_crop", "crops_per_image"),
    *("condition_dropout", "vlb_weight"),
)
OF_ADAPTERS = ("rank", "lora_alpha", "target_modules")
OF_CLASS_PICTURES = ("class_data_dir", "class_prompt", "num_class_images")
# An embedding is learned with the frozen, plain decoder, and no part of its condition is dropped.
INVERSION_LACKS = (
    *(*OF_ADAPTERS, "condition_dropout", "vlb_weight", "hint_type", "validation_prompt"),
    *(*OF_CLASS_PICTURES, "prior_loss_weight"),
)
# A tiny decoder learns from pictures and MoVQ alone.
TINY_DECODER_LACKS = (
    *("prior", "stage", "mode", "hint_type", "caption_column", "validation_prompt"),
    *("caption_dropout", "condition_dropout", "image_embeds", "snr_gamma", "vlb_weight"),
    *OF_ADAPTERS,
)


def ineffective_in_mode(mode: str, stage: str) -> Iterator[Ineffective]:
    """Yield the options that have no effect for a kind of decoder.

    Args:
        mode: Kind of decoder.
        stage: Networks that are trained.
    """
    if mode != "hint":
        yield f"for a decoder of the kind {mode}", ("hint_type",)
    if mode != "plain" and stage == "decoder":  # sheets of other decoders show pictures
        yield f"for a decoder of the kind {mode}", ("validation_prompt",)
