"""Share of the embedded model's drawings that show what their prompts state, read by the trained judge.

Groups: one thing, two things in each arrangement, rows of three, each with combinations that training contained and
with held-out ones. Images are generated with the model's default settings and are not picked. Next to each share stands
that of true renders of the same scenes, the upper bound: the judge errs too, and some things have a natural colour that
is also one of the ten colours.

``python -m benchmarks.drawing_success --out training`` reads the judge from the folder of the training. `--stage
decoder` starts from the sums of parts instead of prompts, the upper bound of text tower and prior.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.drawing_judge import HEADS, Judge, accepted_answers
from kandinsky22.models.prior import PriorTransformer
from kandinsky22.pipelines.combined import KandinskyV22CombinedPipeline
from kandinsky22.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky22.training.drawings import decoder, prior, shared
from kandinsky22.training.drawings.assemble import DECODER_DEFAULTS, PRIOR_DEFAULTS
from kandinsky22.training.drawings.captions import FULL, Caption, caption
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.movq import SIZE, load_movq
from kandinsky22.training.drawings.probe import SceneLabels
from kandinsky22.training.drawings.rendering import render
from kandinsky22.training.drawings.scenes import Mixture, Scene, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import CHECKPOINT, is_finished, load_average
from kandinsky22.training.towers import image_processor

ARRANGEMENTS = (None, "beside", "above", "on", "front", "row")
SEED = 424242
# Heads that each column of the report needs.
COLUMNS = {
    "things": ("thing",),
    "things and colours": ("thing", "color"),
    "all": ("thing", "color", "background", "layout", "style"),
    "background": ("background",),
    "layout": ("layout",),
    "style": ("style",),
}
DEFAULTS: Mapping[str, Any] = {
    **DECODER_DEFAULTS,
    **{f"prior_{name}": value for name, value in PRIOR_DEFAULTS.items()},
}


@dataclass(frozen=True)
class Case:
    """A prompt and the scene that it describes.

    Attributes:
        scene: The scene.
        caption: Its caption, which states everything that can be stated.
        seed: Seed of the image's noise.
    """

    scene: Scene
    caption: Caption
    seed: int


def cases(arrangement: str | None, *, held_out: bool, count: int, seed: int, mixture: Mixture) -> list[Case]:
    """Return random cases of a group.

    Args:
        arrangement: Arrangement of the things; None for one thing.
        held_out: Whether the combinations are left out of training.
        count: Number of cases.
        seed: Seed of the benchmark.
        mixture: Styles and things that are drawn.
    """
    rng = np.random.default_rng([SEED, seed, ARRANGEMENTS.index(arrangement), held_out])
    scenes = [sample_scene(rng, mixture, arrangement=arrangement, held_out=held_out) for _ in range(count)]
    return [Case(scene, caption(scene, rng, FULL), int(rng.integers(2**31))) for scene in scenes]


class Model:
    """Networks that generate drawings.

    Args:
        pipe: Combined pipeline.
        clip: CLIP with its probe, for embeddings that are sums of parts; None generates from prompts.
        arguments: Arguments of calls.
        side: Side of the images in pixels.
    """

    def __init__(self, pipe: Any, clip: Clip | None, arguments: Mapping[str, Any], side: int = SIZE) -> None:
        self.pipe, self.clip, self.arguments, self.side = pipe, clip, arguments, side

    @classmethod
    def of_training(cls, folder: Path, sprites: Sprites, *, from_parts: bool) -> Model:
        """Return the networks of a training that need not be finished.

        Args:
            folder: Folder of the stages.
            sprites: Pixels of all things.
            from_parts: Whether image embeddings are sums of parts instead of results of the prior.
        """
        clip = Clip.load(folder / ("towers" if is_finished(folder / "towers") else "clip"))
        is_full_size = (folder / "shared" / CHECKPOINT).is_file()
        unet = (
            shared.load_shared(folder / "shared", sprites).variant({})
            if is_full_size
            else decoder.load_decoder(folder / "decoder")
        )
        network: PriorTransformer | None = None
        if not from_parts:
            network = prior.create_prior(clip, prior.SETTINGS.seed)
            load_average(network, folder / "prior")
            network.eval()
        pipe = KandinskyV22CombinedPipeline(
            unet=unet,
            scheduler=DDPMScheduler(**decoder.SCHEDULER),
            movq=load_movq(folder / "movq", sprites).eval(),
            prior_prior=network,
            prior_image_encoder=clip.towers.vision,
            prior_text_encoder=clip.towers.text,
            prior_tokenizer=clip.towers.tokenizer,
            prior_scheduler=UnCLIPScheduler(**prior.SCHEDULER),
            prior_image_processor=image_processor(clip.towers.image_size),
        )
        return cls(pipe, clip if from_parts else None, DEFAULTS, SIZE if is_full_size else SIZE // 2)

    @classmethod
    def of_checkpoint(cls, model: str) -> Model:
        """Return a saved model with its default settings.

        Args:
            model: Folder or name of a decoder.
        """
        pipe = KandinskyV22CombinedPipeline.from_pretrained(model)
        return cls(pipe, None, pipe.generation_defaults)

    @torch.no_grad()
    def generate(self, group: Sequence[Case]) -> Tensor:
        """Return RGB images (N, 3, H, W) in [0, 1].

        Args:
            group: N cases.
        """
        generators = [torch.Generator().manual_seed(case.seed) for case in group]
        self.pipe.set_progress_bar_config(disable=True)
        if self.clip is None:
            result = self.pipe(
                [case.caption.text for case in group],
                generator=generators,
                output_type="pt",
                height=self.side,
                width=self.side,
                **self.arguments,
            )
            return result.images.float()
        embeds = self.clip.probe.compose(SceneLabels.of([case.scene for case in group])).float()
        negatives = decoder.zero_embedding(self.clip).expand_as(embeds)
        arguments = {name: value for name, value in self.arguments.items() if not name.startswith("prior_")}
        pipe = self.pipe.decoder_pipe
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            embeds, negatives, generator=generators, output_type="pt", height=self.side, width=self.side, **arguments
        ).images
        return images.float()


@torch.no_grad()
def correct(judge: Judge, images: Tensor, group: Sequence[Case]) -> dict[str, Tensor]:
    """Return whether each image is right, a tensor (N,) for each of COLUMNS.

    Args:
        judge: The judge.
        images: RGB images (N, 3, H, W) in [0, 1].
        group: The N cases.
    """
    read = torch.stack([logits.argmax(1) for logits in judge(images)], dim=1)
    names = [name.rstrip("012") for name in HEADS]
    right: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for row, case in zip(read, group, strict=True):
        accepted = accepted_answers(case.caption.description)
        agrees = (row == accepted) | (accepted < 0)
        for column, heads in COLUMNS.items():
            chosen = [index for index, name in enumerate(names) if name in heads]
            right[column].append(bool(agrees[:, chosen].all(1).any()))
    return {column: torch.tensor(values) for column, values in right.items()}


def save_sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """Save images in a grid.

    Args:
        images: RGB images (N, 3, H, W) in [0, 1].
        path: File to write.
        columns: Number of columns.
    """
    rows = [torch.cat(list(part), dim=2) for part in images.split(columns)]
    width = max(row.shape[2] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows]
    pixels = (torch.cat(padded, dim=1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path)


def measure(
    model: Model,
    judge: Judge,
    sprites: Sprites,
    *,
    count: int,
    seed: int,
    batch: int,
    mixture: Mixture,
    sheets: Path | None,
) -> dict[str, dict[str, float]]:
    """Return the share of right images of each group by column.

    Args:
        model: The model.
        judge: The judge.
        sprites: Pixels of all things, for true renders.
        count: Number of images per group.
        seed: Seed of the benchmark.
        batch: Number of images per batch.
        mixture: Styles and things that are drawn.
        sheets: Folder for contact sheets; None saves none.
    """
    report: dict[str, dict[str, float]] = {}
    for arrangement in ARRANGEMENTS:
        for held_out in (False, True):
            name = f"{arrangement or 'one'}{', held out' if held_out else ''}"
            group = cases(arrangement, held_out=held_out, count=count, seed=seed, mixture=mixture)
            images = torch.cat([model.generate(group[i : i + batch]) for i in range(0, count, batch)])
            renders = render(sprites, [case.scene for case in group], model.side)
            report[name] = {
                f"{column}{suffix}": round(float(right.float().mean()), 4)
                for suffix, judged in (("", images), (", true renders", renders))
                for column, right in correct(judge, judged, group).items()
            }
            print(name, json.dumps(report[name]), flush=True)
            if sheets is not None:
                sheets.mkdir(parents=True, exist_ok=True)
                save_sheet(images, sheets / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    return report


def main() -> None:
    """Measure and print the shares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drawing_success", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder of the training's stages")
    parser.add_argument("--stage", choices=("decoder", "all"), help="judge a training that need not be finished")
    parser.add_argument("--model", default="embedded", help="decoder to be judged, unless --stage is set")
    parser.add_argument("--count", type=int, default=100, help="number of images per group")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and images")
    parser.add_argument("--batch", type=int, default=10, help="number of images per batch")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge()
    load_average(judge, options.out / "judge")
    judge.eval()
    sprites = Sprites(options.out)
    if options.stage is None:
        model = Model.of_checkpoint(options.model)
    else:
        model = Model.of_training(options.out, sprites, from_parts=options.stage == "decoder")
    report = measure(
        model,
        judge,
        sprites,
        count=options.count,
        seed=options.seed,
        batch=options.batch,
        mixture=decoder.MIXTURE,
        sheets=options.sheets,
    )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
