"""Hints from photographs: Canny's edges, also in comparison with OpenCV, and depth by a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.pictures import noise_picture, photo

from kandinsky22 import CheckpointError, InputError, make_depth_hint, make_edge_hint
from kandinsky22.inputs import hints

CASES = {
    "noise": noise_picture(3, 96, 64),
    "photo": photo(4, 120, 90),
    "column": noise_picture(5, 1, 17),
    "pixel": noise_picture(6, 1, 1),
}


def square(side: int = 48, inside: tuple[int, int, int] = (255, 255, 255)) -> PIL.Image.Image:
    image = PIL.Image.new("RGB", (side, side))
    image.paste(inside, (side // 4, side // 4, side // 4 + side // 2, side // 4 + side // 2))
    return image


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("low", "high"), [(100, 200), (0, 0), (30.5, 90.25), (400, 1000)])
def test_edges_equal_those_of_opencv(name: str, low: float, high: float) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.asarray(CASES[name])
    expected = cv2.Canny(pixels, low, high, L2gradient=True)
    ours = np.asarray(make_edge_hint(CASES[name], low=low, high=high, sigma=0))
    np.testing.assert_array_equal(ours, expected)


def test_blurred_gradients_equal_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.asarray(CASES["photo"], np.float32)
    for sigma, side in ((0.7, 7), (2.0, 13)):
        expected = cv2.GaussianBlur(pixels, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
        np.testing.assert_allclose(hints._blurred(pixels, sigma), expected, atol=1e-3)


def test_a_square_has_four_thin_sides() -> None:
    edges = np.asarray(make_edge_hint(square()))
    assert edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    lines = edges[24] > 0
    assert lines.sum() == 2 and abs(int(np.flatnonzero(lines)[0]) - 12) <= 1
    assert not edges[20:28, 20:28].any() and not edges[:8].any()


def test_colours_of_equal_brightness_have_edges() -> None:
    image = square(inside=(200, 0, 0))
    image.paste((0, 102, 0), (0, 0, 12, 48))
    grey = np.asarray(image.convert("L")).astype(int)
    assert abs(grey[24, 14] - grey[24, 4]) <= 1
    assert np.asarray(make_edge_hint(image))[24, 8:16].any()


def test_faint_lines_count_only_if_they_continue_strong_ones() -> None:
    brightness = np.zeros((40, 120), np.uint8)
    brightness[:20] = np.linspace(255, 20, 120)
    image = PIL.Image.fromarray(brightness)
    both = np.asarray(make_edge_hint(image, low=50, high=600, sigma=0))
    strong = np.asarray(make_edge_hint(image, low=600, high=600, sigma=0))
    assert both[:, 110].any() and strong[:, 10].any() and not strong[:, 110].any()


def test_larger_images_have_long_edges() -> None:
    """The search along an edge takes as many rounds as the edge has pixels."""
    edges = np.asarray(make_edge_hint(square(1024)))
    assert 2000 < (edges > 0).sum() < 2100


def test_an_even_image_has_no_edges(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    hint = make_edge_hint(tmp_path / "red.png")
    assert (hint.size, hint.mode, hint.getextrema()) == ((20, 10), "L", (0, 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 300}, "low=300"),
        ({"low": -1}, "low=-1"),
        ({"high": 1444}, "high=1444"),
        ({"high": float("nan")}, "high=nan"),
        ({"sigma": -0.1}, "sigma=-0.1"),
        ({"sigma": "wide"}, "sigma='wide'"),
        ({"image": 3}, "image=3"),
    ],
)
def test_invalid_arguments_of_edges(options: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"image": square(), **options}
    with pytest.raises(InputError, match=words):
        make_edge_hint(arguments.pop("image"), **arguments)


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random depth estimation model."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    folder = tmp_path_factory.mktemp("depth")
    model = DPTForDepthEstimation(config)
    with torch.no_grad():
        model.head.head[-2].weight.mul_(1e4)
        model.head.head[-2].bias.fill_(10.0)  # the last layer cuts off negative values
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_fills_the_range_of_grey(depth_model: Path) -> None:
    image = photo(7, 50, 40)
    hint = make_depth_hint(image, depth_model)
    assert (hint.size, hint.mode, hint.getextrema()) == ((50, 40), "L", (0, 255))
    inverted = np.asarray(make_depth_hint(image, str(depth_model), invert=True)).astype(int)
    np.testing.assert_allclose(255 - inverted, np.asarray(hint), atol=1)


def test_near_is_bright_for_models_of_both_kinds(monkeypatch: pytest.MonkeyPatch, depth_model: Path) -> None:
    processor, network = hints._load_depth_model(depth_model)
    monkeypatch.setattr(hints, "_load_depth_model", lambda model: (processor, network))
    relative = np.asarray(make_depth_hint(photo(7), "model")).astype(float)
    assert relative.std() > 10
    network.config.depth_estimation_type = "metric"
    metric = np.asarray(make_depth_hint(photo(7), "model")).astype(float)
    assert np.corrcoef(relative.ravel(), metric.ravel())[0, 1] < 0


def test_models_that_estimate_no_depth(depth_model: Path, tmp_path: Path) -> None:
    for model in (tmp_path, tmp_path / "missing", "two words"):
        with pytest.raises(CheckpointError, match="depth estimation"):
            make_depth_hint(photo(7), model)
    for model in ("", None, 3):
        with pytest.raises(InputError, match="model="):
            make_depth_hint(photo(7), model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device='nowhere'"):
        make_depth_hint(photo(7), depth_model, device="nowhere")
    with pytest.raises(InputError, match="invert=1"):
        make_depth_hint(photo(7), depth_model, invert=1)  # type: ignore[arg-type]
