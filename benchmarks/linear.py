"""Gain of the packed weights of `kandinsky22.kernels.linear`, for layers of Kandinsky 2.2.

    python -m benchmarks.linear

prints the median times with and without packed weights, whose calls alternate, their ratio, and the time to pack once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from kandinsky22.kernels.linear import apply_linear
from kandinsky22.kernels.settings import optimisations

# (inputs, outputs, rows) of a step of the prior, of its text, and of the UNet's attention at 512 x 512.
CASES = (
    (2048, 2048, 4),
    (2048, 8192, 4),
    (8192, 2048, 4),
    (2048, 8192, 40),
    (2048, 8192, 154),
    (768, 768, 2048),
    (1152, 1152, 512),
    (1536, 1536, 128),
)
LAYERS = 4  # layers called one after the other, since the weights of a network do not fit into the caches


def median(values: list[float]) -> float:
    """Return the median, the upper one of two.

    Args:
        values: The values.
    """
    return sorted(values)[len(values) // 2]


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes.

    Args:
        call: Function without arguments.
    """
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(in_features: int, out_features: int, rows: int, repeats: int) -> tuple[float, float, float]:
    """Return the median seconds without and with packed weights, and the seconds to pack one weight.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        rows: Number of rows of the input.
        repeats: Number of calls of each kind.
    """
    with torch.inference_mode(False):
        layers = [torch.nn.Linear(in_features, out_features).requires_grad_(False) for _ in range(LAYERS)]
    features = torch.randn(rows, in_features)

    def run(packed: bool) -> float:
        with optimisations(packed_linear=packed):
            return seconds(lambda: [apply_linear(layer, features) for layer in layers]) / LAYERS

    run(False)
    first = run(True)
    pairs = [(run(False), run(True)) for _ in range(repeats)]
    unpacked, packed = (median(list(column)) for column in zip(*pairs, strict=True))
    return unpacked, packed, first - packed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="calls of each kind (15)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype (float32)")
    options = parser.parse_args()
    torch.set_default_dtype(getattr(torch, options.dtype))
    print(f"{options.dtype}, {torch.get_num_threads()} threads\n")
    print(
        "| inputs | outputs | rows | unpacked, ms | packed, ms | ratio | packing, ms |\n|---|---|---|---|---|---|---|"
    )
    for case in CASES:
        unpacked, packed, packing = (1000 * value for value in measure(*case, options.repeats))
        ratio = unpacked / packed
        inputs, outputs, rows = case
        print(f"| {inputs} | {outputs} | {rows} | {unpacked:.2f} | {packed:.2f} | {ratio:.1f} | {packing:.0f} |")


if __name__ == "__main__":
    main()
