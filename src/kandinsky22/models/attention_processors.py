"""Names of the reference's standard attention processors.

Networks always run torch's fused attention here, which all of these stand for: an object of one of these classes says
"standard attention" and does nothing by itself.
"""

from __future__ import annotations


class StandardAttention:
    """Base of the standard attention processors."""


class AttnProcessor(StandardAttention):
    """Standard attention of the prior and MoVQ."""


class AttnProcessor2_0(AttnProcessor):
    """Standard attention of the prior and MoVQ, by its newer name."""


class XFormersAttnProcessor(AttnProcessor):
    """Attention by xformers, which computes the same."""


class SlicedAttnProcessor(AttnProcessor):
    """Attention in slices, which computes the same."""


class AttnAddedKVProcessor(StandardAttention):
    """Standard attention of the UNet, with keys and values of the image embedding."""


class AttnAddedKVProcessor2_0(AttnAddedKVProcessor):
    """Standard attention of the UNet, by its newer name."""


class XFormersAttnAddedKVProcessor(AttnAddedKVProcessor):
    """Attention by xformers with keys and values of the image embedding, which computes the same."""


class SlicedAttnAddedKVProcessor(AttnAddedKVProcessor):
    """Attention in slices with keys and values of the image embedding, which computes the same."""


STANDARD_PROCESSORS: dict[str, type[StandardAttention]] = {
    kind.__name__: kind
    for kind in (
        AttnProcessor,
        AttnProcessor2_0,
        XFormersAttnProcessor,
        SlicedAttnProcessor,
        AttnAddedKVProcessor,
        AttnAddedKVProcessor2_0,
        XFormersAttnAddedKVProcessor,
        SlicedAttnAddedKVProcessor,
    )
}
