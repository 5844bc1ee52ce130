"""Messages of the argument checks: argument, value, and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kandinsky22 import InputError
from kandinsky22.inputs import images, interpolation, masks, prompts, validation

NAN = float("nan")
ARRAYS = "an array (H, W), (H, W, C) or (N, H, W, C) with C = 1, 3 or 4, of uint8 or of floats in [0, 1]"
TENSORS = "a tensor (C, H, W) or (N, C, H, W) with C = 1 or 3, of uint8 or floats"
MASKS = "booleans, integers or floats of shape (H, W), (N, H, W), (N, 1, H, W) or (N, H, W, 1)"


def read_image(value: Any) -> torch.Tensor:
    return images.images_to_tensor("image", value, (8, 8), latent_shape=(4, 1, 1))


def read_mask(value: Any) -> torch.Tensor:
    return masks.masks_to_tensor("mask_image", value, (8, 8))


def read_items(items: Any, weights: Any) -> list[interpolation.InterpolationItem]:
    sizes = {"embedding_dim": 5, "image_size": 8, "image_processor": None, "dtype": torch.float16}
    return interpolation.interpolation_items(items, weights, batch_size=2, **sizes)


CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: validation.positive_int("steps", 0), "steps=0 is invalid: expected an integer of at least 1"),
    (lambda: validation.positive_int("steps", True), "steps=True is invalid: expected an integer of at least 1"),
    (lambda: validation.finite_float("eta", NAN), "eta=nan is invalid: expected a finite number"),
    (lambda: validation.strict_bool("flag", 1), "flag=1 is invalid: expected True or False"),
    (lambda: validation.one_of("kind", "c", ("a", "b")), "kind='c' is invalid: expected one of 'a', 'b'"),
    (lambda: validation.subset_of("kinds", "a", ("a", "b")), "kinds='a' is invalid: expected a list of names out of"),
    (lambda: validation.subset_of("kinds", ["c"], ("a", "b")), "kinds='c' is invalid: expected one of 'a', 'b'"),
    (lambda: validation.output_format("gif", True, ("pil",)), "output_type='gif' is invalid: expected one of 'pil'"),
    (lambda: validation.output_format("pil", 1, ("pil",)), "return_dict=1 is invalid: expected True or False"),
    (lambda: validation.optional_callable("callback", 1), "callback=1 is invalid: expected a function or None"),
    (
        lambda: validation.generators_per_item(7, 1, 1),
        "generator=7 is invalid: expected a torch.Generator, a list of them, or None",
    ),
    (
        lambda: validation.generators_per_item([torch.Generator()] * 3, 2, 4),
        "len(generator)=3 is invalid: expected 1 or 2, one generator per image",
    ),
    (
        lambda: validation.initial_latents(torch.zeros(1, 2), (1, 3)),
        "latents=<Tensor float32 (1, 2)> is invalid: expected a tensor of real numbers of shape (1, 3)",
    ),
    (
        lambda: validation.initial_latents(torch.full((1, 2), NAN), (1, 2)),
        "latents=<Tensor float32 (1, 2)> is invalid: expected finite values, without NaN and infinity",
    ),
    (
        lambda: validation.image_embeddings("embeds", [torch.zeros(1, 3), torch.zeros(1, 4)], 3),
        "embeds[1]=<Tensor float32 (1, 4)> is invalid: expected a floating-point tensor or array of shape (batch, 3)",
    ),
    (lambda: validation.image_embeddings("embeds", [], 3), "embeds=[] is invalid: expected at least one embedding"),
    (
        lambda: validation.dense("embeds", torch.ones(2).to_sparse()),
        "embeds.layout=torch.sparse_coo is invalid: expected torch.strided; call to_dense() first",
    ),
    (
        lambda: validation.dense("embeds", torch.ones(2, device="meta")),
        "embeds.device=device(type='meta') is invalid: expected a device that stores values",
    ),
    (
        lambda: validation.replacement_tensor("latents", torch.zeros(3, 2), torch.zeros(4, 2), 2),
        "latents=<Tensor float32 (3, 2)> is invalid: expected a real tensor of shape (4, 2) or (2, 2)",
    ),
    (
        lambda: validation.replacement_tensor("latents", 3, None),
        "latents=3 is invalid: expected no tensor of this name",
    ),
    (
        lambda: validation.batch_of_size("negatives", torch.zeros(3, 2), 2, "embeds"),
        "len(negatives)=3 is invalid: expected 1 or 2, the batch size of embeds",
    ),
    (lambda: read_image(3), "image=3 is invalid: expected a path, an http(s) URL, a PIL image, an array or a tensor"),
    (lambda: read_image([]), "image=[] is invalid: expected at least one item"),
    (lambda: read_image(np.zeros(4, np.uint8)), f"image=<ndarray uint8 (4,)> is invalid: expected {ARRAYS}"),
    (lambda: read_image(np.zeros((4, 4), np.int64)), f"image=<ndarray int64 (4, 4)> is invalid: expected {ARRAYS}"),
    (lambda: read_image(np.full((4, 4), 1.5)), "image.max()=1.5 is invalid: expected floats in [0, 1]"),
    (lambda: read_image(np.full((4, 4), NAN)), "image.min()=nan is invalid: expected floats in [0, 1]"),
    (lambda: read_image(torch.zeros(2, 4, 4)), f"image=<Tensor float32 (2, 4, 4)> is invalid: expected {TENSORS}"),
    (lambda: read_image(torch.full((3, 4, 4), -2.0)), "image.min()=-2.0 is invalid: expected floats in [-1, 1]"),
    (
        lambda: read_image(torch.zeros(1, 4, 2, 2)),
        "image=<Tensor float32 (1, 4, 2, 2)> is invalid: expected floating-point latents of shape (n, 4, 1, 1)",
    ),
    (
        lambda: read_image([torch.zeros(1, 4, 1, 1), torch.zeros(3, 8, 8)]),
        "channels of image=[3, 4] is invalid: expected either images or latents; do not mix them in one list",
    ),
    (lambda: read_mask(np.full((4, 4), "a")), f"mask_image=<ndarray <U1 (4, 4)> is invalid: expected {MASKS}"),
    (lambda: read_mask(torch.zeros(4)), f"mask_image=<Tensor float32 (4,)> is invalid: expected {MASKS}"),
    (
        lambda: read_mask([torch.zeros(4, 4), np.full((4, 4), 256)]),
        "mask_image[1].max()=256.0 is invalid: expected floats in [0, 1] or integers from 0 to 255",
    ),
    (lambda: read_items([], []), "images_and_prompts=[] is invalid: expected a list of at least one image or text"),
    (lambda: read_items(["a"], 1), "weights=1 is invalid: expected a list of one number per item"),
    (lambda: read_items(["a"], [1, 2]), "len(weights)=2 is invalid: expected 1, one per item of images_and_prompts"),
    (lambda: read_items(["a"], ["1"]), "weights[0]='1' is invalid: expected a finite number"),
    (lambda: read_items(["a", 3], [1, 1]), "images_and_prompts[1]=3 is invalid: expected an image"),
    (
        lambda: read_items([torch.zeros(3, 5)], [1]),
        "len(images_and_prompts[0])=3 is invalid: expected 1 or 2, the batch size of the result",
    ),
    (
        lambda: read_items([torch.zeros(2, 3, 8, 8)], [1]),
        "len(images_and_prompts[0])=2 is invalid: expected 1 image per item; list each image with its own weight",
    ),
    (
        lambda: read_items([torch.zeros(3, 4, 4)], [1]),
        "images_and_prompts[0]=<Tensor float32 (3, 4, 4)> is invalid: expected floating-point pixels of shape (n, 3, 8",
    ),
    (lambda: prompts.text_list("prompt", 3), "prompt=3 is invalid: expected a string or a list of at least one string"),
    (lambda: prompts.text_list("prompt", ["a", 3]), "prompt[1]=3 is invalid: expected a string"),
    (lambda: prompts.text_list("prompt", "\ud83d"), r"prompt='\ud83d' is invalid: expected text without lone surr"),
    (
        lambda: prompts.prompt_pairs(["a", "b"], ["c", "d", "e"]),
        "len(negative_prompt)=3 is invalid: expected 1 or 2, the number of prompts",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message.split(" ")[0] for _, message in CASES])
def test_messages_name_argument_value_and_what_is_accepted(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert str(raised.value).startswith(message)


QUANTIZED = torch.quantize_per_tensor(torch.zeros(3, 8, 8), 0.1, 0, torch.quint8)
UNUSUAL: dict[str, Any] = {
    "sparse": torch.zeros(3, 8, 8).to_sparse(),
    "meta": torch.zeros(3, 8, 8, device="meta"),
    "parameter on meta": torch.nn.Parameter(torch.zeros(3, 8, 8, device="meta")),
    "quantized": QUANTIZED,
    "complex": torch.zeros(3, 8, 8, dtype=torch.complex64),
    "beyond float32": torch.full((3, 8, 8), 1e300, dtype=torch.float64),
    "repeated": torch.zeros(1, 1, 1).expand(3, 10**6, 10**6),
    "repeated array": np.broadcast_to(np.float32(0.5), (10**6, 10**6)),
    "objects": np.full((8, 8), None),
    "masked": np.ma.masked_all((8, 8)),
    "records": np.zeros((8, 8), [("a", "f4")]),
    "void": np.zeros((8, 8), "V8"),
    "dates": np.zeros((8, 8), "M8[s]"),
    "empty": np.zeros((0, 8)),
    "scalar": np.array(3),
    "long double": np.full((8, 8), np.longdouble("1e4000")),
}


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_tensors_and_arrays_are_refused_everywhere(value: Any) -> None:
    readers = [
        read_image,
        read_mask,
        lambda item: images.hints_to_tensor("hint", item, (8, 8)),
        lambda item: validation.initial_latents(item, (3, 8, 8)),
        lambda item: validation.image_embeddings("image_embeds", item, 8),
        lambda item: read_items([item], [1.0]),
    ]
    for read in readers:
        with pytest.raises(InputError):
            read(value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    value = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for read in (read_image, read_mask, lambda item: validation.initial_latents(item, (2, 3))):
        with pytest.raises(InputError, match="a tensor with one shape"):
            read(value)


def test_matrices_masked_arrays_without_masks_and_narrow_floats_are_accepted() -> None:
    expected = read_image(np.full((8, 8), 0.5))
    for value in (np.matrix(np.full((8, 8), 0.5)), np.ma.array(np.full((8, 8), 0.5))):
        assert torch.equal(read_image(value), expected)
        assert torch.equal(read_mask(value), torch.ones(1, 1, 8, 8))
    assert torch.equal(read_image(torch.full((3, 8, 8), 0.5).to(torch.float8_e4m3fn)), expected)
    embeds = torch.full((1, 8), 0.5)
    narrow = embeds.to(torch.float8_e5m2)
    assert torch.equal(validation.image_embeddings("image_embeds", [narrow, embeds], 8), torch.cat([embeds, embeds]))


def test_accepted_values_are_normalised() -> None:
    assert validation.positive_int("steps", np.int64(3)) == 3
    assert validation.finite_float("eta", np.float32(0.5)) == 0.5
    assert validation.subset_of("kinds", None, ("a",)) == ()
    assert validation.subset_of("kinds", ["a"], ("a",)) == ("a",)
    generators = [torch.Generator(), torch.Generator()]
    assert validation.generators_per_item(generators, 2, 4) == generators * 2
    assert validation.generators_per_item(generators[:1], 2, 4) is generators[0]
    assert validation.batch_of_size("embeds", torch.ones(1, 2), 3, "others").shape == (3, 2)


@pytest.mark.parametrize("value", [None, 3, "unet", len, np.array(0), [["unet"]], {"x"}, iter([1]), torch.ones(())])
def test_names_are_a_list_of_accepted_names(value: Any) -> None:
    with pytest.raises(InputError, match=r"^components=.*: expected a list of names of networks \(unet, movq\)$"):
        validation.names_among("components", value, ["unet", "movq"], "networks")


def test_names_are_taken_once_from_any_iterable() -> None:
    for value in (["movq", "unet", "movq"], ("movq", "unet"), {"movq": 1, "unet": 2}, iter(["movq", "unet"])):
        assert validation.names_among("components", value, ["unet", "movq"], "networks") == ["movq", "unet"]


@pytest.mark.parametrize("value", [3, True, len, b"/", "", "\0", "\ud800", "no/such/folder", __file__, 2**63, 1.5])
def test_folders_exist(value: Any) -> None:
    with pytest.raises(InputError, match=r"^folder=.*: expected an existing folder$"):
        validation.existing_folder("folder", value)


@pytest.mark.parametrize("value", [None, True, 1.5, 2**64, -(2**70), "\ud800", "nothing", "cat " * 9999, torch.ones(1)])
def test_devices_are_those_of_torch(value: Any) -> None:
    with pytest.raises(InputError, match=r"^gpu=.* is invalid: expected a") as caught:
        validation.usable_device(value, "gpu")
    assert len(str(caught.value)) < 4000


def test_lists_that_cannot_be_read_are_refused() -> None:
    class Broken(list[Any]):
        def __len__(self) -> int:
            raise RuntimeError("no length")

    for read in (
        lambda value: validation.listed("image", value),
        lambda value: validation.image_embeddings("image", value, 3),
        lambda value: images.labelled_items("image", value),
        lambda value: prompts.text_list("image", value),
    ):
        with pytest.raises(InputError, match=r"^image=\[\] is invalid: expected a list whose items can be read$"):
            read(Broken())
