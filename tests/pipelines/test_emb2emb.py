"""The prior that starts from pictures: equal to the reference where it works, and right where it fails."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.comparison import EMBEDDING_TOLERANCE, assert_same_embeddings
from tests.pipelines.pictures import noise_picture
from tests.pipelines.tiny import DIM, PIXELS, difference, embeds, seeded

from kandinsky22 import InputError, KandinskyV22PriorEmb2EmbPipeline, KandinskyV22PriorPipeline, PriorTransformer

STEPS = 6


def prepared(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 3, PIXELS, PIXELS, generator=seeded(seed))


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "picture": lambda: {"image": noise_picture(1), "generator": seeded(0)},
    "global seed": lambda: {"image": noise_picture(1)},
    "a third of the steps": lambda: {"image": noise_picture(1), "strength": 0.34, "generator": seeded(1)},
    "all steps": lambda: {"image": noise_picture(1), "strength": 1.0, "generator": seeded(2)},
    "one step": lambda: {"image": noise_picture(1), "strength": 0.17, "generator": seeded(3)},
    "negative": lambda: {"image": noise_picture(1), "negative_prompt": "blue", "generator": seeded(4)},
    "a picture for two prompts": lambda: {
        "prompt": ["a cat", "red"],
        "image": noise_picture(1),
        "generator": seeded(5),
    },
    "two pictures": lambda: {
        "prompt": ["a cat", "red"],
        "image": [noise_picture(1), noise_picture(2, 30, 30)],
        "generator": seeded(6),
    },
    "two pictures, negatives, three each": lambda: {
        "prompt": ["a cat", "red"],
        "image": [noise_picture(1), noise_picture(2)],
        "negative_prompt": ["blue", "bad"],
        "num_images_per_prompt": 3,
        "generator": seeded(7),
    },
    "embedding": lambda: {"image": embeds(1, 8), "generator": seeded(8)},
    "embeddings, two each": lambda: {
        "prompt": ["a cat", "red"],
        "image": embeds(2, 9),
        "num_images_per_prompt": 2,
        "generator": seeded(9),
    },
    "list of embeddings": lambda: {
        "prompt": ["a cat", "red"],
        "image": [embeds(1, 10), embeds(1, 11)],
        "generator": seeded(10),
    },
    "prepared pixels": lambda: {"image": prepared(1, 11), "generator": seeded(11)},
    "list of prepared pixels": lambda: {
        "prompt": ["a cat", "red", "dog"],
        "image": [prepared(1, 12), prepared(2, 13)],
        "generator": seeded(12),
    },
    "guidance off": lambda: {"image": noise_picture(1), "guidance_scale": 1.0, "generator": seeded(13)},
    "guidance off, negative, two each": lambda: {
        "image": noise_picture(1),
        "guidance_scale": 0.0,
        "negative_prompt": "red",
        "num_images_per_prompt": 2,
        "generator": seeded(14),
    },
    "generators": lambda: {
        "prompt": ["a cat", "red"],
        "image": noise_picture(1),
        "generator": [seeded(15), seeded(16)],
    },
    "arrays": lambda: {"image": noise_picture(1), "output_type": "np", "generator": seeded(17)},
    "more steps": lambda: {
        "image": noise_picture(1),
        "num_inference_steps": 17,
        "strength": 0.4,
        "generator": seeded(18),
    },
    "a mode with a palette": lambda: {"image": noise_picture(1).convert("P"), "generator": seeded(19)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call: Callable[[], dict[str, Any]], emb2emb: Any, their_emb2emb: Any) -> None:
    results = []
    for pipe in (emb2emb, their_emb2emb):
        torch.manual_seed(5)
        results.append(pipe(**{"prompt": "a red cat", "strength": 0.5, "num_inference_steps": STEPS, **call()}))
    assert_same_embeddings(*results)


PICTURES: dict[str, Callable[[], dict[str, Any]]] = {
    "picture": lambda: {"images_and_prompts": [noise_picture(1)], "weights": [0.7]},
    "pictures, two each": lambda: {
        "images_and_prompts": [noise_picture(1), noise_picture(2)],
        "weights": [0.3, 0.7],
        "num_images_per_prompt": 2,
    },
    "prepared pixels": lambda: {"images_and_prompts": [prepared(1, 3), noise_picture(1)], "weights": [0.5, -0.5]},
}


@pytest.mark.parametrize("call", PICTURES.values(), ids=PICTURES)
def test_interpolate_pictures(call: Callable[[], dict[str, Any]], emb2emb: Any, their_emb2emb: Any) -> None:
    """Without texts the reference mixes pictures correctly, but returns noise as the negative embedding."""
    ours, theirs = (pipe.interpolate(**call(), num_inference_steps=2) for pipe in (emb2emb, their_emb2emb))
    assert difference(ours.image_embeds, theirs.image_embeds) < EMBEDDING_TOLERANCE
    with torch.no_grad():
        nothing = emb2emb.get_zero_embed(len(ours.image_embeds))
    assert difference(ours.negative_image_embeds, nothing) < EMBEDDING_TOLERANCE
    assert difference(theirs.negative_image_embeds, nothing) > 0.1


def test_interpolate_is_that_of_the_other_prior(emb2emb: Any, prior: KandinskyV22PriorPipeline) -> None:
    call = {"images_and_prompts": ["a cat", noise_picture(1), embeds(1, 3)], "weights": [0.3, 0.3, 0.4]}
    for more in ({}, {"negative_prompt": "blue"}, {"negative_prior_prompt": "red"}):
        results = [
            pipe.interpolate(**call, **more, num_inference_steps=3, generator=seeded(1)) for pipe in (emb2emb, prior)
        ]
        assert torch.equal(results[0].image_embeds, results[1].image_embeds)
        assert torch.equal(results[0].negative_image_embeds, results[1].negative_image_embeds)


def test_signatures_start_as_the_references() -> None:
    for name in ("__call__", "interpolate"):
        ours, theirs = (
            inspect.signature(getattr(kind, name)).parameters
            for kind in (KandinskyV22PriorEmb2EmbPipeline, diffusers.KandinskyV22PriorEmb2EmbPipeline)
        )
        assert list(ours)[: len(theirs)] == list(theirs)
        assert {name: ours[name].default for name in theirs} == {name: each.default for name, each in theirs.items()}


# Kinds of pictures


def test_kinds_of_pictures_are_equal(emb2emb: Any, tmp_path: Path) -> None:
    pixels = np.asarray(noise_picture(3))
    file = tmp_path / "picture.png"
    noise_picture(3).save(file)
    rotated = noise_picture(3).transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # displayed after a rotation by 90 degrees clockwise
    rotated.save(tmp_path / "rotated.png", exif=exif)
    ready = emb2emb.image_processor(noise_picture(3), return_tensors="pt").pixel_values
    with torch.no_grad():
        embedding = emb2emb.encode_pixels(ready)
    kinds = {
        "PIL": noise_picture(3),
        "path": file,
        "string": str(file),
        "exif": tmp_path / "rotated.png",
        "opaque": noise_picture(3).convert("RGBA"),
        "uint8": pixels,
        "uint8, batch": pixels[None],
        "floats": pixels.astype(np.float64) / 255,
        "prepared": ready,
        "prepared, no batch": ready[0],
        "prepared, double": ready.double(),
        "embedding": embedding,
        "embedding, vector": embedding[0],
        "embedding, array": embedding.numpy(),
        "list": [noise_picture(3)],
        "tuple": (file,),
    }
    expected = None
    for name, kind in kinds.items():
        result = emb2emb("a cat", image=kind, num_inference_steps=4, strength=0.5, generator=seeded(0)).image_embeds
        expected = result if expected is None else expected
        assert difference(result, expected) < EMBEDDING_TOLERANCE, name


def test_grey_pictures(emb2emb: Any) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    kinds = [grey, grey[..., None], PIL.Image.fromarray(grey), deep]
    result = [emb2emb("a cat", kind, 0.5, num_inference_steps=4, generator=seeded(0)).image_embeds for kind in kinds]
    assert max(difference(each, result[0]) for each in result) < EMBEDDING_TOLERANCE


def test_inputs_are_not_modified(emb2emb: Any) -> None:
    arguments: list[Any] = [embeds(1, 1), prepared(1, 2), np.asarray(noise_picture(3)).copy(), noise_picture(4)]
    before = copy.deepcopy(arguments)
    emb2emb("a cat", image=arguments, num_inference_steps=4, strength=0.5)
    assert torch.equal(arguments[0], before[0]) and torch.equal(arguments[1], before[1])
    assert np.array_equal(arguments[2], before[2]) and arguments[3].tobytes() == before[3].tobytes()


# Batches, outputs, callbacks


def test_one_prompt_is_used_for_all_pictures(emb2emb: Any) -> None:
    mixed: list[Any] = [noise_picture(1), embeds(1, 2), prepared(1, 3)]
    options = {"negative_prompt": "blue", "num_inference_steps": 4, "strength": 0.5}
    together = emb2emb("a cat", image=mixed, **options, generator=[seeded(i) for i in range(3)])
    assert together.image_embeds.shape == together.negative_image_embeds.shape == (3, DIM)
    for i, one in enumerate(mixed):
        alone = emb2emb("a cat", image=one, **options, generator=seeded(i))
        assert difference(together.image_embeds[i], alone.image_embeds[0]) < EMBEDDING_TOLERANCE
        assert difference(together.negative_image_embeds[i], alone.negative_image_embeds[0]) < EMBEDDING_TOLERANCE


def test_batch_equals_single_calls(emb2emb: Any) -> None:
    texts, pictures = ["a cat", "red, red dog"], [noise_picture(1), noise_picture(2)]
    options = {"num_images_per_prompt": 2, "num_inference_steps": 4, "strength": 0.75}
    together = emb2emb(texts, pictures, **options, generator=[seeded(i) for i in range(4)]).image_embeds
    for i in range(2):
        alone = emb2emb(texts[i], pictures[i], **options, generator=[seeded(2 * i), seeded(2 * i + 1)]).image_embeds
        assert difference(together[2 * i : 2 * i + 2], alone) < EMBEDDING_TOLERANCE


def test_one_negative_prompt_is_used_for_all_prompts(emb2emb: Any) -> None:
    options = {"image": noise_picture(1), "num_inference_steps": 4, "strength": 0.5}
    one, each = (
        emb2emb(["a cat", "dog"], negative_prompt=negative, **options, generator=seeded(0))
        for negative in ("blue", ["blue", "blue"])
    )
    assert torch.equal(one.image_embeds, each.image_embeds)
    assert torch.equal(one.negative_image_embeds, each.negative_image_embeds)


def test_strength_0_returns_the_embedding(emb2emb: Any) -> None:
    arguments = embeds(2, 1)
    out = emb2emb(["a cat", "dog"], image=arguments, strength=0.0, num_images_per_prompt=2, num_inference_steps=4)
    assert torch.equal(out.image_embeds, arguments.repeat_interleave(2, dim=0))


def test_negative_prompts_act_when_no_step_is_left(emb2emb: Any, prior: KandinskyV22PriorPipeline) -> None:
    """The negative embedding must differ from the picture's, or the decoder's guidance has no effect."""
    arguments = embeds(2, 1)
    call: dict[str, Any] = {"prompt": ["a cat", "dog"], "negative_prompt": ["blue", "bad"], "num_inference_steps": 4}
    for strength in (0.0, 0.2):
        out = emb2emb(**call, image=arguments, strength=strength, generator=seeded(1))
        assert torch.equal(out.image_embeds, arguments)
        assert torch.equal(out.negative_image_embeds, prior(**call, generator=seeded(1)).negative_image_embeds)
    some = emb2emb(**call, image=arguments, strength=0.25, generator=seeded(1))
    assert difference(out.negative_image_embeds, arguments) > 0.1
    assert difference(some.negative_image_embeds, out.negative_image_embeds) > 1e-3


def test_more_strength_moves_further_from_the_picture(emb2emb: Any) -> None:
    """With more strength less of the picture remains: two pictures end nearer to each other."""
    ends = [
        torch.cat(
            [
                emb2emb("a cat", embeds(1, seed), strength, num_inference_steps=20, generator=seeded(0)).image_embeds
                for seed in (1, 2)
            ]
        )
        for strength in (0.1, 0.5, 1.0)
    ]
    apart = [float((one - other).norm()) for one, other in ends]
    assert apart[0] > apart[1] > apart[2]


def test_tuple_equals_named_output(emb2emb: Any) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "image": noise_picture(1), "num_inference_steps": 4, "strength": 0.5}
    named = emb2emb(**call, generator=seeded(0))
    as_tuple = emb2emb(**call, generator=seeded(0), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
    assert torch.equal(as_tuple[0], named.image_embeds) and torch.equal(as_tuple[1], named.negative_image_embeds)


def test_callbacks(emb2emb: Any) -> None:
    calls: list[tuple[int, int, tuple[int, ...]]] = []
    legacy: list[int] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((step, int(timestep), tuple(tensors["prompt_embeds"].shape)))
        return {"latents": tensors["latents"] * 0.5}

    call = {"image": noise_picture(1), "num_inference_steps": 8, "strength": 0.5}
    changed = emb2emb(
        "a cat",
        **call,
        generator=seeded(0),
        callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        callback=lambda step, timestep, latents: legacy.append(step),
        callback_steps=2,
    ).image_embeds
    assert [step for step, *_ in calls] == [0, 1, 2, 3]
    emb2emb.scheduler.set_timesteps(8)
    assert [timestep for _, timestep, _ in calls] == emb2emb.scheduler.timesteps[-4:].tolist()
    assert {shape for *_, shape in calls} == {(2, DIM)}
    assert legacy == [0, 2]
    assert emb2emb.num_timesteps == 4
    assert difference(changed, emb2emb("a cat", **call, generator=seeded(0)).image_embeds) > 1e-2


def test_stopping_early(emb2emb: Any) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        steps.append(step)
        pipe.interrupt()

    call = {"prompt": "a cat", "image": noise_picture(1), "num_inference_steps": 8, "strength": 1.0}
    assert emb2emb(**call, callback_on_step_end=stop).image_embeds.shape == (1, DIM)
    assert steps == [0]


def test_half_precision(emb2emb: Any) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
    exact = emb2emb(**call, image=noise_picture(1), generator=seeded(0)).image_embeds
    rough = emb2emb.to(torch.bfloat16)(**call, image=noise_picture(1), generator=seeded(0)).image_embeds
    assert rough.dtype == np.float32
    assert difference(rough, exact) < 0.1


def test_interrupting_from_another_thread_ends_interpolate(emb2emb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    denoise = PriorTransformer.denoise

    def denoised(*args: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 4:  # the first step of the second text
            other = threading.Thread(target=emb2emb.interrupt)
            other.start()
            other.join()
        return denoise(*args)

    monkeypatch.setattr(PriorTransformer, "denoise", denoised)
    call: dict[str, Any] = {"weights": [0.2, 0.5, 0.3, 1.0], "num_inference_steps": 3, "negative_prompt": "blue"}
    out = emb2emb.interpolate(["a cat", "dog", "red", noise_picture(1)], **call, generator=seeded(0))
    assert len(steps) == 4
    assert torch.isfinite(out.image_embeds).all()
    with torch.no_grad():
        assert torch.equal(out.negative_image_embeds, emb2emb.get_zero_embed())
    emb2emb.interpolate(["a cat", "dog", "red", noise_picture(1)], **call)  # the next call is unaffected
    assert len(steps) == 4 + 3 * 3 + 3


# Wrong arguments


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("image", {"image": None}),
        ("image", {"image": []}),
        ("image", {"image": "no/such/file.png"}),
        ("image", {"image": {"a": 1}}),
        (r"image\[1\]", {"image": [embeds(1, 0), 3]}),
        ("image", {"image": torch.zeros(3, 8, 8)}),
        ("image", {"image": torch.zeros(1, 4, PIXELS, PIXELS)}),
        ("image", {"image": torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8)}),
        ("image", {"image": torch.full((1, 3, PIXELS, PIXELS), float("nan"))}),
        ("image", {"image": torch.zeros(0, 3, PIXELS, PIXELS)}),
        ("image", {"image": torch.zeros(1, DIM + 1)}),
        ("image", {"image": torch.full((1, DIM), float("inf"))}),
        ("image", {"image": np.full((8, 8, 3), 2.0)}),
        ("image", {"image": np.zeros((8, 8, 2), np.uint8)}),
        ("image", {"image": np.zeros((8, 8, 3), np.int64)}),
        ("image", {"prompt": ["a", "b", "c"], "image": embeds(2, 0)}),
        ("strength", {"strength": 1.5}),
        ("strength", {"strength": -0.1}),
        ("strength", {"strength": float("nan")}),
        ("strength", {"strength": "much"}),
        ("strength", {"strength": None}),
        ("prompt", {"prompt": None}),
        ("negative_prompt", {"negative_prompt": 3}),
        ("negative_prompt", {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}),
        ("num_images_per_prompt", {"num_images_per_prompt": 0}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("guidance_scale", {"guidance_scale": "4"}),
        ("generator", {"generator": [seeded(0), seeded(1), seeded(2)]}),
        ("output_type", {"output_type": "pil"}),
        ("callback_on_step_end", {"callback_on_step_end": 1}),
        ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["image"]}),
        ("callback", {"callback": 1}),
        ("callback_steps", {"callback_steps": 0}),
    ],
)
def test_wrong_arguments(emb2emb: Any, no_network_runs: None, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        emb2emb(**{"prompt": "a cat", "image": embeds(1, 1), **arguments})


def test_a_scheduler_that_cannot_add_noise(emb2emb: Any, no_network_runs: None) -> None:
    class Bare:
        config = None
        timesteps = torch.arange(25)
        set_timesteps = step = staticmethod(lambda *_, **__: None)

    emb2emb.scheduler = Bare()
    with pytest.raises(InputError, match="scheduler: Bare has no add_noise"):
        emb2emb("a cat", image=noise_picture(1))


@pytest.mark.parametrize("missing", ["prior", "image_encoder", "image_processor", "text_encoder", "tokenizer"])
def test_missing_components(emb2emb: Any, no_network_runs: None, missing: str) -> None:
    setattr(emb2emb, missing, None)
    with pytest.raises(InputError, match=f"without {missing}"):
        emb2emb("a cat", image=noise_picture(1))
