"""Behaviour of calls: batches, callbacks, output types, components, and defects of the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.tiny import DIM, difference, embeds, pair, seeded

import kandinsky22
from kandinsky22 import (
    AutoPipelineForText2Image,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)

SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}


# Callbacks that go wrong


def test_a_failing_callback_leaves_nothing_on_the_device(
    decoder: KandinskyV22Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    freed: list[int] = []
    monkeypatch.setattr(type(decoder), "maybe_free_model_hooks", lambda self: freed.append(1))
    with pytest.raises(RuntimeError, match="stop"):
        decoder(**pair(), **SMALL, callback_on_step_end=fail)
    assert freed


def test_a_callback_cannot_switch_guidance_on(decoder: KandinskyV22Pipeline) -> None:
    def raise_guidance(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 4.0
        return {}

    with pytest.raises(InputError, match="guidance"):
        decoder(**pair(), **SMALL, guidance_scale=1.0, callback_on_step_end=raise_guidance)


# Pictures of unusual modes and layouts


def test_mode_i_of_8_and_16_bit_pictures() -> None:
    from kandinsky22.inputs.images import convert_mode

    grey = PIL.Image.new("L", (2, 2), 200)
    assert convert_mode("image", grey.convert("I")).getpixel((0, 0)) == (200, 200, 200)
    deep = PIL.Image.fromarray(np.full((2, 2), 200 * 257, dtype=np.int32))
    assert deep.mode == "I" and convert_mode("image", deep).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_hold_no_pixels(kind: str) -> None:
    from kandinsky22.inputs.images import hints_to_tensor, images_to_tensor
    from kandinsky22.inputs.masks import masks_to_tensor

    dense = torch.rand(1, 3, 8, 8)
    tensor = dense.to_sparse() if kind == "sparse" else dense.to("meta")
    for read in (images_to_tensor, hints_to_tensor, masks_to_tensor):
        with pytest.raises(InputError, match=f"^thing.*{kind}"):
            read("thing", tensor, (8, 8))


# Batches


def test_prior_batch_equals_single_calls(prior: KandinskyV22PriorPipeline) -> None:
    texts, negatives = ["a cat", "red, red dog", "on a mat"], ["blue", "", "ugly"]
    together = prior(texts, negatives, num_inference_steps=4, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = prior(texts[i], negatives[i], num_inference_steps=4, generator=seeded(i))
        assert difference(together.image_embeds[i], alone.image_embeds[0]) < 1e-5
        assert difference(together.negative_image_embeds[i], alone.negative_image_embeds[0]) < 1e-5


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_decoder_batch_equals_single_calls(decoder: KandinskyV22Pipeline, guidance_scale: float) -> None:
    inputs = pair(3)
    options = {**SMALL, "guidance_scale": guidance_scale}
    together = decoder(**inputs, **options, generator=[seeded(i) for i in range(3)]).images
    for i in range(3):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        assert difference(together[i], decoder(**row, **options, generator=seeded(i)).images[0]) < 1e-4


def test_combined_batch_equals_single_calls(combined: KandinskyV22CombinedPipeline) -> None:
    options = {**SMALL, "prior_num_inference_steps": 3}
    texts, negatives = ["a cat", "red dog"], ["blue", "ugly"]
    together = combined(texts, negatives, **options, generator=[seeded(0), seeded(1)]).images
    for i in range(2):
        alone = combined(texts[i], negatives[i], **options, generator=seeded(i)).images
        assert difference(together[i], alone[0]) < 1e-4


# Callbacks


def record(log: list[Any]) -> Any:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        log.append((step, int(timestep), {name: tensor.clone() for name, tensor in tensors.items()}))
        return tensors

    return callback


def same_records(ours: list[Any], theirs: list[Any]) -> None:
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for (_, _, one), (_, _, other) in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert difference(one[name].float(), other[name].float()) < 1e-4


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_callbacks_get_the_references_tensors(
    prior: KandinskyV22PriorPipeline,
    decoder: KandinskyV22Pipeline,
    oracles: dict[str, Any],
    guidance_scale: float,
) -> None:
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("prior", prior, {"prompt": ["a cat", "red dog"], "num_inference_steps": 3}),
        ("decoder", decoder, {**pair(2), **SMALL}),
    ]
    for name, pipe, arguments in calls:
        assert list(pipe._callback_tensor_inputs) == list(oracles[name]._callback_tensor_inputs)
        records: list[list[Any]] = []
        for each in (pipe, oracles[name]):
            records.append([])
            each(
                **arguments,
                guidance_scale=guidance_scale,
                generator=seeded(0),
                callback_on_step_end=record(records[-1]),
                callback_on_step_end_tensor_inputs=each._callback_tensor_inputs,
            )
            assert each.num_timesteps == 3
            assert each.guidance_scale == guidance_scale
        same_records(*records)


def change_everything(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return new tensors of other values for all but masks at the first step."""
    return {
        name: tensor * 0.5 if step == 0 and tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def change_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Change the values of tensors in place at the first step."""
    for name, tensor in tensors.items():
        if step == 0 and name in ("image_embeds", "prompt_embeds"):
            tensor.mul_(0.5)
    return tensors


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Switch guidance off after the first step, and return only the conditional rows."""
    if step > 0:
        return {}
    pipe._guidance_scale = 0.0
    return {
        name: tensor.chunk(2)[1] for name, tensor in tensors.items() if name != "latents" and "negative" not in name
    }


@pytest.mark.parametrize("callback", [change_everything, change_in_place, stop_guidance])
def test_callbacks_change_tensors_in_flight(
    prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline, oracles: dict[str, Any], callback: Any
) -> None:
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("prior", prior, {"prompt": ["a cat", "red dog"], "num_inference_steps": 3}),
        ("decoder", decoder, {**pair(2), **SMALL}),
    ]
    for name, pipe, arguments in calls:
        untouched = pipe(**arguments, generator=seeded(0))[0]
        results = [
            each(
                **arguments,
                generator=seeded(0),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=each._callback_tensor_inputs,
            )[0]
            for each in (pipe, oracles[name])
        ]
        assert difference(*results) < 1e-4
        assert difference(results[0], untouched) > 1e-3


def test_changes_in_place_count_under_inference_mode(decoder: KandinskyV22Pipeline) -> None:
    call = {
        **pair(),
        **SMALL,
        "callback_on_step_end": change_in_place,
        "callback_on_step_end_tensor_inputs": ["image_embeds"],
    }
    expected = decoder(**call, generator=seeded(0)).images
    with torch.inference_mode():
        assert torch.equal(decoder(**call, generator=seeded(0)).images, expected)


def test_guidance_can_be_switched_off_alone(decoder: KandinskyV22Pipeline) -> None:
    def only_scale(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        pipe._guidance_scale = 1.0

    options = {**pair(), **SMALL}
    results = [
        decoder(
            **options,
            generator=seeded(0),
            callback_on_step_end=each,
            callback_on_step_end_tensor_inputs=["image_embeds"],
        ).images
        for each in (only_scale, stop_guidance)
    ]
    assert torch.equal(*results)


def test_a_new_negative_embedding_acts(decoder: KandinskyV22Pipeline) -> None:
    new = embeds(1, 99)

    def replace(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert step == 0 or torch.equal(tensors["image_embeds"][:1], new)
        return {"negative_image_embeds": new} if step == 0 else {}

    changed = decoder(
        **pair(),
        **SMALL,
        generator=seeded(0),
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=["image_embeds"],
    ).images
    assert difference(changed, decoder(**pair(), **SMALL, generator=seeded(0)).images) > 1e-3


def test_condition_is_computed_once(decoder: KandinskyV22Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = decoder.unet.encode_condition
    monkeypatch.setattr(decoder.unet, "encode_condition", lambda **inputs: calls.append(1) or encode(**inputs))
    decoder(**pair(), **SMALL, callback_on_step_end=record([]))
    assert len(calls) == 1


@pytest.mark.parametrize("every", [None, 1, 2])
def test_legacy_callback(
    decoder: KandinskyV22Pipeline, combined: KandinskyV22CombinedPipeline, every: int | None
) -> None:
    expected = [0, 1, 2] if every != 2 else [0, 2]
    log: list[tuple[int, tuple[int, ...]]] = []
    extra = {} if every is None else {"callback_steps": every}

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        log.append((step, tuple(latents.shape)))

    decoder(**pair(), **SMALL, callback=callback, **extra)
    combined("a cat", **SMALL, prior_num_inference_steps=2, callback=callback, **extra)
    assert log == [(step, (1, 4, 16, 16)) for step in expected] * 2


def test_combined_callbacks_of_both_stages(combined: KandinskyV22CombinedPipeline) -> None:
    first: list[Any] = []
    second: list[Any] = []
    combined(
        "a cat",
        **SMALL,
        prior_num_inference_steps=2,
        prior_callback_on_step_end=record(first),
        prior_callback_on_step_end_tensor_inputs=["latents", "text_mask"],
        callback_on_step_end=record(second),
        callback_on_step_end_tensor_inputs=["image_embeds"],
    )
    assert [sorted(entry[2]) for entry in first] == [["latents", "text_mask"]] * 2
    assert [sorted(entry[2]) for entry in second] == [["image_embeds"]] * 3


# Outputs


def test_tuple_equals_named_output(
    prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline, combined: KandinskyV22CombinedPipeline
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [
        (prior, {"prompt": "a cat", "num_inference_steps": 2}),
        (decoder, {**pair(), **SMALL}),
        (combined, {"prompt": "a cat", "prior_num_inference_steps": 2, **SMALL}),
    ]
    for pipe, arguments in calls:
        named = pipe(**arguments, generator=seeded(0))
        as_tuple = pipe(**arguments, generator=seeded(0), return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(named.to_tuple())
        for one, (name, other) in zip(as_tuple, zip(named.keys(), named.to_tuple(), strict=True), strict=True):
            assert torch.equal(one, other)
            assert named[name] is other is getattr(named, name)


def test_output_types(decoder: KandinskyV22Pipeline) -> None:
    options = {**pair(2), **SMALL}
    results = {
        kind: decoder(**{**options, "output_type": kind}, generator=seeded(0)).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert results["latent"].shape == (2, 4, 16, 16)
    assert results["pt"].shape == (2, 3, 32, 32)
    assert results["np"].shape == (2, 32, 32, 3)
    assert results["np"].dtype == np.float32
    assert results["np"].min() >= 0 and results["np"].max() <= 1
    assert [type(picture) for picture in results["pil"]] == [PIL.Image.Image] * 2
    assert [picture.size for picture in results["pil"]] == [(32, 32)] * 2
    np.testing.assert_allclose(
        (results["pt"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), results["np"], atol=1e-6
    )


def test_size_defaults_to_the_models_own(decoder: KandinskyV22Pipeline) -> None:
    assert decoder.default_size == 32
    assert decoder(**pair(), num_inference_steps=1, output_type="pil").images[0].size == (32, 32)
    assert decoder(**pair(), num_inference_steps=1, width=50, output_type="pil").images[0].size == (52, 32)


def test_prior_makes_arrays_that_the_decoder_takes(
    prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline
) -> None:
    out = prior("a cat", num_inference_steps=2, output_type="np", generator=seeded(0))
    tensors = prior("a cat", num_inference_steps=2, generator=seeded(0))
    results = [
        decoder(**dict(zip(inputs.keys(), inputs.to_tuple(), strict=True)), **SMALL, generator=seeded(1)).images
        for inputs in (out, tensors)
    ]
    assert torch.equal(*results)


# Defects of the reference, by their numbers in docs/defects.md


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_without_guidance_embeddings_are_repeated_and_cast(decoder: KandinskyV22Pipeline, dtype: torch.dtype) -> None:
    """[2]"""
    decoder = KandinskyV22Pipeline(**copy.deepcopy(decoder.components)).to(dtype)
    inputs = pair(2)
    images = decoder(**inputs, **SMALL, guidance_scale=1.0, num_images_per_prompt=2, generator=seeded(0)).images
    assert images.shape == (4, 4, 16, 16)
    assert images.dtype == dtype


def test_negative_embeddings_are_optional_without_guidance(decoder: KandinskyV22Pipeline) -> None:
    inputs = {"image_embeds": embeds(1, 1), "negative_image_embeds": None}
    assert decoder(**inputs, **SMALL, guidance_scale=1.0).images.shape == (1, 4, 16, 16)
    with pytest.raises(InputError, match="negative_image_embeds"):
        decoder(**inputs, **SMALL)


def test_latents_are_cast(prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline) -> None:
    """[4]"""
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=seeded(0))
    assert decoder(**pair(), **SMALL, latents=latents).images.dtype == torch.float32
    start = torch.randn(1, DIM, dtype=torch.float64, generator=seeded(0))
    assert prior("a cat", num_inference_steps=2, latents=start).image_embeds.dtype == torch.float32


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [(["a cat", "red"], "blue"), (["a cat", "red"], ["blue"]), ("a cat", ["blue", "ugly"]), ("a cat", "blue")],
)
def test_prompts_and_negatives_broadcast(prior: KandinskyV22PriorPipeline, prompt: Any, negative: Any) -> None:
    """[7]"""
    count = 1 if isinstance(prompt, str) and isinstance(negative, str) else 2
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    negatives = [negative] * count if isinstance(negative, str) else negative * (count // len(negative))
    out = prior(prompt, negative, num_inference_steps=2, generator=seeded(0))
    full = prior(prompts, negatives, num_inference_steps=2, generator=seeded(0))
    assert out.image_embeds.shape == out.negative_image_embeds.shape == (count, DIM)
    assert torch.equal(out.image_embeds, full.image_embeds)
    assert torch.equal(out.negative_image_embeds, full.negative_image_embeds)


def test_combined_latents_start_the_decoder(combined: KandinskyV22CombinedPipeline) -> None:
    """[8]"""
    latents = torch.randn(1, 4, 16, 16, generator=seeded(5))
    embeddings = combined.prior_pipe("a cat", num_inference_steps=2, generator=seeded(0))
    generator = seeded(0)
    options = {**SMALL, "latents": latents, "prior_num_inference_steps": 2}
    images = combined("a cat", **options, generator=generator).images
    generator = seeded(0)
    combined.prior_pipe("a cat", num_inference_steps=2, generator=generator)
    expected = combined.decoder_pipe(
        embeddings.image_embeds, embeddings.negative_image_embeds, **SMALL, latents=latents, generator=generator
    ).images
    assert torch.equal(images, expected)


def test_combined_progress_bar_shows_and_offloads_nothing(
    combined: KandinskyV22CombinedPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """[8]"""
    combined.set_progress_bar_config(disable=False)
    combined("a cat", **SMALL, prior_num_inference_steps=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "3/3" in shown
    assert list(combined.progress_bar([1, 2])) == [1, 2]
    combined.set_progress_bar_config(disable=True)
    capsys.readouterr()
    combined("a cat", **SMALL, prior_num_inference_steps=2)
    assert not capsys.readouterr().err


def test_interpolate_runs_on_the_execution_device(prior: KandinskyV22PriorPipeline) -> None:
    """[10]: inputs follow the execution device, whatever `device` says about the results."""
    out = prior.interpolate(
        ["a cat", PIL.Image.new("RGB", (40, 40), "red")], [0.5, 0.5], num_inference_steps=2, device="meta"
    )
    assert out.image_embeds.device.type == out.negative_image_embeds.device.type == "meta"


def test_output_type_is_checked_first(prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline) -> None:
    """[10]"""
    steps: list[Any] = []
    with pytest.raises(InputError, match="output_type"):
        decoder(**pair(), num_inference_steps=2, output_type="jpeg", callback_on_step_end=record(steps))
    with pytest.raises(InputError, match="output_type"):
        prior("a cat", num_inference_steps=2, output_type="pil", callback_on_step_end=record(steps))
    assert not steps


# Interpolation


def test_interpolate_of_embeddings_is_their_weighted_sum(prior: KandinskyV22PriorPipeline) -> None:
    out = prior.interpolate([embeds(1, 1), embeds(1, 2)[0]], [0.25, 0.75], num_images_per_prompt=2)
    expected = 0.25 * embeds(1, 1) + 0.75 * embeds(1, 2)
    assert torch.allclose(out.image_embeds, expected.expand(2, DIM))
    assert torch.equal(out.negative_image_embeds, prior.get_zero_embed(2))


def test_interpolate_takes_one_negative_for_each_picture(prior: KandinskyV22PriorPipeline) -> None:
    out = prior.interpolate(
        ["a cat"], [1.0], num_images_per_prompt=2, negative_prompt=["blue", "ugly"], num_inference_steps=2
    )
    assert out.image_embeds.shape == out.negative_image_embeds.shape == (2, DIM)


# Components


def test_combined_finds_the_prior_of_a_decoder(checkpoints: Path, combined: KandinskyV22CombinedPipeline) -> None:
    call = {"prompt": "a red cat", "prior_num_inference_steps": 2, **SMALL}
    expected = combined(**call, generator=seeded(0)).images
    prior = KandinskyV22PriorPipeline.from_pretrained(checkpoints / "prior")
    sources: list[dict[str, Any]] = [{}, {"prior": prior}, {"prior": checkpoints / "prior"}]
    for inputs in sources:
        for kind in (KandinskyV22CombinedPipeline, AutoPipelineForText2Image):
            pipe: Any = kind.from_pretrained(checkpoints / "decoder", **inputs)
            assert type(pipe) is KandinskyV22CombinedPipeline
            pipe.set_progress_bar_config(disable=True)
            assert torch.equal(pipe(**call, generator=seeded(0)).images, expected)
    assert pipe.prior_prior is not prior.prior
    shared = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder", prior=prior)
    assert shared.prior_prior is prior.prior


def test_auto_pipeline(
    checkpoints: Path, decoder: KandinskyV22Pipeline, combined: KandinskyV22CombinedPipeline
) -> None:
    assert isinstance(AutoPipelineForText2Image.from_pretrained(checkpoints / "combined"), KandinskyV22CombinedPipeline)
    again: Any = AutoPipelineForText2Image.from_pipe(combined)
    assert again.components.keys() == combined.components.keys()
    assert all(again.components[name] is part for name, part in combined.components.items())
    with pytest.raises(InputError, match="KandinskyV22PriorPipeline cannot do text to image"):
        AutoPipelineForText2Image.from_pretrained(checkpoints / "prior")
    with pytest.raises(InputError, match="from_pretrained"):
        AutoPipelineForText2Image()


def test_assigned_components_reach_the_stages(combined: KandinskyV22CombinedPipeline) -> None:
    call = {"prompt": "a red cat", "prior_num_inference_steps": 2, **SMALL}
    before = combined(**call, generator=seeded(0)).images
    combined.scheduler = kandinsky22.DDIMScheduler.from_config(combined.scheduler.config)
    assert combined.decoder_pipe.scheduler is combined.scheduler
    assert difference(combined(**call, generator=seeded(0)).images, before) > 1e-3
