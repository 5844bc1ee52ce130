"""Names of the reference's standard attention processors, for scripts that choose one.

Networks always run torch's fused attention here, which all of these stand for: an instance says "standard attention"
and does nothing by itself.
"""

from __future__ import annotations


class AttnProcessor:
    """Standard attention of the prior and MoVQ."""


class AttnProcessor2_0(AttnProcessor):
    """Standard attention of the prior and MoVQ, by its newer name."""


class AttnAddedKVProcessor:
    """Standard attention of the UNet, with keys and values of the image embedding."""


class AttnAddedKVProcessor2_0(AttnAddedKVProcessor):
    """Standard attention of the UNet, by its newer name."""
