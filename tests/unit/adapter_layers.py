"""Random low-rank updates of tiny networks, in all layouts of files, and the weights that they should give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Factors of one layer: down (rank, in, ...) and up (out, rank)."""

    down: Tensor
    up: Tensor

    def difference(self, scale: float = 1.0) -> Tensor:
        product = self.up.double() @ self.down.double().flatten(1)
        return scale * product.view(len(self.up), *self.down.shape[1:])


def attention_layers(network: nn.Module) -> list[str]:
    """Return the paths of the projections of all attention layers."""
    return [path for path, _ in network.named_modules() if path.endswith(PROJECTIONS)]


def random_pairs(network: nn.Module, layers: Iterable[str], rank: int = 4, seed: int = 0) -> dict[str, Pair]:
    """Return random factors by the path of the layer."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in layers:
        shape = network.get_parameter(f"{path}.weight").shape
        down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        pairs[path] = Pair(down, torch.randn(shape[0], rank, generator=generator) / 4)
    return pairs


def peft_layout(pairs: dict[str, Pair], prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{path}.lora_{part}.weight": tensor
        for path, pair in pairs.items()
        for part, tensor in (("A", pair.down), ("B", _kernels(pair)))
    }


def processor_layout(pairs: dict[str, Pair], prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for path, pair in pairs.items():
        layer, _, projection = path.removesuffix(".0").rpartition(".")
        name = f"{prefix}{layer}.processor.{projection}_lora"
        tensors |= {f"{name}.down.weight": pair.down, f"{name}.up.weight": pair.up}
    return tensors


def flat_layout(pairs: dict[str, Pair], alpha: float, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    tensors = {}
    for path, pair in pairs.items():
        name = prefix + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": _kernels(pair)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def _kernels(pair: Pair) -> Tensor:
    return pair.up if pair.down.ndim == 2 else pair.up[:, :, None, None]
