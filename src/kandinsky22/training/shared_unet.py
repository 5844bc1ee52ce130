"""Last stage of the UNet: one network that serves text to image, inpainting and hints.

It learns to inpaint, to follow hints, to preserve an image that has little noise, to generate interpolations, and
continues to learn text to image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.training import decoder
from kandinsky22.training.clip import Towers
from kandinsky22.training.decoder import CONFIG, denoising_objective, zero_embedding
from kandinsky22.training.loop import Settings, load_average, train
from kandinsky22.training.movq import SIZE
from kandinsky22.training.scenes import render_hints, sample_scene
from kandinsky22.training.shared_banks import BANK_SIZE, HintBank, InpaintBank, InterpolationBank, StrongSignalBank
from kandinsky22.training.shared_network import SharedUNet

SETTINGS = Settings(steps=6000, learning_rate=7e-4, warmup=200, average=0.998, bf16=True, seed=5)


def train_shared(
    folder: str | Path,
    decoder_folder: str | Path,
    movq: VQModel,
    towers: Towers,
    settings: Settings = SETTINGS,
    *,
    bank_size: int = BANK_SIZE,
) -> SharedUNet:
    """Train the shared network, starting from the trained decoder, or resume its training.

    Args:
        folder: Folder of the stage.
        decoder_folder: Folder of the decoder's stage, whose bank is used again.
        movq: Trained MoVQ.
        towers: Trained CLIP towers.
        settings: Hyperparameters.
        bank_size: Largest number of images in each further bank.

    Returns:
        The trained network.
    """
    torch.manual_seed(settings.seed)
    shared = SharedUNet(decoder.load_decoder(decoder_folder), example_hints())
    text_to_image = StrongSignalBank(
        Path(decoder_folder) / "bank", movq, towers, seed=decoder.SETTINGS.seed, size=decoder.BANK_SIZE
    )
    kinds = (InterpolationBank, InpaintBank, HintBank)
    banks = [kind(Path(folder) / kind.name, movq, towers, seed=kind.default_seed, size=bank_size) for kind in kinds]
    objective = denoising_objective(shared, [text_to_image, *banks], zero_embedding(towers))
    train(shared, objective, settings, folder)
    return shared


def load_shared(folder: str | Path) -> SharedUNet:
    """Return the network in its current state of training, frozen.

    Args:
        folder: Folder of the stage.
    """
    shared = SharedUNet(UNet2DConditionModel(**CONFIG), example_hints())
    load_average(shared, folder)
    return shared.eval().requires_grad_(False)


def example_hints() -> Tensor:
    """Return some hints (16, 3, H, W), from which the convolutions of hints are initialised."""
    rng = np.random.default_rng(0)
    return render_hints([sample_scene(rng) for _ in range(16)], SIZE)
