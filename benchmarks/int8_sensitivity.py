"""Error of the UNet's output when a single layer is rounded to 8 bits, as "int8-static" does, for all layers.

    python -m benchmarks.int8_sensitivity

The embedded model, in float32. Prompts are denoised while the ranges of the layers' inputs are measured, and the noise
that is predicted for other latents, at several noise levels, is compared with and without rounding of one layer. Errors
are root mean squares, relative to those of the float32 output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare_report import table
from kandinsky22 import KandinskyV22CombinedPipeline
from kandinsky22.runtime.calibration import observed_ranges
from kandinsky22.runtime.int8_layers import Int8Conv2d, Int8Linear
from kandinsky22.runtime.quantize import MIN_CHANNELS, measure_ranges, quantize

CALIBRATION = (
    "a red circle",
    "two blue squares",
    "a green star on a yellow background",
    "a small white triangle above a black circle",
)
PROMPTS = ("a purple square on a white background", "three orange circles")
TIMESTEPS = (900, 600, 300, 50)


def candidates(unet: nn.Module) -> dict[str, nn.Module]:
    """Return all convolutions and linear layers that can be rounded, by name, also those that are left alone.

    Args:
        unet: The network.
    """
    return {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS)
    }


def rounded(layer: Any) -> Any:
    """Return the 8-bit form of a layer, without a range.

    Args:
        layer: A convolution or a linear layer.
    """
    return Int8Conv2d(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer, per_token=False)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of the output, relative to it.

    Attributes:
        alone: That of each layer alone, by name.
        together: That of "int8-static".
        rounded: Names of the layers that "int8-static" rounds.
    """

    alone: dict[str, float]
    together: float
    rounded: frozenset[str]


def measure() -> Errors:
    """Return the errors of the embedded model's UNet."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("embedded")
    unet: Any = pipe.unet
    arguments = {**pipe.generation_defaults, "num_inference_steps": 8, "output_type": "latent"}

    def draw() -> None:
        pipe(list(CALIBRATION), generator=torch.Generator().manual_seed(0), **arguments)

    layers = candidates(unet)
    ranges = observed_ranges(layers, draw)
    embeds = pipe.prior_pipe(list(PROMPTS), generator=torch.Generator().manual_seed(1))
    condition = unet.encode_condition(torch.cat([embeds.negative_image_embeds, embeds.image_embeds]))
    latents = torch.randn(2 * len(PROMPTS), 4, 16, 16, generator=torch.Generator().manual_seed(2))

    def predict() -> Tensor:
        return torch.cat([unet.denoise(latents, float(step), condition)[:, :4] for step in TIMESTEPS])

    expected = predict()

    def error() -> float:
        return float((predict() - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    alone = {}
    for name, layer in layers.items():
        if name not in ranges:
            continue
        parent = unet.get_submodule(name.rpartition(".")[0])
        replacement = rounded(layer)
        replacement.set_input_range(*ranges[name])
        setattr(parent, name.rpartition(".")[2], replacement)
        # what the condition holds was computed by the float layers
        condition = unet.encode_condition(torch.cat([embeds.negative_image_embeds, embeds.image_embeds]))
        alone[name] = error()
        setattr(parent, name.rpartition(".")[2], layer)
    condition = unet.encode_condition(torch.cat([embeds.negative_image_embeds, embeds.image_embeds]))
    static = measure_ranges(unet, draw)
    quantize(unet, "int8-static", static)
    return Errors(alone, error(), frozenset(static))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_sensitivity", description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="layers in the table (16)")
    parser.add_argument("--out", type=Path, help="file for all results (JSON)")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        errors = measure()
    ordered = sorted(errors.alone.items(), key=lambda item: -item[1])
    rows = [[name, f"{100 * value:.2f} %", "yes" if name in errors.rounded else "no"] for name, value in ordered]
    print(table(["layer", "error alone", "rounded"], rows[: options.rows]))
    print(f'\n{len(rows)} layers; "int8-static" as a whole: {100 * errors.together:.2f} %')
    if options.out is not None:
        options.out.write_text(json.dumps({"layers": dict(ordered), "together": errors.together}, indent=1) + "\n")


if __name__ == "__main__":
    main()
