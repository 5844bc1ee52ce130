"""Pictures, hints and masks have the values in training that pipelines compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kandinsky22.inputs.images import hints_to_tensor, images_to_tensor
from kandinsky22.inputs.masks import masks_to_tensor, unmasked_latents
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.frames import to_tensor
from kandinsky22.training.finetuning.objectives import DecoderObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.samples import pictures_sheet
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import LORA

SIDE, LATENTS = 32, 16  # of the tiny model's pictures, and of their latents
HINT = 8 * LATENTS
DRAW = Draw(0, (5,))


def ignore(line: str) -> None:
    """Receive a line."""


def random_picture(side: int, mode: str = "RGB", seed: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, len(mode)), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255  # the whole range of values
    return Image.fromarray(pixels, mode)


@pytest.fixture
def objective(options: Any, models: Path, tmp_path: Path) -> Any:
    """Function that returns a decoder's objective for one picture with a hint or a mask, and the training."""

    def make(folder: str, suffix: str, image: Image.Image) -> tuple[DecoderObjective, Training]:
        pictures = tmp_path / "one"
        pictures.mkdir()
        random_picture(SIDE).save(pictures / "p.png")
        image.save(pictures / f"p.{suffix}.png")
        choices = options(train_data_dir=str(pictures), model=str(models / folder), validation_images=0)
        training = Training(choices, new_accelerator(choices), ignore)
        (stream,) = training.decoder_stage(read_examples(choices), LORA).streams
        assert isinstance(stream.objective, DecoderObjective)
        return stream.objective, training

    return make


class Recorder:
    """Draws nothing, and keeps the arguments of the pipeline."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def decoded(self, latents: Tensor) -> Image.Image:
        return Image.new("RGB", (SIDE, SIDE), "red")

    def draw(self, *embeds: object, **arguments: Any) -> Image.Image:
        self.arguments = arguments
        return Image.new("RGB", (SIDE, SIDE))


def sheet(objective: DecoderObjective, training: Training) -> tuple[dict[str, Any], Image.Image]:
    """Arguments of the pipeline that draws a sheet, and the sheet."""
    recorder: Any = Recorder()
    picture = pictures_sheet(recorder, objective, objective.entries, training.store)
    return recorder.arguments, picture


def test_pictures_have_the_values_of_pipelines() -> None:
    image = random_picture(SIDE)
    assert torch.equal(to_tensor(image), images_to_tensor("image", image, (SIDE, SIDE))[0])


def test_hints_have_the_values_of_pipelines(objective: Any) -> None:
    hint = random_picture(HINT)
    task, training = objective("control/decoder", "hint", hint)
    expected = hints_to_tensor("hint", hint, (HINT, HINT))
    assert (float(expected.min()), float(expected.max())) == (0.0, 1.0)
    for is_training in (True, False):
        assert torch.equal(task.item(DRAW, task.entries[0], training=is_training)["hint"], expected[0])
    assert torch.equal(task.batch([DRAW], task.entries, training=True).condition["hint"], expected)
    arguments, _ = sheet(task, training)
    assert torch.equal(hints_to_tensor("hint", arguments["hint"], (HINT, HINT)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_masks_have_the_values_of_pipelines(mode: str, objective: Any, tmp_path: Path) -> None:
    """White and opaque is repainted; transparent parts are laid over black."""
    pixels = np.full((SIDE, SIDE, 4), 255, dtype=np.uint8)
    pixels[: SIDE // 2, :, :3] = 0
    pixels[:, : SIDE // 2, 3] = 0
    mask = Image.fromarray(pixels, "RGBA")
    mask = mask.quantize(4) if mode == "P" else mask.convert(mode)
    task, training = objective("inpaint", "mask", mask)
    expected = masks_to_tensor("mask", str(tmp_path / "one" / "p.mask.png"), (SIDE, SIDE))
    assert float(expected.mean()) == (0.25 if mode in ("RGBA", "LA", "P") else 0.5)
    item = task.item(DRAW, task.entries[0], training=True)
    known = unmasked_latents(expected, (LATENTS, LATENTS))
    assert torch.equal(item["known"], known[0])
    assert torch.equal(task.batch([DRAW], task.entries, training=True).condition["channels"][:, 4:], known)
    arguments, _ = sheet(task, training)
    assert torch.equal(masks_to_tensor("mask", arguments["mask_image"], (SIDE, SIDE)), expected)


def test_sheets_repaint_the_random_masks_of_training(options: Any, models: Path) -> None:
    """A mask that were made of unchanged latents would grow by a latent."""
    choices = options(model=str(models / "inpaint"), validation_images=2)
    training = Training(choices, new_accelerator(choices), ignore)
    (stream,) = training.decoder_stage(read_examples(choices), LORA).streams
    task: Any = stream.objective
    arguments, picture = sheet(task, training)
    shown = len(task.entries)
    item = task.item(Draw(shown - 1, (task.seed, 6, shown - 1)), task.entries[-1], training=False)
    white = masks_to_tensor("mask", arguments["mask_image"], (SIDE, SIDE))
    assert 0 < float(white.mean()) < 1
    assert torch.equal(unmasked_latents(white, (LATENTS, LATENTS))[0], item["known"])
    covered = np.asarray(picture)[SIDE : 2 * SIDE, -SIDE:]
    assert np.array_equal((covered == 255).all(-1), white[0, 0].numpy() == 1)
