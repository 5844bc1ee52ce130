"""Rendered pictures with captions, for distilling the embedded model: `python -m kandinsky22.training.pictures`.

The distilled adapter and the tiny decoder of the embedded model were trained on 3,000 of them; the commands are in the
model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from kandinsky22.training.captions import caption
from kandinsky22.training.scenes import render, sample_scene

SEED = 20_261_127
SIDE = 128
BATCH = 100  # scenes that are rendered together


def write_pictures(folder: Path, count: int, seed: int = SEED) -> None:
    """Write pictures of random scenes, and their captions to `metadata.jsonl`.

    Args:
        folder: Folder of the files, which is created if it does not exist.
        count: Number of pictures.
        seed: Seed of scenes and captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for start in range(0, count, BATCH):
        scenes = [sample_scene(rng) for _ in range(min(BATCH, count - start))]
        for number, (scene, image) in enumerate(zip(scenes, render(scenes, SIDE), strict=True), start):
            name = f"{number:05d}.png"
            pixels = (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype("uint8")
            Image.fromarray(pixels).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption(scene, rng).text}))
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
    write_pictures(options.out, options.count, options.seed)


if __name__ == "__main__":
    main()
