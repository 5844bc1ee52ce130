"""Generated calls of all ten classes with one invalid argument among valid ones that vary.

Each call raises a KandinskyError that names the argument before any network runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import Phase
from tests.pipelines.calls import TEN, is_combined, is_prior
from tests.pipelines.pictures import box_mask, hint, photo
from tests.pipelines.tiny import DIM, PIXELS, seeded

import kandinsky22
from kandinsky22 import KandinskyError

NAN = float("nan")
EMBEDS: list[Any] = [
    None,
    "a cat",
    3,
    [],
    torch.zeros(0, DIM),
    torch.zeros(1, DIM + 1),
    torch.zeros(1, 2, DIM),
    torch.zeros(1, DIM, dtype=torch.int64),
    torch.full((1, DIM), NAN),
    [torch.zeros(1, DIM), None],
]
PICTURES: list[Any] = [
    None,
    3,
    [],
    {"a": 1},
    "no/such/picture.png",
    [photo(1), None],
    torch.zeros(1, 2, 8, 8),
    torch.full((1, 3, 32, 32), NAN),
    torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
    np.zeros((8, 8, 3), dtype=np.int64),
    np.full((8, 8, 3), 2.0),
    np.zeros((8, 8, 2), dtype=np.uint8),
    np.zeros((0, 8, 3), dtype=np.uint8),
    [photo(1)] * 5,
]
INTEGERS: list[Any] = [0, -1, 2.5, "3", True, [1], None, NAN]
NUMBERS: list[Any] = [NAN, float("inf"), "4", None, [4.0], True, 1j]
SIDES: list[Any] = [0, -64, 3.5, "512", True, [32]]
CALLBACKS: list[Any] = [3, "print", [print]]
NAMES: list[Any] = [["noise"], "latents", 3, [3], ["latents", None]]
STEPS: list[Any] = [*INTEGERS, 10**6]
RATIOS: list[Any] = [*NUMBERS, -0.1, 1.01]
INTERVALS: list[Any] = [0.5, [0.5], [0.7, 0.2], (0.0, 1.5), (NAN, 1.0), ["0", "1"], "01"]
TIMES: list[Any] = [[], 500, "500", [500, "0"], [0, 500], [500, 500], [-1], [1000], [NAN]]
SIGMAS: list[Any] = [[], 3.0, "3", [3.0, "1"], [1.0, 3.0], [3.0, 3.0], [-1.0], [NAN]]
WRONG: dict[str, list[Any]] = {
    "prompt": [None, [], 3, ["a cat", None], b"a cat", {}],
    "negative_prompt": [[], 3, ["blue", 3], b"blue", {"blue": 1}],
    "image_embeds": EMBEDS,
    "negative_image_embeds": [*EMBEDS, torch.zeros(5, DIM)],
    "image": PICTURES,
    "mask_image": [*PICTURES[:6], np.full((8, 8), 300.0), np.full((8, 8), NAN), np.zeros(8), [box_mask()] * 5],
    "hint": [*PICTURES[:9], [hint(1, 1)] * 5, torch.full((1, 3, 32, 32), 2.0)],
    "strength": RATIOS,
    "num_images_per_prompt": INTEGERS,
    "num_inference_steps": STEPS,
    "prior_num_inference_steps": STEPS,
    "guidance_scale": NUMBERS,
    "prior_guidance_scale": NUMBERS,
    **{f"{stage}guidance_rescale": RATIOS for stage in ("", "prior_")},
    **{f"{stage}guidance_interval": INTERVALS for stage in ("", "prior_")},
    **{f"{stage}guidance_threshold": [*RATIOS[:3], *RATIOS[4:], 0] for stage in ("", "prior_")},
    **{f"{stage}timesteps": TIMES for stage in ("", "prior_")},
    **{f"{stage}sigmas": SIGMAS for stage in ("", "prior_")},
    "height": SIDES,
    "width": SIDES,
    "generator": [7, "seed", [], [1], [seeded(0)] * 11, seeded],
    "latents": ["noise", [0.0], torch.zeros(7, 7, 7), torch.zeros(3, 3), np.zeros((1, 4, 16, 16))],
    "output_type": ["jpeg", None, 3, "PIL", ["pt"]],
    "callback": CALLBACKS,
    "callback_on_step_end": CALLBACKS,
    "prior_callback_on_step_end": CALLBACKS,
    "callback_on_step_end_tensor_inputs": NAMES,
    "prior_callback_on_step_end_tensor_inputs": NAMES,
    "callback_steps": [0, -2, 1.5, "1", True],
    "keep_pixels": ["yes", None, 2],
    "padding_mask_crop": [-1, 1.5, "4", True],
    "prompt_weights": ["yes", None, 2],
    "return_dict": [None, "no", 1],
}
# Invalid pictures for priors: their tensors are preprocessed, with another range and shape.
WRONG_FOR_PRIORS = [*PICTURES[:6], *PICTURES[9:13], torch.zeros(3, 8, 8), torch.full((1, 3, PIXELS, PIXELS), NAN)]


pytestmark = pytest.mark.usefixtures("no_network_runs")


def arguments_of(name: str) -> list[str]:
    """Return all arguments of the class's `__call__`."""
    return [each for each in inspect.signature(getattr(kandinsky22, name).__call__).parameters if each != "self"]


def valid_call(name: str, draw: Any) -> dict[str, Any]:
    """Return a valid call."""
    accepted = arguments_of(name)
    rows = draw(st.integers(1, 2))
    out = ["pt", "np"] if is_prior(name) else ["pil", "np", "pt"]
    call: dict[str, Any] = {
        "prompt": draw(st.sampled_from(["a cat", ["a cat"], "red"])) if rows == 1 else ["a cat", "red"],
        "negative_prompt": draw(st.sampled_from([None, "blue", ["blue"] * rows])),
        "image_embeds": torch.zeros(rows, DIM),
        "negative_image_embeds": torch.zeros(draw(st.sampled_from([1, rows])), DIM),
        "image": photo(1),
        "mask_image": box_mask(),
        "hint": hint(1, 1),
        "height": draw(st.sampled_from([32, 20])),
        "width": 32,
        "num_images_per_prompt": draw(st.integers(1, 2)),
        "num_inference_steps": draw(st.integers(1, 5)),
        "prior_num_inference_steps": 2,
        "guidance_scale": draw(st.sampled_from([4.0, 2, 1.0, 0])),
        "generator": draw(st.sampled_from([None, seeded(0)])),
        "output_type": draw(st.sampled_from(out)),
        "callback_steps": draw(st.sampled_from([None, 1, 3])),
        "keep_pixels": draw(st.booleans()),
        "return_dict": draw(st.booleans()),
    }
    return {key: value for key, value in call.items() if key in accepted}


def test_no_argument_is_forgotten() -> None:
    assert {each for name in TEN for each in arguments_of(name)} == set(WRONG)


def cases_of(name: str) -> list[tuple[str, Any]]:
    """Return every argument with each of its invalid values."""
    wrong = {**WRONG, "image": WRONG_FOR_PRIORS} if is_prior(name) else WRONG
    return [(argument, value) for argument in arguments_of(name) for value in wrong[argument]]


# Shrinking is left out, because a failure names its case.
SETTINGS: dict[str, Any] = {"derandomize": True, "deadline": None, "database": None, "phases": [Phase.generate]}


@pytest.mark.parametrize("name", TEN)
def test_one_invalid_argument_is_refused(name: str, ten_pipelines: dict[str, Any]) -> None:
    @hypothesis.settings(max_examples=1, **SETTINGS)
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        problems = []
        for argument, value in cases_of(name):
            call = valid_call(name, data.draw) | {argument: value}
            if argument == "negative_image_embeds":
                call["guidance_scale"] = 4.0  # without guidance they may be missing
            message = "no error"
            try:
                ten_pipelines[name](**call)
            except (KandinskyError, pytest.fail.Exception) as error:
                message = str(error)
            early = is_combined(name) and argument.startswith("prior_")
            if argument.removeprefix("prior_") not in message or (early and "prior" not in message):
                problems.append(f"{argument}={value!r}: {message}")
        assert not problems

    assert len(cases_of(name)) >= 50
    check()


@pytest.mark.parametrize("name", TEN)
def test_valid_calls_reach_a_network(name: str, ten_pipelines: dict[str, Any]) -> None:
    """The calls into which invalid arguments are put reach a network."""

    @hypothesis.settings(max_examples=3, **SETTINGS)
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        with pytest.raises(pytest.fail.Exception, match="a network ran"):
            ten_pipelines[name](**valid_call(name, data.draw))

    check()
