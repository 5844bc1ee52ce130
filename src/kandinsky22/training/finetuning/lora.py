"""Low-rank adapters as layers that are trained (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kandinsky22.adapters.updates import Adapter, LowRankUpdate
from kandinsky22.errors import invalid
from kandinsky22.models import PriorTransformer

PRIOR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (*PRIOR_TARGETS, "add_k_proj", "add_v_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale · B A, in which A and B are trained. B is zero at first.

    Args:
        base: The layer.
        rank: Rows of A.
        alpha: The scale is alpha / rank.
        generator: Source of A's initial values, on the CPU.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device="meta")
        # uniform with the variance 1 / (3 in_features), as that of an initial linear layer
        bound = base.in_features**-0.5
        initial = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.lora_A.weight = nn.Parameter(initial.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return the layer's output for features (..., in_features).

        Args:
            features: Input of the layer; adapters compute in their own type where autocast is off.
        """
        out: Tensor = self.base(features)
        # Under autocast a copy in another type would be stored for the backward pass.
        own = features if autocasts(features.device) else features.to(self.lora_A.weight.dtype)
        return out + (self.scale * self.lora_B(self.lora_A(own))).to(out.dtype)


def autocasts(device: torch.device) -> bool:
    """Return whether autocast chooses the type of products on a device.

    Args:
        device: The device.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def add_adapters(
    network: nn.Module, rank: int, alpha: float | None, targets: Sequence[str], seed: int
) -> dict[str, LoraLinear]:
    """Freeze a network and put adapters around its linear layers.

    Args:
        network: The network.
        rank: Rank of the adapters.
        alpha: They are scaled by alpha / rank; None for 1.
        targets: Ends of the names of the layers; empty for the attention layers.
        seed: Seed of the initial values.

    Returns:
        The adapters by the names of the layers.

    Raises:
        InputError: No linear layer has such a name, or the rank is larger than a side of such a layer.
    """
    chosen = tuple(targets) or (PRIOR_TARGETS if isinstance(network, PriorTransformer) else UNET_TARGETS)
    linear = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    layers = {name: layer for name, layer in linear.items() if _matches(name, chosen)}
    unused = [target for target in chosen if not any(_matches(name, (target,)) for name in linear)]
    if unused and (targets or not layers):
        endings = sorted(
            {name.split(".")[-1] if not name[-1].isdigit() else ".".join(name.split(".")[-2:]) for name in linear}
        )
        raise invalid("--target-modules", " ".join(unused), f"ends of names of linear layers: {', '.join(endings)}")
    largest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if rank > largest:
        raise invalid("--rank", rank, f"at most {largest}, the smallest side of a layer that gets an adapter")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, layer in layers.items():
        adapters[name] = LoraLinear(layer, rank, float(rank if alpha is None else alpha), generator)
        _replace(network, name, adapters[name])
    return adapters


def remove_adapters(network: nn.Module, adapters: Mapping[str, LoraLinear]) -> None:
    """Put the layers that adapters contain back into a network.

    Args:
        network: The network.
        adapters: Result of `add_adapters`.
    """
    for name, adapter in adapters.items():
        _replace(network, name, adapter.base)


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def trained_adapter(network: nn.Module, values: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return the adapters in a network as updates of its parameters, by the names that these have without adapters.

    Args:
        network: The network.
        values: Values that replace those of the trained parameters of the same names, such as moving averages; None
            for none.
    """
    replaced = values or {}
    updates: dict[str, LowRankUpdate] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            down = replaced.get(f"{name}.lora_A.weight", module.lora_A.weight.detach())
            up = replaced.get(f"{name}.lora_B.weight", module.lora_B.weight.detach())
            updates[f"{name}.weight"] = LowRankUpdate(down.float().cpu(), up.float().cpu(), module.scale * len(down))
    return updates
