"""Tiny random models, a few pictures, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.conftest import command, model, models

from kandinsky22.training.finetuning.options import SubjectOptions, TrainingOptions

__all__ = ["command", "model", "models"]


def write_pictures(folder: Path, count: int = 6, *, captions: bool = True, seed: int = 0) -> Path:
    """Write random pictures of several sizes to a folder, with captions, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for index in range(count):
        size = (40, 36) if index % 2 else (36, 48)
        pixels = numbers.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((2 * size[1], 2 * size[0])).save(folder / f"p{index}.png")
        if captions:
            (folder / f"p{index}.txt").write_text(f"a cat on a red thing {index}")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def options(model: Path, pictures: Path, tmp_path: Path) -> Any:
    """Function that returns options of short trainings with the tiny model."""

    def make(kind: type[TrainingOptions] = TrainingOptions, **changes: Any) -> Any:
        defaults: dict[str, Any] = {
            "model": str(model),
            "train_data_dir": str(pictures),
            "output_dir": str(tmp_path / "out"),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "validation_images": 1,
            "validation_steps": 4,
            "checkpointing_steps": 2,
            "log_every": 2,
        }
        if kind is not SubjectOptions or changes.get("method") == "dreambooth":  # embeddings have no rank
            defaults["rank"] = 2
        return kind(**{**defaults, **changes})

    return make
