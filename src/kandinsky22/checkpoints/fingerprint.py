"""Fingerprints: of the weights of networks in memory, and of files without reading them entirely."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky22.kernels.fingerprint import TensorFingerprint

# Enough to tell any two trainings apart; reading all of a 10 GB checkpoint would take longer than generating an image.
SAMPLES_PER_TENSOR = 64

# Blocks read from each file, and their size: 256 KiB per file stand for files of gigabytes.
BLOCKS_PER_FILE = 64
BYTES_PER_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class TensorSample:
    """Evenly spread values of one tensor.

    Attributes:
        name: Name of the tensor in its network.
        shape: Its shape.
        values: The values, as bytes of float64 numbers.
    """

    name: str
    shape: tuple[int, ...]
    values: bytes


def weight_samples(network: nn.Module) -> list[TensorSample]:
    """Return samples of all tensors of a network, ordered by name.

    Args:
        network: The network.
    """
    samples = []
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))
        values = flat[::stride].to("cpu", torch.float64).numpy().tobytes()
        samples.append(TensorSample(name, tuple(tensor.shape), values))
    return samples


def weights_digest(networks: Mapping[str, nn.Module | list[TensorSample]]) -> str:
    """Return a SHA-256 digest over names, shapes and evenly spread values of the tensors of networks.

    The digest depends on the dtype that the weights were loaded in, but not on file format, sharding or device.

    Args:
        networks: Networks, or the samples of their weights, by component name, such as "unet".

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for component, network in sorted(networks.items(), key=lambda item: item[0]):
        for sample in network if isinstance(network, list) else weight_samples(network):
            digest.update(f"{component}.{sample.name} {sample.shape}\n".encode())
            digest.update(sample.values)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest over names, dtypes, shapes and evenly spread values of tensors.

    Args:
        tensors: Contiguous tensors by name.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(flat[::stride].to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def files_digest(files: Iterable[Path], min_bytes: int = 1) -> str | None:
    """Return a SHA-256 digest over names, sizes, modification times and evenly spread blocks of files.

    Reading the files entirely would take as long as running a network of their size.

    Args:
        files: The files, in a fixed order.
        min_bytes: Smallest total size in bytes for which a digest is returned.

    Returns:
        64 hexadecimal digits, or None if a file cannot be read or the files have fewer than `min_bytes` bytes together.
    """
    digest, total = hashlib.sha256(), 0
    for path in files:
        try:
            status = path.stat()
            total += status.st_size
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            with open(path, "rb") as file:
                for index in range(BLOCKS_PER_FILE):
                    file.seek(status.st_size * index // BLOCKS_PER_FILE)
                    digest.update(file.read(BYTES_PER_BLOCK))
        except OSError:
            return None
    return digest.hexdigest() if total >= min_bytes else None


class WeightFingerprint:
    """State of a network's weights in memory, to notice later changes without reading the weights entirely.

    Moves, conversions and changes in place that torch counts are noticed. Other changes, through `weight.data` or a
    numpy view, are noticed if they concern the first or last element along each side of a weight: that includes scaled
    and averaged weights and merged adapters, but not single elements in the middle. Tensors of torch's inference mode
    count no changes, and therefore never match.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = [TensorFingerprint(parameter) for parameter in network.parameters()]

    def matches(self, network: nn.Module) -> bool:
        """Return whether the network has the same weights now.

        Args:
            network: The network of which this fingerprint was made, or any other one, which does not match.
        """
        parameters = list(network.parameters())
        return len(parameters) == len(self._parameters) and all(
            state.matches(parameter) for state, parameter in zip(self._parameters, parameters, strict=True)
        )
