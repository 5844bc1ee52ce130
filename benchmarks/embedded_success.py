"""Share of the embedded model's images that show every attribute of their prompt, judged by pixel analysis.

Run from the root of the repository: `python -m benchmarks.embedded_success --help`.

There are 200 prompts with one shape and 200 with two, and as many whose combination of attributes is left out of
training. Images are generated with the model's default settings. An upper bound replaces stages by the truth, to find
the stage that loses most: `embedding` starts from the image embedding of the rendered scene (no text, no prior), `movq`
only encodes and decodes the rendered scene (no UNet either), and `render` judges the rendered scene itself.

`--training` judges the checkpoints of a training that need not be finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, ImageDraw

from benchmarks.embedded_prompts import DETAILS, Prompt, Shares, count, draw_prompts, table
from benchmarks.pixel_judge import Verdict, judge, to_array
from kandinsky22.training.scenes import render

Generate: TypeAlias = Callable[[Sequence[Prompt]], Sequence[Any]]  # from prompts to their images
UPPER_BOUNDS = ("embedding", "movq", "render")
DECODER_ARGUMENTS = ("num_inference_steps", "guidance_scale", "height", "width")
# Settings for checkpoints of a training, which have no default settings.
TRAINING_DEFAULTS = {
    "num_inference_steps": 25,
    "guidance_scale": 2.0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 1.0,
}


def _rendered(prompts: Sequence[Prompt], side: int = 128) -> list[Image.Image]:
    images = render([prompt.scene for prompt in prompts], size=side)
    return [Image.fromarray((to_array(image) * 255).round().astype("uint8")) for image in images]


def _generators(prompts: Sequence[Prompt]) -> list[torch.Generator]:
    """Return one generator per prompt: an image must not depend on its batch."""
    return [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]


def from_prompts(pipe: Any, arguments: dict[str, Any]) -> Generate:
    """Return a function that generates images with the complete pipeline.

    Args:
        pipe: Combined pipeline.
        arguments: Arguments of its calls.
    """

    def generate(prompts: Sequence[Prompt]) -> Sequence[Any]:
        texts = [prompt.text for prompt in prompts]
        return list(pipe(texts, generator=_generators(prompts), **arguments).images)

    return generate


def from_embeddings(pipe: Any, arguments: dict[str, Any]) -> Generate:
    """Return a function that generates images from true image embeddings, the upper bound of the prior.

    Args:
        pipe: Combined pipeline.
        arguments: Arguments of its calls.
    """
    decoder_arguments = {name: value for name, value in arguments.items() if name in DECODER_ARGUMENTS}
    encoder, processor = pipe.prior_image_encoder, pipe.prior_image_processor

    @torch.no_grad()
    def generate(prompts: Sequence[Prompt]) -> Sequence[Any]:
        images = _rendered(prompts, encoder.config.image_size)
        pixels = processor(images, return_tensors="pt").pixel_values.to(encoder.dtype)
        embeds, negatives = encoder(pixels).image_embeds, encoder(torch.zeros_like(pixels)).image_embeds
        decoder = pipe.decoder_pipe
        return list(decoder(embeds, negatives, generator=_generators(prompts), **decoder_arguments).images)

    return generate


def from_latents(pipe: Any) -> Generate:
    """Return a function that encodes and decodes rendered scenes, the upper bound of the UNet.

    Args:
        pipe: Pipeline with a MoVQ.
    """
    movq = pipe.movq

    @torch.no_grad()
    def generate(prompts: Sequence[Prompt]) -> Sequence[Any]:
        images = render([prompt.scene for prompt in prompts]).to(movq.dtype)
        latents = movq.encode(images * 2 - 1).latents
        return list(movq.decode(latents, force_not_quantize=True).sample / 2 + 0.5)

    return generate


def run(generate: Generate, prompts: Sequence[Prompt], batch: int) -> Iterator[tuple[Any, Verdict]]:
    """Yield the image and the verdict of each prompt, in order.

    Args:
        generate: Function from prompts to images.
        prompts: The prompts.
        batch: Number of images per batch.
    """
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        for image, prompt in zip(generate(group), group, strict=True):
            yield image, judge(image, prompt.description)


def load_training(folder: Path, upper_bound: str | None) -> Any:
    """Return the combined pipeline of a training that need not be finished.

    Args:
        folder: Folder of all stages. The stages that the upper bound skips are not needed.
        upper_bound: One of UPPER_BOUNDS, or None.
    """
    from kandinsky22 import DDPMScheduler, KandinskyV22CombinedPipeline, UnCLIPScheduler
    from kandinsky22.training import clip, decoder, loop, movq, prior, shared_unet

    parts: dict[str, Any] = {"unet": None, "scheduler": None, "movq": movq.load_movq(folder / "movq").eval()}
    names = ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
    parts |= {f"prior_{name}": None for name in names}
    if upper_bound != "movq":
        towers = clip.Towers.load(folder / "clip" / "model")
        shared = folder / "shared"
        parts["unet"] = (
            shared_unet.load_shared(shared).variant({}) if shared.is_dir() else decoder.load_decoder(folder / "decoder")
        )
        parts["scheduler"] = DDPMScheduler(**decoder.SCHEDULER)
        parts |= {"prior_image_encoder": towers.vision, "prior_image_processor": clip.image_processor()}
        parts |= {"prior_text_encoder": towers.text, "prior_tokenizer": towers.tokenizer}
    if upper_bound is None:
        network = prior.create_prior(towers, prior.SETTINGS.seed)
        loop.load_average(network, folder / "prior")
        parts |= {"prior_prior": network.eval(), "prior_scheduler": UnCLIPScheduler(**prior.SCHEDULER)}
    return KandinskyV22CombinedPipeline(**parts)


def load_pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline to be judged and the arguments of its calls.

    Args:
        options: Command line options.
    """
    import kandinsky22

    prior = {} if options.prior is None else {"prior": options.prior}
    if options.training is not None:
        pipe, arguments = load_training(options.training, options.upper_bound), dict(TRAINING_DEFAULTS)
    else:
        pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(options.model, **prior)
        arguments = pipe.generation_defaults
    pipe.set_progress_bar_config(disable=True)
    overrides = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "prior_num_inference_steps": options.prior_steps,
        "prior_guidance_scale": options.prior_guidance,
    }
    arguments |= {name: value for name, value in overrides.items() if value is not None}
    if options.scheduler is not None:
        kind = {"ddpm": kandinsky22.DDPMScheduler, "ddim": kandinsky22.DDIMScheduler}[options.scheduler]
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe, arguments


def make_generate(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    """Return the function that generates the images, and the arguments for the report.

    Args:
        options: Command line options.
    """
    if options.upper_bound == "render":
        return _rendered, {}
    pipe, arguments = load_pipeline(options)
    if options.upper_bound == "movq":
        return from_latents(pipe), {}
    return (from_embeddings if options.upper_bound else from_prompts)(pipe, arguments), arguments


def contact_sheet(cells: Sequence[tuple[Any, Prompt, Verdict]], path: Path, columns: int = 6) -> None:
    """Save images with their prompts and wrong attributes in one image.

    Args:
        cells: Images, prompts and verdicts.
        path: File to write.
        columns: Number of columns.
    """
    width, height, side = 200, 210, 128
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(cells) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, prompt, verdict) in enumerate(cells):
        left, top = width * (index % columns), height * (index // columns)
        thumbnail = Image.fromarray((to_array(image) * 255).round().astype("uint8")).resize((side, side))
        sheet.paste(thumbnail, (left + (width - side) // 2, top + 4))
        wrong = "wrong: " + ", ".join(verdict.wrong)
        pen.text((left + 4, top + side + 6), textwrap.fill(prompt.text, 36, max_lines=3), fill="black", font_size=10)
        pen.text((left + 4, top + side + 46), textwrap.fill(wrong, 36), fill="red", font_size=10)
    sheet.save(path)


def report(
    options: argparse.Namespace, arguments: dict[str, Any], cells: Sequence[tuple[Any, Prompt, Verdict]], shares: Shares
) -> dict[str, Any]:
    """Return all measurements for JSON.

    Args:
        options: Command line options.
        arguments: Arguments of the pipeline's calls.
        cells: Images, prompts and verdicts.
        shares: Result of `count`.
    """
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "arguments": arguments,
        "success": [
            {
                "shapes": shapes,
                "held_out": held_out,
                **{name: {"correct": share.correct, "total": share.total} for name, share in row.items()},
            }
            for (shapes, held_out), row in shares.items()
        ],
        "failures": [
            {
                "prompt": prompt.text,
                "seed": prompt.seed,
                "held_out": prompt.held_out,
                "wrong": verdict.wrong,
                "reading": dataclasses.asdict(verdict.reading),
            }
            for _, prompt, verdict in cells
            if not verdict.all_correct
        ],
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is invalid: expected an integer from 1")
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_success", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--prior", help="folder of a prior pipeline, if --model is a decoder pipeline")
    parser.add_argument("--training", type=Path, help="judge the checkpoints in this folder of a training instead")
    parser.add_argument("--upper-bound", choices=UPPER_BOUNDS, help="replace the stages before this one by the truth")
    parser.add_argument("--prompts", type=_positive, default=200, help="prompts with one and with two shapes (200)")
    parser.add_argument("--only", choices=("seen", "held-out"), help="judge only these prompts")
    parser.add_argument("--detail", choices=tuple(DETAILS), default="usual", help="detail of prompts (usual)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and images (0)")
    parser.add_argument("--steps", type=int, help="steps of the decoder (default of the model)")
    parser.add_argument("--guidance", type=float, help="guidance scale of the decoder (default of the model)")
    parser.add_argument("--prior-steps", type=int, help="steps of the prior (default of the model)")
    parser.add_argument("--prior-guidance", type=float, help="guidance scale of the prior (default of the model)")
    parser.add_argument("--scheduler", choices=("ddpm", "ddim"), help="scheduler of the decoder (that of the model)")
    parser.add_argument("--batch", type=_positive, default=8, help="images per batch (8)")
    parser.add_argument("--threads", type=_positive, help="threads of torch")
    parser.add_argument("--out", type=Path, help="folder for success.json and failures.png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge the model, print the table, and write the report and the failures if requested.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kinds = {None: (False, True), "seen": (False,), "held-out": (True,)}[options.only]
    prompts = draw_prompts(options.prompts, held_out=kinds, detail=options.detail, seed=options.seed)
    generate, settings = make_generate(options)
    print(f"{len(prompts)} prompts, {options.upper_bound or 'text to image'}, {settings}", flush=True)
    start, cells = time.monotonic(), []
    for prompt, (image, verdict) in zip(prompts, run(generate, prompts, options.batch), strict=True):
        cells.append((image, prompt, verdict))
        if len(cells) % 100 == 0:
            correct = sum(cell[2].all_correct for cell in cells)
            print(f"  {len(cells)} images, {correct} correct, {time.monotonic() - start:.0f} s", flush=True)
    shares = count(prompts, [verdict for _, _, verdict in cells])
    print(table(shares))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report(options, settings, cells, shares), indent=2) + "\n"
        (options.out / "success.json").write_text(text, encoding="utf-8")
        failures = [cell for cell in cells if not cell[2].all_correct]
        if failures:
            contact_sheet(failures, options.out / "failures.png")


if __name__ == "__main__":
    main()
