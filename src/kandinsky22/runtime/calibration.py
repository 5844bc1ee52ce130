"""Calibration: the range of the inputs of each layer, seen while a network runs, for rounding them to 8 bits.

`observed_ranges` records what passes through the layers while any function runs the network. `random_steps` is such a
function for a UNet without prompts: it denoises latents for random image embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kandinsky22.errors import InputError

CALIBRATION_STEPS = 8  # denoising steps, spread over all noise levels
SAMPLES = 2**13  # inputs of a layer that are stored per call, evenly spaced, to choose the range
CANDIDATES = tuple(1 - index / 20 for index in range(13))  # shares of the complete range that are tried: 1 to 0.4
TRAINING_STEPS = 1000
BETAS = 0.00085, 0.012  # first and last beta of the published decoder's linear schedule
LARGEST_CLEAN = 2.0  # limit of predicted clean latents, as schedulers have; random networks would diverge without it


class Range(NamedTuple):
    """Range of the inputs of a layer.

    Attributes:
        low: Smallest input, at most zero.
        high: Largest input, at least zero.
    """

    low: float
    high: float


class _Observer:
    """Hook that records the inputs of a layer: their range, and a sample of them."""

    def __init__(self) -> None:
        self.low, self.high, self.samples = 0.0, 0.0, list[Tensor]()

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        features: Tensor = inputs[0].detach()
        low, high = features.aminmax()
        if not math.isfinite((high - low).item()):
            raise InputError("calibration: a layer received NaN or infinity; use float32 or bfloat16, or other prompts")
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        values = features.contiguous(memory_format=_layout(features)).as_strided((features.numel(),), (1,))
        stride = max(1, values.numel() // SAMPLES) | 1  # odd, so that all channels are sampled
        self.samples.append(values[::stride].float().cpu())

    def best_range(self) -> Range:
        """Return the part of the observed range with the smallest mean squared error of rounding to 256 levels."""
        values = torch.cat(self.samples)
        ranges = [Range(self.low * share, self.high * share) for share in CANDIDATES]
        return min(ranges, key=lambda candidate: _rounding_error(values, candidate))


def observed_ranges(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Range]:
    """Return the ranges of layers' inputs while a function runs.

    Args:
        layers: Layers by name.
        run: Function that runs the network that has the layers.

    Returns:
        Ranges by name, of the layers that ran.
    """
    observers: dict[str, _Observer] = {}
    hooks = []
    try:
        for name, layer in layers.items():
            observers[name] = _Observer()
            hooks.append(layer.register_forward_pre_hook(observers[name]))
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: observer.best_range() for name, observer in observers.items() if observer.samples}


@torch.no_grad()
def random_steps(unet: Any, embeds: Tensor | None = None, seed: int = 0) -> None:
    """Denoise latents for image embeddings in a few steps of DDIM (https://arxiv.org/abs/2010.02502), with eta 0.

    Args:
        unet: A UNet of any variant.
        embeds: Image embeddings (batch, encoder_hid_dim); None for two whose elements are normally distributed.
        seed: Seed of all random numbers.
    """
    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    embeds = draw(2, config.encoder_hid_dim) if embeds is None else embeds.to(unet.device, unet.dtype)
    side = (config.sample_size or 64) // 2 ** (levels := len(config.block_out_channels) - 1) * 2**levels
    batch, hint, channels = len(embeds), None, None
    if config.addition_embed_type == "image_hint":
        hint = draw(batch, 3, 8 * side, 8 * side).clamp_(-1, 1)
    elif config.in_channels > 4:  # a masked image and its mask
        mask = (draw(batch, 1, side, side) > 0).to(unet.dtype)
        channels = torch.cat([draw(batch, config.in_channels - 5, side, side) * mask, mask], dim=1)
    condition = unet.encode_condition(embeds, hint, channels)
    products = torch.cumprod(1 - torch.linspace(*BETAS, TRAINING_STEPS), dim=0)
    timesteps = torch.linspace(TRAINING_STEPS - 1, 0, CALIBRATION_STEPS).round().int().tolist()
    latents = draw(batch, 4, side, side)
    for step, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        noise = unet.denoise(latents, float(step), condition)[:, :4]
        product = products[step]
        target = torch.ones(()) if following is None else products[following]
        clean = ((latents - (1 - product).sqrt() * noise) / product.sqrt()).clamp_(-LARGEST_CLEAN, LARGEST_CLEAN)
        noise = (latents - product.sqrt() * clean) / (1 - product).sqrt()
        latents = (target.sqrt() * clean + (1 - target).sqrt() * noise).to(unet.dtype)


def _layout(features: Tensor) -> torch.memory_format:
    is_image = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_image else torch.contiguous_format


def _rounding_error(values: Tensor, candidate: Range) -> float:
    step = max((candidate.high - candidate.low) / 255, torch.finfo(torch.float32).tiny)
    zero_point = round(-candidate.low / step)
    return torch.fake_quantize_per_tensor_affine(values, step, zero_point, 0, 255).sub_(values).square_().mean().item()
