"""Defects of the reference that we do not share, by their numbers in docs/defects.md.

Each test first shows the reference's error on an input, then the right result on the same input.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.calls import small_call
from tests.pipelines.pictures import box_mask, hint, photo, photo_tensor
from tests.pipelines.tiny import difference, embeds, pair, seeded

from kandinsky22 import (
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)

SAME = 1e-4  # relative, between two of our calls
SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
Ours = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def mode_call(mode: str, **more: Any) -> dict[str, Any]:
    return {**small_call(mode), "output_type": "latent", **more}


# 1


def test_1_emb2emb_interpolates_texts(emb2emb: Any, their_emb2emb: Any, oracles: dict[str, Any]) -> None:
    call = {"images_and_prompts": ["a cat", photo(1)], "weights": [0.4, 0.6], "num_inference_steps": 3}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        their_emb2emb.interpolate(**call)
    for more in ({}, {"negative_prompt": "blue"}, {"negative_prior_prompt": "red"}):
        ours = emb2emb.interpolate(**call, **more, generator=seeded(0))
        right = oracles["prior"].interpolate(**call, **more, generator=seeded(0))
        assert difference(ours.image_embeds, right.image_embeds) < 1e-5
        assert difference(ours.negative_image_embeds, right.negative_image_embeds) < 1e-5


def test_1_emb2emb_negatives_are_not_noise(emb2emb: Any, their_emb2emb: Any) -> None:
    call = {"images_and_prompts": [photo(1)], "weights": [1.0], "num_inference_steps": 3}

    def negative(pipe: Any, **more: Any) -> torch.Tensor:
        return pipe.interpolate(**call, **more, generator=seeded(0)).negative_image_embeds

    assert difference(negative(their_emb2emb), negative(their_emb2emb)) > 0.1
    assert torch.equal(negative(emb2emb), negative(emb2emb))
    assert difference(negative(emb2emb, negative_prompt="blue"), negative(emb2emb)) > 0.1


# 2


def test_2_embeddings_are_repeated_without_guidance(decoder: KandinskyV22Pipeline, oracles: dict[str, Any]) -> None:
    call = {**pair(2), **SMALL, "guidance_scale": 1.0, "num_images_per_prompt": 2}
    with pytest.raises((RuntimeError, ValueError)):
        oracles["decoder"](**call)
    together = decoder(**call, generator=[seeded(i) for i in range(4)]).images
    for i in range(4):
        row = {name: tensor[i // 2 : i // 2 + 1] for name, tensor in pair(2).items()}
        alone = oracles["decoder"](**row, **SMALL, guidance_scale=1.0, generator=seeded(i)).images
        assert difference(together[i], alone[0]) < SAME


def test_2_embeddings_are_cast_without_guidance(decoder: KandinskyV22Pipeline, checkpoints: Path) -> None:
    call = {**pair(), **SMALL, "guidance_scale": 1.0}
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder", torch_dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="dtype"):
        theirs(**call)
    assert theirs(**{**call, "guidance_scale": 4.0}).images.dtype == torch.bfloat16
    assert decoder.to(torch.bfloat16)(**call).images.dtype == torch.bfloat16


def test_2_hints_are_repeated_without_guidance(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    two = {**pair(2), "hint": hint(2, 1), "guidance_scale": 1.0}
    call = mode_call("Controlnet", **two, num_images_per_prompt=2, output_type="np")
    with pytest.raises((RuntimeError, ValueError)):
        mode_oracles["Controlnet"](**call)
    together = make_pipeline("Controlnet")(**call, generator=[seeded(i) for i in range(4)]).images
    for i in range(4):
        row = {name: value[i // 2 : i // 2 + 1] for name, value in two.items() if isinstance(value, torch.Tensor)}
        single = mode_call("Controlnet", **row, guidance_scale=1.0, output_type="np")
        alone = mode_oracles["Controlnet"](**single, generator=seeded(i)).images
        assert difference(together[i], alone[0]) < SAME


# 3


def masks_and_images() -> dict[str, Any]:
    masks = torch.from_numpy(np.stack([box_mask(), box_mask()[::-1].copy()]))[:, None]
    return {"image": torch.stack([photo_tensor(1, signed=True), photo_tensor(2, signed=True)]), "mask_image": masks}


def test_3_each_batch_item_uses_its_own_image_and_mask(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    ours, theirs, inputs = make_pipeline("Inpaint"), mode_oracles["Inpaint"], masks_and_images()
    call = mode_call("Inpaint", **pair(2), **inputs)

    def alone(i: int) -> Any:
        rows = {name: value[i : i + 1].clone() for name, value in {**pair(2), **inputs}.items()}
        return theirs(**mode_call("Inpaint", **rows), generator=seeded(i)).images[0]

    wrong = theirs(**mode_call("Inpaint", **pair(2), **masks_and_images()), generator=[seeded(0), seeded(1)]).images
    assert difference(wrong[1], alone(1)) > 0.1
    together = ours(**call, generator=[seeded(0), seeded(1)]).images
    for i in range(2):
        assert difference(together[i], alone(i)) < SAME


def test_3_one_image_is_used_for_all_embeddings(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    call = mode_call("Inpaint", **pair(2))
    with pytest.raises((RuntimeError, ValueError)):
        mode_oracles["Inpaint"](**call)
    together = make_pipeline("Inpaint")(**call, generator=[seeded(0), seeded(1)]).images
    for i in range(2):
        row = {name: value[i : i + 1] for name, value in pair(2).items()}
        alone = mode_oracles["Inpaint"](**mode_call("Inpaint", **row), generator=seeded(i)).images
        assert difference(together[i], alone[0]) < SAME


def test_3_masks_are_not_modified(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    changed = []
    for pipe in (make_pipeline("Inpaint"), mode_oracles["Inpaint"]):
        mask = torch.from_numpy(np.random.default_rng(0).random((1, 1, 32, 32)).astype(np.float32))
        before = mask.clone()
        pipe(**mode_call("Inpaint", image=photo_tensor(1, signed=True)[None], mask_image=mask))
        changed.append(not torch.equal(mask, before))
    assert changed == [False, True]


def test_3_arrays_are_resized(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    large = np.asarray(photo(1, 48, 48))
    call = mode_call("Inpaint", image=large, mask_image=box_mask())
    with pytest.raises((RuntimeError, ValueError)):
        mode_oracles["Inpaint"](**call)
    ours = make_pipeline("Inpaint")(**call, generator=seeded(0)).images
    right = mode_oracles["Inpaint"](**{**call, "image": photo(1, 48, 48)}, generator=seeded(0)).images
    assert difference(ours, right) < SAME


# 4


def test_4_latents_are_cast(decoder: KandinskyV22Pipeline, oracles: dict[str, Any]) -> None:
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=seeded(0))
    with pytest.raises(RuntimeError, match="type"):
        oracles["decoder"](**pair(), **SMALL, latents=latents)
    ours = decoder(**pair(), **SMALL, latents=latents, generator=seeded(1)).images
    right = oracles["decoder"](**pair(), **SMALL, latents=latents.float(), generator=seeded(1)).images
    assert ours.dtype == torch.float32
    assert difference(ours, right) < SAME


# 5


@pytest.mark.parametrize("mode", ["", "Img2Img", "Inpaint"])
def test_5_callback_steps_is_optional(
    mode: str, make_pipeline: Ours, decoder: KandinskyV22Pipeline, oracles: dict[str, Any], mode_oracles: dict[str, Any]
) -> None:
    steps: list[int] = []

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        steps.append(step)

    ours, theirs = (make_pipeline(mode), mode_oracles[mode]) if mode else (decoder, oracles["decoder"])
    call = mode_call(mode) if mode else {**pair(), **SMALL}
    with pytest.raises(TypeError):
        theirs(**call, callback=callback)
    steps.clear()
    ours(**call, callback=callback)
    assert steps == list(range(ours.num_timesteps)) and len(steps) > 1


# 6


def test_6_wide_pictures_stay_wide(make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    call = mode_call("Img2Img", image=photo(1, 40, 24), height=24, width=40, output_type="np")
    assert mode_oracles["Img2Img"](**call).images.shape == (1, 40, 24, 3)
    ours = make_pipeline("Img2Img")(**call, generator=seeded(0)).images
    assert ours.shape == (1, 24, 40, 3)
    swapped = mode_oracles["Img2Img"](**{**call, "height": 40, "width": 24}, generator=seeded(0)).images
    assert difference(ours, swapped) < SAME


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img"])
def test_6_arrays_are_accepted_as_pictures(mode: str, make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    call = mode_call(mode, image=np.asarray(photo(1)), output_type="np")
    with pytest.raises((ValueError, AttributeError)):
        mode_oracles[mode](**call)
    right = mode_oracles[mode](**{**call, "image": photo(1)}, generator=seeded(0)).images
    assert difference(make_pipeline(mode)(**call, generator=seeded(0)).images, right) < SAME


# 7


def test_7_one_negative_prompt_is_used_for_all_prompts(
    prior: KandinskyV22PriorPipeline, oracles: dict[str, Any]
) -> None:
    texts = ["a cat", "red"]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        oracles["prior"](texts, "blue", num_inference_steps=2)
    ours = prior(texts, "blue", num_inference_steps=2, generator=seeded(0))
    right = oracles["prior"](texts, ["blue", "blue"], num_inference_steps=2, generator=seeded(0))
    assert difference(ours.image_embeds, right.image_embeds) < 1e-5
    assert difference(ours.negative_image_embeds, right.negative_image_embeds) < 1e-5


# 8


def test_8_latents_reach_the_decoder(combined: KandinskyV22CombinedPipeline, oracles: dict[str, Any]) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=seeded(5))
    call = {"prompt": "a cat", **SMALL, "prior_num_inference_steps": 2, "latents": latents}
    with pytest.raises(ValueError, match="latents"):
        oracles["combined"](**call)
    generator = seeded(0)
    results = oracles["prior"]("a cat", num_inference_steps=2, generator=generator)
    right = oracles["decoder"](*results.to_tuple(), **SMALL, latents=latents, generator=generator).images
    assert difference(combined(**call, generator=seeded(0)).images, right) < SAME


def test_8_progress_bars_do_not_enable_offloading(
    combined: KandinskyV22CombinedPipeline, oracles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[str] = []
    for pipe, name in ((combined, "ours"), (oracles["combined"], "theirs")):
        monkeypatch.setattr(
            pipe.decoder_pipe, "enable_model_cpu_offload", lambda *_, name=name, **__: switched.append(name)
        )
        pipe.progress_bar(total=1)
    assert switched == ["theirs"]


# 9


@pytest.mark.parametrize("mode", ["Controlnet", "ControlnetImg2Img"])
def test_9_controlled_pipelines_have_step_callbacks_and_latents(
    mode: str, make_pipeline: Ours, mode_oracles: dict[str, Any]
) -> None:
    assert "callback_on_step_end" not in inspect.signature(type(mode_oracles[mode]).__call__).parameters
    with pytest.raises(ValueError, match="output"):
        mode_oracles[mode](**mode_call(mode))
    recorded: list[torch.Tensor] = []
    out = make_pipeline(mode)(
        **mode_call(mode),
        callback_on_step_end=lambda pipe, step, timestep, tensors: recorded.append(tensors["latents"]),
    )
    assert torch.equal(recorded[-1], out.images)
    assert out.images.shape == (1, 4, 16, 16)


# 10


def recording_device_reads(pipe: Any, reads: list[str]) -> Any:
    """Return the same pipeline, recording reads of its execution device."""

    class Recording(type(pipe)):  # type: ignore[misc]
        @property
        def _execution_device(self) -> torch.device:
            reads.append(type(pipe).__module__.split(".")[0])
            return super()._execution_device

    recording = Recording(**pipe.components)
    recording.set_progress_bar_config(disable=True)
    return recording


def test_10_interpolate_uses_the_execution_device(emb2emb: Any, their_emb2emb: Any) -> None:
    reads: list[str] = []
    for pipe in (their_emb2emb, emb2emb):
        recording_device_reads(pipe, reads).interpolate([photo(1)], [1.0], num_inference_steps=2)
    assert set(reads) == {"kandinsky22"}


def test_10_output_types_are_checked_first(
    prior: KandinskyV22PriorPipeline, oracles: dict[str, Any], make_pipeline: Ours, mode_oracles: dict[str, Any]
) -> None:
    steps: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (make_pipeline("Inpaint"), mode_oracles["Inpaint"], mode_call("Inpaint", output_type="jpeg")),
        (prior, oracles["prior"], {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pil"}),
    ]
    for ours, theirs, call in calls:
        with pytest.raises(ValueError, match="output"):
            theirs(**call, callback_on_step_end=callback)
        assert len(steps) > 1
        steps.clear()
        with pytest.raises(InputError, match="output_type"):
            ours(**call, callback_on_step_end=callback)
        assert not steps
    unknown = mode_call("Img2Img", output_type="jpeg")
    assert isinstance(mode_oracles["Img2Img"](**unknown).images, np.ndarray)  # without an error
    with pytest.raises(InputError, match="output_type"):
        make_pipeline("Img2Img")(**unknown)


# 12


def test_12_each_prompt_uses_its_own_picture(
    checkpoints: Path, mode_folder: Path, prior: Any, oracles: dict[str, Any], mode_oracles: dict[str, Any]
) -> None:
    parts = {f"prior_{name}": part for name, part in oracles["prior"].components.items()}
    theirs = diffusers.KandinskyV22Img2ImgCombinedPipeline(**mode_oracles["Img2Img"].components, **parts)
    theirs.set_progress_bar_config(disable=True)
    ours = KandinskyV22Img2ImgCombinedPipeline.from_pretrained(mode_folder / "Img2Img", prior=prior)
    ours.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {**SMALL, "num_inference_steps": 6, "prior_num_inference_steps": 2, "strength": 0.2}
    call = {"prompt": ["a cat", "a cat"], "image": [photo(1), photo(2)], "num_images_per_prompt": 2}

    def generators() -> list[torch.Generator]:
        return [seeded(i) for i in range(4)]

    results = {
        name: pipe(**call, **options, generator=generators()).images
        for name, pipe in (("ours", ours), ("theirs", theirs))
    }
    for i in range(4):
        alone = theirs("a cat", photo(1 + i // 2), **options, generator=seeded(i)).images
        assert difference(results["ours"][i], alone[0]) < SAME
        assert (difference(results["theirs"][i], alone[0]) > 0.1) == (i in (1, 2))  # pictures 1, 2, 1, 2


# 13


def test_13_one_generator_per_picture_is_enough_with_negatives(
    prior: KandinskyV22PriorPipeline, oracles: dict[str, Any]
) -> None:
    texts, negatives = ["a cat", "red"], ["blue", "ugly"]
    with pytest.raises(IndexError):
        oracles["prior"](texts, negatives, num_inference_steps=2, generator=[seeded(0), seeded(1)])
    together = prior(texts, negatives, num_inference_steps=2, generator=[seeded(0), seeded(1)])
    for i in range(2):
        alone = oracles["prior"](texts[i], negatives[i], num_inference_steps=2, generator=seeded(i))
        assert difference(together.image_embeds[i], alone.image_embeds[0]) < 1e-5
        assert difference(together.negative_image_embeds[i], alone.negative_image_embeds[0]) < 1e-5


# 14


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img"])
def test_14_strength_may_leave_no_step(mode: str, make_pipeline: Ours, mode_oracles: dict[str, Any]) -> None:
    call = mode_call(mode, strength=0.0, output_type="np")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        mode_oracles[mode](**call)
    ours = make_pipeline(mode)
    with torch.no_grad():
        clean = ours.movq.encode(photo_tensor(1)[None] * 2 - 1)[0]
        right = ours.movq.decode(clean, force_not_quantize=True)[0]
    expected = (right / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert difference(ours(**call).images, expected) < 1e-3


def test_14_strength_may_leave_no_step_of_the_prior(emb2emb: Any, their_emb2emb: Any) -> None:
    call = {"prompt": "a cat", "image": embeds(1, 1), "strength": 0.0, "num_inference_steps": 4}
    assert len(their_emb2emb(**call).image_embeds) == 0  # no embedding at all
    assert torch.equal(emb2emb(**call).image_embeds, embeds(1, 1))


# 15


def test_15_one_prompt_is_used_for_all_pictures(emb2emb: Any, their_emb2emb: Any) -> None:
    options = {"strength": 0.5, "num_inference_steps": 4}
    with pytest.raises((RuntimeError, ValueError)):
        their_emb2emb("a cat", image=[photo(1), photo(2)], **options)
    together = emb2emb("a cat", image=[photo(1), photo(2)], **options, generator=[seeded(0), seeded(1)]).image_embeds
    for i in range(2):
        alone = their_emb2emb("a cat", image=photo(1 + i), **options, generator=seeded(i)).image_embeds
        assert difference(together[i], alone[0]) < 1e-5


# All


def test_every_defect_has_its_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "defects.md").read_text(encoding="utf-8")
    here = Path(__file__).parent
    named = [line.strip() for line in page.split("`") if "::test_" in line]
    for name in named:
        file, test = name.split("::")
        assert f"def {test}(" in (here / Path(file).name).read_text(encoding="utf-8"), name
    numbered_tests = [name for name in globals() if name.startswith("test_") and name[5].isdigit()]
    assert {name.split("::")[1] for name in named} >= set(numbered_tests)
