"""Training a tiny decoder: a small network learns to give the pictures that MoVQ's decoder gives for latents.

Latents and MoVQ's pictures are computed once per picture and cached, so that a step runs the small network alone.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.models.movq import VQModel
from kandinsky22.models.tiny_decoder import SUBFOLDER, TinyDecoder, TinyDecoderConfig
from kandinsky22.training.finetuning import frames, preparation, samples
from kandinsky22.training.finetuning.batches import Draw, TensorStore, split_held_out
from kandinsky22.training.finetuning.data import Example, read_examples
from kandinsky22.training.finetuning.losses import picture_losses
from kandinsky22.training.finetuning.networks import decoder_mode, load_decoder
from kandinsky22.training.finetuning.objectives import CachedObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import TinyDecoderOptions
from kandinsky22.training.finetuning.preparation import Entry, Report
from kandinsky22.training.finetuning.run import Stage, Stream
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import FULL

KIND = "tiny-decoder"


def train_tiny_decoder(options: TinyDecoderOptions, report: Report | None = None) -> list[Path]:
    """Train a tiny decoder against MoVQ's own.

    Args:
        options: Options of the training.
        report: Receives lines of text for the person at the terminal; None shows nothing.

    Returns:
        The result: the folder of the network. Empty in processes other than the first.

    Raises:
        InputError: An option, or the data set, is invalid.
        CheckpointError: A file is missing, damaged or cannot be written.
        MissingDependencyError: A package is not installed.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    training = Training(options, new_accelerator(options), report)
    examples = read_examples(options)
    training.check_folders(SUBFOLDER)
    stage = tiny_decoder_stage(training, options, examples)
    training.run(stage)
    if not training.is_main:
        return []
    folder = training.folder / SUBFOLDER
    network: Any = stage.network
    network.to("cpu").save_pretrained(folder)
    return [folder]


def tiny_decoder_stage(training: Training, options: TinyDecoderOptions, examples: Sequence[Example]) -> Stage:
    """Return the stage that trains a tiny decoder.

    Args:
        training: The training.
        options: Its options.
        examples: The pictures.

    Raises:
        InputError: An option does not fit MoVQ, or no picture can be read.
        CheckpointError: Files are missing or damaged.
    """
    mode = decoder_mode(options)
    movq: VQModel = load_decoder(options, mode, torch.float32, movq=True).movq.to(training.device)
    config = TinyDecoderConfig.for_movq(movq, options.widths)
    _, sizes = training.sizes(mode, movq.downscale_factor, FULL)
    job = TinyDecoderJob(movq, training.device, options, sizes)
    entries = preparation.prepare(examples, job, training.cache, training.accelerator, training.report)
    del movq, job
    gc.collect()
    own, held_out = split_held_out(entries, options.validation_images, options.seed)
    training.report(f"{len(own)} pictures to train on, {len(held_out)} held out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = TinyDecoder(**config)
    training.report(f"tiny decoder of {network.num_parameters() / 1e6:.2f} million parameters")
    signature = training.signature(KIND, network, own, latent_noise=options.latent_noise)
    training.make_trainable(network, FULL)
    objective = TinyDecoderObjective(
        own, held_out, training.store, options.gradient_weight, options.seed, training.device
    )
    return Stage(
        name=SUBFOLDER,
        network=network,
        streams=[Stream(objective, training.plan(own))],
        write_results=training.writer(network, FULL, SUBFOLDER),
        signature=signature,
        draw_samples=functools.partial(objective.sheet, network),
    )


class TinyDecoderJob:
    """Encoding for a tiny decoder: latents of parts of a picture, and what MoVQ decodes from them.

    Each part has two rows: its latents, and the same with noise. Latents of a diffusion model are inexact, and the tiny
    decoder must follow MoVQ there too.

    Args:
        movq: The autoencoder.
        device: Device that it is on.
        options: Options of the training.
        sizes: Buckets (width, height).
    """

    def __init__(
        self, movq: VQModel, device: torch.device, options: TinyDecoderOptions, sizes: list[tuple[int, int]]
    ) -> None:
        self.movq, self.device, self.options, self.sizes = movq, device, options, sizes
        self.movq_digest = weights_digest({"movq": movq})

    def plan(self, example: Example, digest: str, size: tuple[int, int]) -> tuple[dict[str, Any], list[frames.Frame]]:
        """Return the cache key of an example, and the parts that are encoded.

        Args:
            example: The example.
            digest: Digest of the picture's bytes.
            size: Width and height of the picture.
        """
        options = self.options
        bucket = frames.nearest_bucket(size, self.sizes)
        crops = options.crops_per_image if options.random_crop else None
        parts = frames.frames(digest, bucket, crops=crops, flips=options.random_flip)
        key: dict[str, Any] = {
            "kind": KIND,
            "file": digest,
            "parts": [(part.size, part.position, part.flip) for part in parts],
            "movq": self.movq_digest,
            "latent_noise": options.latent_noise,
        }
        return key, parts

    @torch.no_grad()
    def encode(self, example: Example, parts: Sequence[frames.Frame]) -> dict[str, Tensor]:
        """Return "latents" (2 n, 4, h, w) and "pixels" (2 n, 3, H, W), uint8.

        Args:
            example: The example.
            parts: The parts.

        Raises:
            InputError: A picture cannot be decoded.
            OSError: A file cannot be read.
        """
        image = example.picture.open()
        generator = torch.Generator().manual_seed(int(example.picture.digest()[:12], 16))
        latents, pixels = [], []
        for part in parts:  # one at a time: MoVQ at full size takes gigabytes per picture
            exact = self.movq.encode(frames.to_tensor(part.cut(image))[None].to(self.device))[0].float().cpu()
            deviation = self.options.latent_noise * torch.rand((), generator=generator)
            for rows in (exact, exact + deviation * torch.randn(exact.shape, generator=generator)):
                decoded = self.movq.decode(rows.to(self.device), force_not_quantize=True)[0].float().cpu()
                latents.append(rows)
                pixels.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return {"latents": torch.cat(latents), "pixels": torch.cat(pixels)}


class TinyDecoderObjective(CachedObjective):
    """Difference between the pictures of a tiny decoder and those of MoVQ.

    Args:
        entries: Pictures to train on.
        held_out: Pictures to validate with.
        store: Their tensors.
        gradient_weight: Weight of the loss on differences between neighbouring pixels.
        seed: Seed of the training.
        device: Device of the network.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        held_out: Sequence[Entry],
        store: TensorStore,
        gradient_weight: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.entries, self.held_out, self.store = entries, held_out, store
        self.gradient_weight, self.seed, self.device = gradient_weight, seed, device

    def losses(self, network: nn.Module, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the losses of a batch, averaged over it; "loss" is minimised.

        Args:
            network: The network, which a wrapper for several processes may contain.
            draws: The examples.
        """
        chosen = []
        for draw in draws:
            tensors = self.store[self.entries[draw.index].path]
            numbers = np.random.default_rng(list(draw.key))
            row = int(numbers.integers(len(tensors["latents"])))
            chosen.append((tensors["latents"][row], tensors["pixels"][row]))
        latents, pixels = (torch.stack(rows).to(self.device) for rows in zip(*chosen, strict=True))
        return picture_losses(network(latents), pixels.float() / 127.5 - 1, self.gradient_weight)

    @torch.no_grad()
    def validation_losses(self, network: nn.Module) -> dict[str, float]:
        """Return the losses of the held-out pictures, without noise; empty without such pictures.

        Args:
            network: The network.
        """
        sums: dict[str, float] = {}
        for entry in self.held_out:
            latents, pixels = self._exact(entry)
            for name, value in picture_losses(network(latents), pixels, self.gradient_weight).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: value / len(self.held_out) for name, value in sums.items()}

    def _exact(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Return latents (1, 4, h, w) of a picture, and MoVQ's picture (1, 3, H, W) of them in [-1, 1]."""
        tensors = self.store[entry.path]
        return tensors["latents"][:1].to(self.device), tensors["pixels"][:1].to(self.device).float() / 127.5 - 1

    def sheet(self, network: nn.Module) -> Image:
        """Return a row of MoVQ's pictures above a row of the network's.

        Args:
            network: The network.
        """
        entries = self.held_out or self.entries
        shown = [entry for entry in entries if entry.size == entries[0].size][: samples.PICTURES_PER_SHEET]
        pairs = [self._exact(entry) for entry in shown]
        rows = [pixels for _, pixels in pairs] + [network(latents).float().cpu() for latents, _ in pairs]
        return samples.grid([samples.to_pil(pixels) for pixels in rows], columns=len(shown))
