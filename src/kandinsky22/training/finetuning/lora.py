"""Low-rank adapters as layers that are trained (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kandinsky22.adapters.updates import Adapter, LowRankUpdate
from kandinsky22.errors import invalid
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.models import PriorTransformer
from kandinsky22.training.finetuning.options import ATTENTION, BLOCKS

# Ends of the names of layers, by names of groups. Most weights are outside of the attention.
PRIOR_GROUPS = {ATTENTION: ("to_q", "to_k", "to_v", "to_out.0"), BLOCKS: ("ff.net.0.proj", "ff.net.2")}
UNET_GROUPS = {
    ATTENTION: (*PRIOR_GROUPS[ATTENTION], "add_k_proj", "add_v_proj"),
    BLOCKS: ("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}


class LoraLayer(nn.Module):
    """A frozen linear layer or convolution plus scale · B A, in which A and B are trained. B is zero at first.

    Of a convolution, A is one with the same kernel and `rank` channels, and B one with a kernel of 1x1.

    Args:
        base: The layer.
        rank: Rank of A and B.
        alpha: The scale is alpha / rank.
        generator: Source of A's initial values, on the CPU.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scale = alpha / rank
        self.lora_A, self.lora_B = _factors(base, rank)
        # uniform with the variance 1 / (3 inputs), as that of an initial layer
        shape = self.lora_A.weight.shape
        bound = shape[1:].numel() ** -0.5
        initial = (2 * torch.rand(shape, generator=generator) - 1) * bound
        self.lora_A.weight = nn.Parameter(initial.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(self.lora_B.weight.shape, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            features: Input of the layer; adapters compute in their own type where autocast is off.
        """
        out: Tensor = self.base(features)
        # Under autocast a copy in another type would be stored for the backward pass.
        own = features if autocasts(features.device) else features.to(self.lora_A.weight.dtype)
        return out + (self.scale * self.lora_B(self.lora_A(own))).to(out.dtype)


def _factors(base: nn.Linear | nn.Conv2d, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Return A and B without values."""
    with torch.device("meta"):
        if isinstance(base, nn.Linear):
            return nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        size: Any = base.kernel_size
        step: Any = base.stride
        margin: Any = base.padding
        down = nn.Conv2d(base.in_channels, rank, size, step, margin, bias=False)
        return down, nn.Conv2d(rank, base.out_channels, 1, bias=False)


def autocasts(device: torch.device) -> bool:
    """Return whether autocast chooses the type of products on a device.

    Args:
        device: The device.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def add_adapters(
    network: nn.Module, rank: int, alpha: float | None, targets: Sequence[str], seed: int
) -> dict[str, LoraLayer]:
    """Freeze a network and put adapters around its linear layers and convolutions.

    Args:
        network: The network.
        rank: Rank of the adapters.
        alpha: They are scaled by alpha / rank; None for 1.
        targets: Ends of the names of the layers; `ATTENTION` stands for those of the attention, and `BLOCKS` for those
            of residual blocks and feed-forward networks.
        seed: Seed of the initial values.

    Returns:
        The adapters by the names of the layers.

    Raises:
        InputError: No layer has such a name, or the rank is larger than a side of such a layer.
    """
    groups = PRIOR_GROUPS if isinstance(network, PriorTransformer) else UNET_GROUPS
    possible = {name: layer for name, layer in network.named_modules() if _takes_adapter(layer)}
    chosen = [end for target in targets for end in groups.get(target, (target,))]
    layers: dict[str, Any] = {name: layer for name, layer in possible.items() if _matches(name, chosen)}
    unused = [
        target for target in targets if not any(_matches(name, groups.get(target, (target,))) for name in possible)
    ]
    if unused or not layers:
        endings = sorted(
            {name.split(".")[-1] if not name[-1].isdigit() else ".".join(name.split(".")[-2:]) for name in possible}
        )
        expected = f"{ATTENTION}, {BLOCKS}, or endings of layer names: {', '.join(endings)}"
        raise invalid("--target-modules", " ".join(unused), expected)
    largest = min(min(layer.weight.flatten(1).shape) for layer in layers.values())
    if rank > largest:
        raise invalid("--rank", rank, f"at most {largest}, the smallest side of a layer that gets an adapter")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, layer in layers.items():
        adapters[name] = LoraLayer(layer, rank, float(rank if alpha is None else alpha), generator)
        _replace(network, name, adapters[name])
    return adapters


def remove_adapters(network: nn.Module, adapters: Mapping[str, LoraLayer]) -> None:
    """Put the layers that adapters contain back into a network.

    Args:
        network: The network.
        adapters: Result of `add_adapters`.
    """
    for name, adapter in adapters.items():
        _replace(network, name, adapter.base)


def _takes_adapter(layer: nn.Module) -> bool:
    if type(layer) in (nn.Conv2d, Conv2d):
        return cast(nn.Conv2d, layer).groups == 1
    return type(layer) is nn.Linear


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
        if isinstance(module, LoraLayer):
            down = replaced.get(f"{name}.lora_A.weight", module.lora_A.weight.detach())
            up = replaced.get(f"{name}.lora_B.weight", module.lora_B.weight.detach())
            updates[f"{name}.weight"] = LowRankUpdate(
                down.float().cpu(), up.flatten(1).float().cpu(), module.scale * len(down)
            )
    return updates


def values_without_adapters(network: nn.Module) -> dict[str, Tensor]:
    """Return values of the trained parameters with which the network computes as it did before it got adapters.

    Args:
        network: The network.
    """
    return {
        name: torch.zeros_like(parameter) if ".lora_B." in name else parameter.detach()
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    }
