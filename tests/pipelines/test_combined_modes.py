"""Combined classes that start from pictures: equal to the reference, and batches equal single calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.calls import small_call
from tests.pipelines.comparison import assert_same_pictures
from tests.pipelines.pictures import box_mask, box_mask_image, photo, photo_tensor
from tests.pipelines.tiny import DIM, difference, seeded

import kandinsky22
from kandinsky22 import InputError

KINDS = ("Img2ImgCombined", "InpaintCombined")
Call = Callable[[], dict[str, Any]]


def both_kinds() -> dict[str, Call]:
    return {
        "prompt": lambda: {"generator": seeded(0)},
        "global seed": dict,
        "negative": lambda: {"negative_prompt": "blue", "generator": seeded(1)},
        "guidance": lambda: {"guidance_scale": 2.0, "prior_guidance_scale": 6.0, "generator": seeded(2)},
        "guidance off in the decoder": lambda: {"guidance_scale": 1.0, "generator": seeded(3)},
        "guidance off in the prior": lambda: {"prior_guidance_scale": 1.0, "generator": seeded(4)},
        "latents of the prior": lambda: {
            "latents": torch.randn(1, DIM, generator=seeded(5)),
            "generator": seeded(5),
        },
        "steps": lambda: {"num_inference_steps": 5, "prior_num_inference_steps": 4, "generator": seeded(6)},
        "pil": lambda: {"output_type": "pil", "generator": seeded(7)},
        "pt": lambda: {"output_type": "pt", "generator": seeded(8)},
        "latent": lambda: {"output_type": "latent", "generator": seeded(9)},
    }


CALLS: dict[str, dict[str, Call]] = {
    "Img2ImgCombined": {
        **both_kinds(),
        "prompts": lambda: {"prompt": ["a cat", "dog"], "image": [photo(1), photo(2)], "generator": seeded(10)},
        "a picture for two prompts": lambda: {"prompt": ["a cat", "dog"], "generator": seeded(11)},
        "generators": lambda: {"prompt": ["a cat", "dog"], "generator": [seeded(12), seeded(13)]},
        "two each": lambda: {"negative_prompt": "bad", "num_images_per_prompt": 2, "generator": seeded(14)},
        "strength 1": lambda: {"strength": 1.0, "generator": seeded(15)},
        "a little": lambda: {"strength": 0.2, "generator": seeded(16)},
        "tensor": lambda: {"image": photo_tensor(3), "generator": seeded(17)},
        "large picture": lambda: {"image": photo(4, 90, 70), "generator": seeded(18)},
    },
    "InpaintCombined": {
        **both_kinds(),
        "array": lambda: {"image": np.array(photo(2)), "mask_image": box_mask(), "generator": seeded(10)},
        "tensors": lambda: {
            "image": photo_tensor(3, signed=True),
            "mask_image": torch.from_numpy(box_mask()),
            "generator": seeded(11),
        },
        "two each": lambda: {"num_images_per_prompt": 2, "generator": seeded(12)},
        "a picture for two prompts": lambda: {"prompt": ["a cat", "dog"], "generator": [seeded(13), seeded(14)]},
        "wide": lambda: {"height": 24, "width": 40, "generator": seeded(15)},
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in CALLS[kind]])
def test_calls(kind: str, name: str, make_pipeline: Callable[..., Any], reference: Callable[[str], Any]) -> None:
    results = []
    for pipe in (make_pipeline(kind), reference(kind)):
        torch.manual_seed(5)
        results.append(pipe(**{**small_call(kind), **CALLS[kind][name]()}).images)
    assert_same_pictures(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_start_as_the_references(
    kind: str, make_pipeline: Callable[..., Any], reference: Callable[[str], Any]
) -> None:
    ours, theirs = (
        inspect.signature(each.__call__).parameters for each in (type(make_pipeline(kind)), type(reference(kind)))
    )
    names = [name for name in theirs if name != "kwargs"]
    assert list(ours)[: len(names)] == names
    sizes = {"height": None, "width": None}  # the model's own side, which is 512 for the published ones
    assert {name: ours[name].default for name in names} == {
        name: sizes.get(name, theirs[name].default) for name in names
    }


# Batches


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single_calls(kind: str, make_pipeline: Callable[..., Any]) -> None:
    pipe, options = make_pipeline(kind), {**small_call(kind), "output_type": "latent", "num_images_per_prompt": 2}
    masks = {"mask_image": [box_mask_image(), box_mask()[::-1].copy()]} if kind == "InpaintCombined" else {}
    arguments: dict[str, Any] = {
        "prompt": ["a cat", "red dog"],
        "negative_prompt": ["blue", "ugly"],
        "image": [photo(1), photo(2)],
        **masks,
    }
    together = pipe(**{**options, **arguments}, generator=[seeded(i) for i in range(4)]).images
    assert together.shape[0] == 4
    for i in range(2):
        one = {name: value[i] for name, value in arguments.items()}
        alone = pipe(**{**options, **one}, generator=[seeded(2 * i), seeded(2 * i + 1)]).images
        assert difference(together[2 * i : 2 * i + 2], alone) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_stages_alone_equal_the_combined_pipeline(kind: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(kind)
    call = {**small_call(kind), "guidance_scale": 3.0}
    generator = seeded(1)
    embeds = pipe.prior_pipe("a red cat", num_inference_steps=2, generator=generator)
    rest = {name: value for name, value in call.items() if name not in ("prompt", "prior_num_inference_steps")}
    apart = pipe.decoder_pipe(*embeds.to_tuple()[:1], negative_image_embeds=embeds[1], **rest, generator=generator)
    assert np.array_equal(apart.images, pipe(**call, generator=seeded(1)).images)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_the_decoder(kind: str, make_pipeline: Callable[..., Any]) -> None:
    pipe, call = make_pipeline(kind), {**small_call(kind), "output_type": "latent"}
    noise = torch.randn(1, 4, 16, 16, generator=seeded(3), dtype=torch.float64)
    with_noise, again, without = (
        pipe(**call, latents=latents, generator=seeded(0)).images for latents in (noise, noise, None)
    )
    assert torch.equal(with_noise, again) and with_noise.dtype == torch.float32
    assert difference(with_noise, without) > 1e-2
    # The noise that the decoder draws itself, after the prior.
    generator = seeded(0)
    pipe.prior_pipe("a red cat", num_inference_steps=2, generator=generator)
    drawn = torch.randn(1, 4, 16, 16, generator=generator)
    pipe.scheduler = kandinsky22.DDIMScheduler.from_config(
        pipe.scheduler.config
    )  # deterministic: no further noise is drawn
    assert torch.equal(*(pipe(**call, latents=x, generator=seeded(0)).images for x in (drawn, None)))


# Outputs, callbacks


@pytest.mark.parametrize("kind", KINDS)
def test_tuple_equals_named_output(kind: str, make_pipeline: Callable[..., Any]) -> None:
    pipe, call = make_pipeline(kind), small_call(kind)
    as_tuple = pipe(**call, generator=seeded(0), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert np.array_equal(as_tuple[0], pipe(**call, generator=seeded(0)).images)


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_both_stages(
    kind: str, make_pipeline: Callable[..., Any], reference: Callable[[str], Any]
) -> None:
    records: list[list[Any]] = []
    for pipe in (make_pipeline(kind), reference(kind)):
        calls: list[Any] = []

        def record(stage: Any, step: int, timestep: Any, tensors: dict[str, Any], calls: list[Any] = calls) -> Any:
            calls.append((step, int(timestep), {name: tuple(value.shape) for name, value in tensors.items()}))
            return tensors

        pipe(
            **small_call(kind),
            prior_callback_on_step_end=record,
            prior_callback_on_step_end_tensor_inputs=["latents", "text_mask"],
            callback_on_step_end=record,
            callback_on_step_end_tensor_inputs=["image_embeds"],
        )
        records.append(calls)
    assert records[0] == records[1] and len(records[0]) == 5
    steps: list[int] = []
    make_pipeline(kind)(
        **small_call(kind), callback=lambda step, timestep, latents: steps.append(step), callback_steps=2
    )
    assert steps == [0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_early(kind: str, make_pipeline: Callable[..., Any]) -> None:
    pipe, steps = make_pipeline(kind), []

    def stop(stage: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        steps.append(step)
        pipe.interrupt()

    assert pipe(**small_call(kind), callback_on_step_end=stop).images.shape == (1, 32, 32, 3)
    assert steps == [0]
    pipe(**small_call(kind), prior_callback_on_step_end=stop, callback_on_step_end=stop)
    assert steps == [0, 0]


def test_keep_pixels(make_pipeline: Callable[..., Any]) -> None:
    repainted = make_pipeline("InpaintCombined")(**small_call("InpaintCombined"), keep_pixels=True).images[0]
    unmasked = box_mask() == 0
    assert np.abs(repainted - np.asarray(photo(1), dtype=np.float32) / 255)[unmasked].max() < 1e-6


# Wrong arguments


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": []}),
    ("negative_prompt", {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}),
    ("image", {"image": None}),
    ("image", {"image": "no/such/file.png"}),
    ("image", {"image": [photo(1), photo(2)]}),
    ("image", {"prompt": ["a", "b", "c"], "image": [photo(1), photo(2)]}),
    (r"image\[1\]", {"prompt": ["a", "b"], "image": [photo(1), 3]}),
    ("height", {"height": 0}),
    ("width", {"width": "32"}),
    ("num_images_per_prompt", {"num_images_per_prompt": 0}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"prior_num_inference_steps": 0}),
    ("guidance_scale", {"guidance_scale": None}),
    ("guidance_scale", {"prior_guidance_scale": "4"}),
    ("generator", {"generator": [seeded(0), seeded(1)]}),
    ("latents", {"latents": torch.zeros(1, 4, 3, 3)}),
    ("latents", {"latents": torch.zeros(1, DIM + 1)}),
    ("output_type", {"output_type": "jpeg"}),
    ("callback", {"callback": 1}),
    ("callback_steps", {"callback_steps": 0}),
    ("callback_on_step_end", {"callback_on_step_end": 1}),
    ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["noise"]}),
    ("callback_on_step_end_tensor_inputs", {"prior_callback_on_step_end_tensor_inputs": ["image_embeds"]}),
]
WRONG_FOR_ONE: list[tuple[str, str, dict[str, Any]]] = [
    ("Img2ImgCombined", "strength", {"strength": 1.1}),
    ("Img2ImgCombined", "strength", {"strength": "0.3"}),
    ("InpaintCombined", "mask_image", {"mask_image": None}),
    ("InpaintCombined", "mask_image", {"mask_image": np.full((32, 32), 300.0)}),
    ("InpaintCombined", "mask_image", {"mask_image": [box_mask(), box_mask()]}),
    ("InpaintCombined", "keep_pixels", {"keep_pixels": "yes"}),
    ("InpaintCombined", "output_type", {"keep_pixels": True, "output_type": "latent"}),
]


@pytest.mark.parametrize(
    ("kind", "name", "arguments"), [(kind, *wrong) for kind in KINDS for wrong in WRONG] + WRONG_FOR_ONE
)
def test_wrong_arguments(
    kind: str, name: str, arguments: dict[str, Any], make_pipeline: Callable[..., Any], no_network_runs: None
) -> None:
    with pytest.raises(InputError, match=name):
        make_pipeline(kind)(**{**small_call(kind), **arguments})
