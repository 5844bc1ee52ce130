"""Quality of all modes of the embedded model except text to image, judged by pixel analysis.

Run from the root of the repository: `python -m benchmarks.embedded_modes --help`.

Each mode has 200 cases with the model's default settings: image to image at two strengths, inpainting, hints,
interpolation of two prompts, negative prompts, and variations of an image. Each row of the table is a criterion with
its target.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks import mode_judge
from benchmarks.embedded_prompts import Share
from benchmarks.embedded_success import load_training
from benchmarks.mode_cases import (
    SIZE,
    case_rng,
    description_without,
    full_description,
    neighbours,
    render_image,
    sample_edit,
    sentence,
    to_image,
)
from benchmarks.pixel_judge import judge, to_array
from kandinsky22.training import shared_banks, shared_network, shared_unet
from kandinsky22.training.assemble import DECODER_DEFAULTS, PRIOR_DEFAULTS
from kandinsky22.training.captions import FULL, Detail, caption
from kandinsky22.training.scenes import COLORS, Scene, render_hints, sample_scene


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        mode: Name of the mode.
        criterion: What is measured.
        share: Share of cases that fulfil the criterion, or None if the value is an average.
        value: Its value.
        target: Its target, or None.
        at_most: Whether the target is an upper instead of a lower limit.
        percent: Whether the value is shown in percent.
    """

    mode: str
    criterion: str
    share: Share | None
    value: float
    target: float | None
    at_most: bool = False
    percent: bool = True

    @property
    def reached(self) -> bool:
        """Whether the target is reached; true without a target."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        def show(value: float) -> str:
            return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"

        interval = "" if self.share is None else " to ".join(f"{100 * limit:.1f}" for limit in self.share.interval)
        verdict = "reached" if self.reached else "missed"
        sign = "at most" if self.at_most else "at least"
        target = "-" if self.target is None else f"{sign} {show(self.target)}: {verdict}"
        cells = (self.mode, self.criterion, show(self.value), interval, target)
        return "| " + " | ".join(cells) + " |"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A case to be shown.

    Attributes:
        images: Its images from left to right.
        text: Its prompt or other description.
        correct: Whether the result is correct.
    """

    images: list[Any]
    text: str
    correct: bool


Result = tuple[list[Row], list[Cell]]


def share_row(mode: str, criterion: str, correct: Sequence[bool], target: float | None) -> Row:
    """Return a row for a criterion that each case fulfils or not.

    Args:
        mode: Name of the mode.
        criterion: What is measured.
        correct: Whether each case fulfils it.
        target: Smallest share that is aimed at, or None.
    """
    share = Share(sum(correct), len(correct))
    return Row(mode, criterion, share, share.value, target)


# Models


class Models:
    """The pipelines to be judged, and their settings.

    Args:
        options: Command line options.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import kandinsky22

        self.package, self.training, self.batch = kandinsky22, options.training, options.batch
        self.model = options.model
        if self.training is not None:
            combined = load_training(self.training, None)
            self.prior, self.decoder = combined.prior_pipe, combined.decoder_pipe
        else:
            self.prior = kandinsky22.KandinskyV22PriorPipeline.from_pretrained(self._part("prior"))
            self.decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(self._part("decoder"))
        defaults = self.decoder.generation_defaults or DECODER_DEFAULTS
        overrides = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        self.decoder_settings = defaults | {name: value for name, value in overrides.items() if value is not None}
        self.prior_settings = self.prior.generation_defaults or PRIOR_DEFAULTS
        self.image_to_image = kandinsky22.KandinskyV22Img2ImgPipeline.from_pipe(self.decoder)
        for pipe in (self.prior, self.decoder, self.image_to_image):
            pipe.set_progress_bar_config(disable=True)

    def _part(self, name: str) -> str:
        return self.model if self.model == "embedded" else str(Path(self.model) / name)

    def variant(self, name: str) -> Any:
        """Return a decoder pipeline of another kind.

        Args:
            name: "inpaint" or "control".
        """
        kind = {"inpaint": "KandinskyV22InpaintPipeline", "control": "KandinskyV22ControlnetPipeline"}[name]
        if self.training is not None:
            changes = {"inpaint": shared_network.INPAINT_CONFIG, "control": shared_network.HINT_CONFIG}[name]
            unet = shared_unet.load_shared(self.training / "shared").variant(changes)
            pipe = getattr(self.package, kind)(unet, self.decoder.scheduler, self.decoder.movq)
        else:
            pipe = getattr(self.package, kind).from_pretrained(self._part(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def embed(self, texts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] | None = None) -> Any:
        """Return image embeddings and negative image embeddings of prompts.

        Args:
            texts: The prompts.
            seeds: Seed of each prompt.
            negatives: Negative prompts, or None.
        """
        negative_prompt = None if negatives is None else list(negatives)
        result = self.prior(list(texts), negative_prompt, generator=generators(seeds), **self.prior_settings)
        return result.image_embeds, result.negative_image_embeds

    def interpolate(self, items: Sequence[Sequence[Any]], weights: Sequence[float], seeds: Sequence[int]) -> Any:
        """Return image embeddings and negative image embeddings of interpolations.

        Args:
            items: Prompts and images of each interpolation.
            weights: Weights of the items.
            seeds: Seed of each interpolation.
        """
        results = [
            self.prior.interpolate(list(group), list(weights), generator=generators([seed])[0], **self.prior_settings)
            for group, seed in zip(items, seeds, strict=True)
        ]
        embeds = torch.cat([result.image_embeds for result in results])
        return embeds, torch.cat([result.negative_image_embeds for result in results])

    def generate(self, pipe: Any, embeds: Any, seeds: Sequence[int], **arguments: Any) -> list[Any]:
        """Return images of a decoder pipeline.

        Args:
            pipe: Decoder pipeline of any kind.
            embeds: Image embeddings and negative image embeddings.
            seeds: Seed of each image.
            **arguments: Further arguments of the call.
        """
        positive, negative = embeds
        return list(
            pipe(
                image_embeds=positive,
                negative_image_embeds=negative,
                generator=generators(seeds),
                height=SIZE,
                width=SIZE,
                **self.decoder_settings,
                **arguments,
            ).images
        )

    def batches(self, count: int) -> Iterator[range]:
        """Yield the indices of the cases of each batch.

        Args:
            count: Number of cases.
        """
        for start in range(0, count, self.batch):
            yield range(start, min(start + self.batch, count))


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, thus an image does not depend on its batch.

    Args:
        seeds: Seed of each image.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Modes


def image_to_image(models: Models, count: int, seed: int) -> Result:
    """Judge image to image with prompts that share only the number of shapes with the image.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    cells: dict[float, list[Cell]] = {0.3: [], 1.0: []}
    overlaps: list[bool] = []
    for batch in models.batches(count):
        rngs = [case_rng(seed, 0, index) for index in batch]
        scenes = [sample_scene(rng) for rng in rngs]
        captions = [
            caption(sample_scene(rng, shapes=len(scene.shapes)), rng) for scene, rng in zip(scenes, rngs, strict=True)
        ]
        embeds = models.embed([c.text for c in captions], list(batch))
        sources = [render_image(scene) for scene in scenes]
        for strength, row in cells.items():
            images = models.generate(models.image_to_image, embeds, list(batch), image=sources, strength=strength)
            for source, scene, words, image in zip(sources, scenes, captions, images, strict=True):
                if strength < 1:
                    correct = mode_judge.has_composition(image, scene)
                    overlaps.append(mode_judge.overlap_with_scene(image, scene) >= mode_judge.MIN_OVERLAP)
                else:
                    correct = judge(image, words.description).all_correct
                row.append(Cell([source, image], f"{strength}: {words.text}", correct))
    low, high = ([cell.correct for cell in row] for row in cells.values())
    rows = [
        share_row("img2img", "strength 0.3 keeps number, positions and sizes of shapes, and the background", low, 0.9),
        share_row("img2img", "strength 0.3 also keeps each outline (IoU 0.8)", overlaps, 0.9),
        share_row("img2img", "strength 1.0 shows the prompt", high, 0.9),
    ]
    return rows, [cell for row in cells.values() for cell in row]


def inpaint(models: Models, count: int, seed: int) -> Result:
    """Judge inpainting: one shape of an image is masked, and the prompt describes another one.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    pipe = models.variant("inpaint")
    cells: list[Cell] = []
    errors: list[float] = []
    exact: list[bool] = []
    for batch in models.batches(count):
        rngs = [case_rng(seed, 1, index) for index in batch]
        scenes = [sample_scene(rng) for rng in rngs]
        edits = [sample_edit(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
        captions = [caption(edit.target, rng) for edit, rng in zip(edits, rngs, strict=True)]
        sources, masks = [render_image(scene) for scene in scenes], [edit.mask for edit in edits]
        embeds = models.embed([c.text for c in captions], list(batch))
        arguments: dict[str, Any] = {"image": sources, "mask_image": [mask.astype(np.float32) for mask in masks]}
        images = models.generate(pipe, embeds, list(batch), **arguments)
        if not exact:
            pasted = models.generate(pipe, embeds, list(batch), keep_pixels=True, **arguments)
            exact = [mode_judge.known_region_error(*case) == 0 for case in zip(pasted, sources, masks, strict=True)]
        for source, mask, words, image in zip(sources, masks, captions, images, strict=True):
            errors.append(mode_judge.known_region_error(image, source, mask))
            masked = np.where(mask[:, :, None], np.float32(0.5), to_array(source))
            correct = judge(image, words.description).all_correct
            cells.append(Cell([source, masked, image], words.text, correct))
    mean, limit = float(np.mean(errors)), mode_judge.MAX_KNOWN_ERROR
    rows = [
        share_row("inpaint", "the repainted region shows the prompt", [cell.correct for cell in cells], 0.9),
        Row("inpaint", "mean error of the known region, of 255", None, mean, limit, at_most=True, percent=False),
        share_row("inpaint", "error of each image is within this limit", [error <= limit for error in errors], 0.9),
        share_row("inpaint", "`keep_pixels` keeps the known region exactly", exact, 1.0),
    ]
    return rows, cells


# Prompts for hints state kinds and colours, but neither positions nor sizes.
LOOKS = Detail(size=0.0, color=1.0, background=1.0, position=0.0, relation=1.0)


def control(models: Models, count: int, seed: int) -> Result:
    """Judge hints: layer maps and edges, half of them of shapes at positions that no prompt can describe.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    pipe = models.variant("control")
    cells, scores = [], []
    for batch in models.batches(count):
        rngs = [case_rng(seed, 2, index) for index in batch]
        scenes = [sample_scene(rng) for rng in rngs]
        scenes = [
            shared_banks.free_layout(scene, rng) if index % 2 else scene
            for index, scene, rng in zip(batch, scenes, rngs, strict=True)
        ]
        captions = [caption(scene, rng, LOOKS) for scene, rng in zip(scenes, rngs, strict=True)]
        hints = render_hints(scenes, SIZE, outlines=[index % 4 > 1 for index in batch])
        embeds = models.embed([c.text for c in captions], list(batch))
        images = models.generate(pipe, embeds, list(batch), hint=hints)
        for hint, scene, words, image in zip(hints, scenes, captions, images, strict=True):
            scores.append(mode_judge.overlap_with_scene(image, scene))
            description = dataclasses.replace(words.description, relation=None)
            correct = judge(image, description).all_correct and scores[-1] >= mode_judge.MIN_OVERLAP
            cells.append(Cell([hint, image], f"{scores[-1]:.2f} {words.text}", correct))
    layers, edges = ([s for i, s in enumerate(scores) if (i % 4 > 1) == kind] for kind in (False, True))
    rows = [
        Row("control", "mean overlap (IoU), layer maps", None, float(np.mean(layers)), 0.8, percent=False),
        Row("control", "mean overlap (IoU), edges", None, float(np.mean(edges)), 0.8, percent=False),
        share_row("control", "overlap of 0.8, and as the prompt states", [cell.correct for cell in cells], 0.8),
    ]
    return rows, cells


def mix(models: Models, count: int, seed: int) -> Result:
    """Judge interpolations of two prompts that differ in one attribute.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    cells: list[Cell] = []
    correct: dict[str, list[bool]] = {name: [] for name in mode_judge.ATTRIBUTES}
    for batch in models.batches(count):
        rngs = [case_rng(seed, 3, index) for index in batch]
        names = [mode_judge.ATTRIBUTES[index % len(correct)] for index in batch]
        pairs = [neighbours(rng, name) for name, rng in zip(names, rngs, strict=True)]
        texts = [[caption(scene, rng, FULL).text for scene in pair] for pair, rng in zip(pairs, rngs, strict=True)]
        embeds = models.interpolate(texts, [0.5, 0.5], list(batch))
        images = models.generate(models.decoder, embeds, list(batch))
        for name, pair, words, image in zip(names, pairs, texts, images, strict=True):
            first, second = (render_image(scene) for scene in pair)
            mask = mode_judge.foreground(first) & mode_judge.foreground(second) if name == "color" else None
            ends = [mode_judge.measure(end, name, mask) for end in (first, second)]
            is_between = mode_judge.is_between(mode_judge.measure(image, name, mask), *ends)
            correct[name].append(is_between)
            cells.append(Cell([first, image, second], f"{name}: {words[0]} + {words[1]}", is_between))
    rows = [
        share_row("mix", f"half of each lies between: {name}", results, 0.9)
        for name, results in correct.items()
        if results
    ]
    return rows, cells


def negative(models: Models, count: int, seed: int) -> Result:
    """Judge negative prompts.

    A prompt leaves an attribute open. A negative prompt that states its value must make that value rarer than a
    negative prompt that states another one.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    cells: list[Cell] = []
    unchanged: dict[str, list[bool]] = {"stated": [], "other": []}
    followed: list[bool] = []
    for batch in models.batches(count):
        rngs = [case_rng(seed, 4, index) for index in batch]
        scenes = [sample_scene(rng, shapes=1) for rng in rngs]
        attributes = ["background" if index % 2 else "color" for index in batch]
        prompts = [sentence(scene, name, None) for scene, name in zip(scenes, attributes, strict=True)]
        images = {"none": models.generate(models.decoder, models.embed(prompts, list(batch)), list(batch))}
        values = [
            mode_judge.read_attribute(image, name) for image, name in zip(images["none"], attributes, strict=True)
        ]
        stated = [value or "red" for value in values]
        others = [_other_color(value, scene, rng) for value, scene, rng in zip(stated, scenes, rngs, strict=True)]
        for kind, colors in (("stated", stated), ("other", others)):
            negatives = [sentence(*case) for case in zip(scenes, attributes, colors, strict=True)]
            embeds = models.embed(prompts, list(batch), negatives)
            images[kind] = models.generate(models.decoder, embeds, list(batch))
        for row, (value, attribute) in enumerate(zip(values, attributes, strict=True)):
            if value is None:
                continue  # the image has no value that a negative prompt could state
            for kind, results in unchanged.items():
                results.append(mode_judge.read_attribute(images[kind][row], attribute) == value)
            description = description_without(scenes[row], attribute)
            followed.append(judge(images["stated"][row], description).all_correct)
            text = f"{prompts[row]}; not {value}; not {others[row]}"
            cells.append(Cell([images[kind][row] for kind in images], text, not unchanged["stated"][-1]))
    share, other = (Share(sum(results), len(results)) for results in unchanged.values())
    criterion = f"a value stays although the negative prompt states it (if it states another: {str(other).strip()})"
    suppressed = Row("negative", criterion, share, share.value, other.value / 2, at_most=True)
    return [suppressed, share_row("negative", "the image still shows the prompt", followed, None)], cells


def _other_color(value: str, scene: Scene, rng: np.random.Generator) -> str:
    excluded = {value, scene.background, scene.shapes[0].color}
    return str(rng.choice([name for name in COLORS if name not in excluded]))


def variations(models: Models, count: int, seed: int) -> Result:
    """Judge images generated from the embedding of an image.

    Args:
        models: The pipelines.
        count: Number of cases.
        seed: Seed of the cases.

    Returns:
        Rows of the table, and the cases.
    """
    cells: list[Cell] = []
    for batch in models.batches(count):
        scenes = [sample_scene(case_rng(seed, 5, index)) for index in batch]
        sources = [render_image(scene) for scene in scenes]
        embeds = models.interpolate([[source] for source in sources], [1.0], list(batch))
        images = models.generate(models.decoder, embeds, list(batch))
        for source, scene, image in zip(sources, scenes, images, strict=True):
            verdict = judge(image, full_description(scene))
            cells.append(Cell([source, image], ", ".join(verdict.wrong), verdict.all_correct))
    return [share_row("variations", "all attributes are kept", [cell.correct for cell in cells], 0.9)], cells


MODES: dict[str, Callable[[Models, int, int], Result]] = {
    "img2img": image_to_image,
    "inpaint": inpaint,
    "control": control,
    "mix": mix,
    "negative": negative,
    "variations": variations,
}


# Reports


def contact_sheet(cells: Sequence[Cell], path: Path, across: int = 1200, side: int = 96) -> None:
    """Save cases with their texts in one image; texts of wrong cases are red.

    Args:
        cells: The cases.
        path: File to write.
        across: Largest width in pixels.
        side: Side of each image in pixels.
    """
    width = max(len(cell.images) for cell in cells) * (side + 2) + 12
    columns = max(1, across // width)
    height = side + 44
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(cells) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        left, top = width * (index % columns), height * (index // columns)
        for column, image in enumerate(cell.images):
            sheet.paste(to_image(image).resize((side, side)), (left + column * (side + 2), top))
        words = textwrap.fill(cell.text, width // 6, max_lines=3)
        pen.text((left, top + side + 2), words, fill="black" if cell.correct else "red", font_size=10)
    sheet.save(path)


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: The rows.
    """
    head = ["| mode | criterion | value | 95 % interval | target |", "|---|---|---:|---|---|"]
    return "\n".join([*head, *map(str, rows)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_modes", description=__doc__.split("\n")[0])
    parser.add_argument("--mode", action="append", choices=tuple(MODES), help="may be repeated (all)")
    parser.add_argument("--model", default="embedded", help="folder with prior, decoder, inpaint, control (embedded)")
    parser.add_argument("--training", type=Path, help="judge the checkpoints in this folder of a training instead")
    parser.add_argument("--cases", type=int, default=200, help="cases per mode (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (0)")
    parser.add_argument("--steps", type=int, help="steps of the decoder (default of the model)")
    parser.add_argument("--guidance", type=float, help="guidance scale of the decoder (default of the model)")
    parser.add_argument("--batch", type=int, default=8, help="images per batch (8)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, help="folder for modes.md and contact sheets")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge modes and print the table.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models, rows = Models(options), []
    for name in options.mode or MODES:
        start = time.monotonic()
        mode_rows, cells = MODES[name](models, options.cases, options.seed)
        rows += mode_rows
        for row in mode_rows:
            print(row, flush=True)
        print(f"  {name}: {len(cells)} cases, {time.monotonic() - start:.0f} s", flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            contact_sheet(sorted(cells, key=lambda cell: cell.correct)[:96], options.out / f"{name}.png")
    print(table(rows))
    if options.out is not None:
        (options.out / "modes.md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
