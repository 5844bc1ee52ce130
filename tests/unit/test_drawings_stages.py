"""Stages of the embedded model's training on drawings, for a step or two each."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.solid_sprites import SolidSprites
from torch import Tensor

from kandinsky22 import DDPMScheduler, UNet2DConditionModel, VQModel
from kandinsky22.errors import CheckpointError
from kandinsky22.training import autoencoder
from kandinsky22.training.denoising import denoising_objective
from kandinsky22.training.drawings import __main__ as stages
from kandinsky22.training.drawings import clip as clip_recipe
from kandinsky22.training.drawings import decoder, movq, prior, shared
from kandinsky22.training.drawings.captions import VOCABULARY
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.probe import Probe
from kandinsky22.training.loop import Settings, StepRandomness
from kandinsky22.training.shared_network import INPAINT_CONFIG, SharedUNet
from kandinsky22.training.towers import Towers, build_tokenizer

ONE_STEP = Settings(steps=1, warmup=1, average=0.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)
    return Clip(Towers.create(tokenizer, clip_recipe.SIZES), Probe(clip_recipe.SIZES.embedding))


def test_each_word_is_one_token(clip: Clip) -> None:
    for word in VOCABULARY:
        assert clip.towers.tokenizer.tokenize(word) == [word + "</w>"]


def test_clip_is_trained_and_read_again(tmp_path: Path) -> None:
    trained = clip_recipe.train_clip(tmp_path, SolidSprites(), ONE_STEP, count=4, evaluated=4)
    loaded = Clip.load(tmp_path)
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded.towers.embed_images(image), trained.towers.embed_images(image))
    for name, value in trained.probe.state_dict().items():
        torch.testing.assert_close(loaded.probe.state_dict()[name], value)
    assert (tmp_path / "evaluation.json").is_file()


def test_towers_are_trained_on_frozen_parts(clip: Clip, tmp_path: Path) -> None:
    trained = copy.deepcopy(clip).requires_grad_(False)
    clip_recipe.train_towers(
        tmp_path, trained, SolidSprites(), dataclasses.replace(ONE_STEP, learning_rate=1e-3), count=4, evaluated=4
    )
    loaded = Clip.load(tmp_path)
    before, after = clip.state_dict(), loaded.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("towers.") for name in changed)


def test_neighbours_differ_in_one_attribute() -> None:
    rng = StepRandomness.of(0, 0).numpy
    for _ in range(50):
        scene = clip_recipe.sample_scene(rng)
        first, second = clip_recipe.neighbours(scene, 2, rng)
        assert first == scene
        assert second != scene
        assert second.arrangement == scene.arrangement


def test_autoencoder_sees_crops_and_full_images() -> None:
    sprites = SolidSprites()
    crops = movq.training_images(sprites, StepRandomness.of(0, 0))
    full = movq.training_images(sprites, StepRandomness.of(0, movq.FULL_SIZE_EVERY - 1))
    assert crops.shape == (movq.BATCH, 3, movq.CROP, movq.CROP)
    assert full.shape[1:] == (3, movq.SIZE, movq.SIZE)
    assert crops.numel() == full.numel()


def test_normalised_latents_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    network = VQModel(**{**movq.CONFIG, "num_vq_embeddings": 16})
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    latents = autoencoder.encode(network, images)
    with torch.no_grad():
        before = network.decode(latents, force_not_quantize=True).sample
    autoencoder.normalise_latents(network, images, seed=0)
    normalised = autoencoder.encode(network, images)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    with torch.no_grad():
        after = network.decode(normalised, force_not_quantize=True).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_stage_of_the_decoder_trains_the_decoder_alone() -> None:
    network = VQModel(**movq.CONFIG)

    def images(randomness: StepRandomness) -> Tensor:
        return torch.rand(2, 3, 32, 32, generator=randomness.torch) * 2 - 1

    losses = autoencoder.decoder_objective(network, images)(StepRandomness.of(0, 7))
    losses["loss"].backward()
    trained = {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    assert trained == {"decoder", "post_quant_conv"}
    first = autoencoder.autoencoder_objective(VQModel(**movq.CONFIG), images)(StepRandomness.of(0, 0))
    assert first["loss"].isfinite()


def test_prior_learns_sums_of_parts(clip: Clip) -> None:
    network = prior.create_prior(clip, seed=0)
    rng = StepRandomness.of(0, 0).numpy
    pairs = [prior.sample_pair(rng) for _ in range(300)]
    assert any(caption.text == "" for caption, _ in pairs)
    assert any(scene.things[0].color == scene.background.name for _, scene in pairs), "as prompts ask for it"
    report = prior.evaluate(network, clip, count=2, steps=2)
    assert {"one", "row, held out"} <= report.keys()


def test_bank_of_the_decoder_is_resumed(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHUNK": 2, "BANK_START": 4, "BANK_GROWTH": 2, "BATCH": 2}.items():
        monkeypatch.setattr(decoder, name, value)
    network, sprites = VQModel(**movq.CONFIG), SolidSprites()
    bank = decoder.Bank(tmp_path, network, clip, sprites, seed=0, size=8)
    first, later = bank.examples(StepRandomness.of(0, 0)), bank.examples(StepRandomness.of(0, 2))
    assert (bank.count, first.latents.shape) == (8, (2, 4, 32, 32))
    stored = bank.embeds.copy()
    again = decoder.Bank(tmp_path, network, clip, sprites, seed=0, size=8)
    assert again.count == 8
    other = copy.deepcopy(clip)
    torch.nn.init.normal_(other.towers.vision.visual_projection.weight)
    refreshed = decoder.Bank(tmp_path, network, other, sprites, seed=0, size=8).embeds
    assert (refreshed[:, 1] != stored[:, 1]).all(1).any() and (refreshed[:, 0] == stored[:, 0]).all()
    torch.testing.assert_close(again.examples(StepRandomness.of(0, 2)).latents, later.latents)
    unet = UNet2DConditionModel(**decoder.CONFIG)
    objective = denoising_objective(unet, DDPMScheduler(**decoder.SCHEDULER), [bank])
    losses = objective(StepRandomness.of(0, 0))
    losses["loss"].backward()
    assert losses["velocity"].isfinite()
    assert all(value.grad is not None for value in unet.parameters())


def test_images_of_the_bank_do_not_depend_on_the_timestep(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timesteps of a batch ascend, so its images must be in no order."""
    for name, value in {"CHUNK": 2, "BANK_START": 8, "BANK_GROWTH": 0, "BATCH": 16}.items():
        monkeypatch.setattr(decoder, name, value)
    bank = decoder.Bank(tmp_path, VQModel(**movq.CONFIG), clip, SolidSprites(), seed=0, size=8, image_size=64)
    bank.latents[:] = np.arange(8).reshape(8, 1, 1, 1)
    indices = torch.stack([bank.examples(StepRandomness.of(0, step)).latents[:, 0, 0, 0] for step in range(40)])
    assert indices.unique().tolist() == list(range(8))
    correlation = torch.corrcoef(torch.stack([indices.flatten(), torch.arange(16.0).repeat(40)]))[0, 1]
    assert abs(correlation) < 0.2


def test_prior_generates_only_what_the_decoder_draws() -> None:
    assert prior.MIXTURE.styles == decoder.MIXTURE.styles == decoder.HALF_SIZE_MIXTURE.styles
    assert prior.MIXTURE.things == decoder.MIXTURE.things == decoder.HALF_SIZE_MIXTURE.things


def test_stages_need_the_ones_before_them(tmp_path: Path) -> None:
    for stage, missing in {
        "towers": "clip",
        "decoder": "autoencoder",
        "prior": "towers",
        "shared": "decoder",
    }.items():
        with pytest.raises(CheckpointError, match=f"{missing} is not finished"):
            stages.STAGES[stage](tmp_path, SolidSprites())
    with pytest.raises(CheckpointError, match=r"not finished: .*clip, .*towers"):
        stages.STAGES["assemble"](tmp_path, SolidSprites())


def test_norms_see_contiguous_features_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's group norm has a slow backward pass for channels last features."""
    layouts: list[bool] = []
    group_norm = torch.group_norm

    def recording(features: Tensor, *arguments: Any) -> Tensor:
        layouts.append(features.is_contiguous())
        return group_norm(features, *arguments)

    monkeypatch.setattr(torch, "group_norm", recording)
    image = torch.rand(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    VQModel(**movq.CONFIG)(image).sample.sum().backward()
    unet = UNet2DConditionModel(**decoder.CONFIG)
    condition = unet.encode_condition(torch.rand(1, clip_recipe.SIZES.embedding))
    latents = torch.rand(1, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    unet.denoise(latents, torch.tensor([3]), condition).sum().backward()
    assert len(layouts) > 60
    assert all(layouts)


def test_shared_network_sees_all_kinds_of_examples(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHUNK": 2, "BANK_START": 4, "BATCH": 2}.items():
        monkeypatch.setattr(decoder, name, value)
    monkeypatch.setattr(shared, "CHUNK", 2)
    monkeypatch.setattr(shared, "BATCHES", {"text_to_image": 2, "inpaint": 2, "hints": 2})
    bank = decoder.Bank(tmp_path, VQModel(**movq.CONFIG), clip, SolidSprites(), seed=0, size=4)
    network = SharedUNet(UNet2DConditionModel(**decoder.CONFIG), shared.example_hints(SolidSprites()))
    sources = [shared.TextToImageBank(bank), shared.InpaintBank(bank), shared.HintBank(bank)]
    losses = denoising_objective(network, DDPMScheduler(**decoder.SCHEDULER), sources)(StepRandomness.of(0, 0))
    losses["loss"].backward()
    assert {"text_to_image", "inpaint", "hints"} <= losses.keys()
    assert all(value.grad is not None for value in network.parameters())
    inpaint = network.variant(INPAINT_CONFIG)
    assert inpaint.config.in_channels == 9


def test_masks_surround_things_and_embeddings_may_show_them_alone() -> None:
    rng = StepRandomness.of(0, 0).numpy
    slots = []
    for _ in range(60):
        scene = clip_recipe.sample_scene(rng)
        mask = shared.sample_mask(scene, rng)
        known, slot = mask.known, mask.slot
        slots.append(slot)
        described = shared.single_thing(scene, slot, rng)
        assert known.shape == (1, 1, 32, 32)
        if slot is None:
            assert described == scene
            continue
        thing = scene.things[slot]
        assert known[0, 0, int(thing.y * 32), int(thing.x * 32)] == 0
        assert described == scene or described.things[0].name == thing.name
    assert {None, 0, 1} <= set(slots)


def test_other_layouts_keep_what_things_are() -> None:
    rng = StepRandomness.of(0, 0).numpy
    for _ in range(20):
        scene = clip_recipe.sample_scene(rng)
        other = shared.other_layout(scene, rng)
        assert [(t.name, t.color) for t in other.things] == [(t.name, t.color) for t in scene.things]
        assert other.background == scene.background
