"""Rendered pictures with captions, for training the embedded model: `python -m kandinsky22.training.pictures`.

The distilled adapter and the tiny decoder of the embedded model were trained on 3,000 of them; the commands are in the
model card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from kandinsky22.training.captions import caption
from kandinsky22.training.scenes import render, sample_scene

SEED = 20_261_127
SIDE = 128
BATCH = 100  # scenes that are rendered together


def random_pictures(count: int, seed: int = SEED) -> Iterator[tuple[Tensor, str]]:
    """Yield images (3, 128, 128) in [0, 1] of random scenes, with captions.

    Args:
        count: Number of images.
        seed: Seed of scenes and captions.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, count, BATCH):
        scenes = [sample_scene(rng) for _ in range(min(BATCH, count - start))]
        for scene, image in zip(scenes, render(scenes, SIDE), strict=True):
            yield image, caption(scene, rng).text


def write_pictures(folder: Path, pictures: Iterable[tuple[Tensor, str]]) -> None:
    """Write pictures, and their captions to `metadata.jsonl`: a data set for `kandinsky22 train`.

    Args:
        folder: Folder of the files, which is created if it does not exist.
        pictures: Images (3, H, W) in [0, 1], with captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, text) in enumerate(pictures):
        name = f"{number:05d}.png"
        pixels = (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m kandinsky22.training.pictures", description="Write rendered pictures with captions."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--count", type=int, default=3000, help="number of pictures (3000)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of scenes and captions ({SEED})")
    options = parser.parse_args()
    write_pictures(options.out, random_pictures(options.count, options.seed))


if __name__ == "__main__":
    main()
