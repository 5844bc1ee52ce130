"""MoVQ for large images: time and peak memory of encoding and decoding, with and without tiling, and their difference.

    python -m benchmarks.large_pictures --sizes 512 1024 2048

Published config, random weights, a separate process for each case. The memory is the peak of the process minus what it
has when the weights are loaded and packed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

OPERATIONS = ("decode", "encode")
MAX_DIFFERENCE = 1 / 255  # largest mean difference in [0, 1] due to tiling


def work(operation: str, size: int, tiled: bool, dtype: str, threads: int, out: Path) -> dict[str, Any]:
    """Measure one case, and save its result.

    Args:
        operation: "decode" or "encode".
        size: Side of the image in pixels.
        tiled: Whether tiling is on.
        dtype: Name of a dtype of torch.
        threads: Number of threads of torch.
        out: File for the result.

    Returns:
        The case with its seconds, and its memory in GiB.
    """
    import torch

    from kandinsky22.models import VQModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    movq = VQModel().eval().to(getattr(torch, dtype))
    is_decoding = operation == "decode"
    inputs = torch.randn(1, 4, size // 8, size // 8) if is_decoding else torch.rand(1, 3, size, size) * 2 - 1
    inputs = inputs.to(movq.dtype)

    def call(inputs: Any) -> Any:
        with torch.no_grad():
            if is_decoding:
                return movq.decode(inputs, force_not_quantize=True, return_dict=False)[0]
            return movq.encode(inputs, return_dict=False)[0]

    if tiled:
        movq.enable_tiling()
    side = 32 if is_decoding else 256
    call(inputs[:, :, :side, :side])  # packs the weights
    before = peak()
    start = time.perf_counter()
    result = call(inputs)
    seconds = time.perf_counter() - start
    torch.save(result.float(), out)
    case = {"operation": operation, "size": size, "tiled": tiled, "dtype": dtype}
    return {**case, "seconds": seconds, "gib": peak() - before}


def peak() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def spawn(case: list[str], out: Path) -> dict[str, Any]:
    """Return the result of `work` in a separate process.

    Args:
        case: Its arguments except the last.
        out: File for the result.
    """
    command = [sys.executable, "-m", "benchmarks.large_pictures", "--work", *case, str(out)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> int:
    """Measure all cases.

    Returns:
        Exit code: 1 if tiling changes results by more than MAX_DIFFERENCE, 0 otherwise.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels (512 1024)")
    parser.add_argument("--operations", choices=OPERATIONS, nargs="+", default=OPERATIONS, help="(both)")
    parser.add_argument("--dtype", default="float32", help="dtype of torch (float32)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument(
        "--only-tiled", action="store_true", help="leave out cases without tiling, which need most memory"
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        operation, size, tiled, dtype, threads, out = options.work
        print(json.dumps(work(operation, int(size), tiled == "True", dtype, int(threads), Path(out))))
        return 0
    import torch

    rows, is_close = [], True
    print("| | size | not tiled: s | GiB | tiled: s | GiB | mean difference in [0, 1] |\n|---|---|---|---|---|---|---|")
    for operation in options.operations:
        for size in options.sizes:
            with TemporaryDirectory() as folder:
                results: dict[bool, Any] = {}
                for tiled in (True,) if options.only_tiled else (False, True):
                    case = [operation, str(size), str(tiled), options.dtype, str(options.threads)]
                    results[tiled] = spawn(case, Path(folder) / str(tiled))
                untiled = results.get(False, {"seconds": float("nan"), "gib": float("nan")})
                error = float("nan")
                if False in results:
                    first, second = (torch.load(Path(folder) / str(tiled)) for tiled in (True, False))
                    scale = 0.5 if operation == "decode" else 1.0  # images are in [-1, 1]
                    error = ((first - second).abs().mean() * scale).item()
                    is_close &= error < MAX_DIFFERENCE
            figures = [untiled["seconds"], untiled["gib"], results[True]["seconds"], results[True]["gib"]]
            print(
                f"| {operation} | {size} | " + " | ".join(f"{value:.1f}" for value in figures) + f" | {error:.1e} |",
                flush=True,
            )
            rows += results.values()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if is_close else 1


if __name__ == "__main__":
    sys.exit(main())
