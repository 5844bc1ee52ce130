"""How often the embedded model draws what its prompt says, by attribute, judged by pixel analysis.

Run from the root of the repository: `python -m benchmarks.embedded_success --help`.

Two hundred prompts each with one and with two shapes, and as many whose combination of attributes training never
showed, are drawn with the model's own defaults. An upper bound replaces stages by the truth, to see which one loses
what: `embedding` draws from the image embedding of the rendered scene (no text, no prior), `movq` only encodes and
decodes the rendered scene (no UNet either), and `render` judges the rendered scene itself.

With `--training` it judges the checkpoints of a training that may still be under way.
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

Drawer: TypeAlias = Callable[[Sequence[Prompt]], Sequence[Any]]
UPPER_BOUNDS = ("embedding", "movq", "render")
DECODER_ARGUMENTS = ("num_inference_steps", "guidance_scale", "height", "width")
# For checkpoints under training, which bring no settings of their own yet.
FIRST_GUESS = {
    "num_inference_steps": 25,
    "guidance_scale": 2.0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 1.0,
}


def _rendered(prompts: Sequence[Prompt], side: int = 128) -> list[Image.Image]:
    pictures = render([prompt.scene for prompt in prompts], size=side)
    return [Image.fromarray((to_array(picture) * 255).round().astype("uint8")) for picture in pictures]


def _generators(prompts: Sequence[Prompt]) -> list[torch.Generator]:
    """One generator a prompt: a picture must not depend on the batch it is drawn in."""
    return [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]


def from_prompts(pipe: Any, arguments: dict[str, Any]) -> Drawer:
    """The whole chain, as users call it."""

    def draw(prompts: Sequence[Prompt]) -> Sequence[Any]:
        texts = [prompt.text for prompt in prompts]
        return list(pipe(texts, generator=_generators(prompts), **arguments).images)

    return draw


def from_embeddings(pipe: Any, arguments: dict[str, Any]) -> Drawer:
    """The decoder on true image embeddings: what the prior could reach at best."""
    own = {name: value for name, value in arguments.items() if name in DECODER_ARGUMENTS}
    encoder, processor = pipe.prior_image_encoder, pipe.prior_image_processor

    @torch.no_grad()
    def draw(prompts: Sequence[Prompt]) -> Sequence[Any]:
        pictures = _rendered(prompts, encoder.config.image_size)
        pixels = processor(pictures, return_tensors="pt").pixel_values.to(encoder.dtype)
        embeds, empty = encoder(pixels).image_embeds, encoder(torch.zeros_like(pixels)).image_embeds
        decoder = pipe.decoder_pipe
        return list(decoder(embeds, empty, generator=_generators(prompts), **own).images)

    return draw


def from_latents(pipe: Any) -> Drawer:
    """The MoVQ there and back: what the UNet could reach at best."""
    movq = pipe.movq

    @torch.no_grad()
    def draw(prompts: Sequence[Prompt]) -> Sequence[Any]:
        pictures = render([prompt.scene for prompt in prompts]).to(movq.dtype)
        latents = movq.encode(pictures * 2 - 1).latents
        return list(movq.decode(latents, force_not_quantize=True).sample / 2 + 0.5)

    return draw


def run(draw: Drawer, prompts: Sequence[Prompt], batch: int) -> Iterator[tuple[Any, Verdict]]:
    """Draw and judge the prompts in batches, yielding every picture with its verdict in order."""
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        for image, prompt in zip(draw(some), some, strict=True):
            yield image, judge(image, prompt.named)


def under_training(folder: Path, upper_bound: str | None) -> Any:
    """A pipeline of what the stages under `folder` have learned so far; those an upper bound skips are not needed."""
    from kandinsky22 import DDPMScheduler, KandinskyV22CombinedPipeline, UnCLIPScheduler
    from kandinsky22.training import clip, decoder, loop, movq, prior, shared_unet

    parts: dict[str, Any] = {"unet": None, "scheduler": None, "movq": movq.load_movq(folder / "movq").eval()}
    names = ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
    parts |= {f"prior_{name}": None for name in names}
    if upper_bound != "movq":
        towers = clip.Towers.load(folder / "clip" / "model")
        shared = folder / "shared"
        parts["unet"] = (
            shared_unet.load_shared(shared).part({}) if shared.is_dir() else decoder.load_decoder(folder / "decoder")
        )
        parts["scheduler"] = DDPMScheduler(**decoder.SCHEDULER)
        parts |= {"prior_image_encoder": towers.vision, "prior_image_processor": clip.image_processor()}
        parts |= {"prior_text_encoder": towers.text, "prior_tokenizer": towers.tokenizer}
    if upper_bound is None:
        network = prior.create(towers, prior.SETTINGS.seed)
        loop.load_average(network, folder / "prior")
        parts |= {"prior_prior": network.eval(), "prior_scheduler": UnCLIPScheduler(**prior.SCHEDULER)}
    return KandinskyV22CombinedPipeline(**parts)


def load_pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline to judge and the arguments to call it with."""
    import kandinsky22

    prior = {} if options.prior is None else {"prior": options.prior}
    if options.training is not None:
        pipe, arguments = under_training(options.training, options.upper_bound), dict(FIRST_GUESS)
    else:
        pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(options.model, **prior)
        arguments = pipe.generation_defaults
    pipe.set_progress_bar_config(disable=True)
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "prior_num_inference_steps": options.prior_steps,
        "prior_guidance_scale": options.prior_guidance,
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    if options.scheduler is not None:
        kind = {"ddpm": kandinsky22.DDPMScheduler, "ddim": kandinsky22.DDIMScheduler}[options.scheduler]
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe, arguments


def make_drawer(options: argparse.Namespace) -> tuple[Drawer, dict[str, Any]]:
    """What draws the pictures, and the arguments that belong into the report."""
    if options.upper_bound == "render":
        return _rendered, {}
    pipe, arguments = load_pipeline(options)
    if options.upper_bound == "movq":
        return from_latents(pipe), {}
    return (from_embeddings if options.upper_bound else from_prompts)(pipe, arguments), arguments


def contact_sheet(cells: Sequence[tuple[Any, Prompt, Verdict]], path: Path, columns: int = 6) -> None:
    """Save pictures with their prompts and what is wrong with them."""
    width, height, side = 200, 210, 128
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(cells) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, prompt, verdict) in enumerate(cells):
        left, top = width * (index % columns), height * (index // columns)
        picture = Image.fromarray((to_array(image) * 255).round().astype("uint8")).resize((side, side))
        sheet.paste(picture, (left + (width - side) // 2, top + 4))
        wrong = "wrong: " + ", ".join(verdict.wrong)
        pen.text((left + 4, top + side + 6), textwrap.fill(prompt.text, 36, max_lines=3), fill="black", font_size=10)
        pen.text((left + 4, top + side + 46), textwrap.fill(wrong, 36), fill="red", font_size=10)
    sheet.save(path)


def report(
    options: argparse.Namespace, arguments: dict[str, Any], cells: Sequence[tuple[Any, Prompt, Verdict]], shares: Shares
) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "arguments": arguments,
        "success": [
            {
                "shapes": shapes,
                "held_out": held_out,
                **{name: {"right": share.right, "of": share.of} for name, share in row.items()},
            }
            for (shapes, held_out), row in shares.items()
        ],
        "failures": [
            {
                "prompt": prompt.text,
                "seed": prompt.seed,
                "held_out": prompt.held_out,
                "wrong": verdict.wrong,
                "found": dataclasses.asdict(verdict.reading),
            }
            for _, prompt, verdict in cells
            if not verdict.all_right
        ],
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_success", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--prior", help="folder of a prior pipeline, where --model is a decoder's")
    parser.add_argument("--training", type=Path, help="judge the checkpoints in this folder of the training instead")
    parser.add_argument("--upper-bound", choices=UPPER_BOUNDS, help="replace the stages before this one by the truth")
    parser.add_argument("--prompts", type=_positive, default=200, help="prompts with one and with two shapes (200)")
    parser.add_argument("--only", choices=("seen", "held-out"), help="leave out the other prompts")
    parser.add_argument("--detail", choices=tuple(DETAILS), default="usual", help="how much prompts state (usual)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other prompts and pictures (0)")
    parser.add_argument("--steps", type=int, help="of the decoder; this and the next four default to the model's own")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--scheduler", choices=("ddpm", "ddim"), help="of the decoder")
    parser.add_argument("--batch", type=_positive, default=8, help="pictures drawn at once (8)")
    parser.add_argument("--threads", type=_positive, help="of torch")
    parser.add_argument("--out", type=Path, help="folder for success.json and failures.png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and leave a report and the failures where asked."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kinds = {None: (False, True), "seen": (False,), "held-out": (True,)}[options.only]
    prompts = draw_prompts(options.prompts, held_out=kinds, detail=options.detail, seed=options.seed)
    draw, settings = make_drawer(options)
    print(f"{len(prompts)} prompts, {options.upper_bound or 'prompt to picture'}, {settings}", flush=True)
    start, cells = time.monotonic(), []
    for prompt, (image, verdict) in zip(prompts, run(draw, prompts, options.batch), strict=True):
        cells.append((image, prompt, verdict))
        if len(cells) % 100 == 0:
            good = sum(found.all_right for _, _, found in cells)
            print(f"  {len(cells)} drawn, {good} all right, {time.monotonic() - start:.0f} s", flush=True)
    shares = count(prompts, [verdict for _, _, verdict in cells])
    print(table(shares))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report(options, settings, cells, shares), indent=2) + "\n"
        (options.out / "success.json").write_text(text, encoding="utf-8")
        failures = [cell for cell in cells if not cell[2].all_right]
        if failures:
            contact_sheet(failures, options.out / "failures.png")


if __name__ == "__main__":
    main()
