"""The recipes of CLIP and prior at tiny size: they run, resume nothing they should not, and save what loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky22.training import prior as recipe
from kandinsky22.training.captions import VOCABULARY, caption
from kandinsky22.training.clip import Towers, build_tokenizer, clip_losses, neighbours
from kandinsky22.training.loop import StepRandomness
from kandinsky22.training.probe import UNKNOWN, Probe, SceneLabels, caption_answers, scene_answers, scene_of
from kandinsky22.training.scenes import is_held_out, random_palette, render, sample_scene


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    torch.manual_seed(0)
    return Towers.create(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_every_known_word_is_one_token_and_any_text_can_be_tokenised(towers: Towers) -> None:
    for word in VOCABULARY:
        assert len(towers.tokenizer.tokenize(word.upper())) == 1
    assert towers.tokenizer.tokenize("hexagon, 42 \u00fc \u6f22")
    assert towers.tokenizer.unk_token_id not in towers.tokenizer("hexagon \u6f22").input_ids[1:-1]


def test_trimming_changes_no_value(towers: Towers) -> None:
    short, full = (towers.embed_texts(["a red circle", "a star"], trim=trim) for trim in (True, False))
    assert torch.allclose(short.embeds, full.embeds, atol=1e-5)
    assert torch.allclose(short.hidden, full.hidden[:, : short.hidden.shape[1]], atol=1e-5)
    assert full.hidden.shape[1] == 77


def test_captions_are_true() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        truth, stated = scene_answers(scene), caption_answers(caption(scene, rng).description)
        assert all(a in (UNKNOWN, b) for a, b in zip(stated, truth, strict=True))


def test_answers_describe_the_scene() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = sample_scene(rng)
        again = scene_of(scene_answers(scene))
        assert (again.background, again.position, again.relation) == (scene.background, scene.position, scene.relation)
        looks = [[(shape.kind, shape.color, shape.size) for shape in s.shapes] for s in (again, scene)]
        assert looks[0] == looks[1]


def test_parts_that_add_up_leave_no_residual() -> None:
    torch.manual_seed(0)
    probe, rng = Probe(128), np.random.default_rng(2)
    scenes = [sample_scene(rng, shapes=1 + index % 2) for index in range(64)]
    palettes = [random_palette(scene, rng) for scene in scenes]
    labels = SceneLabels.of(scenes).followed_by(SceneLabels.of(scenes, palettes))
    assert labels.answers.shape == (128, 8) and labels.colors.shape == (128, 3, 3)
    assert (labels.answers[64:, [0, 3, 6]] == UNKNOWN).all(), "colours of a palette have no names"
    assert labels.colors[::2, 2].isnan().all() and not labels.colors[1::2].isnan().any()
    with torch.no_grad():
        composed = probe.compose(labels)
        assert probe.image_losses(composed, labels)["residual"] < 1e-10
        assert probe.image_losses(composed.roll(1, 0), labels)["residual"] > 0.1
        # the same change of one attribute is the same step in any combination
        brighter = SceneLabels(labels.answers, labels.geometry, labels.colors.clone())
        brighter.colors[:, 0] = 1.0
        darker = SceneLabels(labels.answers, labels.geometry, labels.colors.clone())
        darker.colors[:, 0] = 0.0
        steps = probe.compose(brighter) - probe.compose(darker)
        assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-5)


def test_neighbours_are_different_and_never_held_out() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        group = neighbours(sample_scene(rng), 4, rng)
        assert len(group) == 4 and group[0] not in group[1:]
        assert not any(is_held_out(scene) for scene in group)


def test_a_training_step_of_clip_changes_all_weights(towers: Towers) -> None:
    losses = clip_losses(towers, StepRandomness.of(0, 0), 8)
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    unreached = [name for name, p in towers.named_parameters() if p.grad is None]
    assert unreached == []
    towers.zero_grad(set_to_none=True)


def test_towers_are_saved_in_the_published_layout(towers: Towers, tmp_path: Path) -> None:
    towers.save(tmp_path)
    loaded = Towers.load(tmp_path)
    pictures = render([sample_scene(np.random.default_rng(0))])
    assert torch.allclose(loaded.embed_images(pictures), towers.embed_images(pictures), atol=1e-6)
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"tokenizer", "text_encoder", "image_encoder", "image_processor"}


def test_timesteps_share_a_text_without_attending_to_each_other(towers: Towers) -> None:
    prior = recipe.create_prior(towers.requires_grad_(False), 0)
    text = towers.embed_texts(["a red circle", "a big blue square on white"])
    with torch.no_grad():
        condition = prior.encode_condition(text.embeds, text.hidden, text.mask)
        noisy, timesteps = torch.randn(2, 3, 128), torch.randint(0, 1000, (2, 3))
        together = recipe.denoise_timesteps(prior, noisy, timesteps, condition)
        separate = [prior.denoise(noisy[:, index], timesteps[:, index], condition) for index in range(3)]
    assert torch.allclose(together, torch.stack(separate, 1), atol=1e-5)
