"""Quantization: networks whose weights take 8 or 4 bits, made in place or loaded from a checkpoint that has them.

Linear layers are torchao's, convolutions our own (`quantized.py`). Embeddings, norms, the few layers at either end of a
network and those that their owners look into keep their numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky22.errors import ConfigError, InputError, MissingDependencyError
from kandinsky22.runtime.device_offload import READ_BY_PARENT, place_of, plain

KINDS: Mapping[str, str] = {
    "int8": "weights of 8 bits; products as before",
    "int8-dynamic": "weights of 8 bits, activations rounded to 8 bits at each call; products of whole numbers",
    "int4": "linear layers' weights of 4 bits, convolutions' of 8; bfloat16 on CPUs only",
}
NETWORKS = ("prior", "prior_prior", "unet")  # what pipelines quantize unless told otherwise: by far the largest parts
ENTRY = "quantization_config"  # of config.json
_KIND = "_quantization"  # attribute of a quantized network, in no state dict
NARROW = 16  # channels: convolutions with fewer on either side stay as they are


def quantize(network: nn.Module, kind: str) -> None:
    """Quantize a network's layers in place. Their old weights are let go one by one.

    Raises InputError for other kinds than those of `KINDS`, a network that is quantized already or, with "int4", not
    of bfloat16 on a CPU; MissingDependencyError without torchao.
    """
    check_quantizable(network, kind)
    _replace_layers(plain(network), kind)
    plain(network).__dict__[_KIND] = kind


def check_quantizable(network: nn.Module, kind: str) -> None:
    """Raise what `quantize` raises."""
    _check(kind)
    network = plain(network)
    if kind_of(network) is not None:
        raise InputError(f"{type(network).__name__} is quantized already ({kind_of(network)}); load it anew")
    types = {p.dtype for p in network.parameters()}
    devices = {p.device.type for p in network.parameters()}
    if kind == "int4" and (types != {torch.bfloat16} or devices != {"cpu"}):
        raise InputError(
            f"int4 weights compute in bfloat16 on CPUs; this {type(network).__name__} has "
            f"{', '.join(sorted(map(str, types)))} on {', '.join(sorted(devices))}: call to(torch.bfloat16) first"
        )


def kind_of(network: nn.Module) -> str | None:
    """How a network is quantized, None if it is not."""
    kind: str | None = plain(network).__dict__.get(_KIND)
    return kind


# Checkpoints


def stored_as(network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of a network's quantization, and its tensors, in a form that any machine can read."""
    tensors, kind = network.state_dict(), kind_of(network)
    if kind is None:
        return {}, tensors
    if kind == "int4":
        for name, layer in _small_linears(network):
            tensors[f"{name}.weight_qdata"] = layer.portable()
    return {ENTRY: {"quant_method": "kandinsky22", "kind": kind}}, tensors


def prepare(network: nn.Module, entry: Any, dtype: torch.dtype | None) -> None:
    """Give a network that has no weights yet the layers for those of a quantized checkpoint.

    `entry` is what `stored_as` said, None for other checkpoints. Raises ConfigError for another library's entry,
    InputError if "int4" weights are wanted in another dtype than bfloat16, MissingDependencyError without torchao.
    """
    if entry is None:
        return
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS or entry.get("quant_method") != "kandinsky22":
        raise ConfigError(f"{ENTRY} is {entry!r}; accepted: what kandinsky22 writes, of kind {', '.join(KINDS)}")
    if kind == "int4" and dtype not in (None, torch.bfloat16):
        raise InputError(f"torch_dtype={dtype}: the weights are int4, which compute in bfloat16; pass torch.bfloat16")
    _check(kind)
    _replace_layers(network, kind)
    network.__dict__[_KIND] = kind


def arrange(network: nn.Module) -> None:
    """Put weights that came from a checkpoint into the order that suits this CPU."""
    if kind_of(network) == "int4":
        for _, layer in _small_linears(network):
            layer.arrange()


def _check(kind: Any) -> None:
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}; accepted: {', '.join(KINDS)}")
    if importlib.util.find_spec("torchao") is None:
        raise MissingDependencyError(
            f"{kind} weights need torchao, which is not installed: pip install 'kandinsky22[quantize]'"
        )


def _small_linears(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with 4-bit weights, by their paths."""
    for name, layer in network.named_modules():
        if getattr(layer, "kind", None) == "int4":
            yield name, layer


def _replace_layers(network: nn.Module, kind: str) -> None:
    for parent in list(network.modules()):
        if type(parent).__name__ in READ_BY_PARENT:
            continue
        for name, layer in list(parent.named_children()):
            made = _quantized(layer, kind)
            if made is not None:
                setattr(parent, name, made)


def _quantized(layer: nn.Module, kind: str) -> nn.Module | None:
    """The layer in 8 or 4 bits, None if it is to stay."""
    from kandinsky22.runtime.quantized_layers import GROUP, QuantizedConv2d, QuantizedLinear

    if isinstance(layer, nn.Conv2d) and min(layer.in_channels, layer.out_channels) >= NARROW:
        return QuantizedConv2d(layer, dynamic=kind == "int8-dynamic")
    if isinstance(layer, nn.Linear):
        fits = layer.in_features % GROUP == 0 and layer.out_features % NARROW == 0
        form = "int8" if kind == "int4" and not fits else kind
        if layer.weight.is_meta:
            return QuantizedLinear(form, layer.in_features, layer.out_features, layer.bias)
        return QuantizedLinear.of(layer, form)
    return None


# Pipelines


class Quantizes:
    """What pipelines can be told about quantization."""

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    def quantize(self, kind: str = "int8", components: Iterable[str] | None = None) -> None:
        """Let networks have weights of 8 or 4 bits, in place: `kind` is "int8", "int8-dynamic" or "int4".

        Networks are the prior and the UNet, as far as the pipeline has them, or the `components` named. Pictures
        change; docs/speed-and-memory.md says how much, and what is gained. `save_pretrained` writes the small form, and
        `from_pretrained` reads it. Raises InputError for other names, networks that are quantized already or that are
        offloaded, and as `quantize` does, before anything changes; MissingDependencyError without torchao.
        """
        _check(kind)
        own = {name: part for name, part in self.components.items() if name in NETWORKS and part is not None}
        names = list(own) if components is None else list(components)
        for name in names:
            if name not in own:
                raise InputError(f"components: {name!r} cannot be quantized; accepted: {', '.join(own) or 'none here'}")
            if (place := place_of(own[name])) is not None:
                raise InputError(f"components: {name} is offloaded by {place.method}(); call remove_all_hooks() first")
            check_quantizable(own[name], kind)
        for name in dict.fromkeys(names):
            quantize(own[name], kind)
