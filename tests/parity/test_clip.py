"""CLIP's towers and image processor against those of transformers: the same numbers from the same files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.pipelines.fake_accelerator import fake_accelerator

from kandinsky22 import CheckpointError, ConfigError, InputError
from kandinsky22.models import clip
from kandinsky22.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from kandinsky22.pipelines import clip_files
from kandinsky22.pipelines.clip_image_processor import CLIPImageProcessor

COMMON = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "projection_dim": 12}
TEXT = {**COMMON, "num_hidden_layers": 3, "vocab_size": 30, "max_position_embeddings": 10, "eos_token_id": 29}
VISION = {**COMMON, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}


def towers(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """Save a tower of transformers; return ours of the same files, and theirs."""
    torch.manual_seed(0)
    if kind == "text":
        config: Any = transformers.CLIPTextConfig(**{**TEXT, **settings})
        theirs: Any = transformers.CLIPTextModelWithProjection(config)
    else:
        config = transformers.CLIPVisionConfig(**{**VISION, **settings})
        theirs = transformers.CLIPVisionModelWithProjection(config)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    theirs = theirs.to(dtype).eval()
    theirs.save_pretrained(folder)
    own = clip.CLIPTextModelWithProjection if kind == "text" else clip.CLIPVisionModelWithProjection
    return clip_files.load_tower(own, folder, [folder / "model.safetensors"], "auto"), theirs


def ids(batch: int = 3, length: int = 10) -> torch.Tensor:
    tokens = torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(batch), torch.tensor([3, 9, 5])[:batch]] = 29
    return tokens


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_text_tower(activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, "text", dtype, hidden_act=activation)
    actual, expected = ours(ids(), output_hidden_states=True), theirs(ids(), output_hidden_states=True)
    assert ours.dtype == dtype
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(actual.text_embeds, expected.text_embeds, **tolerance)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **tolerance)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for own, other in zip(actual.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@pytest.mark.parametrize("end", [2, 29])
@torch.no_grad()
def test_masks_positions_and_ends_of_texts(end: int, tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, "text", eos_token_id=end)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 4:] = 0
    positions = torch.arange(10).flip(0).expand(3, -1)
    for options in ({}, {"attention_mask": mask}, {"position_ids": positions}):
        actual, expected = ours(ids(), **options), theirs(ids(), **options)
        torch.testing.assert_close(actual.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    shorter = ids()[:, :4]
    torch.testing.assert_close(ours(shorter)[1], theirs(shorter)[1], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"input_ids.shape\[-1\]=11 is invalid: expected at most 10 tokens"):
        ours(torch.zeros(1, 11, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_vision_tower(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, "vision", dtype)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual, expected = ours(pixels, output_hidden_states=True), theirs(pixels, output_hidden_states=True)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds, **tolerance)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **tolerance)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    with pytest.raises(InputError, match="pixel_values"):
        ours(pixels[..., :8])


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("shard_size", ["10GB", "4KB"])
def test_transformers_reads_what_a_tower_writes(kind: str, shard_size: str, tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path / "theirs", kind, torch.float16)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard_size)
    assert (tmp_path / "ours" / "model.safetensors").exists() == (shard_size == "10GB")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert again.dtype == torch.float16 and again.config.hidden_act == theirs.config.hidden_act
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["architectures"] == [type(theirs).__name__] and stored["torch_dtype"] == "float16"


def test_a_tower_of_a_whole_clip_model(tmp_path: Path) -> None:
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    ).eval()
    model.save_pretrained(tmp_path)
    own = clip_files.load_tower(clip.CLIPTextModelWithProjection, tmp_path, [tmp_path / "model.safetensors"], None)
    assert own.config.vocab_size == 30
    torch.testing.assert_close(own.state_dict()["text_projection.weight"], model.text_projection.weight.data)


SIZES = [(40, 30), (30, 40), (16, 16), (7, 90), (5, 3), (201, 200)]
SETTINGS: list[dict[str, Any]] = [
    {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    {"size": {"height": 12, "width": 20}, "crop_size": 11},
    {"do_resize": False, "crop_size": {"height": 17, "width": 40}},
    {"size": 16, "do_center_crop": False, "do_normalize": False},
    {"size": 16, "crop_size": 16, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    {"size": 16, "crop_size": 16, "do_rescale": False},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_image_processor(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    theirs = theirs_class(**settings)
    theirs.save_pretrained(tmp_path)
    ours = clip_files.load_image_processor(tmp_path)
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        picture = PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for mode in ("RGB", "L"):
            shown = picture.convert(mode)
            expected = np.asarray(theirs([shown], return_tensors="np").pixel_values)
            actual = ours([shown], return_tensors="pt").pixel_values
            assert actual.dtype == torch.float32 or not settings.get("do_rescale", True)
            np.testing.assert_array_equal(actual.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(ours(np.asarray(picture))["pixel_values"][0], rgb_pixels(ours, picture))


def rgb_pixels(processor: CLIPImageProcessor, picture: PIL.Image.Image) -> np.ndarray:
    return processor([picture], return_tensors="np").pixel_values[0]


def test_transformers_reads_what_the_image_processor_writes(tmp_path: Path) -> None:
    ours = CLIPImageProcessor(size=20, crop_size={"height": 10, "width": 12}, image_mean=[0.1, 0.2, 0.3])
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(tmp_path)
    picture = PIL.Image.radial_gradient("L").convert("RGB")
    expected = np.asarray(theirs([picture], return_tensors="np").pixel_values)
    np.testing.assert_array_equal(ours([picture], return_tensors="np").pixel_values, expected)
    for invalid in ("text", 3, torch.zeros(4, 5, 6), torch.full((3, 4, 4), 0.5) - 1, np.full((3, 4, 4), np.nan), []):
        with pytest.raises(InputError, match="images="):
            ours(invalid)


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        ("text", {"hidden_size": 10}, "num_attention_heads=8"),
        ("text", {"hidden_act": "magic"}, "hidden_act"),
        ("text", {"eos_token_id": None}, "eos_token_id"),
        ("vision", {"patch_size": 300}, "image_size=224"),
    ],
)
def test_settings_are_checked_with_their_defaults(
    kind: str, settings: dict[str, Any], part: str, tmp_path: Path
) -> None:
    config_class = CLIPTextConfig if kind == "text" else CLIPVisionConfig
    with pytest.raises(ConfigError, match=part):
        config_class(**settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    own = clip.CLIPTextModelWithProjection if kind == "text" else clip.CLIPVisionModelWithProjection
    with pytest.raises((ConfigError, CheckpointError)):
        clip_files.tower_config(own, tmp_path)


CALLS: list[tuple[str, Any]] = [
    ("tuple", lambda tower, inputs: tower(inputs, return_dict=False)),
    ("names", lambda tower, inputs: tower(inputs, return_dict=True, output_attentions=False)[0]),
    ("states", lambda tower, inputs: tower(inputs, output_hidden_states=True, return_dict=False)[2][1]),
    ("base", lambda tower, inputs: tower.base_model(inputs).last_hidden_state),
    ("pooled", lambda tower, inputs: tower.base_model(inputs)[1]),
    ("states of the base", lambda tower, inputs: tower.base_model(inputs, output_hidden_states=True).hidden_states[-2]),
    ("embeddings", lambda tower, inputs: tower.base_model.embeddings(inputs)),
    ("parameters", lambda tower, inputs: torch.tensor(tower.num_parameters(only_trainable=True))),
    ("without tables", lambda tower, inputs: torch.tensor(tower.num_parameters(exclude_embeddings=True))),
    ("config", lambda tower, inputs: torch.tensor(tower.config.use_return_dict and not tower.config.output_attentions)),
    ("copy", lambda tower, inputs: type(tower)(type(tower.config).from_dict(tower.config.to_dict()))(inputs)[0] * 0),
    ("text", lambda tower, inputs: torch.tensor(json.loads(tower.config.to_json_string())["hidden_size"])),
]


@pytest.mark.parametrize("kind", ["text", "vision"])
@torch.no_grad()
def test_calls_of_scripts_for_transformers(kind: str, tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, kind)
    inputs = ids() if kind == "text" else torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, call in CALLS:
        actual, expected = call(ours, inputs), call(theirs, inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=name)
    assert ours.main_input_name == theirs.main_input_name
    assert ours.name_or_path == str(tmp_path)
    ours.set_attn_implementation("eager")
    ours.config.update({"output_hidden_states": True, "return_dict": False})
    assert len(ours(inputs)) == 3 and len(ours.base_model(inputs, output_hidden_states=False)) == 2
    for call in (
        lambda: ours(inputs, output_attentions=True),
        lambda: ours.set_attn_implementation("owner/kernel"),
        lambda: ours.config.update({"hidden_act": "magic"}),
        lambda: ours.save_pretrained(tmp_path, state_dict={}),
        lambda: ours.save_pretrained(tmp_path, push_to_hub=True),
    ):
        with pytest.raises((InputError, ConfigError)):
            call()
    ours.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    ours.save_pretrained(tmp_path / "saved", True, ours.state_dict())
    ours.config.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored["output_hidden_states"] is True and "output_attentions" not in stored


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_gradient_checkpointing_of_towers(kind: str, tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, kind)
    inputs = ids() if kind == "text" else torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients, runs = [], []
    ours.base_model.encoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.zero_grad()
        ours(inputs)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.base_model.encoder.parameters()])
    assert ours.is_gradient_checkpointing and len(runs) == 3
    torch.testing.assert_close(gradients[0], gradients[1])
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(inputs)[0].requires_grad
    ours.disable_input_require_grads()
    assert not ours(inputs)[0].requires_grad


def test_gradients_of_inputs_after_new_tokens(tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, "text")
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    old = ours.get_input_embeddings()
    for change in (
        lambda: ours.resize_token_embeddings(33),
        lambda: ours.set_input_embeddings(torch.nn.Embedding.from_pretrained(old.weight.data)),
    ):
        change()
        assert ours.get_input_embeddings() is not old
        assert ours(ids())[0].requires_grad and not old(ids()).requires_grad
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other(ids())[0].requires_grad
        other.disable_input_require_grads()
        assert not other(ids())[0].requires_grad
    assert ours(ids())[0].requires_grad
    ours.disable_input_require_grads()
    assert not ours(ids())[0].requires_grad
    ours.resize_token_embeddings(34)
    assert not ours(ids())[0].requires_grad


@torch.no_grad()
def test_images_of_other_sizes_with_interpolated_positions(tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, "vision")
    for height, width in ((16, 16), (24, 20), (8, 8)):
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
        actual, expected = (tower(pixels, interpolate_pos_encoding=True)[0] for tower in (ours, theirs))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for shape in ((3, 16, 16), (1, 4, 16, 16), (1, 3, 2, 16), (1, 3)):
        with pytest.raises(InputError, match="pixel_values"):
            ours(torch.zeros(shape), interpolate_pos_encoding=True)
        with pytest.raises(InputError, match="pixel_values"):
            ours(torch.zeros(shape))


@torch.no_grad()
def test_new_tokens(tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, "text")
    before = ours(ids())[0]
    assert ours.resize_token_embeddings() is ours.get_input_embeddings()
    table = ours.resize_token_embeddings(33)
    assert table.weight.shape == (33, 16) and ours.config.vocab_size == 33
    torch.testing.assert_close(table.weight[-1], table.weight[:30].mean(dim=0))
    torch.testing.assert_close(ours(ids())[0], before, rtol=0, atol=0)
    torch.testing.assert_close(ours(ids()[0])[0], before[:1])
    for wrong in (0, "3", True):
        with pytest.raises(InputError, match="new_num_tokens"):
            ours.resize_token_embeddings(wrong)
        with pytest.raises(InputError, match="pad_to_multiple_of"):
            ours.resize_token_embeddings(34, wrong)
    with pytest.raises(InputError, match="mean_resizing='no' is invalid"):
        ours.resize_token_embeddings(34, mean_resizing="no")
    with pytest.raises(InputError, match="resize_token_embeddings='factor' is invalid: expected new_num_tokens"):
        ours.resize_token_embeddings(34, factor=2)
    assert ours.get_input_embeddings() is table
    with pytest.raises(InputError, match="value"):
        ours.set_input_embeddings(torch.nn.Embedding(4, 5))


def test_numbers_of_new_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    ours, theirs = towers(tmp_path, "text", initializer_range=3.0)
    before = ours.get_input_embeddings().weight.detach().clone()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((None, 8), {}),
        ((33,), {"pad_to_multiple_of": 20, "mean_resizing": False}),
        ((40, 4), {}),
        ((31,), {"mean_resizing": False}),
    ]
    for args, options in calls:
        for tower in (ours, theirs):
            tower.resize_token_embeddings(*args, **options)
        assert ours.get_input_embeddings().weight.shape == theirs.get_input_embeddings().weight.shape
        assert ours.config.vocab_size == theirs.config.vocab_size == len(ours.get_input_embeddings().weight)
        torch.testing.assert_close(ours.get_input_embeddings().weight[:30], before, rtol=0, atol=0)
    ours.resize_token_embeddings(1031, mean_resizing=False)
    drawn = ours.get_input_embeddings().weight[31:].detach()
    assert abs(float(drawn.mean())) < 0.2 and 2.8 < float(drawn.std()) < 3.2


def test_names_of_one_setting_in_configs(tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, "text", torch.bfloat16)
    config = ours.config
    config.update({"torch_dtype": "float16"})
    assert config.dtype == config.torch_dtype == torch.float16
    config.update({"dtype": torch.float32})
    config.update({"hidden_act": "gelu"})
    assert config.dtype == torch.float32
    for entries in ({"use_return_dict": False}, {"dtype": "magic"}, {"torch_dtype": 16}):
        with pytest.raises(ConfigError, match=next(iter(entries))):
            config.update(entries)
        with pytest.raises(ConfigError, match=next(iter(entries))):
            CLIPTextConfig(**entries)
    config.update({"use_return_dict": True, "return_dict": False})
    assert "use_return_dict" not in config.to_dict() and not config.use_return_dict
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_return_dict": False}))
    with pytest.raises(CheckpointError, match="use_return_dict is False: expected true"):
        clip_files.tower_config(type(ours), tmp_path)


def test_state_dicts_that_are_saved_are_those_of_the_tower(tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, "text")
    name, tensor = next(iter(ours.state_dict().items()))
    for other in (tensor + 1, tensor.half(), tensor[:1], tensor.to("meta"), tensor.tolist()):
        with pytest.raises(InputError, match="state_dict"):
            ours.save_pretrained(tmp_path / "saved", state_dict={**ours.state_dict(), name: other})
    assert not (tmp_path / "saved").exists()
    with fake_accelerator() as device:
        elsewhere = {name: tensor.to(device) for name, tensor in ours.state_dict().items()}
        assert elsewhere[name].device != tensor.device
        ours.save_pretrained(tmp_path / "saved", state_dict=elsewhere)
    assert (tmp_path / "saved" / "model.safetensors").exists()


PICTURE = PIL.Image.radial_gradient("L").convert("RGB")


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": 20}},
        {"size": {"height": 20}},
        {"size": {"shortest_edge": 20, "longest_edge": 30}},
        {"size": {}},
        {"size": True},
        {"size": 2.5},
        {"crop_size": -3},
        {"crop_size": {"height": 3}},
        {"crop_size": (3, 4)},
        {"resample": 99},
        {"resample": "bicubic"},
        {"image_mean": [1, 2]},
        {"image_mean": float("nan")},
        {"image_std": 0.0},
        {"image_std": (1.0, 0.0, 1.0)},
        {"rescale_factor": 0},
        {"rescale_factor": "1/255"},
        {"do_resize": "no"},
    ],
    ids=str,
)
def test_settings_of_the_image_processor_are_checked(settings: dict[str, Any], tmp_path: Path) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=f"{name}=.* is invalid"):
        CLIPImageProcessor(**settings)
    ours = CLIPImageProcessor(size=16, crop_size=16)
    before = ours.to_dict()
    with pytest.raises(InputError, match=f"{name}=.* is invalid"):
        ours(PICTURE, **settings)
    assert ours.to_dict() == before
    setattr(ours, name, settings[name])
    with pytest.raises(InputError, match=f"{name}=.* is invalid"):
        ours(PICTURE)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {name} is"):
        clip_files.load_image_processor(tmp_path)


def test_forms_of_settings_of_the_image_processor() -> None:
    ours = CLIPImageProcessor(
        size={"shortest_edge": np.int64(16), "height": None},
        crop_size={"shortest_edge": 12},
        image_mean=(0.1, 0.2, 0.3),
        image_std=np.array([0.5, 0.25, 1.0]),
        resample=PIL.Image.Resampling.BILINEAR,
    )
    assert (ours.size, ours.crop_size) == ({"shortest_edge": 16}, {"height": 12, "width": 12})
    assert (ours.image_mean, ours.image_std, ours.resample) == ([0.1, 0.2, 0.3], [0.5, 0.25, 1.0], 2)
    assert json.loads(ours.to_json_string()) == ours.to_dict()
    expected = ours(PICTURE, return_tensors="np", size=20, crop_size=18).pixel_values
    ours.size, ours.crop_size = 20, 18  # type: ignore[assignment]
    np.testing.assert_array_equal(ours(PICTURE, return_tensors="np").pixel_values, expected)


@pytest.mark.parametrize("do_resize", [True, False])
def test_the_range_of_values_is_checked_without_resizing_too(do_resize: bool) -> None:
    ours = CLIPImageProcessor(size=16, crop_size=16)
    for value in (256, -1):
        for dtype in (np.int64, np.float32):
            with pytest.raises(InputError, match=f"not {value} to {value}"):
                ours(np.full((3, 16, 16), value, dtype), do_resize=do_resize)
    ours(np.full((3, 16, 16), 255), do_resize=do_resize)


def test_image_processor_takes_what_transformers_takes() -> None:
    theirs = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(size=16, crop_size=16)
    ours = CLIPImageProcessor(size=16, crop_size=16)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    fractions = generator.random((3, 24, 40), dtype=np.float32)
    inputs: list[tuple[Any, dict[str, Any]]] = [
        (np.stack([pixels, pixels[::-1]]), {}),
        (torch.from_numpy(pixels).permute(2, 0, 1), {}),
        ([torch.from_numpy(pixels).permute(2, 0, 1)[None]], {}),
        (pixels.astype(np.float32), {}),
        (torch.from_numpy(fractions), {"do_rescale": False}),
        (fractions[:, :16, :16], {"do_rescale": False, "do_resize": False, "do_center_crop": False}),
        (PIL.Image.fromarray(pixels), {"size": {"shortest_edge": 20}, "crop_size": 18, "do_convert_rgb": True}),
        (PIL.Image.fromarray(pixels), {"do_normalize": False, "resample": 2}),
        (PIL.Image.fromarray(pixels), {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 2.0]}),
    ]
    for images, settings in inputs:
        expected = np.asarray(theirs(images, return_tensors="np", **settings).pixel_values)
        actual = ours(images=images, return_tensors="np", **settings).pixel_values
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert ours.preprocess(pixels, return_tensors=transformers.TensorType.PYTORCH).data["pixel_values"].shape[1] == 3
    assert CLIPImageProcessor.from_dict(json.loads(ours.to_json_string())).to_dict() == ours.to_dict()
    with pytest.raises(InputError, match="one size to stack"):
        ours([pixels, pixels[:20]], return_tensors="pt", do_resize=False, do_center_crop=False)
    with pytest.raises(InputError, match="do_magic"):
        ours(pixels, do_magic=True)


@pytest.mark.parametrize(
    "names", [("do_convert_rgb",), ("do_resize", "do_normalize"), ("do_center_crop", "do_rescale")]
)
def test_steps_that_are_null_in_the_file(names: tuple[str, ...], tmp_path: Path) -> None:
    null = dict.fromkeys(names)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(null))
    theirs = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(tmp_path)
    ours = clip_files.load_image_processor(tmp_path)
    picture = PIL.Image.radial_gradient("L").convert("RGB").resize((300, 230))
    expected = np.asarray(theirs([picture], return_tensors="np").pixel_values)
    np.testing.assert_array_equal(ours([picture], return_tensors="np").pixel_values, expected)


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize(
    "entries", [{"dtype": "auto"}, {"torch_dtype": "auto", "dtype": None}, {"text_config": None, "vision_config": None}]
)
def test_entries_that_transformers_accepts(kind: str, entries: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, kind, torch.float16)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    for dtype, expected in (("auto", torch.float16), (None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        tower = clip_files.load_tower(type(ours), tmp_path, [tmp_path / "model.safetensors"], dtype)
        assert tower.dtype == tower.config.dtype == expected


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_a_config_with_fewer_layers_than_the_weights(kind: str, tmp_path: Path) -> None:
    ours, _ = towers(tmp_path, kind)
    path, weights = tmp_path / "config.json", [tmp_path / "model.safetensors"]
    assert clip_files.is_readable_tower(type(ours), ours.config, weights)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"unexpected: .*_model\.encoder\.layers\.1\."):
        clip_files.load_tower(type(ours), tmp_path, weights, None)
    names = list(ours.state_dict())
    ours.save_pretrained(tmp_path)  # with all layers
    tensors = load_file(weights[0])
    del tensors[names[0]]
    save_file(tensors, weights[0], metadata={"format": "pt"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=rf"1 missing: {names[0]}; \d+ unexpected: .*\.layers\.1\."):
        clip_files.load_tower(type(ours), tmp_path, weights, None)
    if kind == "vision":  # the tower that is read later
        assert not clip_files.is_readable_tower(type(ours), clip_files.tower_config(type(ours), tmp_path), weights)
