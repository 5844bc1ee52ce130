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
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import machine
from benchmarks.embedded_prompts import EVALUATION_SEED, Prompt
from benchmarks.pixel_judge import CROSS, Floats, judge, read_image, shifted, to_array
from kandinsky22 import AutoPipelineForText2Image
from kandinsky22.training.captions import FULL, caption, matches
from kandinsky22.training.pictures import write_pictures
from kandinsky22.training.scenes import COLORS, Scene, coverage, render, sample_scene

SIDE = 128
FRAME = 8  # pixels
DARK, FILLED = 0.4, 0.9  # pixels whose channels are all below it are dark; share of them on each side of a frame
SUBJECT, MIDDLE = "purple", "yellow"  # colours of the subject
MIDDLE_RADIUS = 0.5  # of the subject's yellow middle, relative to its radius
SUBJECT_BACKGROUNDS = ("red", "green", "white", "blue")  # of the pictures of the subject
PROMPTS = 40
COLUMNS, GAP = 8, 4  # pictures per row of a sheet, and pixels between them
PAGE = Path(__file__).parent.parent / "docs" / "training-tutorial.md"
BEGIN, END = "<!-- finetuning -->", "<!-- end -->"
EQUAL = 8  # prompts that are also drawn with weight 0


# Pictures to train on


def framed(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return scenes in the style: in a black frame.

    Args:
        scenes: The scenes, in colours other than black.

    Returns:
        Images (len(scenes), 3, 128, 128) in [0, 1].
    """
    images = render(scenes, SIDE)
    inside = images[:, :, FRAME:-FRAME, FRAME:-FRAME].clone()
    images[:] = torch.tensor(COLORS["black"])[:, None, None]
    images[:, :, FRAME:-FRAME, FRAME:-FRAME] = inside
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


def style_scenes(rng: np.random.Generator) -> list[Scene]:
    """Return the 20 scenes of the style that are trained on.

    Args:
        rng: Random generator.
    """
    return [style_scene(rng) for _ in range(20)]


def subject_scenes(rng: np.random.Generator) -> list[Scene]:
    """Return the four scenes of the subject that are trained on, each at another place and on another background.

    Args:
        rng: Random generator.
    """
    scenes: list[Scene] = []
    while len(scenes) < 4:
        scene = subject_scene(rng, SUBJECT_BACKGROUNDS)
        if not any(scene.position == other.position or scene.background == other.background for other in scenes):
            scenes.append(scene)
    return scenes


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


def other_scene(rng: np.random.Generator) -> Scene:
    """Return a scene without a purple circle.

    Args:
        rng: Random generator.
    """
    while True:
        scene = sample_scene(rng)
        if not any((shape.kind, shape.color) == ("circle", SUBJECT) for shape in scene.shapes):
            return scene


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
    """Return an image in which yellow is purple, unless there is more yellow than purple.

    Args:
        image: Any image that `to_array` accepts.
    """
    pixels, names = to_array(image), list(COLORS)
    nearest = _nearest(pixels)
    yellow, purple = nearest == names.index(MIDDLE), nearest == names.index(SUBJECT)
    if yellow.sum() > purple.sum():
        return pixels
    for dy, dx in (*CROSS, *CROSS):  # rims are mixtures of both colours
        yellow |= shifted(yellow, dy, dx, False)
    return np.where(yellow[..., None], np.array(COLORS[SUBJECT], np.float32), pixels)


def _nearest(pixels: Floats) -> Any:
    palette = np.array(list(COLORS.values()), np.float32)
    return np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to learn.

    Attributes:
        name: Its name.
        pictures: Function from scenes to pictures that show it.
        train_scenes: Function that draws the scenes to train on.
        judged_scene: Function that draws a scene whose caption is a prompt.
        is_shown: Whether an image has the style or shows the subject.
        plain: Function that removes it, for the judge of the content.
        command: Arguments of `kandinsky22 train`.
        other_scene: Function that draws scenes in which it should not be shown; None if it should always be.
    """

    name: str
    pictures: Callable[[Sequence[Scene]], torch.Tensor]
    train_scenes: Callable[[np.random.Generator], list[Scene]]
    judged_scene: Callable[[np.random.Generator], Scene]
    is_shown: Callable[[Any], bool]
    plain: Callable[[Any], Floats]
    command: tuple[str, ...]
    other_scene: Callable[[np.random.Generator], Scene] | None = None


LEARNING = (  # options of both commands
    *("--image-embeds", "prior", "--target-modules", "attention", "blocks", "--snr-gamma", "5"),
    *("--learning-rate", "2e-3", "--lr-scheduler", "cosine", "--lr-warmup-steps", "20"),
)
CLASS_PROMPTS = ("a circle", "a square", "a triangle", "a star", "two shapes")
OTHERS = ("orange", *SUBJECT_BACKGROUNDS)
CASES = (
    Case(
        name="style",
        pictures=framed,
        train_scenes=style_scenes,
        judged_scene=style_scene,
        is_shown=has_frame,
        plain=without_frame,
        command=(*("lora", "--train-batch-size", "8", "--max-train-steps", "900", *LEARNING),),
    ),
    Case(
        name="subject",
        pictures=with_middle,
        train_scenes=subject_scenes,
        judged_scene=lambda rng: subject_scene(rng, OTHERS),
        is_shown=has_subject,
        plain=without_middle,
        command=(
            *("subject", "--method", "dreambooth", "--class-prompt", *CLASS_PROMPTS, "--num-class-images", "40"),
            *("--prior-loss-weight", "0.3", "--train-batch-size", "4", "--max-train-steps", "750", *LEARNING),
        ),
        other_scene=other_scene,
    ),
)


def draw_prompts(
    judged_scene: Callable[[np.random.Generator], Scene], seed: int, trained: Sequence[Scene]
) -> list[Prompt]:
    """Return prompts that state all attributes of their scenes, and that are true of no scene that was trained on.

    Args:
        judged_scene: Function that draws a scene.
        seed: Seed of the prompts.
        trained: Scenes that were trained on.
    """
    prompts = []
    for index in range(PROMPTS):
        rng = np.random.default_rng([EVALUATION_SEED + seed, 77, index])
        while True:
            scene = judged_scene(rng)
            result = caption(scene, rng, FULL)
            if not any(matches(result.description, other) for other in trained):
                break
        prompts.append(Prompt(result.text, result.description, scene, int(rng.integers(2**31)), held_out=False))
    return prompts


def captioned_scenes(case: Case, seed: int) -> tuple[list[Scene], list[str]]:
    """Return the scenes to train on, and their captions.

    Args:
        case: What is learned.
        seed: Seed of the scenes.
    """
    rng = np.random.default_rng([seed, 55])
    scenes = case.train_scenes(rng)
    return scenes, [caption(scene, rng, FULL).text for scene in scenes]


def write_case(case: Case, folder: Path, seed: int) -> list[str]:
    """Write the pictures to train on, and return the arguments of `kandinsky22`.

    Args:
        case: What is learned.
        folder: Folder of pictures and result.
        seed: Seed of the pictures.
    """
    scenes, captions = captioned_scenes(case, seed)
    write_pictures(folder / "pictures", zip(case.pictures(scenes), captions, strict=True))
    places = ("--train-data-dir", str(folder / "pictures"), "--output-dir", str(folder / "result"))
    return ["train", *case.command, *places]


def train(arguments: Sequence[str]) -> float:
    """Train, and return the seconds of the command.

    Args:
        arguments: Arguments of `kandinsky22`.
    """
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kandinsky22", *arguments], check=True)
    return time.perf_counter() - start


def measure(case: Case, folder: Path, seed: int, prompt_seed: int) -> dict[str, Any]:
    """Judge the pictures of fresh prompts without and with what was learned.

    Args:
        case: What was learned.
        folder: Folder of pictures and result.
        seed: Seed of the pictures that were trained on.
        prompt_seed: Seed of the prompts.
    """
    pipe: Any = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    scenes, _ = captioned_scenes(case, seed)
    prompts = draw_prompts(case.judged_scene, prompt_seed, scenes)
    others = [] if case.other_scene is None else draw_prompts(case.other_scene, prompt_seed, scenes)

    def draw(prompts: Sequence[Prompt]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        return [
            pipe(prompt.text, generator=generator, **pipe.generation_defaults).images[0]
            for prompt, generator in zip(prompts, generators, strict=True)
        ]

    before, others_before = draw(prompts), draw(others)
    pipe.load_lora_weights(folder / "result")
    after, others_after = draw(prompts), draw(others)
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    without = draw(prompts[:EQUAL])
    renders = list(case.pictures([prompt.scene for prompt in prompts]))
    report: dict[str, Any] = {"pictures": len(scenes), "prompts": len(prompts)}
    for name, images in (("before", before), ("after", after), ("renders", renders)):
        report[name] = _judged(images, prompts, case.is_shown, case.plain)
    if others:
        report["others"] = {
            "before": _judged(others_before, others, case.is_shown, to_array),
            "after": _judged(others_after, others, case.is_shown, to_array),
        }
    report["weight 0 equals no adapter"] = all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(before[:EQUAL], without, strict=True)
    )
    drawn = {"before": before, "after": after, "others-before": others_before, "others-after": others_after}
    for name, images in drawn.items():
        (folder / name).mkdir(exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / name / f"{number:02d}.png")
    _sheet(folder, before, after).save(folder / "sheet.png", optimize=True)
    return report


def _judged(
    images: Sequence[Any], prompts: Sequence[Prompt], is_shown: Callable[[Any], bool], plain: Callable[[Any], Floats]
) -> dict[str, int]:
    """Return how many images show what was learned, and how many have the content of their prompts."""
    pairs = list(zip(images, prompts, strict=True))
    return {
        "shown": sum(bool(is_shown(image)) for image in images),
        "right": sum(judge(plain(image), prompt.description).all_correct for image, prompt in pairs),
    }


def _sheet(folder: Path, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Return pictures to train on, then those of eight prompts without and with what was learned."""
    paths = sorted((folder / "pictures").glob("*.png"))
    rows = [[Image.open(path) for path in paths[:COLUMNS]], before[:COLUMNS], after[:COLUMNS]]
    step = SIDE + GAP
    sheet = Image.new("RGB", (step * COLUMNS - GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * step, y * step))
    return sheet


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of results.

    Args:
        reports: Results by name of the case.
    """
    lines = [
        "| | prompts | shown before | shown after | content right before | content right after |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, report in reports.items():
        row = f"{name}, from {report['pictures']} pictures in {report['seconds']:.0f} s"
        lines.append(_row(row, report["prompts"], report["before"], report["after"]))
        if "others" in report:
            others = report["others"]
            lines.append(_row(f"{name}: prompts of other things", report["prompts"], others["before"], others["after"]))
    return lines


def _row(name: str, prompts: int, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    cells = [str(each[key]) for key in ("shown", "right") for each in (before, after)]
    return "| " + " | ".join([name, str(prompts), *cells]) + " |"


def write_page(page: Path, folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the table of a page, between its two markers, and the sheets next to it.

    Args:
        page: The page.
        folder: Folder of the results.
        reports: Results by name of the case.

    Raises:
        ValueError: The page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"{BEGIN}\n.*?{END}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no markers {BEGIN} and {END}")
    about = machine.describe()
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    table = "\n".join([*markdown(reports), "", f"{about['processor']}, {about['cores']} cores; {versions}."])
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text), encoding="utf-8")
    for name in reports:
        shutil.copyfile(folder / name / "sheet.png", page.parent / f"finetuning-{name}.png")


def main() -> None:
    """Train, judge, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetuning_success", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of pictures, results and sheets")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="cases (all)")
    parser.add_argument(
        "--pictures-only", action="store_true", help="write the pictures, and print the commands that learn them"
    )
    parser.add_argument("--judge-only", action="store_true", help="judge what an earlier run has trained")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures to train on (0)")
    parser.add_argument("--prompt-seed", type=int, default=0, help="seed of the prompts (0)")
    parser.add_argument(
        "--docs", type=Path, nargs="?", const=PAGE, help="page to write table and sheets into (docs); needs all cases"
    )
    options = parser.parse_args()
    if options.docs is not None and (options.only is not None or options.pictures_only):
        parser.error("--docs needs all cases: leave out --only and --pictures-only")
    reports: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if options.only is not None and case.name not in options.only:
            continue
        folder = options.folder / case.name
        time_file = folder / "seconds.json"
        if not options.judge_only:
            arguments = write_case(case, folder, options.seed)
            if options.pictures_only:
                print(shlex.join(["kandinsky22", *arguments]))
                continue
            time_file.write_text(json.dumps(train(arguments)), encoding="utf-8")
        seconds = float(json.loads(time_file.read_text(encoding="utf-8")))
        reports[case.name] = report = {**measure(case, folder, options.seed, options.prompt_seed), "seconds": seconds}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if reports:
        print(json.dumps(reports, indent=2))
    if options.docs is not None:
        write_page(options.docs, options.folder, reports)


if __name__ == "__main__":
    main()
