"""Invalid pictures, masks, hints and strengths: one error that names the argument, before any network runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.calls import small_call
from tests.pipelines.invalid_arguments import EMBEDDINGS, SHARED, SIZES
from tests.pipelines.pictures import box_mask, hint, photo
from tests.pipelines.tiny import MODES, pair

import kandinsky22
from kandinsky22 import InputError

Ours = Callable[[str], Any]
NAN = torch.full((1, 3, 32, 32), float("nan"))


pytestmark = pytest.mark.usefixtures("no_network_runs")


NO_PICTURES: list[Any] = [
    None,
    3,
    "",
    "no such file.png",
    "http://",
    "\0",
    Path("no such file.png"),
    b"bytes",
    [],
    [None],
    [photo(1), "no such file.png"],
    [photo(1)] * 3,
    {"image": photo(1)},
    PIL.Image.new("RGB", (0, 4)),
    PIL.Image.fromarray(np.full((4, 4), -1, np.int32)),
    PIL.Image.fromarray(np.full((4, 4), 70_000, np.int32)),
    PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros(4, np.uint8),
    np.zeros((4, 4, 2), np.uint8),
    np.zeros((3, 4, 4, 3), np.uint8),
    np.zeros((1, 1, 4, 4, 3), np.uint8),
    np.full((4, 4, 3), 1.5),
    np.full((4, 4, 3), -0.5),
    np.full((4, 4, 3), np.nan),
    np.full((4, 4, 3), np.inf),
    np.zeros((4, 4, 3), np.complex64),
    np.full((4, 4, 3), "a"),
    np.full((4, 4, 3), None, object),
    torch.zeros(4),
    torch.zeros(0, 3, 4, 4),
    torch.zeros(3, 0, 4),
    torch.zeros(5, 3, 4, 4),
    torch.zeros(1, 1, 3, 4, 4),
    torch.zeros(3, 4, 4, dtype=torch.complex64),
    NAN,
    torch.full((3, 4, 4), float("inf")),
    torch.full((3, 4, 4), 255.0),
    torch.full((3, 4, 4), -255.0),
]
ONLY_IMAGE: list[Any] = [
    np.zeros((4, 4, 3), np.int64),
    np.zeros((4, 4, 3), bool),
    torch.zeros(3, 4, 4, dtype=torch.int64),
    torch.zeros(2, 4, 4),
    torch.zeros(4, 4),
    torch.zeros(1, 4, 8, 8),  # latents of another size
    torch.full((1, 4, 16, 16), float("nan")),
    torch.zeros(1, 4, 16, 16, dtype=torch.uint8),
    [torch.zeros(1, 4, 16, 16), photo(1)],
]
ONLY_HINT: list[Any] = [
    torch.zeros(2, 4, 4),
    torch.zeros(1, 4, 128, 128),
    np.zeros((4, 4, 3), np.int64),
    torch.zeros(4, 4),
]
ONLY_MASK: list[Any] = [
    np.full((4, 4), 256, np.int64),
    np.full((4, 4), -1, np.int64),
    torch.full((4, 4), 1.5),
    torch.full((4, 4), -0.1),
    torch.zeros(1, 2, 4, 4),
]
STRENGTHS: list[Any] = [-0.1, 1.1, 30, float("nan"), "0.5", None, True]


@pytest.fixture(scope="module")
def loaded(mode_folder: Path) -> dict[str, Any]:
    """One pipeline per mode for all invalid calls, which stop before they change it."""
    return {mode: kandinsky22.DiffusionPipeline.from_pretrained(mode_folder / mode) for mode in MODES}


def arguments_of(mode: str) -> set[str]:
    return set(inspect.signature(getattr(kandinsky22, f"KandinskyV22{mode}Pipeline").__call__).parameters)


def cases() -> list[Any]:
    params: list[Any] = []
    for mode in MODES:
        known = arguments_of(mode)
        for name, wrong in (
            ("image", NO_PICTURES + ONLY_IMAGE),
            ("hint", NO_PICTURES + ONLY_HINT),
            ("mask_image", NO_PICTURES + ONLY_MASK),
            ("strength", STRENGTHS),
            ("keep_pixels", [None, 1, "yes"]),
        ):
            if name in known:
                params += [
                    pytest.param(mode, name, {name: value}, id=f"{mode}-{name}-{index}")
                    for index, value in enumerate(wrong)
                ]
        shared = [(name, arguments) for name, arguments in SHARED + SIZES + EMBEDDINGS if set(arguments) <= known]
        params += [
            pytest.param(mode, name, arguments, id=f"{mode}-{name}-shared-{index}")
            for index, (name, arguments) in enumerate(shared)
        ]
    return params


def valid_call(mode: str) -> dict[str, Any]:
    return small_call(mode) | pair(2, seed=1)


@pytest.mark.parametrize(("mode", "name", "arguments"), cases())
def test_wrong_argument(mode: str, name: str, arguments: dict[str, Any], loaded: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        loaded[mode](**valid_call(mode) | arguments)


def test_items_of_lists_are_named(make_pipeline: Ours) -> None:
    with pytest.raises(InputError, match=r"mask_image\[1\]"):
        make_pipeline("Inpaint")(**valid_call("Inpaint") | {"mask_image": [box_mask(), box_mask() * 2]})
    with pytest.raises(InputError, match=r"hint\[0\]"):
        make_pipeline("Controlnet")(**valid_call("Controlnet") | {"hint": [3, hint(1, 1)]})


def test_keep_pixels_needs_pixels(make_pipeline: Ours) -> None:
    pipe = make_pipeline("Inpaint")
    with pytest.raises(InputError, match="keep_pixels"):
        pipe(**valid_call("Inpaint") | {"image": torch.zeros(1, 4, 16, 16)}, keep_pixels=True)
    with pytest.raises(InputError, match="output_type"):
        pipe(**valid_call("Inpaint") | {"output_type": "latent"}, keep_pixels=True)


@pytest.mark.parametrize("mode", MODES)
def test_unet_of_another_mode(mode: str, make_pipeline: Ours) -> None:
    other = "Img2Img" if mode != "Img2Img" else "Inpaint"
    pipe = make_pipeline(mode)
    pipe.unet = make_pipeline(other).unet
    with pytest.raises(InputError, match="unet"):
        pipe(**valid_call(mode))


@pytest.mark.parametrize("part", ["unet", "movq", "scheduler"])
@pytest.mark.parametrize("mode", MODES)
def test_component_left_out(mode: str, part: str, make_pipeline: Ours) -> None:
    pipe = make_pipeline(mode)
    setattr(pipe, part, None)
    with pytest.raises(InputError, match=f"without {part}"):
        pipe(**valid_call(mode))


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint", "ControlnetImg2Img"])
def test_scheduler_that_cannot_add_noise(mode: str, make_pipeline: Ours) -> None:
    class Bare:
        config = None
        timesteps = torch.arange(3)

        def set_timesteps(self, *_: Any, **__: Any) -> None: ...
        def step(self, *_: Any, **__: Any) -> None: ...

    pipe = make_pipeline(mode)
    pipe.scheduler = Bare()
    with pytest.raises(InputError, match="add_noise"):
        pipe(**valid_call(mode))
