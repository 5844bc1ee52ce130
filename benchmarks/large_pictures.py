"""MoVQ for large pictures: time and peak memory of encoding and decoding, whole and tiled, and how much they differ.

    python -m benchmarks.large_pictures --sizes 512 1024 2048

Published config, random weights, each case in a process of its own. Memory is what the process has at most beyond
what it has once the weights are there and packed.
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

WAYS = ("decode", "encode")
BOUND = 1 / 255  # mean difference in [0, 1] that tiling may make


def work(way: str, size: int, tiled: bool, dtype: str, threads: int, out: Path) -> dict[str, Any]:
    """One case; leaves its result in a file."""
    import torch

    from kandinsky22.models import VQModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    movq = VQModel().eval().to(getattr(torch, dtype))
    given = torch.randn(1, 4, size // 8, size // 8) if way == "decode" else torch.rand(1, 3, size, size) * 2 - 1
    given = given.to(movq.dtype)

    def call(given: Any) -> Any:
        with torch.no_grad():
            if way == "decode":
                return movq.decode(given, force_not_quantize=True, return_dict=False)[0]
            return movq.encode(given, return_dict=False)[0]

    if tiled:
        movq.enable_tiling()
    few = 32 if way == "decode" else 256
    call(given[:, :, :few, :few])  # packs the weights
    before = peak()
    start = time.perf_counter()
    made = call(given)
    seconds = time.perf_counter() - start
    torch.save(made.float(), out)
    return {"way": way, "size": size, "tiled": tiled, "dtype": dtype, "seconds": seconds, "gib": peak() - before}


def peak() -> float:
    """The most memory that this process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def spawn(case: list[str], out: Path) -> dict[str, Any]:
    """Run `work` in a process of its own; what it found."""
    command = [sys.executable, "-m", "benchmarks.large_pictures", "--work", *case, str(out)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> int:
    """Run the cases; exit code 1 if tiling makes a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only-tiled", action="store_true", help="leave out the whole pictures, which take most memory"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        way, size, tiled, dtype, threads, out = options.work
        print(json.dumps(work(way, int(size), tiled == "True", dtype, int(threads), Path(out))))
        return 0
    import torch

    rows, good = [], True
    print("| | size | whole: s | GiB | tiled: s | GiB | mean difference in [0, 1] |\n|---|---|---|---|---|---|---|")
    for way in options.ways:
        for size in options.sizes:
            with TemporaryDirectory() as folder:
                found: dict[bool, Any] = {}
                for tiled in (True,) if options.only_tiled else (False, True):
                    case = [way, str(size), str(tiled), options.dtype, str(options.threads)]
                    found[tiled] = spawn(case, Path(folder) / str(tiled))
                whole = found.get(False, {"seconds": float("nan"), "gib": float("nan")})
                error = float("nan")
                if False in found:
                    ours, theirs = (torch.load(Path(folder) / str(tiled)) for tiled in (True, False))
                    scale = 0.5 if way == "decode" else 1.0  # pictures are in [-1, 1]
                    error = ((ours - theirs).abs().mean() * scale).item()
                    good &= error < BOUND
            figures = [whole["seconds"], whole["gib"], found[True]["seconds"], found[True]["gib"]]
            print(
                f"| {way} | {size} | " + " | ".join(f"{value:.1f}" for value in figures) + f" | {error:.1e} |",
                flush=True,
            )
            rows += found.values()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
