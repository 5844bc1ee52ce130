"""What the four decoders that start from pictures promise, and what the reference gets wrong there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.test_modes_parity import box, box_image, hint, photo, standard, tensor, two
from tests.pipelines.tiny import MODES, difference, embeds, seeded

SAME = 1e-4  # absolute, pixels in [0, 1]: how many rows a network gets at once moves rounding
Ours = Callable[[str], Any]


def numbers(value: Any) -> Any:
    """An array, of whatever holds numbers."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def off(one: Any, other: Any) -> float:
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def of_two(mode: str) -> dict[str, list[Any]]:
    """Two of every picture that a mode takes."""
    given: dict[str, list[Any]] = {}
    if mode != "Controlnet":
        given["image"] = [photo(1), photo(2, 50, 40)]
    if mode == "Inpaint":
        given["mask_image"] = [box_image(), PIL.Image.fromarray(np.rot90(np.array(box_image())))]
    if mode.startswith("Controlnet"):
        given["hint"] = [hint(1, 1), photo(3, 128, 128)]
    return given


@pytest.mark.parametrize("mode", MODES)
def test_signatures(mode: str, mode_oracles: dict[str, Any], modes: Ours) -> None:
    """Names, order and defaults are the reference's; sizes default to the model's own, and ours add some at the end."""
    ours = inspect.signature(type(modes(mode)).__call__).parameters
    theirs = dict(inspect.signature(type(mode_oracles[mode]).__call__).parameters)
    theirs.pop("kwargs", None)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {"callback", "callback_steps", "callback_on_step_end"} <= set(ours)
    for name, parameter in theirs.items():
        assert ours[name].default == (None if name in ("height", "width") else parameter.default), name


@pytest.mark.parametrize("mode", MODES)
def test_size_of_the_model_unless_given(mode: str, modes: Ours) -> None:
    given = standard(mode) | {"height": None, "width": None}
    pipe = modes(mode)
    assert pipe(**given).images.shape == (1, 32, 32, 3)
    given = standard(mode) | {"height": 21, "width": 38}
    if "hint" in given:
        given["hint"] = hint(1, 1, 24, 40)
    assert pipe(**given).images.shape == (1, 24, 40, 3)


@pytest.mark.parametrize("mode", MODES)
def test_tuple_is_dict(mode: str, modes: Ours) -> None:
    pipe = modes(mode)
    whole = pipe(**standard(mode), generator=seeded(1))
    (images,) = pipe(**standard(mode), generator=seeded(1), return_dict=False)
    assert np.array_equal(whole.images, images)
    assert np.array_equal(whole["images"], whole[0])


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_batch_is_its_single_pictures(mode: str, guidance: float, modes: Ours) -> None:
    pipe, pictures = modes(mode), of_two(mode)
    common = standard(mode) | {"guidance_scale": guidance, "num_images_per_prompt": 2}
    generators = [seeded(seed) for seed in range(4)]
    together = pipe(**{**common, **two(), **pictures, "generator": generators}).images
    assert len(together) == 4
    for row in range(2):
        own = {name: value[row] for name, value in pictures.items()}
        own |= {name: value[row : row + 1] for name, value in two().items()}
        alone = pipe(**{**common, **own, "generator": [seeded(2 * row), seeded(2 * row + 1)]}).images
        assert off(together[2 * row : 2 * row + 2], alone) < SAME
    assert off(together[0], together[2]) > 0.01, "the rows are to differ, or else the comparison says nothing"


@pytest.mark.parametrize("mode", MODES)
def test_one_picture_serves_all(mode: str, modes: Ours) -> None:
    pipe, pictures = modes(mode), of_two(mode)
    common = standard(mode) | two()
    one = pipe(**{**common, **{name: value[1] for name, value in pictures.items()}, "generator": seeded(1)}).images
    same = pipe(**{**common, **{name: [value[1]] * 2 for name, value in pictures.items()}, "generator": seeded(1)})
    assert off(one, same.images) < SAME


def test_the_reference_keeps_one_mask_for_all(mode_oracles: dict[str, Any], modes: Ours) -> None:
    """Two pictures, repainted nowhere and everywhere: the second is to be new, the first not."""
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    pictures = torch.stack([tensor(1, signed=True), tensor(2, signed=True)])
    results = {}
    for name, pipe in (("ours", modes("Inpaint")), ("theirs", mode_oracles["Inpaint"])):
        given = {**standard("Inpaint"), **two(), "image": pictures.clone(), "mask_image": masks.clone()}
        results[name] = pipe(**{**given, "output_type": "latent", "generator": seeded(1)}).images
    encoded = mode_oracles["Inpaint"].movq.encode(pictures).latents.detach()
    assert difference(results["ours"][0], encoded[0]) < 1e-4
    assert difference(results["ours"][1], encoded[1]) > 0.1
    assert difference(results["theirs"][1], encoded[0]) < 1e-4, "the first picture, whole, in place of the second"


@pytest.mark.parametrize("mode", MODES)
def test_inputs_stay_as_they_are(mode: str, modes: Ours) -> None:
    given: dict[str, Any] = standard(mode) | {"latents": torch.randn(1, 4, 16, 16, generator=seeded(3))}
    given |= {"image_embeds": embeds(1, 1), "negative_image_embeds": embeds(1, 2)}
    pipe = modes(mode)
    given = {name: value for name, value in given.items() if name in inspect.signature(pipe.__call__).parameters}
    kinds: list[dict[str, Any]] = [{}]
    if "image" in given:
        kinds = [{"image": np.array(photo(1))}, {"image": tensor(1, signed=True)}, {"image": [tensor(2)[None]]}]
    if "mask_image" in given:
        kinds = [kind | {"mask_image": mask} for kind in kinds for mask in (box() * 0.7, torch.from_numpy(box() * 0.7))]
    for kind in kinds:
        call = given | kind
        arrays = {name: value for name, value in call.items() if isinstance(value, np.ndarray | torch.Tensor)}
        before = {name: numbers(value).copy() for name, value in arrays.items()}
        pipe(**call)
        for name, value in before.items():
            assert np.array_equal(value, numbers(arrays[name])), name


@pytest.mark.parametrize("mode", MODES)
def test_other_types_are_brought_to_the_networks(mode: str, modes: Ours) -> None:
    """Everything in float64, guidance on and off; the networks are in float32."""
    pipe = modes(mode)
    for guidance in (4.0, 1.0):
        given = standard(mode) | {"guidance_scale": guidance}
        if not mode.endswith("Img2Img"):
            given["latents"] = torch.randn(1, 4, 16, 16, generator=seeded(3))
        if "image" in given:
            given["image"] = tensor(1, signed=True)
        wider = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        results = [pipe(**call, generator=seeded(1)).images for call in (given, wider)]
        assert off(*results) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode: str, modes: Ours) -> None:
    pipe = modes(mode).to(torch.bfloat16)
    for guidance in (4.0, 1.0):
        images = pipe(**standard(mode) | {"guidance_scale": guidance}).images
        assert images.dtype == np.float32
        assert np.isfinite(images).all()


@pytest.mark.parametrize("mode", MODES)
def test_callbacks_on_every_class(mode: str, modes: Ours) -> None:
    """Both kinds, the legacy one without callback_steps too; hints can be seen and changed."""
    pipe, seen = modes(mode), []

    def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> Any:
        assert self is pipe
        assert list(tensors) == pipe._callback_tensor_inputs
        seen.append(("end", step, int(timestep)))
        return {"hint": tensors["hint"] * 0} if "hint" in tensors else {}

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        assert latents.shape == (1, 4, 16, 16)
        seen.append(("callback", step, int(timestep)))

    given = standard(mode) | {"num_inference_steps": 4, "output_type": "latent"}
    told = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}
    plain = pipe(**given, generator=seeded(1)).images
    heard = pipe(**given, **told, callback=callback, generator=seeded(1)).images
    steps = 2 if mode.endswith("Img2Img") else 4
    assert len(seen) == 2 * steps == 2 * pipe.num_timesteps
    assert [entry[1] for entry in seen] == [step for step in range(steps) for _ in range(2)]
    changed = difference(plain, heard)
    assert changed > 0.01 if mode.startswith("Controlnet") else changed == 0, "only the hint is another"


def test_guidance_may_end_early(modes: Ours) -> None:
    """A callback turns guidance off: the conditional halves of hint and mask go on alone."""
    for mode in ("Controlnet", "Inpaint"):
        pipe = modes(mode)

        def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> Any:
            self._guidance_scale = 1.0
            return {}

        given = standard(mode) | {"num_inference_steps": 4, "generator": seeded(1)}
        assert np.isfinite(pipe(**given, callback_on_step_end=on_step_end).images).all()


@pytest.mark.parametrize("mode", MODES)
def test_interrupt(mode: str, modes: Ours) -> None:
    pipe, latents = modes(mode), []

    def on_step_end(self: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        latents.append(tensors["latents"])
        if step == 1:
            self.interrupt()

    given = standard(mode) | {"num_inference_steps": 10, "output_type": "latent", "callback_on_step_end": on_step_end}
    result = pipe(**given).images
    assert len(latents) == 2
    if mode != "Inpaint":  # there the kept part is finished
        assert torch.equal(result, latents[-1])
    latents.clear()
    given["callback_on_step_end"] = lambda self, step, timestep, tensors: latents.append(tensors["latents"])
    pipe(**given)
    assert len(latents) == pipe.num_timesteps, "the next call runs to its end"
    latents.clear()
    pipe(**given, callback=lambda *_: pipe.interrupt())
    assert len(latents) == 1


def test_interrupted_inpainting_keeps_what_is_kept(modes: Ours) -> None:
    pipe = modes("Inpaint")
    given = standard("Inpaint") | {"num_inference_steps": 10, "output_type": "latent", "mask_image": np.zeros((4, 4))}
    whole = pipe(**given).images
    cut = pipe(**given, callback=lambda *_: pipe.interrupt()).images
    assert torch.equal(whole, cut)


# Starting from a picture


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img"])
def test_strength(mode: str, modes: Ours) -> None:
    pipe = modes(mode)
    encoded = pipe.movq.encode(tensor(1, signed=True)[None])[0].detach()
    given = standard(mode) | {"num_inference_steps": 10, "output_type": "latent"}
    for strength, steps in ((0, 0), (0.05, 0), (0.1, 1), (0.29, 2), (0.999, 9), (1, 10), (np.float32(1.0), 10)):
        generator, log = seeded(1), []
        call = given | {"strength": strength, "generator": generator, "callback": lambda *_, log=log: log.append(1)}
        result = pipe(**call).images
        assert len(log) == pipe.num_timesteps == steps
        if steps == 0:
            assert difference(result, encoded) < 1e-5, "nothing is added and nothing removed"
        else:
            assert difference(result, encoded) > 0.01
    assert pipe(**given | {"strength": 0.0, "output_type": "pil"}).images[0].size == (32, 32)


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img", "Inpaint"])
def test_latents_instead_of_a_picture(mode: str, modes: Ours) -> None:
    """The reference encodes them as if they were pixels, and fails."""
    pipe = modes(mode)
    encoded = pipe.movq.encode(torch.stack([tensor(1, signed=True), tensor(2, signed=True)]))[0].detach()
    common = standard(mode) | two() | {"generator": seeded(1)}
    expected = pipe(**common | {"image": [photo(1), photo(2)]}).images
    for given in (encoded, encoded.double(), list(encoded), [encoded[:1], encoded[1]]):
        assert off(pipe(**common | {"image": given, "generator": seeded(1)}).images, expected) < SAME


@pytest.mark.parametrize("mode", ["Img2Img", "ControlnetImg2Img", "Inpaint"])
def test_kinds_of_pictures_agree(mode: str, modes: Ours, tmp_path: Path) -> None:
    pipe, picture = modes(mode), photo(1, 40, 24)
    pixels = np.array(picture)
    picture.save(tmp_path / "picture.png")
    turned = picture.transpose(PIL.Image.Transpose.ROTATE_90)  # exif orientation 6: turn it back by a quarter
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    signed = chw.float() / 127.5 - 1
    kinds: dict[str, Any] = {
        "path": tmp_path / "picture.png",
        "string": str(tmp_path / "picture.png"),
        "turned": str(tmp_path / "turned.png"),
        "turned, opened": PIL.Image.open(tmp_path / "turned.png"),
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
    common = standard(mode) | {"height": 24, "width": 40, "generator": seeded(1)}
    if "hint" in common:
        common["hint"] = hint(1, 1, 24, 40)
    expected = pipe(**common | {"image": picture}).images
    for name, kind in kinds.items():
        result = pipe(**common | {"image": kind, "generator": seeded(1)}).images
        assert off(result, expected) < (2e-3 if name == "half floats" else SAME), name


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint"])
def test_grey_pictures_agree(mode: str, modes: Ours) -> None:
    pipe = modes(mode)
    grey = photo(1).convert("L")
    level = np.array(grey)
    deep = level.astype(np.uint16) * 257
    kinds: dict[str, Any] = {
        "L": grey,
        "LA": grey.convert("LA"),
        "P": grey.convert("P"),
        "I;16": PIL.Image.fromarray(deep),
        "I": PIL.Image.fromarray(deep.astype(np.int32)),
        "F": PIL.Image.fromarray(level.astype(np.float32)),
        "array": level,
        "array, one channel": level[..., None],
        "floats": level / 255,
        "tensor": torch.from_numpy(level)[None],
        "tensors": torch.from_numpy(level)[None, None],
    }
    common = standard(mode)
    expected = pipe(**common | {"image": grey.convert("RGB"), "generator": seeded(1)}).images
    for name, kind in kinds.items():
        assert off(pipe(**common | {"image": kind, "generator": seeded(1)}).images, expected) < SAME, name


# Hints


@pytest.mark.parametrize("mode", ["Controlnet", "ControlnetImg2Img"])
def test_kinds_of_hints_agree(mode: str, modes: Ours) -> None:
    pipe, picture = modes(mode), photo(1, 128, 128).convert("L")
    level = np.array(picture)
    kinds: dict[str, Any] = {
        "rgb": picture.convert("RGB"),
        "list": [picture],
        "16 bits": PIL.Image.fromarray(level.astype(np.uint16) * 257),
        "array": level,
        "floats": np.repeat(level[..., None] / 255, 3, axis=2),
        "bytes in a tensor": torch.from_numpy(level)[None],
        "tensor": torch.from_numpy(level / 255)[None, None],
    }
    common = standard(mode)
    expected = pipe(**common | {"hint": picture, "generator": seeded(1)}).images
    for name, kind in kinds.items():
        assert off(pipe(**common | {"hint": kind, "generator": seeded(1)}).images, expected) < SAME, name
    latents = pipe(**common | {"hint": picture, "output_type": "latent", "generator": seeded(1)}).images
    assert latents.shape == (1, 4, 16, 16)


# Masks


def test_kinds_of_masks_agree(modes: Ours, tmp_path: Path) -> None:
    pipe, mask = modes("Inpaint"), box()
    image = box_image()
    image.save(tmp_path / "mask.png")
    level = np.array(image)
    kinds: dict[str, Any] = {
        "path": tmp_path / "mask.png",
        "rgb": image.convert("RGB"),
        "rgba": image.convert("RGBA"),
        "palette": image.convert("P"),
        "bits": image.convert("1"),
        "16 bits": PIL.Image.fromarray(level.astype(np.uint16) * 257),
        "floats": mask,
        "soft": mask * 0.5 + (1 - mask) * 0.49,
        "doubles": mask.astype(np.float64),
        "bytes": level,
        "ones in bytes": mask.astype(np.uint8),
        "integers": mask.astype(np.int64),
        "booleans": mask > 0,
        "one channel": mask[..., None],
        "colours": np.repeat(level[..., None], 3, axis=2),
        "batch": mask[None],
        "batch of one channel": mask[None, ..., None],
        "tensor": torch.from_numpy(mask),
        "tensor 1HW": torch.from_numpy(mask)[None],
        "tensor N1HW": torch.from_numpy(mask)[None, None],
        "tensor NHW1": torch.from_numpy(mask)[None, ..., None],
        "tensor of colours": torch.from_numpy(mask).expand(1, 3, 32, 32),
        "tensor of booleans": torch.from_numpy(mask) > 0,
        "tensor of bytes": torch.from_numpy(level),
        "list": [image],
        "larger": np.repeat(np.repeat(mask, 3, axis=0), 3, axis=1),
    }
    common = standard("Inpaint") | {"output_type": "latent"}
    expected = pipe(**common | {"mask_image": image, "generator": seeded(1)}).images
    for name, kind in kinds.items():
        result = pipe(**common | {"mask_image": kind, "generator": seeded(1)}).images
        assert torch.equal(result, expected), name


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_kept_pixels(output_type: str, modes: Ours) -> None:
    pipe, picture, mask = modes("Inpaint"), photo(1, 90, 70), box(40, 24)
    call = standard("Inpaint") | two() | {"height": 24, "width": 40, "image": picture, "mask_image": mask}
    call |= {"num_images_per_prompt": 2, "output_type": output_type}
    plain = pipe(**call, generator=seeded(1)).images
    kept = pipe(**call, keep_pixels=True, generator=seeded(1)).images
    resized = np.array(picture.resize((40, 24), PIL.Image.Resampling.BICUBIC, reducing_gap=1))
    expected = resized if output_type == "pil" else resized.astype(np.float32) / 255
    for one, other in zip(kept, plain, strict=True):
        one, other = numbers(one), numbers(other)
        if output_type == "pt":
            one, other = one.transpose(1, 2, 0) * 0.5 + 0.5, other.transpose(1, 2, 0) * 0.5 + 0.5
        if output_type == "pil":
            assert np.array_equal(one[mask == 0], expected[mask == 0])
        assert off(one[mask == 0], expected[mask == 0]) < 1e-6
        assert np.array_equal(one[mask == 1], other[mask == 1])


def test_kept_pixels_in_low_precision(modes: Ours) -> None:
    pipe, picture = modes("Inpaint").to(torch.bfloat16), photo(1)
    (kept,) = pipe(**standard("Inpaint") | {"output_type": "pil", "image": picture}, keep_pixels=True).images
    assert np.array_equal(np.array(kept)[box() == 0], np.array(picture)[box() == 0])


def test_files_of_the_four_are_shared(modes: Ours) -> None:
    """Weights for pictures from text serve img2img, those for hints serve both of their classes."""
    import kandinsky22

    text = kandinsky22.KandinskyV22Pipeline.from_pipe(modes("Img2Img"))
    again = kandinsky22.KandinskyV22Img2ImgPipeline.from_pipe(text)
    assert again(**standard("Img2Img")).images.shape == (1, 32, 32, 3)
    hinted = kandinsky22.KandinskyV22ControlnetImg2ImgPipeline.from_pipe(modes("Controlnet"))
    assert hinted(**standard("ControlnetImg2Img")).images.shape == (1, 32, 32, 3)
