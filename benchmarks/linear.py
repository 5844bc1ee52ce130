"""What the packed weights of `kandinsky22.kernels.linear` gain, for layers of Kandinsky 2.2: both products in turn.

    python -m benchmarks.linear

prints the median time of the plain and of the packed product, their ratio, and what packing once costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from kandinsky22.kernels.linear import Linear
from kandinsky22.kernels.settings import optimisations

# (in, out, rows): a step of the prior, its text, the UNet's attention at 512 x 512
CASES = (
    (2048, 2048, 4), (2048, 8192, 4), (8192, 2048, 4), (2048, 8192, 40), (2048, 8192, 154),
    (768, 768, 2048), (1152, 1152, 512), (1536, 1536, 128),
)  # fmt: skip
LAYERS = 4  # in turn, so that their weights do not all stay in the caches, as in a network


def median(calls: list[float]) -> float:
    """The middle one."""
    return sorted(calls)[len(calls) // 2]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(in_features: int, out_features: int, rows: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the plain and of the packed product, taken in turn, and of packing one weight."""
    with torch.inference_mode(False):
        layers = [Linear(in_features, out_features).requires_grad_(False) for _ in range(LAYERS)]
    features = torch.randn(rows, in_features)

    def run(packing: bool) -> float:
        with optimisations(packed_linear=packing):
            return seconds(lambda: [layer(features) for layer in layers]) / LAYERS

    run(False)
    first = run(True)
    pairs = [(run(False), run(True)) for _ in range(repeats)]
    plain, packed = (median(list(column)) for column in zip(*pairs, strict=True))
    return plain, packed, first - packed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_default_dtype(getattr(torch, options.dtype))
    print(f"{options.dtype}, {torch.get_num_threads()} threads\n")
    print("| in | out | rows | plain, ms | packed, ms | ratio | packing, ms |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        plain, packed, packing = (1000 * value for value in measure(*case, options.repeats))
        print(
            f"| {case[0]} | {case[1]} | {case[2]} | {plain:.2f} | {packed:.2f} | {plain / packed:.1f} | {packing:.0f} |"
        )


if __name__ == "__main__":
    main()
