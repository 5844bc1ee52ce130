"""Effect of the guidance options on contrast and on colours out of range, on the embedded model.

Run from the root of the repository: `python -m benchmarks.guidance_range`. It prints the table of the documentation of
guidance. `benchmarks.samplers` measures how often images show what their prompt states.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.embedded_prompts import draw_prompts

STRONG = 8.0
CELLS: list[dict[str, Any]] = [
    {"guidance_scale": 1.0},
    {"guidance_scale": 2.0},
    {"guidance_scale": STRONG},
    {"guidance_scale": STRONG, "guidance_rescale": 0.7},
    {"guidance_scale": STRONG, "guidance_rescale": 1.0},
    {"guidance_scale": STRONG, "guidance_interval": (0.0, 0.5)},
    {"guidance_scale": STRONG, "guidance_interval": (0.25, 0.75)},
    {"guidance_scale": STRONG, "guidance_threshold": 1.0},
    {"guidance_scale": STRONG, "guidance_threshold": 0.995},
]
OUT_OF_RANGE = 1.02  # decoded pixels should be in [-1, 1]; rounding alone does not exceed this


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="prompts with one shape, and as many with two (8)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the decoder (20)")
    options = parser.parse_args()
    import kandinsky22

    pipe = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    texts = [prompt.text for prompt in draw_prompts(options.prompts, held_out=[False])]
    embeds = pipe.prior_pipe(texts, generator=torch.Generator().manual_seed(0), return_dict=False)
    decoder = pipe.decoder_pipe
    decoder.scheduler = kandinsky22.DPMSolverMultistepScheduler.from_config(
        decoder.scheduler.config, timestep_spacing="trailing"
    )
    print("| guidance | contrast of the latents | pixels out of range | processor time |")
    print("|---|---:|---:|---:|")
    first: tuple[float, float] | None = None
    for cell in CELLS:
        start = time.process_time()
        latents = decoder(
            *embeds,
            num_inference_steps=options.steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
            **cell,
        ).images
        seconds = time.process_time() - start
        contrast = float(latents.flatten(1).std(dim=1).mean())
        images = decoder.movq.decode(latents, force_not_quantize=True).sample
        out_of_range = float((images.abs() > OUT_OF_RANGE).float().mean())
        first = first or (contrast, seconds)
        name = ", ".join(f"{key.removeprefix('guidance_')} {value}" for key, value in cell.items())
        print(f"| {name} | {contrast / first[0]:.2f} | {out_of_range:.1%} | {seconds / first[1]:.2f} |")


if __name__ == "__main__":
    main()
