"""What options that trade results for time or memory do to the embedded model: how often it is still right.

    python -m benchmarks.embedded_options --prompts 15

draws the same prompts with the same seeds for each option, judges the pictures as `embedded_success` does, and compares
them with those of float32. Times are those of this small model, which is a poor guide to large ones; the share of right
pictures is what this is for. With n prompts of each of the four groups, 4 n pictures are drawn for each option.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.embedded_prompts import Prompt, Share, draw_prompts
from benchmarks.embedded_success import from_prompts, run
from benchmarks.pixel_judge import to_array

Change = Callable[[Any], Any]


def _bfloat16(then: Change) -> Change:
    def change(pipe: Any) -> None:
        pipe.to(torch.bfloat16)
        then(pipe)

    return change


OPTIONS: dict[str, Change] = {
    "float32": lambda pipe: None,
    "bfloat16": _bfloat16(lambda pipe: None),
    "caching, every=2": lambda pipe: pipe.enable_feature_caching(every=2),
    "caching, every=3": lambda pipe: pipe.enable_feature_caching(every=3),
    "caching, every=5": lambda pipe: pipe.enable_feature_caching(every=5),
    "caching, every=3, levels=2": lambda pipe: pipe.enable_feature_caching(every=3, levels=2),
    "int8": lambda pipe: pipe.quantize("int8"),
    "int8-dynamic": lambda pipe: pipe.quantize("int8-dynamic"),
    "int4 (bfloat16)": _bfloat16(lambda pipe: pipe.quantize("int4")),
}


def load(model: str, quality: str | None) -> tuple[Any, dict[str, Any]]:
    """A pipeline of its own for each option, which takes it apart, and the arguments to call it with."""
    import kandinsky22
    from kandinsky22.sampling.presets import apply_quality

    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(pipe.generation_defaults) if quality is None else apply_quality(pipe, quality)


def measure(change: Change, prompts: list[Prompt], options: argparse.Namespace) -> tuple[Share, np.ndarray, float]:
    """How many pictures are right, the pictures, and the seconds of CPU time for each."""
    pipe, arguments = load(options.model, options.quality)
    change(pipe)
    draw = from_prompts(pipe, arguments)
    draw(prompts[:1])
    start = time.process_time()
    cells = list(run(draw, prompts, options.batch))
    seconds = (time.process_time() - start) / len(prompts)
    right = sum(verdict.all_right for _, verdict in cells)
    return Share(right, len(prompts)), np.stack([to_array(image) for image, _ in cells]), seconds


def main() -> None:
    """Measure each option and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_options", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--prompts", type=int, default=15, help="prompts of each of four groups (15)")
    parser.add_argument("--only", nargs="+", choices=tuple(OPTIONS), help="these options, besides float32")
    parser.add_argument("--quality", help="draft, balanced or best; the model's own steps unless given")
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at once (4)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    prompts = draw_prompts(options.prompts)
    names = [name for name in OPTIONS if options.only is None or name in (*options.only, "float32")]
    print(
        "| option | right | 95 % interval | mean difference, of 255 | CPU seconds a picture |\n|---|---:|---|---:|---:|"
    )
    exact, report = None, {}
    for name in names:
        share, pictures, seconds = measure(OPTIONS[name], prompts, options)
        exact = pictures if exact is None else exact
        moved = 255 * float(np.abs(pictures - exact).mean())
        low, high = share.interval
        print(
            f"| {name} | {share.right} of {share.of} | {100 * low:.0f} to {100 * high:.0f} % | {moved:.2f} | "
            f"{seconds:.2f} |",
            flush=True,
        )
        report[name] = {"right": share.right, "of": share.of, "difference": moved, "seconds": seconds}
        assert math.isfinite(moved), name
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
