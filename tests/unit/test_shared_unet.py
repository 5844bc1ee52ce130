"""The recipe of the UNet that is decoder, inpainting and hint UNet in one: what it starts from, is shown and learns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kandinsky22 import KandinskyV22ControlnetPipeline, KandinskyV22InpaintPipeline
from kandinsky22.checkpoints import hub
from kandinsky22.errors import CheckpointError
from kandinsky22.inputs import masks
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.training import (
    assemble,
    decoder,
    denoising,
    movq,
    packaging,
    shared_banks,
    shared_network,
    shared_unet,
)
from kandinsky22.training.clip import EMBEDDING, Towers, build_tokenizer
from kandinsky22.training.loop import Settings, StepRandomness
from kandinsky22.training.scenes import (
    COLORS,
    Scene,
    Shape,
    is_held_out,
    rename_colors,
    render,
    render_hints,
    sample_scene,
)
from kandinsky22.training.shared_network import SharedUNet

TINY: dict[str, Any] = {**decoder.CONFIG, "block_out_channels": (32, 32, 32), "attention_head_dim": 32}
TINY |= {"cross_attention_dim": 32}
FEW = Settings(steps=2, warmup=1, log_every=1)
CHANGES = {"inpaint": shared_network.INPAINT_CONFIG, "hint": shared_network.HINT_CONFIG}
BANKS = (shared_banks.InterpolationBank, shared_banks.InpaintBank, shared_banks.HintBank)
BOTH = pytest.mark.parametrize("name", list(CHANGES))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    torch.manual_seed(0)
    return Towers.create(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder() -> VQModel:
    torch.manual_seed(0)
    return VQModel(**movq.CONFIG).eval().requires_grad_(False)


@pytest.fixture
def plain() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_banks, "BANK_START", 64)
    monkeypatch.setattr(decoder, "BANK_START", 64)
    for bank in (shared_banks.StrongSignalBank, *BANKS):
        monkeypatch.setattr(bank, "batch", 4)


def seen(name: str) -> dict[str, Any]:
    """What a variant is shown beside latents and embedding."""
    if name == "hint":
        return {"hint": torch.rand(2, 3, 128, 128)}
    return {"channels": torch.randn(2, 5, 16, 16)}


def test_the_shared_network_and_its_parts_start_equal_to_the_decoder(plain: UNet2DConditionModel) -> None:
    shared = SharedUNet(plain, shared_unet.example_hints()).requires_grad_(False)
    latents, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, EMBEDDING)
    expected = plain.denoise(latents, 500, plain.encode_condition(embeds))
    for extra in ({}, seen("hint"), seen("inpaint"), {**seen("hint"), **seen("inpaint")}):
        torch.testing.assert_close(shared.denoise(latents, 500, shared.encode_condition(embeds, **extra)), expected)
    part = shared.variant({})
    torch.testing.assert_close(part.denoise(latents, 500, part.encode_condition(embeds)), expected)


def awake(plain: UNet2DConditionModel) -> SharedUNet:
    """A shared network whose new inputs count."""
    shared = SharedUNet(plain, shared_unet.example_hints()).requires_grad_(False)
    torch.nn.init.normal_(shared.unet.conv_in.weight, std=0.2)
    return shared


@BOTH
def test_a_part_equals_the_shared_network_without_the_other_inputs(name: str, plain: UNet2DConditionModel) -> None:
    shared = awake(plain)
    latents, embeds, extra = torch.randn(2, 4, 16, 16), torch.randn(2, EMBEDDING), seen(name)
    part = shared.variant(CHANGES[name])
    answer = part.denoise(latents, 500, part.encode_condition(embeds, **extra))
    torch.testing.assert_close(answer, shared.denoise(latents, 500, shared.encode_condition(embeds, **extra)))
    alone = shared.variant({})
    assert not torch.allclose(answer, alone.denoise(latents, 500, alone.encode_condition(embeds)))
    for key, value in part.state_dict().items():
        if not key.startswith(shared_network.UNSHARED_PREFIXES):
            assert torch.equal(value, alone.state_dict()[key]), key


def banks_in(folder: Path, autoencoder: VQModel, towers: Towers) -> list[decoder.Bank]:
    kinds = (shared_banks.StrongSignalBank, *BANKS)
    return [kind(folder / kind.name, autoencoder, towers, seed=0, size=64) for kind in kinds]


def test_gradients_reach_every_weight(
    plain: UNet2DConditionModel, autoencoder: VQModel, towers: Towers, tmp_path: Path
) -> None:
    shared = SharedUNet(plain.requires_grad_(True), shared_unet.example_hints())
    objective = decoder.denoising_objective(
        shared, banks_in(tmp_path, autoencoder, towers), decoder.zero_embedding(towers)
    )
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    for step in range(2):  # new channels count for nothing at first, so what is behind them waits for a step
        optimizer.zero_grad()
        losses = objective(StepRandomness.of(0, step))
        losses["loss"].backward()
        optimizer.step()
    for name, parameter in shared.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name
    assert {"strong_signal", "interpolation", "inpaint", "hints"} < losses.keys()


def test_training_lowers_the_loss_and_can_be_resumed(
    plain: UNet2DConditionModel,
    autoencoder: VQModel,
    towers: Towers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder, "CONFIG", TINY)
    monkeypatch.setattr(shared_unet, "CONFIG", TINY)
    monkeypatch.setattr(decoder, "BANK_SIZE", 64)
    decoder.train_decoder(tmp_path / "decoder", autoencoder, towers, FEW, bank_size=64)
    banks = banks_in(tmp_path / "judging", autoencoder, towers)

    def loss(shared: SharedUNet) -> float:
        objective = decoder.denoising_objective(shared, banks, decoder.zero_embedding(towers))
        with torch.no_grad():
            return sum(float(objective(StepRandomness.of(9, step))["loss"]) for step in range(4))

    before = loss(SharedUNet(decoder.load_decoder(tmp_path / "decoder"), shared_unet.example_hints()))
    settings = Settings(steps=8, warmup=2, learning_rate=3e-3, average=0.5)
    halves = dataclasses.replace(settings, steps=4, decay=4), dataclasses.replace(settings, decay=4)
    for part in halves:
        folders = tmp_path / "shared", tmp_path / "decoder"
        trained = shared_unet.train_shared(*folders, autoencoder, towers, part, bank_size=64)
    assert loss(trained) < before
    loaded = shared_unet.load_shared(tmp_path / "shared").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())


def test_pictures_and_embeddings_contradict_each_other_only_where_there_is_little_noise(
    autoencoder: VQModel, towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_banks.StrongSignalBank, "batch", 32)
    bank = shared_banks.StrongSignalBank(tmp_path, autoencoder, towers, seed=0, size=64)
    own = {
        tuple(latents.flatten().tolist()): embeds
        for latents, embeds in zip(*bank.read(bank.sample_indices(StepRandomness.of(0, 0), 512)), strict=True)
    }
    wrong = torch.zeros(32)
    for step in range(40):
        shown = bank.examples(StepRandomness.of(1, step))
        for row, (latents, embeds) in enumerate(zip(shown.latents, shown.embeds, strict=True)):
            wrong[row] += not torch.equal(own[tuple(latents.flatten().tolist())], embeds)
    table = denoising.timestep_distribution(decoder.DDPMScheduler(**decoder.SCHEDULER).alphas_cumprod)
    clear = int(32 * table[shared_banks.STRONG_SIGNAL_TIMESTEP])
    assert 0 < clear < 32 and not wrong[clear:].any()
    assert abs(float(wrong[:clear].mean()) / 40 - shared_banks.MISMATCH_SHARE) < 0.1
    assert (
        int(denoising.stratified_timesteps(table, 32, StepRandomness.of(1, 0))[:clear].max())
        <= shared_banks.STRONG_SIGNAL_TIMESTEP
    )


def test_mixtures_lie_between_their_ends_and_are_never_held_out() -> None:
    rng = np.random.default_rng(6)
    differ = set()
    for _ in range(300):
        mixture = shared_banks.sample_mixture(rng)
        first, second = (scene.shapes[0] for scene in mixture.ends)
        middle = mixture.scene.shapes[0]
        assert first.kind == second.kind == middle.kind
        assert not any(is_held_out(scene) for scene in mixture.ends)
        assert not is_held_out(rename_colors(mixture.scene, mixture.palette))
        for name in ("x", "y", "radius"):
            start, end = getattr(first, name), getattr(second, name)
            assert getattr(middle, name) == pytest.approx(start + mixture.fraction * (end - start))
            differ |= {name} if start != end else set()
        grounds = [np.array(COLORS[scene.background]) for scene in mixture.ends]
        expected = grounds[0] + mixture.fraction * (grounds[1] - grounds[0])
        np.testing.assert_allclose(mixture.palette[mixture.scene.background], expected)
        differ |= {name for name in ("color", "size") if getattr(first, name) != getattr(second, name)}
    assert differ == {"x", "y", "radius", "color", "size"}


def test_hint_block_passes_hints_at_the_start(plain: UNet2DConditionModel) -> None:
    torch.manual_seed(1)
    block = SharedUNet(plain, shared_unet.example_hints()).hint
    scenes = [Scene("red", (Shape("circle", "blue", "large", x, 0.5, 0.18),)) for x in (0.3, 0.7)]
    with torch.no_grad():
        left, right = block(render_hints(scenes))
    assert 0.2 < float((left - right).std()) < 5


def test_variant_pipelines_share_files_with_the_decoder(
    autoencoder: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shared = awake(UNet2DConditionModel(**decoder.CONFIG))
    plain = shared.variant({})
    monkeypatch.setattr(hub, "_embedded_weights", lambda: tmp_path)
    picture = render([sample_scene(np.random.default_rng(0))])[0]
    unets = packaging.DecoderUNets(
        plain, shared.variant(shared_network.INPAINT_CONFIG), shared.variant(shared_network.HINT_CONFIG)
    )
    packaging.save_decoders(unets, autoencoder, decoder.SCHEDULER, assemble.DECODER_DEFAULTS, tmp_path)
    given: dict[str, dict[str, Any]] = {
        "inpaint": {"image": picture * 2 - 1, "mask_image": torch.ones(128, 128)},
        "control": {"hint": picture},
    }
    kinds = {"inpaint": KandinskyV22InpaintPipeline, "control": KandinskyV22ControlnetPipeline}
    for name, kind in kinds.items():
        unet = shared.variant(shared_network.INPAINT_CONFIG if name == "inpaint" else shared_network.HINT_CONFIG)
        packaging.remove_shared_files(tmp_path / "decoder", tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir() if path.is_dir()) == ["unet"]
        assert not list((tmp_path / name / "unet").glob("*-00001-of-*"))
        pipe = kind.from_pretrained("embedded", torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for key, value in unet.state_dict().items():
            assert torch.equal(pipe.unet.state_dict()[key], value.half().float()), key
        embeds = torch.randn(1, EMBEDDING)
        options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", **given[name]}
        images = pipe(image_embeds=embeds, negative_image_embeds=-embeds, **options).images
        assert images.shape == (1, 128, 128, 3) and np.isfinite(images).all()
        assert pipe.generation_defaults == assemble.DECODER_DEFAULTS
        pipe.save_pretrained(tmp_path / "elsewhere" / name)  # whole again
        assert kind.from_pretrained(tmp_path / "elsewhere" / name).movq is not None
    with pytest.raises(CheckpointError, match="missing file"):
        next((tmp_path / "decoder" / "unet").glob("*-00001-of-*")).unlink()
        KandinskyV22InpaintPipeline.from_pretrained("embedded")


def test_masks_equal_the_pipelines_and_embeddings_show_only_shapes_inside() -> None:
    rng = np.random.default_rng(2)
    indices = []
    for _ in range(400):
        scene = sample_scene(rng)
        mask = shared_banks.sample_mask(scene, rng)
        assert mask.known.shape == (1, 1, 16, 16) and set(mask.known.unique().tolist()) <= {0.0, 1.0}
        indices.append(mask.embedding_index)
        if mask.embedding_index:
            shape = scene.shapes[mask.embedding_index - 1]
            pixels = mask.known[0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1)
            drawn = render_hints([Scene("red", (shape,))])[0, 0] > 0
            assert not bool((pixels.bool() & drawn).any())
            assert bool(mask.known.any())
    assert set(indices) == {0, 1, 2}


def test_masks_are_reduced_to_latents_as_the_pipeline_does(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("red", (Shape("circle", "blue", "large", 0.5, 0.5, 0.18),))

    class Fixed:
        """Draws the middle of every range, so that the hole is a box around the shape."""

        def uniform(self, low: float, high: float, size: int) -> np.ndarray[Any, Any]:
            return np.full(size, (low + high) / 2)

        def random(self) -> float:
            return 0.45

        def integers(self, high: int) -> int:
            return 0

    known = shared_banks.sample_mask(scene, Fixed()).known  # type: ignore[arg-type]
    reach = shared_banks.MAX_EXTENT * 0.18 + 0.075
    centers = (torch.arange(128) + 0.5) / 128
    inside = (centers - 0.5).abs() < reach
    mask = (inside[:, None] & inside[None, :]).float()[None, None]
    assert torch.equal(known, masks.unmasked_latents(mask, (16, 16)))


def test_single_shapes_are_never_held_out() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = sample_scene(rng)
        for slot in range(len(scene.shapes)):
            single = shared_banks.single_shape(scene, slot, rng, other_background=True)
            shape = scene.shapes[slot]
            assert (single.shapes[0].kind, single.shapes[0].color) == (shape.kind, shape.color)
            assert not is_held_out(single) and single.background != shape.color
            same = shared_banks.single_shape(scene, slot, rng, other_background=False)
            assert same.background == scene.background


def test_shapes_in_a_free_layout_stay_apart_inside_and_in_order() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = shared_banks.free_layout(sample_scene(rng), rng)
        for shape in scene.shapes:
            reach = shared_banks.MAX_EXTENT * shape.radius
            assert reach < min(shape.x, shape.y) and max(shape.x, shape.y) < 1 - reach
        if len(scene.shapes) == 2:
            first, second = scene.shapes
            assert math.hypot(first.x - second.x, first.y - second.y) > shared_banks.MAX_EXTENT * (
                first.radius + second.radius
            )
            side = "x" if scene.relation == "left of" else "y"
            assert getattr(first, side) < getattr(second, side)
        captionable = shared_banks.captionable_layout(scene, rng)
        looks = [[(s.kind, s.color) for s in some.shapes] for some in (scene, captionable)]
        assert looks[0] == looks[1] and scene.background == captionable.background


def test_hints_show_shapes_without_colours() -> None:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(6)]
    layers, edges = render_hints(scenes), render_hints(scenes, outlines=True)
    assert layers.shape == edges.shape == (6, 3, 128, 128)
    assert float(layers.min()) == 0 and float(layers.max()) == 1
    mixed = render_hints(scenes, outlines=[True, False] * 3)
    assert torch.equal(mixed[0], edges[0]) and torch.equal(mixed[1], layers[1])
    whitened = [tuple(dataclasses.replace(shape, color="white") for shape in scene.shapes) for scene in scenes]
    recoloured = [Scene("black", shapes) for shapes in whitened]
    white = torch.tensor(COLORS["white"]) - torch.tensor(COLORS["black"])
    drawn = (render(recoloured) - torch.tensor(COLORS["black"])[:, None, None]) / white[:, None, None]
    torch.testing.assert_close(layers, drawn, atol=1e-5, rtol=0)
    assert bool((edges <= layers + 1e-6).all())
    for scene, layer, edge in zip(scenes, layers, edges, strict=True):
        for shape in scene.shapes:  # an edge is empty inside
            x, y = int(shape.x * 128), int(shape.y * 128)
            assert layer[0, y, x] == 1 and edge[0, y, x] == 0
        assert 0.05 < float(edge.sum() / layer.sum()) < 0.9
