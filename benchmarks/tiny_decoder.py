"""Difference and time of the embedded model's tiny decoder, compared with MoVQ.

    python -m benchmarks.tiny_decoder

The pictures are rendered scenes that no training has seen, encoded by MoVQ and decoded by both networks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.embedded_prompts import EVALUATION_SEED
from kandinsky22 import KandinskyV22CombinedPipeline
from kandinsky22.pipelines.network_calls import decode_latents
from kandinsky22.training.scenes import render, sample_scene

ROUNDS = 30


def cpu_seconds(function: Callable[[], Tensor]) -> float:
    """Return the CPU time of a call.

    Args:
        function: The function.
    """
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    """Compare both decoders and print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_decoder", description=str(__doc__).split("\n")[0])
    parser.add_argument("--pictures", type=int, default=64, help="number of pictures (64)")
    parser.add_argument("--tiny-decoder", help="folder of another tiny decoder (that of the embedded model)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = KandinskyV22CombinedPipeline.from_pretrained("embedded")
    pipe.enable_tiny_decoder(options.tiny_decoder)
    tiny, movq = pipe.tiny_decoder, pipe.movq
    assert tiny is not None
    rng = np.random.default_rng([EVALUATION_SEED, 88])
    with torch.inference_mode():
        images = render([sample_scene(rng) for _ in range(options.pictures)], 128) * 2 - 1
        latents = movq.encode(images).latents
        pairs = decode_latents(movq, latents).clamp(-1, 1), tiny(latents).clamp(-1, 1)
        difference = (pairs[0] - pairs[1]).abs().mean((1, 2, 3)) * 127.5
        single = latents[:1]
        functions = (lambda: decode_latents(movq, single), lambda: tiny(single))
        times = [tuple(map(cpu_seconds, functions)) for _ in range(ROUNDS + 3)][3:]
    print(f"mean difference to MoVQ: {difference.mean():.2f} of 255; of the worst picture {difference.max():.2f}")
    milliseconds = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    faster = statistics.median(slow / fast for slow, fast in times)
    print(f"CPU time of one picture: MoVQ {milliseconds[0]:.0f} ms, tiny decoder {milliseconds[1]:.1f} ms")
    print(f"{faster:.1f} times as fast")


if __name__ == "__main__":
    main()
