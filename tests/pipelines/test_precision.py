"""Half precision, all ten classes: no further from the reference in float32 than the reference itself is.

Weights, inputs and noise are the same in all runs. Noise has to be made so: a seed gives other numbers in other types,
here and in the reference, so both draw it in float32 and round it. Both then round every operation, and a random
network magnifies that from step to step; which of two equally good orders of the operations comes out nearer is a
matter of luck for a single picture. So the errors are taken over several seeds, the root of the mean square and the
largest, and both may be a little larger than the reference's. When this was written they were 0.88 to 1.11 and 0.63 to
1.35 times the reference's on a CPU (0.007 to 0.027 in bfloat16 and 0.0008 to 0.004 in float16, root of the mean
square, of pixels in [0, 1] or of embeddings).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.pipelines.test_modes_parity import box_image, hint, photo
from tests.pipelines.tiny import pair, seeded

import kandinsky22
from kandinsky22 import KandinskyV22PriorPipeline

SEEDS = range(5)
SQUARES = 1.25  # how much larger our error may be, by the root of the mean square over all seeds
LARGEST = 1.6  # and by the largest single number, an extreme value that varies more

Call = Callable[[int], dict[str, Any]]


def words(seed: int) -> dict[str, Any]:
    return {"prompt": ["a red cat", "on a mat", "dog, 4k photo", "red", "cat on a red mat"][seed]}


PRIOR = {"num_inference_steps": 4}
PIXELS = {"height": 32, "width": 32, "output_type": "np"}
STEPS = {**PIXELS, "num_inference_steps": 4}
STARTED = {**PIXELS, "num_inference_steps": 8, "strength": 0.5}
BOTH = {"prior_num_inference_steps": 4}

# by the middle of the class's name: where its weights are, and a call
CALLS: dict[str, tuple[str, Call]] = {
    "Prior": ("prior", lambda seed: {**words(seed), **PRIOR, "negative_prompt": "blue"}),
    "PriorEmb2Emb": ("prior", lambda seed: {**words(seed), **PRIOR, "image": photo(seed), "strength": 1.0}),
    "": ("decoder", lambda seed: {**pair(seed=10 * seed), **STEPS}),
    "Img2Img": ("Img2Img", lambda seed: {**pair(seed=10 * seed), **STARTED, "image": photo(seed)}),
    "Inpaint": (
        "Inpaint",
        lambda seed: {**pair(seed=10 * seed), **STEPS, "image": photo(seed), "mask_image": box_image()},
    ),
    "Controlnet": ("Controlnet", lambda seed: {**pair(seed=10 * seed), **STEPS, "hint": hint(1, seed)}),
    "ControlnetImg2Img": (
        "ControlnetImg2Img",
        lambda seed: {**pair(seed=10 * seed), **STARTED, "image": photo(seed), "hint": hint(1, seed)},
    ),
    "Combined": ("decoder", lambda seed: {**words(seed), **BOTH, **STEPS}),
    "Img2ImgCombined": ("Img2Img", lambda seed: {**words(seed), **BOTH, **STARTED, "image": photo(seed)}),
    "InpaintCombined": (
        "Inpaint",
        lambda seed: {**words(seed), **BOTH, **STEPS, "image": photo(seed), "mask_image": box_image()},
    ),
}


@pytest.fixture(autouse=True)
def _noise_that_does_not_depend_on_types(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn

    def randn(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return drawn(*args, **kwargs) if dtype is None else drawn(*args, dtype=torch.float32, **kwargs).to(dtype)

    monkeypatch.setattr(torch, "randn", randn)


@pytest.fixture
def three(
    checkpoints: Path, mode_folder: Path, reference: Callable[[str], Any]
) -> Callable[[str, torch.dtype, str], tuple[Any, Any, Any]]:
    """The reference exactly, the reference in another type, and ours in that type, which read it from files."""

    def make(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any, Any]:
        weights = CALLS[name][0]
        folder = (checkpoints if weights in ("prior", "decoder") else mode_folder) / weights
        options: dict[str, Any] = {"torch_dtype": dtype}
        if name.endswith("Combined"):
            options["prior"] = kandinsky22.KandinskyV22PriorPipeline.from_pretrained(checkpoints / "prior", **options)
        exact = reference(name)
        theirs = type(exact)(**copy.deepcopy(exact.components)).to(device, dtype)
        ours = getattr(kandinsky22, type(exact).__name__).from_pretrained(folder, **options).to(device)
        for pipe in (exact, theirs, ours):
            pipe.set_progress_bar_config(disable=True)
        return exact, theirs, ours

    return make


def numbers(pipe: Any, name: str, seed: int) -> list[np.ndarray[Any, Any]]:
    """All that a call gives, with as many numbers from each seed."""
    out = pipe(**CALLS[name][1](seed), generator=seeded(seed))
    return [np.asarray(torch.as_tensor(value).float().cpu(), dtype=np.float64) for value in vars(out).values()]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, id="bfloat16"),
        pytest.param("cpu", torch.float16, id="float16", marks=pytest.mark.slow),  # CPUs convolve it slowly
        pytest.param("cuda", torch.bfloat16, id="bfloat16 on a GPU", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, id="float16 on a GPU", marks=pytest.mark.gpu),
    ],
)
def test_no_further_from_exact_than_the_reference(
    name: str,
    device: str,
    dtype: torch.dtype,
    three: Callable[..., tuple[Any, Any, Any]],
    record_property: Callable[[str, object], None],
) -> None:
    exact, theirs, ours = three(name, dtype, device)
    assert ours.dtype == dtype
    errors: dict[str, list[np.ndarray[Any, Any]]] = {"ours": [], "theirs": []}
    for seed in SEEDS:
        right, *rough = (numbers(pipe, name, seed) for pipe in (exact, theirs, ours))
        for who, made in zip(("theirs", "ours"), rough, strict=True):
            errors[who] += [(one - other).ravel() for one, other in zip(made, right, strict=True)]
    flat = {who: np.concatenate(parts) for who, parts in errors.items()}
    squares = {who: float(np.sqrt(np.mean(values**2))) for who, values in flat.items()}
    largest = {who: float(np.abs(values).max()) for who, values in flat.items()}
    for measure, values in (("rms", squares), ("largest", largest)):
        record_property(measure, values["ours"] / values["theirs"])
    assert 0 < squares["ours"] <= SQUARES * squares["theirs"]
    assert largest["ours"] <= LARGEST * largest["theirs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_towers_are_converted_as_by_their_own_library(
    stored: torch.dtype, dtype: torch.dtype, checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(checkpoints / "prior", folder)
    transformers.CLIPTextModelWithProjection.from_pretrained(
        folder / "text_encoder", torch_dtype=stored
    ).save_pretrained(folder / "text_encoder")
    expected = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", torch_dtype=dtype)
    pipe = KandinskyV22PriorPipeline.from_pretrained(folder, torch_dtype=dtype)
    ours, theirs = pipe.text_encoder.state_dict(), expected.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert pipe.text_encoder.config.to_dict() == expected.config.to_dict()
