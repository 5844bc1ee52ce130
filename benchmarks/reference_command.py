"""Text to image with diffusers, from the start of the process to the PNG: what `kandinsky22 generate` does.

    python -m benchmarks.reference_command "a red circle" --model bench/decoder --prior bench/prior -o picture.png

Both pipelines are loaded, then they run, as the library's documentation shows. The prior keeps the scheduler of its
folder, because the reference's prior accepts no other class; the decoder may have another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.stopwatch import Stopwatch


def main() -> int:
    """Generate an image.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_command",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, required=True, help="folder of the decoder")
    parser.add_argument("--prior", type=Path, required=True, help="folder of the prior")
    parser.add_argument("--dtype", default="float32", help="dtype of torch (float32)")
    parser.add_argument("--size", type=int, default=512, help="side in pixels (512)")
    parser.add_argument("--prior-steps", type=int, default=25, help="steps of the prior (25)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the decoder (100)")
    parser.add_argument("--scheduler", help="class of the decoder's scheduler (that of the folder)")
    parser.add_argument("--scheduler-settings", type=json.loads, default={}, help="its settings, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--started", type=float, help="start of the process, as of time.time")
    parser.add_argument("--stages", type=Path, help="file for the wall time of stages")
    options = parser.parse_args()
    watch = Stopwatch(time.time() if options.started is None else options.started, "import")
    run(options, watch)
    if options.stages is not None:
        watch.write(options.stages)
    return 0


def run(options: argparse.Namespace, watch: Stopwatch) -> None:
    """Generate and save the image.

    Args:
        options: Command line options.
        watch: Receives the stages.
    """
    import torch
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    watch.switch("load")
    dtype = getattr(torch, options.dtype)
    prior = KandinskyV22PriorPipeline.from_pretrained(options.prior, torch_dtype=dtype)
    decoder = KandinskyV22Pipeline.from_pretrained(options.model, torch_dtype=dtype)
    if options.scheduler is not None:
        import diffusers

        scheduler = getattr(diffusers, options.scheduler)
        decoder.scheduler = scheduler.from_config(decoder.scheduler.config, **options.scheduler_settings)
    for pipe in (prior, decoder):
        pipe.set_progress_bar_config(disable=True)
    encode = prior._encode_prompt

    def encode_prompt(*arguments: Any, **settings: Any) -> Any:
        with watch.stage("text encoding"):
            return encode(*arguments, **settings)

    prior._encode_prompt = encode_prompt
    watch.switch("prior")
    generator = torch.Generator().manual_seed(options.seed)
    embeddings = prior(options.prompt, num_inference_steps=options.prior_steps, generator=generator)
    watch.counts |= {"prior steps": options.prior_steps, "decoder steps": options.steps}
    watch.switch("first step")

    def next_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watch.switch("decode" if step + 1 == options.steps else "other steps")
        return tensors

    image = decoder(
        **embeddings,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        generator=generator,
        callback_on_step_end=next_step,
    ).images[0]
    watch.switch("save")
    image.save(options.output)


if __name__ == "__main__":
    sys.exit(main())
