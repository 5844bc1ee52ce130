"""The recipes of MoVQ and the decoder: a few steps of each, and the exactness that they rest on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky22.models.movq import VQModel
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training import decoder, denoising, movq
from kandinsky22.training.clip import EMBEDDING, Towers, build_tokenizer
from kandinsky22.training.loop import Settings, StepRandomness
from kandinsky22.training.scenes import render, sample_scene

FEW = Settings(steps=2, warmup=1, log_every=1)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    torch.manual_seed(0)
    return Towers.create(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> VQModel:
    return movq.train_autoencoder(tmp_path_factory.mktemp("movq"), FEW).requires_grad_(False)


def test_training_images_are_crops_around_shapes_or_full_images() -> None:
    crops, full = (movq.training_images(StepRandomness.of(0, 1), full_size=full_size) for full_size in (False, True))
    assert crops.shape == (16, 3, 64, 64) and full.shape == (4, 3, 128, 128)
    assert all(crop.flatten(1).std(1).max() > 0.01 for crop in crops), "a crop without an outline teaches nothing"
    assert crops.abs().max() <= 1


def test_frozen_latents_are_normal_and_the_pictures_unchanged() -> None:
    torch.manual_seed(0)
    net = VQModel(**movq.CONFIG).requires_grad_(False)
    rng = np.random.default_rng(5)
    images = render([sample_scene(rng) for _ in range(16)], movq.SIZE) * 2 - 1
    before = net.decode(net.quant_conv(net.encoder(images)), True).sample  # type: ignore[union-attr]
    movq.normalise_latents(net, seed=0, count=64)
    latents = net.quant_conv(net.encoder(images))
    after = net.decode(latents, True).sample  # type: ignore[union-attr]
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 0.5
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.5
    codes, _ = net.quantize(latents)
    assert (codes - latents).square().mean() < 0.05


def test_image_loss_is_zero_for_the_target_and_heavier_at_outlines() -> None:
    images = movq.training_images(StepRandomness.of(0, 2), full_size=True)
    assert movq.image_loss(images, images)["loss"] == 0
    flat = torch.zeros(1, 3, 32, 32)
    square = flat.clone()
    square[:, :, 8:24, 8:24] = 1
    assert movq.image_loss(square + 0.1, square)["loss"] > movq.image_loss(flat + 0.1, flat)["loss"]


def test_the_second_stage_trains_the_decoder_and_keeps_the_latents(autoencoder: VQModel) -> None:
    objective = movq.decoder_objective(autoencoder)
    trained = {name for name, value in autoencoder.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith(("decoder.", "post_quant_conv.")) for name in trained)
    assert torch.isfinite(objective(StepRandomness.of(0, 7))["loss"])
    autoencoder.requires_grad_(False)


def test_the_bank_is_the_same_whether_filled_at_once_or_resumed(
    tmp_path: Path, autoencoder: VQModel, towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "BANK_START", 64)
    monkeypatch.setattr(decoder, "BANK_GROWTH", 64)
    first = decoder.Bank(tmp_path, autoencoder, towers, seed=3, size=128)
    early = first.read(first.sample_indices(StepRandomness.of(3, 0), 8))
    first.sample_indices(StepRandomness.of(3, 1), 8)
    assert first.count == 128
    again = decoder.Bank(tmp_path, autoencoder, towers, seed=3, size=128)
    assert again.count == 128
    for one, other in zip(early, again.read(again.sample_indices(StepRandomness.of(3, 0), 8)), strict=True):
        assert torch.equal(one, other)


def test_a_decoder_can_be_trained_and_loaded(tmp_path: Path, autoencoder: VQModel, towers: Towers) -> None:
    unet = decoder.train_decoder(tmp_path, autoencoder, towers, FEW, bank_size=64)
    loaded = decoder.load_decoder(tmp_path)
    sample, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, EMBEDDING)
    with torch.no_grad():  # the trained one would keep traces, and multiply in another order
        outputs = [net.denoise(sample, 500, net.encode_condition(embeds)) for net in (unet, loaded)]
    assert outputs[0].shape == (1, 8, 16, 16)
    assert torch.equal(*outputs)


def test_timesteps_near_the_clean_end_are_rare() -> None:
    scheduler = DDPMScheduler(**decoder.SCHEDULER)
    distribution = denoising.timestep_distribution(scheduler.alphas_cumprod)
    density = torch.cat([distribution[:1], distribution.diff()])
    assert distribution[-1] == pytest.approx(1, abs=1e-4)
    assert density[0] < density[500] / 20
    assert density[500] == pytest.approx(float(density[999]), rel=1e-2)


def test_the_variance_loss_prefers_the_variance_that_explains_the_error() -> None:
    scheduler = DDPMScheduler(**decoder.SCHEDULER)
    timesteps, shape = torch.full((2,), 30), (2, 4, 4, 4)
    small, large = torch.full(shape, -1.0), torch.full(shape, 1.0)
    none, much = torch.zeros(shape), torch.full(shape, 50.0)
    assert denoising.variance_loss(small, none, timesteps, scheduler) == pytest.approx(0, abs=1e-6)
    assert denoising.variance_loss(small, none, timesteps, scheduler) < denoising.variance_loss(
        large, none, timesteps, scheduler
    )
    assert denoising.variance_loss(large, much, timesteps, scheduler) < denoising.variance_loss(
        small, much, timesteps, scheduler
    )
