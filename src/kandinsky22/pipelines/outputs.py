"""What the pipelines return."""

from __future__ import annotations

import dataclasses
from typing import Any

from kandinsky22.outputs import Output


@dataclasses.dataclass
class ImagePipelineOutput(Output):
    """Pictures: a list of PIL images, an array (batch, height, width, 3) in [0, 1], or a tensor, as was asked for."""

    images: Any


@dataclasses.dataclass
class KandinskyPriorPipelineOutput(Output):
    """Image embeddings and their negatives, each (batch, embedding_dim), as tensors or arrays."""

    image_embeds: Any
    negative_image_embeds: Any
