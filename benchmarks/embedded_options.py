"""Effect of options that trade accuracy for time or memory on the embedded model: how often images are still correct.

    python -m benchmarks.embedded_options --prompts 15

For each option, images of the same prompts and seeds are judged as in `embedded_success` and compared with those of
float32. Times of this small model say little about large ones; the benchmark is about the share of correct images. With
n prompts in each of four groups, each option takes 4 n images.
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


def _bfloat16(change: Change) -> Change:
    def convert_and_change(pipe: Any) -> None:
        pipe.to(torch.bfloat16)
        change(pipe)

    return convert_and_change


# Not the prompts that are judged, whose seed is 0.
CALIBRATION = [prompt.text for prompt in draw_prompts(2, seed=1000)]
OPTIONS: dict[str, Change] = {
    "float32": lambda pipe: None,
    "bfloat16": _bfloat16(lambda pipe: None),
    "caching, every=2": lambda pipe: pipe.enable_feature_caching(every=2),
    "caching, every=3": lambda pipe: pipe.enable_feature_caching(every=3),
    "caching, every=5": lambda pipe: pipe.enable_feature_caching(every=5),
    "caching, every=3, levels=2": lambda pipe: pipe.enable_feature_caching(every=3, levels=2),
    "int8": lambda pipe: pipe.quantize("int8"),
    "int8-dynamic": lambda pipe: pipe.quantize("int8-dynamic"),
    "int8-static": lambda pipe: pipe.quantize("int8-static", calibration=CALIBRATION),
    "int8-static, random calibration": lambda pipe: pipe.quantize("int8-static"),
    "int8-static (bfloat16)": _bfloat16(lambda pipe: pipe.quantize("int8-static", calibration=CALIBRATION)),
    "int4 (bfloat16)": _bfloat16(lambda pipe: pipe.quantize("int4")),
}


def load(model: str, quality: str | None) -> tuple[Any, dict[str, Any]]:
    """Return a new pipeline, which an option may change, and the arguments of its calls.

    Args:
        model: Pipeline folder, or "embedded".
        quality: Name of a preset; None takes the default settings of the model.
    """
    import kandinsky22
    from kandinsky22.sampling.presets import apply_quality

    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(pipe.generation_defaults) if quality is None else apply_quality(pipe, quality)


def measure(change: Change, prompts: list[Prompt], options: argparse.Namespace) -> tuple[Share, np.ndarray, float]:
    """Return the share of correct images, the images, and the CPU time per image in seconds.

    Args:
        change: Function that applies an option to a pipeline.
        prompts: The prompts.
        options: Command line options.
    """
    pipe, arguments = load(options.model, options.quality)
    change(pipe)
    generate = from_prompts(pipe, arguments)
    generate(prompts[:1])  # warm up
    start = time.process_time()
    cells = list(run(generate, prompts, options.batch))
    seconds = (time.process_time() - start) / len(prompts)
    correct = sum(verdict.all_correct for _, verdict in cells)
    return Share(correct, len(prompts)), np.stack([to_array(image) for image, _ in cells]), seconds


def main() -> None:
    """Judge each option and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_options", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--prompts", type=int, default=15, help="prompts in each of four groups (15)")
    parser.add_argument("--only", nargs="+", choices=tuple(OPTIONS), help="options besides float32 (all)")
    parser.add_argument("--quality", help="draft, balanced or best (default settings of the model)")
    parser.add_argument("--batch", type=int, default=4, help="images per batch (4)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    prompts = draw_prompts(options.prompts)
    names = [name for name in OPTIONS if options.only is None or name in (*options.only, "float32")]
    head = "| option | correct | 95 % interval | mean difference, of 255 | CPU seconds per image |"
    print(f"{head}\n|---|---:|---|---:|---:|")
    baseline, report = None, {}
    for name in names:
        share, images, seconds = measure(OPTIONS[name], prompts, options)
        baseline = images if baseline is None else baseline
        difference = 255 * float(np.abs(images - baseline).mean())
        low, high = share.interval
        print(
            f"| {name} | {share.correct} of {share.total} | {100 * low:.0f} to {100 * high:.0f} % | {difference:.2f} | "
            f"{seconds:.2f} |",
            flush=True,
        )
        report[name] = {"correct": share.correct, "total": share.total, "difference": difference, "seconds": seconds}
        assert math.isfinite(difference), name
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
