"""Layers with weights of 8 or 4 bits. Their parts are plain parameters, so they move, offload and save like any others.

Products of linear layers are torchao's: what it makes of a weight is taken apart here and put together for each call.
It has no convolution that is faster than the one it replaces, so those are done with oneDNN's (on x86 CPUs) or, where
only the weights are to be small, with weights that are converted for each call.
"""

from __future__ import annotations

import functools
import logging
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.errors import InputError
from kandinsky22.kernels.linear import Packs

GROUP = 32  # numbers that share a scale and a zero, of 4-bit weights
MIDDLE = 128  # of the 256 levels of an activation, in zero points of symmetric ranges
LEVELS = 127.0  # of an 8-bit weight, on either side of zero


@functools.cache
def torchao() -> Any:
    """`torchao.quantization`, without the complaints about each of its CUDA libraries that a CPU cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.quantization

        return torchao.quantization
    finally:
        logging.disable(before)


def configuration(kind: str) -> Any:
    """How torchao is told to quantize the weight of a linear layer."""
    if kind == "int8":
        return torchao().Int8WeightOnlyConfig()
    if kind == "int8-dynamic":
        return torchao().Int8DynamicActivationInt8WeightConfig()
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def quantized_weight(weight: Tensor, kind: str) -> Tensor:
    """torchao's form of a matrix (out, in)."""
    holder = nn.Sequential(nn.Linear(1, 1, bias=False))
    holder[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
    torchao().quantize_(holder, configuration(kind), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    made: Tensor = holder[0].weight
    return made


@functools.lru_cache(maxsize=64)
def _form(kind: str, rows: int, columns: int) -> tuple[type, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Of a matrix of this shape in torchao's form: its class, what it knows beside numbers, its parts' shapes."""
    made = quantized_weight(torch.zeros(rows, columns, dtype=torch.bfloat16), kind)
    names, context = made.__tensor_flatten__()  # type: ignore[attr-defined]
    return type(made), dict(context), {name: tuple(getattr(made, name).shape) for name in names}


class QuantizedLinear(nn.Module):
    """`nn.Linear` whose weight is in torchao's form; `kind` is one of `quantize.KINDS`."""

    bias: Tensor | None
    weight_qdata: Tensor

    def __init__(self, kind: str, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        _, _, shapes = _form(kind, out_features, in_features)
        for name, shape in shapes.items():
            empty = torch.empty(shape, device="meta", dtype=torch.uint8)
            self.register_parameter(f"weight_{name}", nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def of(cls, layer: nn.Linear, kind: str) -> QuantizedLinear:
        """The same layer, its weight quantized."""
        made, weight = (
            cls(kind, layer.in_features, layer.out_features, layer.bias),
            quantized_weight(layer.weight, kind),
        )
        for name in made._part_names():
            part = getattr(weight, name).detach().clone()
            setattr(made, f"weight_{name}", nn.Parameter(part, requires_grad=False))
        return made

    def _part_names(self) -> list[str]:
        return list(_form(self.kind, self.out_features, self.in_features)[2])

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.kind == "int4" and (features.dtype != torch.bfloat16 or features.device.type != "cpu"):
            raise InputError(f"int4 weights compute in bfloat16 on CPUs, not {features.dtype} on {features.device}")
        form, context, _ = _form(self.kind, self.out_features, self.in_features)
        if "dtype" in context:
            context = {**context, "dtype": features.dtype}
        parts = {name: getattr(self, f"weight_{name}").detach() for name in self._part_names()}
        shape = torch.Size((self.out_features, self.in_features))
        weight = form.__tensor_unflatten__(parts, context, shape, (self.in_features, 1))  # type: ignore[attr-defined]
        made: Tensor = F.linear(features, weight, self.bias)
        return made

    def portable(self) -> Tensor:
        """4-bit numbers row by row, two a byte, from the order that suits this kind of CPU."""
        packed = self.weight_qdata.detach()
        numbers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
        rows = torch.empty_like(numbers)
        rows[_places(self.out_features, self.in_features)] = numbers
        low, high = rows.view(self.out_features, -1, 2).unbind(-1)
        return low | high << 4

    def arrange(self) -> None:
        """Put the numbers that `portable` gave into the order that suits this CPU."""
        stored = self.weight_qdata.detach()
        numbers = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        self.weight_qdata = nn.Parameter(packed, requires_grad=False)


def _places(rows: int, columns: int) -> Tensor:
    """For each place in torch's own order of 4-bit numbers, the place (row by row) of the number that it holds.

    torch does not say, and it depends on the CPU: so places themselves are put in that order, four bits at a time.
    """
    places = torch.arange(rows * columns).view(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        bits = (places >> shift & 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(bits, 1)
        found |= torch.stack([packed & 15, packed >> 4], dim=-1).flatten().long() << shift
    return found


class QuantizedConv2d(Packs, nn.Module):
    """`nn.Conv2d` with 8-bit weights, one scale for each output channel.

    `dynamic` rounds activations to 256 levels too, between the least and the largest of each sample, and multiplies
    whole numbers, wherever oneDNN can; elsewhere, and without it, weights are converted for each call.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, *, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.stride, self.padding = list(layer.stride), [int(side) for side in layer.padding]
        weight = layer.weight.detach()
        scale = (weight.abs().amax(dim=(1, 2, 3)).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (weight / scale[:, None, None, None]).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, features: Tensor, doubled: bool = False) -> Tensor:
        """(batch, out, H', W') from (batch, in, H, W), of which each pixel counts as a 2x2 square if `doubled`."""
        if doubled:
            features = F.interpolate(features, scale_factor=2.0, mode="nearest")
        if self.dynamic and WHOLE_PRODUCTS and features.device.type == "cpu":
            # one by one, so that a picture does not depend on those that are made with it
            return torch.cat([self._whole_product(sample) for sample in features.split(1)])
        out = F.conv2d(features, self.weight.to(features.dtype), None, self.stride, self.padding)
        out = out * self.scale[:, None, None]
        return out if self.bias is None else out + self.bias[:, None, None]

    def _whole_product(self, sample: Tensor) -> Tensor:
        sample = sample.contiguous(memory_format=torch.channels_last)
        # with zero among the levels, for it stands around the picture
        low, high = min(0.0, sample.amin().item()), max(0.0, sample.amax().item())
        step = max((high - low) / 255, torch.finfo(torch.float32).tiny)
        zero = round(-low / step)
        levels = (sample.float() * (1 / step) + zero).round_().clamp_(0, 255).to(torch.uint8)
        settings = self.stride, self.padding, [1, 1], 1
        scale = self.scale.float()
        # a packed weight is the same for all scales and zeros of activations
        packed = self._packed("levels", lambda w: _prepacked(w, scale, settings))
        bias, none = None if self.bias is None else self.bias.float(), torch.zeros(len(scale), dtype=torch.int32)
        made: Tensor = torch.ops.onednn.qconv2d_pointwise(
            levels, step, zero, packed, scale, none, bias, *settings, 1.0, 0, sample.dtype, "none", [], ""
        )
        return made


def _prepacked(weight: Tensor, scale: Tensor, settings: Any) -> Tensor:
    made: Tensor = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, MIDDLE, *settings, None)
    return made


def _whole_products() -> bool:
    """Whether oneDNN convolves whole numbers here: x86 CPUs, and releases of torch that have it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    try:  # not part of torch's public interface
        operators = torch.ops.onednn.qconv2d_pointwise, torch.ops.onednn.qconv_prepack
    except (AttributeError, RuntimeError):
        return False
    return len(operators) == 2


WHOLE_PRODUCTS = _whole_products()
