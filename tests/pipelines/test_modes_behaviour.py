"""Behaviour of the four decoders that start from pictures or hints, and errors of the reference in them."""

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
from tests.pipelines.pictures import box_mask, box_mask_image, hint, photo, photo_tensor
from tests.pipelines.tiny import MODES, difference, embeds, pair, seeded

# Absolute, for pixels in [0, 1]: rounding depends on the batch size.
SAME = 1e-4
Ours = Callable[..., Any]


def numbers(value: Any) -> Any:
    """Return a tensor, array or picture as an array."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def largest_difference(one: Any, other: Any) -> float:
    """Return the largest absolute difference."""
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def two_pictures(mode: str) -> dict[str, list[Any]]:
    """Return two of every picture that a mode accepts."""
    arguments: dict[str, list[Any]] = {}
    if mode != "Controlnet":
        arguments["image"] = [photo(1), photo(2, 50, 40)]
    if mode == "Inpaint":
        arguments["mask_image"] = [box_mask_image(), PIL.Image.fromarray(np.rot90(np.array(box_mask_image())))]
    if mode.startswith("Controlnet"):
        arguments["hint"] = [hint(1, 1), photo(3, 128, 128)]
    return arguments


@pytest.mark.parametrize("mode", MODES)
def test_signatures(mode: str, mode_oracles: dict[str, Any], make_pipeline: Ours) -> None:
    """Names, order and defaults are the reference's, except that sizes default to the model's; new arguments follow."""
    ours = inspect.signature(type(make_pipeline(mode)).__call__).parameters
    theirs = dict(inspect.signature(type(mode_oracles[mode]).__call__).parameters)
    theirs.pop("kwargs", None)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {"callback", "callback_steps", "callback_on_step_end"} <= set(ours)
    for name, parameter in theirs.items():
        assert ours[name].default == (None if name in ("height", "width") else parameter.default), name


@pytest.mark.parametrize("mode", MODES)
def test_size_defaults_to_the_models_own(mode: str, make_pipeline: Ours) -> None:
    arguments = small_call(mode) | {"height": None, "width": None}
    pipe = make_pipeline(mode)
    assert pipe(**arguments).images.shape == (1, 32, 32, 3)
    arguments = small_call(mode) | {"height": 21, "width": 38}
    if "hint" in arguments:
        arguments["hint"] = hint(1, 1, 24, 40)
    assert pipe(**arguments).images.shape == (1, 24, 40, 3)


@pytest.mark.parametrize("mode", MODES)
def test_tuple_equals_named_output(mode: str, make_pipeline: Ours) -> None:
    pipe = make_pipeline(mode)
    complete = pipe(**small_call(mode), generator=seeded(1))
    (images,) = pipe(**small_call(mode), generator=seeded(1), return_dict=False)
    assert np.array_equal(complete.images, images)
    assert np.array_equal(complete["images"], complete[0])


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_single_calls(mode: str, guidance: float, make_pipeline: Ours) -> None:
    pipe, pictures = make_pipeline(mode), two_pictures(mode)
    common = small_call(mode) | {"guidance_scale": guidance, "num_images_per_prompt": 2}
    generators = [seeded(seed) for seed in range(4)]
    together = pipe(**{**common, **pair(2, seed=1), **pictures, "generator": generators}).images
    assert len(together) == 4
    for row in range(2):
        single = {name: value[row] for name, value in pictures.items()}
        single |= {name: value[row : row + 1] for name, value in pair(2, seed=1).items()}
        alone = pipe(**{**common, **single, "generator": [seeded(2 * row), seeded(2 * row + 1)]}).images
        assert largest_difference(together[2 * row : 2 * row + 2], alone) < SAME
    assert largest_difference(together[0], together[2]) > 0.01, "the rows must differ, or the comparison proves nothing"


@pytest.mark.parametrize("mode", MODES)
def test_one_picture_is_used_for_the_batch(mode: str, make_pipeline: Ours) -> None:
    pipe, pictures = make_pipeline(mode), two_pictures(mode)
    common = small_call(mode) | pair(2, seed=1)
    one = pipe(**{**common, **{name: value[1] for name, value in pictures.items()}, "generator": seeded(1)}).images
    same = pipe(**{**common, **{name: [value[1]] * 2 for name, value in pictures.items()}, "generator": seeded(1)})
    assert largest_difference(one, same.images) < SAME


def test_the_reference_keeps_one_mask_for_all(mode_oracles: dict[str, Any], make_pipeline: Ours) -> None:
    """Of two pictures, one is repainted nowhere and one everywhere: only the second may change."""
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    pictures = torch.stack([photo_tensor(1, signed=True), photo_tensor(2, signed=True)])
    results = {}
    for name, pipe in (("ours", make_pipeline("Inpaint")), ("theirs", mode_oracles["Inpaint"])):
        arguments = {**small_call("Inpaint"), **pair(2, seed=1), "image": pictures.clone(), "mask_image": masks.clone()}
        results[name] = pipe(**{**arguments, "output_type": "latent", "generator": seeded(1)}).images
    encoded = mode_oracles["Inpaint"].movq.encode(pictures).latents.detach()
    assert difference(results["ours"][0], encoded[0]) < 1e-4
    assert difference(results["ours"][1], encoded[1]) > 0.1
    assert difference(results["theirs"][1], encoded[0]) < 1e-4, "the first picture instead of the second"


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_not_modified(mode: str, make_pipeline: Ours) -> None:
    arguments: dict[str, Any] = small_call(mode) | {"latents": torch.randn(1, 4, 16, 16, generator=seeded(3))}
    arguments |= {"image_embeds": embeds(1, 1), "negative_image_embeds": embeds(1, 2)}
    pipe = make_pipeline(mode)
    arguments = {
        name: value for name, value in arguments.items() if name in inspect.signature(pipe.__call__).parameters
    }
    kinds: list[dict[str, Any]] = [{}]
    if "image" in arguments:
        kinds = [
            {"image": np.array(photo(1))},
            {"image": photo_tensor(1, signed=True)},
            {"image": [photo_tensor(2)[None]]},
        ]
    if "mask_image" in arguments:
        kinds = [
            kind | {"mask_image": mask}
            for kind in kinds
            for mask in (box_mask() * 0.7, torch.from_numpy(box_mask() * 0.7))
        ]
    for kind in kinds:
        call = arguments | kind
        arrays = {name: value for name, value in call.items() if isinstance(value, np.ndarray | torch.Tensor)}
        before = {name: numbers(value).copy() for name, value in arrays.items()}
        pipe(**call)
        for name, value in before.items():
            assert np.array_equal(value, numbers(arrays[name])), name


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_cast_to_the_networks_dtype(mode: str, make_pipeline: Ours) -> None:
    """Everything in float64, guidance on and off; the networks are in float32."""
    pipe = make_pipeline(mode)
    for guidance in (4.0, 1.0):
        arguments = small_call(mode) | {"guidance_scale": guidance}
        if not mode.endswith("Img2Img"):
            arguments["latents"] = torch.randn(1, 4, 16, 16, generator=seeded(3))
        if "image" in arguments:
            arguments["image"] = photo_tensor(1, signed=True)
        wider = {
            name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        results = [pipe(**call, generator=seeded(1)).images for call in (arguments, wider)]
        assert largest_difference(*results) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode: str, make_pipeline: Ours) -> None:
    pipe = make_pipeline(mode).to(torch.bfloat16)
    for guidance in (4.0, 1.0):
        images = pipe(**small_call(mode) | {"guidance_scale": guidance}).images
        assert images.dtype == np.float32
        assert np.isfinite(images).all()


@pytest.mark.parametrize("mode", MODES)
def test_callbacks_on_every_class(mode: str, make_pipeline: Ours) -> None:
    """Both kinds work, the legacy one without callback_steps too; hints can be read and changed."""
    pipe, events = make_pipeline(mode), []

    def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> Any:
        assert self is pipe
        assert list(tensors) == pipe._callback_tensor_inputs
        events.append(("end", step, int(timestep)))
        return {"hint": tensors["hint"] * 0} if "hint" in tensors else {}

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        assert latents.shape == (1, 4, 16, 16)
        events.append(("callback", step, int(timestep)))

    arguments = small_call(mode) | {"num_inference_steps": 4, "output_type": "latent"}
    callbacks = {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs,
    }
    baseline = pipe(**arguments, generator=seeded(1)).images
    changed_images = pipe(**arguments, **callbacks, callback=callback, generator=seeded(1)).images
    steps = 2 if mode.endswith("Img2Img") else 4
    assert len(events) == 2 * steps == 2 * pipe.num_timesteps
    assert [entry[1] for entry in events] == [step for step in range(steps) for _ in range(2)]
    changed = difference(baseline, changed_images)
    assert changed > 0.01 if mode.startswith("Controlnet") else changed == 0, "only the hint is changed"


def test_callbacks_may_switch_guidance_off(make_pipeline: Ours) -> None:
    """After a callback switches guidance off, the conditional halves of hint and mask are used alone."""
    for mode in ("Controlnet", "Inpaint"):
        pipe = make_pipeline(mode)

        def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> Any:
            self._guidance_scale = 1.0
            return {}

        arguments = small_call(mode) | {"num_inference_steps": 4, "generator": seeded(1)}
        assert np.isfinite(pipe(**arguments, callback_on_step_end=on_step_end).images).all()


@pytest.mark.parametrize("mode", MODES)
def test_interrupt(mode: str, make_pipeline: Ours) -> None:
    pipe, latents = make_pipeline(mode), []

    def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        latents.append(tensors["latents"])
        if step == 1:
            self.interrupt()

    arguments = small_call(mode) | {
        "num_inference_steps": 10,
        "output_type": "latent",
        "callback_on_step_end": on_step_end,
    }
    result = pipe(**arguments).images
    assert len(latents) == 2
    if mode != "Inpaint":  # inpainting finishes the unmasked region
        assert torch.equal(result, latents[-1])
    latents.clear()
    arguments["callback_on_step_end"] = lambda self, step, timestep, tensors: latents.append(tensors["latents"])
    pipe(**arguments)
    assert len(latents) == pipe.num_timesteps, "the next call runs to its end"
    latents.clear()
    pipe(**arguments, callback=lambda *_: pipe.interrupt())
    assert len(latents) == 1


def test_interrupted_inpainting_keeps_the_unmasked_region(make_pipeline: Ours) -> None:
    pipe = make_pipeline("Inpaint")
    arguments = small_call("Inpaint") | {
        "num_inference_steps": 10,
        "output_type": "latent",
        "mask_image": np.zeros((4, 4)),
    }
    complete = pipe(**arguments).images
    cut = pipe(**arguments, callback=lambda *_: pipe.interrupt()).images
    assert torch.equal(complete, cut)


# Starting from a picture


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img"])
def test_strength(mode: str, make_pipeline: Ours) -> None:
    pipe = make_pipeline(mode)
    encoded = pipe.movq.encode(photo_tensor(1, signed=True)[None])[0].detach()
    arguments = small_call(mode) | {"num_inference_steps": 10, "output_type": "latent"}
    for strength, steps in ((0, 0), (0.05, 0), (0.1, 1), (0.29, 2), (0.999, 9), (1, 10), (np.float32(1.0), 10)):
        generator, log = seeded(1), []
        call = arguments | {"strength": strength, "generator": generator, "callback": lambda *_, log=log: log.append(1)}
        result = pipe(**call).images
        assert len(log) == pipe.num_timesteps == steps
        if steps == 0:
            assert difference(result, encoded) < 1e-5, "no noise is added and no step is run"
        else:
            assert difference(result, encoded) > 0.01
    assert pipe(**arguments | {"strength": 0.0, "output_type": "pil"}).images[0].size == (32, 32)


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img", "Inpaint"])
def test_latents_instead_of_a_picture(mode: str, make_pipeline: Ours) -> None:
    """The reference encodes them as if they were pixels, and fails."""
    pipe = make_pipeline(mode)
    encoded = pipe.movq.encode(torch.stack([photo_tensor(1, signed=True), photo_tensor(2, signed=True)]))[0].detach()
    common = small_call(mode) | pair(2, seed=1) | {"generator": seeded(1)}
    expected = pipe(**common | {"image": [photo(1), photo(2)]}).images
    for arguments in (encoded, encoded.double(), list(encoded), [encoded[:1], encoded[1]]):
        assert largest_difference(pipe(**common | {"image": arguments, "generator": seeded(1)}).images, expected) < SAME


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img", "Inpaint"])
def test_kinds_of_pictures_agree(mode: str, make_pipeline: Ours, tmp_path: Path) -> None:
    pipe, picture = make_pipeline(mode), photo(1, 40, 24)
    pixels = np.array(picture)
    picture.save(tmp_path / "picture.png")
    rotated = picture.transpose(PIL.Image.Transpose.ROTATE_90)  # EXIF orientation 6 rotates it back by 90 degrees
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.png", exif=exif)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    signed = chw.float() / 127.5 - 1
    kinds: dict[str, Any] = {
        "path": tmp_path / "picture.png",
        "string": str(tmp_path / "picture.png"),
        "rotated": str(tmp_path / "rotated.png"),
        "rotated, opened": PIL.Image.open(tmp_path / "rotated.png"),
        "rgba": picture.convert("RGBA"),
        "array": pixels,
        "array with alpha": np.dstack([pixels, np.full((24, 40), 7, np.uint8)]),
        "arrays": pixels[None],
        "floats": pixels / 255,
        "half floats": (pixels / 255).astype(np.float16),
        "mirrored twice": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "big-endian": (pixels / 255).astype(">f4"),
        "bytes in a tensor": chw,
        "tensor": signed,
        "tensors": signed[None],
        "list": [picture],
        "tuple of tensors": (signed,),
    }
    common = small_call(mode) | {"height": 24, "width": 40, "generator": seeded(1)}
    if "hint" in common:
        common["hint"] = hint(1, 1, 24, 40)
    expected = pipe(**common | {"image": picture}).images
    for name, kind in kinds.items():
        result = pipe(**common | {"image": kind, "generator": seeded(1)}).images
        assert largest_difference(result, expected) < (2e-3 if name == "half floats" else SAME), name


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint"])
def test_grey_pictures_agree(mode: str, make_pipeline: Ours) -> None:
    pipe = make_pipeline(mode)
    grey = photo(1).convert("L")
    values = np.array(grey)
    deep = values.astype(np.uint16) * 257
    kinds: dict[str, Any] = {
        "L": grey,
        "LA": grey.convert("LA"),
        "P": grey.convert("P"),
        "I;16": PIL.Image.fromarray(deep),
        "I": PIL.Image.fromarray(deep.astype(np.int32)),
        "F": PIL.Image.fromarray(values.astype(np.float32)),
        "array": values,
        "array, one channel": values[..., None],
        "floats": values / 255,
        "tensor": torch.from_numpy(values)[None],
        "tensors": torch.from_numpy(values)[None, None],
    }
    common = small_call(mode)
    expected = pipe(**common | {"image": grey.convert("RGB"), "generator": seeded(1)}).images
    for name, kind in kinds.items():
        assert largest_difference(pipe(**common | {"image": kind, "generator": seeded(1)}).images, expected) < SAME, (
            name
        )


# Hints


@pytest.mark.parametrize("mode", ["Controlnet", "ControlnetImg2Img"])
def test_kinds_of_hints_agree(mode: str, make_pipeline: Ours) -> None:
    pipe, picture = make_pipeline(mode), photo(1, 128, 128).convert("L")
    grey = np.array(picture)
    kinds: dict[str, Any] = {
        "rgb": picture.convert("RGB"),
        "list": [picture],
        "16 bits": PIL.Image.fromarray(grey.astype(np.uint16) * 257),
        "array": grey,
        "floats": np.repeat(grey[..., None] / 255, 3, axis=2),
        "bytes in a tensor": torch.from_numpy(grey)[None],
        "tensor": torch.from_numpy(grey / 255)[None, None],
    }
    common = small_call(mode)
    expected = pipe(**common | {"hint": picture, "generator": seeded(1)}).images
    for name, kind in kinds.items():
        assert largest_difference(pipe(**common | {"hint": kind, "generator": seeded(1)}).images, expected) < SAME, name
    latents = pipe(**common | {"hint": picture, "output_type": "latent", "generator": seeded(1)}).images
    assert latents.shape == (1, 4, 16, 16)


# Masks


def test_kinds_of_masks_agree(make_pipeline: Ours, tmp_path: Path) -> None:
    pipe, mask = make_pipeline("Inpaint"), box_mask()
    image = box_mask_image()
    image.save(tmp_path / "mask.png")
    grey = np.array(image)
    kinds: dict[str, Any] = {
        "path": tmp_path / "mask.png",
        "rgb": image.convert("RGB"),
        "rgba": image.convert("RGBA"),
        "palette": image.convert("P"),
        "bits": image.convert("1"),
        "16 bits": PIL.Image.fromarray(grey.astype(np.uint16) * 257),
        "floats": mask,
        "soft": mask * 0.5 + (1 - mask) * 0.49,
        "doubles": mask.astype(np.float64),
        "bytes": grey,
        "ones in bytes": mask.astype(np.uint8),
        "integers": mask.astype(np.int64),
        "booleans": mask > 0,
        "one channel": mask[..., None],
        "colours": np.repeat(grey[..., None], 3, axis=2),
        "batch": mask[None],
        "batch of one channel": mask[None, ..., None],
        "tensor": torch.from_numpy(mask),
        "tensor 1HW": torch.from_numpy(mask)[None],
        "tensor N1HW": torch.from_numpy(mask)[None, None],
        "tensor NHW1": torch.from_numpy(mask)[None, ..., None],
        "tensor of colours": torch.from_numpy(mask).expand(1, 3, 32, 32),
        "tensor of booleans": torch.from_numpy(mask) > 0,
        "tensor of bytes": torch.from_numpy(grey),
        "list": [image],
        "larger": np.repeat(np.repeat(mask, 3, axis=0), 3, axis=1),
    }
    common = small_call("Inpaint") | {"output_type": "latent"}
    expected = pipe(**common | {"mask_image": image, "generator": seeded(1)}).images
    for name, kind in kinds.items():
        result = pipe(**common | {"mask_image": kind, "generator": seeded(1)}).images
        assert torch.equal(result, expected), name


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_keep_pixels(output_type: str, make_pipeline: Ours) -> None:
    pipe, picture, mask = make_pipeline("Inpaint"), photo(1, 90, 70), box_mask(40, 24)
    call = small_call("Inpaint") | pair(2, seed=1) | {"height": 24, "width": 40, "image": picture, "mask_image": mask}
    call |= {"num_images_per_prompt": 2, "output_type": output_type}
    baseline = pipe(**call, generator=seeded(1)).images
    restored = pipe(**call, keep_pixels=True, generator=seeded(1)).images
    resized = np.array(picture.resize((40, 24), PIL.Image.Resampling.BICUBIC, reducing_gap=1))
    expected = resized if output_type == "pil" else resized.astype(np.float32) / 255
    for one, other in zip(restored, baseline, strict=True):
        one, other = numbers(one), numbers(other)
        if output_type == "pt":
            one, other = one.transpose(1, 2, 0) * 0.5 + 0.5, other.transpose(1, 2, 0) * 0.5 + 0.5
        if output_type == "pil":
            assert np.array_equal(one[mask == 0], expected[mask == 0])
        assert largest_difference(one[mask == 0], expected[mask == 0]) < 1e-6
        assert np.array_equal(one[mask == 1], other[mask == 1])


def test_keep_pixels_is_exact_in_low_precision(make_pipeline: Ours) -> None:
    pipe, picture = make_pipeline("Inpaint").to(torch.bfloat16), photo(1)
    (restored,) = pipe(**small_call("Inpaint") | {"output_type": "pil", "image": picture}, keep_pixels=True).images
    assert np.array_equal(np.array(restored)[box_mask() == 0], np.array(picture)[box_mask() == 0])


def test_weights_are_shared_between_decoder_classes(make_pipeline: Ours) -> None:
    """Text-to-image weights also serve img2img, and ControlNet weights serve both ControlNet classes."""
    import kandinsky22

    text = kandinsky22.KandinskyV22Pipeline.from_pipe(make_pipeline("Img2Img"))
    again = kandinsky22.KandinskyV22Img2ImgPipeline.from_pipe(text)
    assert again(**small_call("Img2Img")).images.shape == (1, 32, 32, 3)
    hinted = kandinsky22.KandinskyV22ControlnetImg2ImgPipeline.from_pipe(make_pipeline("Controlnet"))
    assert hinted(**small_call("ControlnetImg2Img")).images.shape == (1, 32, 32, 3)
