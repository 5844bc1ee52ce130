"""Equal results of both libraries in the four decoders that start from pictures or hints.

Only calls that the reference handles correctly are compared; its errors are tested in `test_modes_behaviour`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.calls import small_call
from tests.pipelines.comparison import SCHEDULERS, assert_same_pictures, with_schedulers
from tests.pipelines.pictures import box_mask, box_mask_image, hint, photo, photo_tensor
from tests.pipelines.tiny import MODES, difference, pair, seeded

HEIGHT, WIDTH = 24, 40
Call = Callable[[], dict[str, Any]]


def with_strength() -> dict[str, Call]:
    return {
        "as it is": lambda: {"generator": seeded(0)},
        "global seed": dict,
        "strength 1": lambda: {"strength": 1.0, "generator": seeded(1)},
        "one step": lambda: {"strength": 0.2, "generator": seeded(2)},
        "strength 0.7": lambda: {"strength": 0.7, "generator": seeded(3)},
        "picture resized": lambda: {"image": photo(4, 57, 43), "generator": seeded(4)},
        "large picture": lambda: {"image": photo(5, 300, 200), "generator": seeded(5)},
        "tensor": lambda: {"image": photo_tensor(6), "generator": seeded(6)},
        "signed tensors": lambda: {"image": torch.stack([photo_tensor(7, signed=True)]), "generator": seeded(7)},
        "tensor resized": lambda: {"image": torch.rand(1, 3, 50, 44, generator=seeded(8)), "generator": seeded(8)},
        "generators": lambda: {"generator": [seeded(9)]},
        "guidance high": lambda: {"guidance_scale": 8, "generator": seeded(10)},
        "guidance off": lambda: {"guidance_scale": 1.0, "generator": seeded(11)},
        "pil": lambda: {"output_type": "pil", "generator": seeded(12)},
        "pt": lambda: {"output_type": "pt", "generator": seeded(13)},
    }


CALLS: dict[str, dict[str, Call]] = {
    "Img2Img": {
        **with_strength(),
        "two": lambda: {**pair(2, seed=1), "image": [photo(1), photo(2)], "generator": seeded(14)},
        "kinds": lambda: {**pair(2, seed=1), "image": [photo(1, 50, 50), photo_tensor(2)], "generator": seeded(15)},
        "two each": lambda: {
            **pair(2, seed=1),
            "image": [photo(1), photo(2)],
            "num_images_per_prompt": 2,
            "generator": seeded(16),
        },
        "latent": lambda: {"output_type": "latent", "generator": seeded(17)},
        "generators of two": lambda: {
            **pair(2, seed=1),
            "image": [photo(1), photo(2)],
            "generator": [seeded(1), seeded(2)],
        },
    },
    "ControlnetImg2Img": {
        **with_strength(),
        "two": lambda: {**pair(2, seed=1), "image": [photo(1), photo(2)], "hint": hint(2, 1), "generator": seeded(14)},
        "two each": lambda: {
            **pair(2, seed=1),
            "image": [photo(1), photo(2)],
            "hint": [hint(1, 1), hint(1, 2)],
            "num_images_per_prompt": 2,
            "generator": seeded(16),
        },
    },
    "Controlnet": {
        "as it is": lambda: {"generator": seeded(0)},
        "global seed": dict,
        "two": lambda: {**pair(2, seed=1), "hint": hint(2, 1), "generator": seeded(1)},
        "list of hints": lambda: {**pair(2, seed=1), "hint": [hint(1, 1), hint(1, 2)], "generator": seeded(2)},
        "two each": lambda: {**pair(2, seed=1), "hint": hint(2, 1), "num_images_per_prompt": 2, "generator": seeded(3)},
        "wide": lambda: {"height": HEIGHT, "width": WIDTH, "hint": hint(1, 4, HEIGHT, WIDTH), "generator": seeded(4)},
        "guidance off": lambda: {"guidance_scale": 0.5, "generator": seeded(5)},
        "guidance high": lambda: {"guidance_scale": 8, "generator": seeded(6)},
        "latents": lambda: {"latents": torch.randn(1, 4, 16, 16, generator=seeded(7)), "generator": seeded(8)},
        "generators": lambda: {**pair(2, seed=1), "hint": hint(2, 1), "generator": [seeded(9), seeded(10)]},
        "pil": lambda: {"output_type": "pil", "generator": seeded(11)},
        "pt": lambda: {"output_type": "pt", "generator": seeded(12)},
        "signed hint": lambda: {"hint": hint(1, 3) * 2 - 1, "generator": seeded(13)},
    },
    "Inpaint": {
        "as it is": lambda: {"generator": seeded(0)},
        "global seed": dict,
        "mask is an array": lambda: {"mask_image": box_mask(), "generator": seeded(1)},
        "array": lambda: {"image": np.array(photo(2)), "mask_image": box_mask(), "generator": seeded(2)},
        "tensors": lambda: {
            "image": photo_tensor(3, signed=True),
            "mask_image": torch.from_numpy(box_mask()),
            "generator": seeded(3),
        },
        "bright tensor": lambda: {  # its values happen to lie in [0, 1], but are read as [-1, 1]
            "image": photo_tensor(3)[None],
            "mask_image": torch.from_numpy(box_mask())[None, None],
            "generator": seeded(3),
        },
        "resized": lambda: {"image": photo(4, 90, 70), "mask_image": box_mask_image(57, 43), "generator": seeded(4)},
        "colours in the mask": lambda: {"mask_image": photo(5), "generator": seeded(5)},
        "mask of bits": lambda: {"mask_image": box_mask_image(50, 40).convert("1"), "generator": seeded(6)},
        "soft mask": lambda: {
            "mask_image": np.random.default_rng(7).random((32, 32)).astype(np.float32),
            "generator": seeded(7),
        },
        "all repainted": lambda: {"mask_image": np.ones((32, 32), dtype=np.float32), "generator": seeded(8)},
        "nothing repainted": lambda: {"mask_image": np.zeros((32, 32), dtype=np.float32), "generator": seeded(9)},
        "wide": lambda: {"height": HEIGHT, "width": WIDTH, "generator": seeded(10)},
        "two each": lambda: {"num_images_per_prompt": 2, "generator": seeded(11)},
        "two of one picture": lambda: {
            **pair(2, seed=1),
            "image": torch.stack([photo_tensor(3, signed=True)] * 2),
            "mask_image": torch.from_numpy(np.stack([box_mask()] * 2)),
            "generator": [seeded(12), seeded(13)],
        },
        "guidance off": lambda: {"guidance_scale": 1.0, "generator": seeded(14)},
        "guidance high": lambda: {"guidance_scale": 8, "generator": seeded(15)},
        "latents": lambda: {"latents": torch.randn(1, 4, 16, 16, generator=seeded(16)), "generator": seeded(16)},
        "pil": lambda: {"output_type": "pil", "generator": seeded(17)},
        "pt": lambda: {"output_type": "pt", "generator": seeded(18)},
        "latent": lambda: {"output_type": "latent", "generator": seeded(19)},
        "more steps": lambda: {"num_inference_steps": 7, "generator": seeded(20)},
    },
}
EVERY = [(mode, name) for mode in MODES for name in CALLS[mode]]


def both(ours: Any, theirs: Any, mode: str, call: Call, scheduler: str = "as saved") -> list[Any]:
    results = []
    for pipe in with_schedulers(ours, theirs, scheduler):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by the reference for tensors in [-1, 1]
            results.append(pipe(**{**small_call(mode), **call()}).images)
    return results


@pytest.mark.parametrize(("mode", "name"), EVERY)
def test_pictures(mode: str, name: str, mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any]) -> None:
    assert_same_pictures(*both(make_pipeline(mode), mode_oracles[mode], mode, CALLS[mode][name]))


CALLS_WITH_SCHEDULERS = {
    "Img2Img": ["as it is", "strength 0.7", "two each", "guidance off"],
    "ControlnetImg2Img": ["strength 0.7", "two each"],
    "Controlnet": ["as it is", "two each", "latents"],
    "Inpaint": ["as it is", "two each", "guidance off", "two of one picture"],
}


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "as saved"])
@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode, names in CALLS_WITH_SCHEDULERS.items() for name in names]
)
def test_schedulers(
    mode: str, name: str, scheduler: str, mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any]
) -> None:
    assert_same_pictures(*both(make_pipeline(mode), mode_oracles[mode], mode, CALLS[mode][name], scheduler))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint"])
def test_double_precision(mode: str, scheduler: str, mode_folder: Path, make_pipeline: Callable[[str], Any]) -> None:
    """A random network magnifies rounding errors from step to step; in float64 many steps are equal too."""
    kind = getattr(diffusers, f"KandinskyV22{mode}Pipeline")
    theirs = kind.from_pretrained(mode_folder / mode).to(torch.float64)
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 10, "output_type": "pt"}
    call |= {"strength": 1.0} if mode == "Img2Img" else {}
    results = both(
        make_pipeline(mode).to(torch.float64), theirs, mode, lambda: {**call, "generator": seeded(1)}, scheduler
    )
    assert difference(*results) < 1e-6


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img"])
def test_wide_pictures_are_tall_in_the_reference(
    mode: str, mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any]
) -> None:
    """The reference swaps height and width of the start picture; with swapped arguments it gives our picture."""
    results = []
    for pipe, height, width in ((make_pipeline(mode), HEIGHT, WIDTH), (mode_oracles[mode], WIDTH, HEIGHT)):
        arguments = {
            **small_call(mode),
            "image": photo(3, 50, 31),
            "height": height,
            "width": width,
            "generator": seeded(1),
        }
        if "hint" in arguments:
            arguments["hint"] = hint(1, 2, HEIGHT, WIDTH)
        results.append(pipe(**arguments).images)
    assert results[0].shape == (1, HEIGHT, WIDTH, 3)
    assert_same_pictures(*results)


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint"])
def test_callbacks_see_the_same(mode: str, mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any]) -> None:
    logs: list[list[Any]] = []
    ours = make_pipeline(mode)
    names = ours._callback_tensor_inputs
    assert names == mode_oracles[mode]._callback_tensor_inputs
    for pipe in (ours, mode_oracles[mode]):
        log: list[Any] = []

        def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, Any], log: list[Any] = log) -> Any:
            log.append((step, int(timestep), {name: tensor.clone() for name, tensor in tensors.items()}))
            return {"latents": tensors["latents"] * 0.9, "image_embeds": tensors["image_embeds"] * 1.1}

        def callback(step: int, timestep: Any, latents: Any, log: list[Any] = log) -> None:
            log.append((step, int(timestep), {"latents": latents.clone()}))

        pipe(
            **small_call(mode),
            generator=seeded(1),
            callback_on_step_end=on_step_end,
            callback_on_step_end_tensor_inputs=names,
            callback=callback,
            callback_steps=2,
        )
        logs.append(log)
    assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]
    for (*_, mine), (*_, other) in zip(*logs, strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert difference(tensor, other[name]) < 1e-4, name


def test_a_mask_changed_by_a_callback(mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any]) -> None:
    def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        mask = tensors["mask_image"]
        return {"mask_image": torch.flip(mask, dims=[2]), "masked_image": tensors["masked_image"] * 0.5}

    call = {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": ["mask_image", "masked_image"],
        "output_type": "latent",
    }
    results = both(
        make_pipeline("Inpaint"), mode_oracles["Inpaint"], "Inpaint", lambda: {**call, "generator": seeded(3)}
    )
    assert difference(*results) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_files_go_both_ways(
    mode: str, mode_oracles: dict[str, Any], make_pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    ours = make_pipeline(mode)
    ours.save_pretrained(tmp_path)
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(reloaded) is type(mode_oracles[mode])
    reloaded.set_progress_bar_config(disable=True)
    results = both(reloaded, mode_oracles[mode], mode, lambda: {"generator": seeded(0)})
    assert np.abs(results[0] - results[1]).max() < 1e-6
