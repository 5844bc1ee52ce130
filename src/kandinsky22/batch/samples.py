"""Samples: finished pictures with their metadata and embeddings, as shards store them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from kandinsky22.generation.batching import Embeddings

EMBEDDING, GENERATOR = "embedding.npy", "generator.npy"


@dataclasses.dataclass(frozen=True)
class StoredEmbedding:
    """Result of the prior for one picture.

    Attributes:
        vectors: Image embedding and negative image embedding, (2, embedding_dim), float32.
        generator_state: State of the generator that draws the decoder's noise, uint8.
    """

    vectors: np.ndarray[Any, Any]
    generator_state: np.ndarray[Any, Any]

    @classmethod
    def of(cls, embeddings: Embeddings) -> StoredEmbedding:
        """Return the stored form of embeddings.

        Args:
            embeddings: Result of `encode_batch`.
        """
        import torch

        vectors = torch.cat([embeddings.positive, embeddings.negative]).float().cpu().numpy()
        return cls(vectors, embeddings.generator.get_state().numpy())

    def restored(self, dtype: Any) -> Embeddings:
        """Return the embeddings.

        Args:
            dtype: Type of the decoder's embeddings. Half precision values are exact in float32.
        """
        import torch

        from kandinsky22.generation.batching import Embeddings

        generator = torch.Generator()
        generator.set_state(torch.from_numpy(self.generator_state.copy()))
        vectors = torch.from_numpy(self.vectors.copy()).to(dtype)
        return Embeddings(vectors[:1], vectors[1:], generator)

    def files(self) -> dict[str, bytes]:
        """Return the content of the two files of a picture by extension."""
        return {EMBEDDING: array_bytes(self.vectors), GENERATOR: array_bytes(self.generator_state)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> StoredEmbedding:
        """Return the embedding that `files` wrote.

        Args:
            files: Contents by extension.

        Raises:
            InputError: If a file is missing or damaged.
        """
        import numpy as np

        try:
            arrays = [np.load(io.BytesIO(files[name]), allow_pickle=False) for name in (EMBEDDING, GENERATOR)]
        except (KeyError, ValueError, OSError, EOFError) as error:
            raise InputError(f"the shard contains no readable embeddings: {error}") from error
        return cls(*arrays)


def array_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Return the content of a .npy file.

    Args:
        array: The array.
    """
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One finished picture.

    Attributes:
        key: Name of the sample: number of the shard and position in it, such as "000010023".
        metadata: Settings and identity of the picture, JSON values by name.
        image: Content of the PNG file, which contains the recipe; None after the prior's stage alone.
        embedding: Embeddings, if they are stored.
    """

    key: str
    metadata: Mapping[str, Any]
    image: bytes | None
    embedding: StoredEmbedding | None = None
