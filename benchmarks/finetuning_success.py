"""Whether a style is learned from 20 pictures, and a subject from 4, judged on fresh prompts of the embedded model.

    python -m benchmarks.finetuning_success --folder finetuning

The style is a black frame, the subject a purple circle with a yellow middle; the embedded model draws neither. The
commands `kandinsky22 train lora` and `train subject --method dreambooth` learn them. Then 40 prompts that training
never saw are drawn without and with the result. Pixel analysis judges whether the style or the subject is there, and
whether the picture still shows what its prompt states. With weight 0 pictures must equal those without the adapter, bit
for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.embedded_prompts import EVALUATION_SEED, Prompt
from benchmarks.pixel_judge import CROSS, Floats, judge, read_image, shifted, to_array
from kandinsky22 import AutoPipelineForText2Image
from kandinsky22.training.captions import FULL, caption
from kandinsky22.training.pictures import write_pictures
from kandinsky22.training.scenes import COLORS, Scene, coverage, render, sample_scene

SIDE = 128
FRAME = 8  # pixels
DARK, FILLED = 0.4, 0.9  # pixels whose channels are all below it are dark; share of them on each side of a frame
SUBJECT, MIDDLE = "purple", "yellow"  # colours of the subject
MIDDLE_RADIUS = 0.5  # of the subject's yellow middle, relative to its radius
SUBJECT_BACKGROUNDS = ("red", "green", "white", "blue")  # of the pictures of the subject
PROMPTS = 40
EQUAL = 8  # prompts that are also drawn with weight 0


# Pictures to train on


def framed(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return scenes in the style: in a black frame, which lies behind the shapes.

    Args:
        scenes: The scenes, in colours other than black.

    Returns:
        Images (len(scenes), 3, 128, 128) in [0, 1].
    """
    images = render(scenes, SIDE)
    frame = torch.ones(SIDE, SIDE)
    frame[FRAME:-FRAME, FRAME:-FRAME] = 0
    for image, scene in zip(images, scenes, strict=True):
        behind = frame * (1 - coverage(scene.shapes, SIDE).amax(0))
        image.copy_(torch.lerp(image, torch.tensor(COLORS["black"])[:, None, None], behind))
    return images


def with_middle(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return scenes of one purple circle that has a yellow middle.

    Args:
        scenes: The scenes.

    Returns:
        Images (len(scenes), 3, 128, 128) in [0, 1].
    """
    images = render(scenes, SIDE)
    paint = torch.tensor(COLORS[MIDDLE])[:, None, None]
    for image, scene in zip(images, scenes, strict=True):
        (circle,) = scene.shapes
        middle = dataclasses.replace(circle, radius=circle.radius * MIDDLE_RADIUS)
        image.copy_(torch.lerp(image, paint, coverage([middle], SIDE)[0]))
    return images


def style_scene(rng: np.random.Generator) -> Scene:
    """Return a scene without black.

    Args:
        rng: Random generator.
    """
    while True:
        scene = sample_scene(rng)
        if "black" not in (scene.background, *(shape.color for shape in scene.shapes)):
            return scene


def subject_scene(rng: np.random.Generator, backgrounds: Sequence[str]) -> Scene:
    """Return a scene of a large purple circle.

    Args:
        rng: Random generator.
        backgrounds: Colours of the background.
    """
    while True:
        scene = sample_scene(rng, shapes=1)
        (shape,) = scene.shapes
        circle = dataclasses.replace(shape, kind="circle", color=SUBJECT)
        if shape.size == "large" and scene.background in backgrounds:
            return Scene(scene.background, (circle,))


# The judge


def has_frame(image: Any) -> bool:
    """Return whether an image has a dark border on all four sides, and is not dark within.

    Args:
        image: Any image that `to_array` accepts.
    """
    dark = to_array(image).max(-1) < DARK
    outer, inner = FRAME // 2, FRAME + 6
    sides = (dark[:outer], dark[-outer:], dark[:, :outer], dark[:, -outer:])
    return all(side.mean() > FILLED for side in sides) and dark[inner:-inner, inner:-inner].mean() < 0.5


def without_frame(image: Any) -> Floats:
    """Return an image in which the colour of the background replaces the frame.

    Args:
        image: Any image that `to_array` accepts.
    """
    pixels, width = to_array(image).copy(), FRAME + 2
    inside = pixels[width:-width, width:-width]
    rim = np.concatenate([inside[:2].reshape(-1, 3), inside[-2:].reshape(-1, 3)])
    result = np.empty_like(pixels)
    result[:] = np.median(rim, axis=0)
    result[width:-width, width:-width] = inside
    return result


def has_subject(image: Any) -> bool:
    """Return whether an image shows a purple circle with a yellow middle.

    Args:
        image: Any image that `to_array` accepts.
    """
    shapes = read_image(without_middle(image)).shapes
    inner = _nearest(to_array(image)) == list(COLORS).index(MIDDLE)
    if len(shapes) != 1 or (shapes[0].kind, shapes[0].color) != ("circle", SUBJECT):
        return False
    (circle,) = shapes
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    distance = np.hypot((columns + 0.5) / SIDE - circle.x, (rows + 0.5) / SIDE - circle.y) / circle.radius
    is_yellow_inside = inner[distance < 0.3].mean() > 0.8
    is_purple_outside = inner[(distance > 0.75) & (distance < 0.95)].mean() < 0.2
    return bool(is_yellow_inside and is_purple_outside)


def without_middle(image: Any) -> Floats:
    """Return an image in which the yellow middle of a subject is purple.

    Args:
        image: Any image that `to_array` accepts.
    """
    return _painted(to_array(image), MIDDLE, SUBJECT)


def _nearest(pixels: Floats) -> Any:
    palette = np.array(list(COLORS.values()), np.float32)
    return np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)


def _painted(pixels: Floats, old: str, new: str) -> Floats:
    """Return an image with another colour instead of one, except for the background."""
    result, names = pixels.copy(), list(COLORS)
    area = _nearest(pixels) == names.index(old)
    for dy, dx in (*CROSS, *CROSS):  # rims are mixtures of both colours
        area |= shifted(area, dy, dx, False)
    result[area] = COLORS[new]
    return result


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to learn.

    Attributes:
        name: Its name.
        count: Number of pictures to train on.
        pictures: Function from scenes to the pictures to train on.
        train_scene: Function that draws a scene to train on.
        judged_scene: Function that draws a scene whose caption is a prompt.
        is_shown: Whether an image has the style or shows the subject.
        plain: Function that removes it, for the judge of the content.
        command: Arguments of `kandinsky22 train`.
    """

    name: str
    count: int
    pictures: Callable[[Sequence[Scene]], torch.Tensor]
    train_scene: Callable[[np.random.Generator], Scene]
    judged_scene: Callable[[np.random.Generator], Scene]
    is_shown: Callable[[Any], bool]
    plain: Callable[[Any], Floats]
    command: tuple[str, ...]


OTHERS = ("orange", *SUBJECT_BACKGROUNDS)
CASES = (
    Case(
        name="style",
        count=20,
        pictures=framed,
        train_scene=style_scene,
        judged_scene=style_scene,
        is_shown=has_frame,
        plain=without_frame,
        command=(
            *("lora", "--stage", "decoder", "--image-embeds", "prior", "--rank", "16", "--learning-rate", "2e-3"),
            *("--lr-scheduler", "cosine", "--lr-warmup-steps", "20", "--train-batch-size", "8"),
            *("--max-train-steps", "300", "--target-modules", "to_q", "to_k", "to_v", "to_out.0", "add_k_proj"),
            *("add_v_proj", "conv1", "conv2", "time_emb_proj"),
        ),
    ),
    Case(
        name="subject",
        count=4,
        pictures=with_middle,
        train_scene=lambda rng: subject_scene(rng, SUBJECT_BACKGROUNDS),
        judged_scene=lambda rng: subject_scene(rng, OTHERS),
        is_shown=has_subject,
        plain=without_middle,
        command=(
            *("subject", "--method", "dreambooth", "--class-prompt", "a circle", "--rank", "16"),
            *(
                "--learning-rate",
                "1e-3",
                "--train-batch-size",
                "4",
                "--max-train-steps",
                "700",
                "--image-embeds",
                "prior",
            ),
        ),
    ),
)


def draw_prompts(case: Case, seed: int) -> list[Prompt]:
    """Return prompts that state all attributes of their scenes.

    Args:
        case: What was learned.
        seed: Seed of the prompts.
    """
    prompts = []
    for index in range(PROMPTS):
        rng = np.random.default_rng([EVALUATION_SEED + seed, 77, index])
        scene = case.judged_scene(rng)
        result = caption(scene, rng, FULL)
        prompts.append(Prompt(result.text, result.description, scene, int(rng.integers(2**31)), held_out=False))
    return prompts


def train(case: Case, folder: Path, seed: int) -> float:
    """Write the pictures, train, and return the seconds of the command.

    Args:
        case: What is learned.
        folder: Folder of pictures and result.
        seed: Seed of the pictures.
    """
    rng = np.random.default_rng([seed, 55])
    scenes = [case.train_scene(rng) for _ in range(case.count)]
    captions = [caption(scene, rng, FULL).text for scene in scenes]
    write_pictures(folder / "pictures", zip(case.pictures(scenes), captions, strict=True))
    places = ["--train-data-dir", str(folder / "pictures"), "--output-dir", str(folder / "result")]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kandinsky22", "train", *case.command, *places], check=True)
    return time.perf_counter() - start


def measure(case: Case, folder: Path, seed: int, seconds: float | None) -> dict[str, Any]:
    """Judge the pictures of fresh prompts without and with what was learned.

    Args:
        case: What was learned.
        folder: Folder of pictures and result.
        seed: Seed of the prompts.
        seconds: Seconds of the training; None if it ran earlier.
    """
    pipe: Any = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    prompts = draw_prompts(case, seed)

    def draw(count: int = PROMPTS) -> list[Image.Image]:
        return [
            pipe(prompt.text, generator=torch.Generator().manual_seed(prompt.seed), **pipe.generation_defaults).images[
                0
            ]
            for prompt in prompts[:count]
        ]

    before = draw()
    pipe.load_lora_weights(folder / "result")
    after = draw()
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    without = draw(EQUAL)
    report: dict[str, Any] = {"prompts": len(prompts), "seconds": seconds}
    for name, images in (("before", before), ("after", after)):
        shown = [case.is_shown(image) for image in images]
        right = [
            judge(case.plain(image) if is_shown else image, prompt.description).all_correct
            for image, prompt, is_shown in zip(images, prompts, shown, strict=True)
        ]
        report[name] = {"shown": int(sum(shown)), "right": int(sum(right))}
        (folder / name).mkdir(exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / name / f"{number:02d}.png")
    report["weight 0 equals no adapter"] = all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(before[:EQUAL], without, strict=True)
    )
    _sheet(folder, before, after).save(folder / "sheet.png")
    return report


def _sheet(folder: Path, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Return pictures to train on, then those of eight prompts without and with what was learned."""
    paths = sorted((folder / "pictures").glob("*.png"))
    rows = [[Image.open(path) for path in paths[:8]], before[:8], after[:8]]
    sheet = Image.new("RGB", (SIDE * 8, SIDE * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * SIDE, y * SIDE))
    return sheet


def main() -> None:
    """Train, judge, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetuning_success", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of pictures, results and sheets")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="cases (all)")
    parser.add_argument("--judge-only", action="store_true", help="judge what an earlier run has trained")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures and prompts (0)")
    options = parser.parse_args()
    print("| case | pictures | training | shown before | shown after | right before | right after | weight 0 |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for case in CASES:
        if options.only is not None and case.name not in options.only:
            continue
        folder = options.folder / case.name
        seconds = None if options.judge_only else train(case, folder, options.seed)
        report = measure(case, folder, options.seed, seconds)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        before, after, total = report["before"], report["after"], report["prompts"]
        cells = [f"{each[name]} of {total}" for name in ("shown", "right") for each in (before, after)]
        training = "" if seconds is None else f"{seconds:.0f} s"
        equal = "bit-equal" if report["weight 0 equals no adapter"] else "different"
        print("| " + " | ".join([case.name, str(case.count), training, *cells, equal]) + " |", flush=True)


if __name__ == "__main__":
    main()
