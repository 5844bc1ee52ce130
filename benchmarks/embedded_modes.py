"""How well the embedded model does all that is not plain text to picture, judged by pixel analysis.

Run from the root of the repository: `python -m benchmarks.embedded_modes --help`.

Two hundred cases for each mode are drawn with the model's own defaults: pictures from pictures at two strengths,
repainted holes, hints, mixtures of two prompts, negative prompts, and variations of a picture. Each row of the table
is a promise with its bar.
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
from benchmarks.embedded_success import under_training
from benchmarks.mode_cases import (
    SIZE,
    as_image,
    case_rng,
    left_open,
    neighbours,
    picture_of,
    repainted,
    sentence,
    stated,
)
from benchmarks.pixel_judge import judge, to_array
from kandinsky22.training import shared_unet
from kandinsky22.training.assemble import DECODER_DEFAULTS, PRIOR_DEFAULTS
from kandinsky22.training.captions import FULL, Detail, caption
from kandinsky22.training.scenes import COLORS, Scene, draw_hints, sample_scene


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was promised, how often (or how well on average) it was kept, and the bar."""

    mode: str
    promise: str
    share: Share | None
    value: float
    bar: float | None
    at_most: bool = False
    percent: bool = True

    @property
    def reached(self) -> bool:
        """Whether the bar is reached; without one it always is."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        def show(value: float) -> str:
            return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"

        interval = "" if self.share is None else " to ".join(f"{100 * limit:.1f}" for limit in self.share.interval)
        verdict = "reached" if self.reached else "missed"
        sign = "at most" if self.at_most else "at least"
        bar = "-" if self.bar is None else f"{sign} {show(self.bar)}: {verdict}"
        cells = (self.mode, self.promise, show(self.value), interval, bar)
        return "| " + " | ".join(cells) + " |"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One case to look at: its pictures from left to right, what was asked for, and whether it came out right."""

    pictures: list[Any]
    text: str
    right: bool


Result = tuple[list[Row], list[Cell]]


def share_row(mode: str, promise: str, rights: Sequence[bool], bar: float | None) -> Row:
    """A row for something that is right or wrong in each case."""
    share = Share(sum(rights), len(rights))
    return Row(mode, promise, share, share.value, bar)


# Models


class Models:
    """The pipelines to judge, each made when it is first needed, and the settings they like best."""

    def __init__(self, options: argparse.Namespace) -> None:
        import kandinsky22

        self.kinds, self.training, self.batch = kandinsky22, options.training, options.batch
        self.model = options.model
        if self.training is not None:
            combined = under_training(self.training, None)
            self.prior, self.decoder = combined.prior_pipe, combined.decoder_pipe
        else:
            self.prior = kandinsky22.KandinskyV22PriorPipeline.from_pretrained(self._part("prior"))
            self.decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(self._part("decoder"))
        defaults = self.decoder.generation_defaults or DECODER_DEFAULTS
        given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        self.settings = defaults | {name: value for name, value in given.items() if value is not None}
        self.early = self.prior.generation_defaults or PRIOR_DEFAULTS
        self.image_to_image = kandinsky22.KandinskyV22Img2ImgPipeline.from_pipe(self.decoder)
        for pipe in (self.prior, self.decoder, self.image_to_image):
            pipe.set_progress_bar_config(disable=True)

    def _part(self, name: str) -> str:
        return self.model if self.model == "embedded" else str(Path(self.model) / name)

    def variant(self, name: str) -> Any:
        """The pipeline of "inpaint" or "control"."""
        kind = {"inpaint": "KandinskyV22InpaintPipeline", "control": "KandinskyV22ControlnetPipeline"}[name]
        if self.training is not None:
            changes = {"inpaint": shared_unet.INPAINT, "control": shared_unet.HINT}[name]
            unet = shared_unet.load_shared(self.training / "shared").part(changes)
            pipe = getattr(self.kinds, kind)(unet, self.decoder.scheduler, self.decoder.movq)
        else:
            pipe = getattr(self.kinds, kind).from_pretrained(self._part(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def embed(self, texts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] | None = None) -> Any:
        """Image embeddings and their negatives for prompts."""
        against = None if negatives is None else list(negatives)
        made = self.prior(list(texts), against, generator=generators(seeds), **self.early)
        return made.image_embeds, made.negative_image_embeds

    def mixed(self, items: Sequence[Sequence[Any]], weights: Sequence[float], seeds: Sequence[int]) -> Any:
        """Image embeddings and their negatives for mixtures."""
        made = [
            self.prior.interpolate(list(some), list(weights), generator=generators([seed])[0], **self.early)
            for some, seed in zip(items, seeds, strict=True)
        ]
        return torch.cat([m.image_embeds for m in made]), torch.cat([m.negative_image_embeds for m in made])

    def draw(self, pipe: Any, embeds: Any, seeds: Sequence[int], **arguments: Any) -> list[Any]:
        """Pictures from embeddings by a decoder of any kind."""
        positive, negative = embeds
        return list(
            pipe(
                image_embeds=positive,
                negative_image_embeds=negative,
                generator=generators(seeds),
                height=SIZE,
                width=SIZE,
                **self.settings,
                **arguments,
            ).images
        )

    def batches(self, count: int) -> Iterator[range]:
        """Numbers of cases to be drawn together."""
        for start in range(0, count, self.batch):
            yield range(start, min(start + self.batch, count))


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a picture, so that it does not depend on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Modes


def image_to_image(models: Models, count: int, seed: int) -> Result:
    """Pictures from pictures and prompts that have nothing to do with them but the number of shapes."""
    cells: dict[float, list[Cell]] = {0.3: [], 1.0: []}
    overlaps: list[bool] = []
    for some in models.batches(count):
        rngs = [case_rng(seed, 0, index) for index in some]
        scenes = [sample_scene(rng) for rng in rngs]
        captions = [
            caption(sample_scene(rng, shapes=len(scene.shapes)), rng) for scene, rng in zip(scenes, rngs, strict=True)
        ]
        embeds = models.embed([c.text for c in captions], list(some))
        sources = [picture_of(scene) for scene in scenes]
        for strength, done in cells.items():
            pictures = models.draw(models.image_to_image, embeds, list(some), image=sources, strength=strength)
            for source, scene, words, picture in zip(sources, scenes, captions, pictures, strict=True):
                right = mode_judge.composed(picture, scene) if strength < 1 else judge(picture, words.named).all_right
                done.append(Cell([source, picture], f"{strength}: {words.text}", right))
                if strength < 1:
                    overlaps.append(mode_judge.placement(picture, scene) >= mode_judge.SAME_COMPOSITION)
    gentle, strong = ([cell.right for cell in done] for done in cells.values())
    rows = [
        share_row("img2img", "strength 0.3 keeps number, places and sizes of shapes, and the background", gentle, 0.9),
        share_row("img2img", "and all of each outline (IoU 0.8)", overlaps, 0.9),
        share_row("img2img", "strength 1.0 shows the prompt", strong, 0.9),
    ]
    return rows, [cell for done in cells.values() for cell in done]


def inpaint(models: Models, count: int, seed: int) -> Result:
    """One shape of a picture erased, and another one asked for in its place."""
    pipe = models.variant("inpaint")
    cells: list[Cell] = []
    errors: list[float] = []
    exact: list[bool] = []
    for some in models.batches(count):
        rngs = [case_rng(seed, 1, index) for index in some]
        scenes = [sample_scene(rng) for rng in rngs]
        targets, holes = zip(*(repainted(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)), strict=True)
        captions = [caption(target, rng) for target, rng in zip(targets, rngs, strict=True)]
        sources, masks = [picture_of(scene) for scene in scenes], [hole.astype(np.float32) for hole in holes]
        embeds = models.embed([c.text for c in captions], list(some))
        arguments: dict[str, Any] = {"image": sources, "mask_image": masks}
        pictures = models.draw(pipe, embeds, list(some), **arguments)
        if not exact:
            composed = models.draw(pipe, embeds, list(some), keep_pixels=True, **arguments)
            exact = [mode_judge.kept_error(*row) == 0 for row in zip(composed, sources, holes, strict=True)]
        for source, hole, words, picture in zip(sources, holes, captions, pictures, strict=True):
            errors.append(mode_judge.kept_error(picture, source, hole))
            shown = np.where(hole[:, :, None], np.float32(0.5), to_array(source))
            cells.append(Cell([source, shown, picture], words.text, judge(picture, words.named).all_right))
    mean = float(np.mean(errors))
    rows = [
        share_row("inpaint", "the hole shows what the prompt says", [cell.right for cell in cells], 0.9),
        Row("inpaint", "mean error of kept pixels, of 255", None, mean, mode_judge.KEPT_ERROR, True, False),
        share_row("inpaint", "each picture within that", [error <= mode_judge.KEPT_ERROR for error in errors], 0.9),
        share_row("inpaint", "keep_pixels keeps them exactly", exact, 1.0),
    ]
    return rows, cells


# What a prompt for a hint says: what is to be seen, and nothing of where or how large.
LOOKS = Detail(size=0.0, color=1.0, background=1.0, place=0.0, relation=1.0)


def control(models: Models, count: int, seed: int) -> Result:
    """Layer maps and edges as hints, half of them of shapes that lie where no prompt could say."""
    pipe = models.variant("control")
    cells, scores = [], []
    for some in models.batches(count):
        rngs = [case_rng(seed, 2, index) for index in some]
        scenes = [sample_scene(rng) for rng in rngs]
        scenes = [
            shared_unet.loosened(s, rng) if index % 2 else s for index, s, rng in zip(some, scenes, rngs, strict=True)
        ]
        captions = [caption(scene, rng, LOOKS) for scene, rng in zip(scenes, rngs, strict=True)]
        hints = draw_hints(scenes, SIZE, outlines=[index % 4 > 1 for index in some])
        embeds = models.embed([c.text for c in captions], list(some))
        pictures = models.draw(pipe, embeds, list(some), hint=hints)
        for hint, scene, words, picture in zip(hints, scenes, captions, pictures, strict=True):
            scores.append(mode_judge.placement(picture, scene))
            named = dataclasses.replace(words.named, relation=None)
            right = judge(picture, named).all_right and scores[-1] >= mode_judge.SAME_COMPOSITION
            cells.append(Cell([hint, picture], f"{scores[-1]:.2f} {words.text}", right))
    layers, edges = ([s for i, s in enumerate(scores) if (i % 4 > 1) == kind] for kind in (False, True))
    rows = [
        Row("control", "mean placement (IoU), layer maps", None, float(np.mean(layers)), 0.8, percent=False),
        Row("control", "mean placement (IoU), edges", None, float(np.mean(edges)), 0.8, percent=False),
        share_row("control", "placed (IoU 0.8) and as the prompt says", [cell.right for cell in cells], 0.8),
    ]
    return rows, cells


def mix(models: Models, count: int, seed: int) -> Result:
    """Halves of two prompts that differ in one attribute."""
    cells: list[Cell] = []
    rights: dict[str, list[bool]] = {name: [] for name in mode_judge.ATTRIBUTES}
    for some in models.batches(count):
        rngs = [case_rng(seed, 3, index) for index in some]
        names = [mode_judge.ATTRIBUTES[index % len(rights)] for index in some]
        pairs = [neighbours(rng, name) for name, rng in zip(names, rngs, strict=True)]
        texts = [[caption(s, rng, FULL).text for s in pair] for pair, rng in zip(pairs, rngs, strict=True)]
        pictures = models.draw(models.decoder, models.mixed(texts, [0.5, 0.5], list(some)), list(some))
        for name, pair, words, picture in zip(names, pairs, texts, pictures, strict=True):
            first, second = (picture_of(scene) for scene in pair)
            where = mode_judge.painted(first) & mode_judge.painted(second) if name == "color" else None
            ends = [mode_judge.measure(end, name, where) for end in (first, second)]
            right = mode_judge.between(mode_judge.measure(picture, name, where), *ends)
            rights[name].append(right)
            cells.append(Cell([first, picture, second], f"{name}: {words[0]} + {words[1]}", right))
    found = {name: some for name, some in rights.items() if some}
    return [share_row("mix", f"half and half lies between: {name}", some, 0.9) for name, some in found.items()], cells


def negative(models: Models, count: int, seed: int) -> Result:
    """What a prompt leaves open comes out somehow; a negative prompt that names it must make it rarer than one that
    names something else."""
    cells: list[Cell] = []
    kept: dict[str, list[bool]] = {"named": [], "other": []}
    followed: list[bool] = []
    for some in models.batches(count):
        rngs = [case_rng(seed, 4, index) for index in some]
        scenes = [sample_scene(rng, shapes=1) for rng in rngs]
        openings = ["background" if index % 2 else "color" for index in some]
        prompts = [sentence(scene, name, None) for scene, name in zip(scenes, openings, strict=True)]
        plain = models.draw(models.decoder, models.embed(prompts, list(some)), list(some))
        came = [mode_judge.named_attribute(picture, name) for picture, name in zip(plain, openings, strict=True)]
        own = [value or "red" for value in came]
        others = [_other_color(value, scene, rng) for value, scene, rng in zip(own, scenes, rngs, strict=True)]
        drawn = {}
        for kind, values in (("named", own), ("other", others)):
            against = [sentence(*row) for row in zip(scenes, openings, values, strict=True)]
            embeds = models.embed(prompts, list(some), against)
            drawn[kind] = models.draw(models.decoder, embeds, list(some))
        for row, (value, opening) in enumerate(zip(came, openings, strict=True)):
            if value is None:
                continue  # there is nothing to name
            still = {kind: mode_judge.named_attribute(drawn[kind][row], opening) == value for kind in drawn}
            for kind, found in still.items():
                kept[kind].append(found)
            followed.append(judge(drawn["named"][row], left_open(scenes[row], opening)).all_right)
            pictures = [plain[row], drawn["named"][row], drawn["other"][row]]
            cells.append(Cell(pictures, f"{prompts[row]}; not {value}; not {others[row]}", not still["named"]))
    named, other = (Share(sum(found), len(found)) for found in kept.values())
    promise = f"what comes of itself still comes although it is named (another named: {str(other).strip()})"
    suppressed = Row("negative", promise, named, named.value, other.value / 2, at_most=True)
    return [suppressed, share_row("negative", "what the prompt says is still right", followed, None)], cells


def _other_color(value: str, scene: Scene, rng: np.random.Generator) -> str:
    taken = {value, scene.background, scene.shapes[0].color}
    return str(rng.choice([name for name in COLORS if name not in taken]))


def variations(models: Models, count: int, seed: int) -> Result:
    """Pictures drawn anew from the embedding of a picture."""
    cells: list[Cell] = []
    for some in models.batches(count):
        scenes = [sample_scene(case_rng(seed, 5, index)) for index in some]
        sources = [picture_of(scene) for scene in scenes]
        embeds = models.mixed([[source] for source in sources], [1.0], list(some))
        pictures = models.draw(models.decoder, embeds, list(some))
        for source, scene, picture in zip(sources, scenes, pictures, strict=True):
            verdict = judge(picture, stated(scene))
            cells.append(Cell([source, picture], ", ".join(verdict.wrong), verdict.all_right))
    return [share_row("variations", "all attributes are kept", [cell.right for cell in cells], 0.9)], cells


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
    """Save cases with their words; those that came out wrong in red."""
    width = max(len(cell.pictures) for cell in cells) * (side + 2) + 12
    columns = max(1, across // width)
    height = side + 44
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(cells) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        left, top = width * (index % columns), height * (index // columns)
        for place, picture in enumerate(cell.pictures):
            sheet.paste(as_image(picture).resize((side, side)), (left + place * (side + 2), top))
        words = textwrap.fill(cell.text, width // 6, max_lines=3)
        pen.text((left, top + side + 2), words, fill="black" if cell.right else "red", font_size=10)
    sheet.save(path)


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown."""
    head = ["| mode | promise | kept | 95 % interval | bar |", "|---|---|---:|---|---|"]
    return "\n".join([*head, *map(str, rows)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_modes", description=__doc__.split("\n")[0])
    parser.add_argument("--mode", action="append", choices=tuple(MODES), help="may be repeated; all by default")
    parser.add_argument("--model", default="embedded", help="folder with prior, decoder, inpaint, control (embedded)")
    parser.add_argument("--training", type=Path, help="judge the checkpoints in this folder of the training instead")
    parser.add_argument("--cases", type=int, default=200, help="cases for each mode (200)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases (0)")
    parser.add_argument("--steps", type=int, help="of the decoder; this and the next default to the model's own")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once (8)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, help="folder for modes.md and sheets of pictures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the modes asked for and print the table."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models, rows = Models(options), []
    for name in options.mode or MODES:
        start = time.monotonic()
        found, cells = MODES[name](models, options.cases, options.seed)
        rows += found
        for row in found:
            print(row, flush=True)
        print(f"  {name}: {len(cells)} cases, {time.monotonic() - start:.0f} s", flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            contact_sheet(sorted(cells, key=lambda cell: cell.right)[:96], options.out / f"{name}.png")
    print(table(rows))
    if options.out is not None:
        (options.out / "modes.md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
