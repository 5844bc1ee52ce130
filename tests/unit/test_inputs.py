"""Reading of input pictures and conversion of outputs."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from kandinsky22 import InputError, load_image, make_image_grid
from kandinsky22.inputs.images import hints_to_tensor, images_to_tensor, pictures_at_their_size, to_output_type
from kandinsky22.inputs.masks import masks_to_tensor
from kandinsky22.inputs.validation import image_embeddings


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of three by two pixels whose EXIF entry asks for a rotation by 90 degrees."""
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    image = PIL.Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "picture.png"
    image.save(path, exif=exif)
    return path


@pytest.fixture
def address(picture: Path) -> Iterator[str]:
    """An HTTP address that serves the folder of the picture."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(picture.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_load_image_from_anywhere(picture: Path, address: str) -> None:
    rotated = np.rot90(np.asarray(PIL.Image.open(picture)), k=-1)
    for source in (picture, str(picture), f"{address}/picture.png", PIL.Image.open(picture)):
        image = load_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), rotated)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_load_image_gives_rgb(mode: str) -> None:
    assert load_image(PIL.Image.new(mode, (4, 4))).mode == "RGB"


def test_load_image_applies_convert_method(picture: Path) -> None:
    assert load_image(picture, convert_method=lambda image: image.convert("L")).mode == "L"


def test_load_image_reports_unreadable_sources(picture: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    for source in ("nowhere.png", tmp_path, tmp_path / "text.png", tmp_path / "cut.png", f"{address}/nowhere.png"):
        with pytest.raises(InputError, match=r"image=.* cannot be read: "):
            load_image(source)
    with pytest.raises(
        InputError,
        match=r"image=<ndarray float64 \(4, 4, 3\)> is invalid: expected a path, an http\(s\) URL or a PIL image",
    ):
        load_image(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


def test_messages_name_all_kinds_of_images() -> None:
    kinds = r"expected a path, an http\(s\) URL, a PIL image, an array or a tensor, alone or in a list$"
    for read in (images_to_tensor, masks_to_tensor, hints_to_tensor):
        for value, label in ((None, "picture"), ([None], r"picture\[0\]"), (5, "picture"), ([b"x"], r"picture\[0\]")):
            with pytest.raises(InputError, match=f"^{label}=.* is invalid: {kinds}"):
                read("picture", value, (8, 8))
    with pytest.raises(InputError, match=f"^picture=None is invalid: {kinds}"):
        pictures_at_their_size("picture", None)


def test_make_image_grid() -> None:
    images = [PIL.Image.new("RGB", (4, 2), (index * 40, 0, 0)) for index in range(6)]
    grid = make_image_grid(images, rows=2, cols=3)
    assert grid.size == (12, 4)
    assert [grid.getpixel((x, y))[0] for y in (0, 3) for x in (0, 5, 11)] == [0, 40, 80, 120, 160, 200]
    assert make_image_grid(images, 3, 2, resize=8).size == (16, 24)
    message = r"len\(images\)=6 is invalid: expected rows x cols = 2 x 2, and at least one, to fill the grid"
    with pytest.raises(InputError, match=message):
        make_image_grid(images, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0, "cols": 0}, "rows=0"),
        ({"rows": 2**70}, "rows=1180591620717411303424"),
        ({"cols": "3"}, "cols='3'"),
        ({"resize": 10**9}, "resize=1000000000"),
        ({"resize": True}, "resize=True"),
        ({"images": "abcdef"}, "images='abcdef'"),
        ({"images": [1, 2, 3, 4, 5, 6]}, "images="),
    ],
)
def test_make_image_grid_refuses_other_arguments(arguments: dict[str, Any], message: str) -> None:
    images = [PIL.Image.new("RGB", (4, 2))] * 6
    with pytest.raises(InputError, match=f"^{re.escape(message)}.* is invalid: expected "):
        make_image_grid(**{"images": images, "rows": 2, "cols": 3, **arguments})


def test_to_output_type() -> None:
    pictures = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, 0.5]).reshape(1, 3, 1, 2)
    assert to_output_type(pictures, "pt") is pictures
    array = to_output_type(pictures, "np")
    assert array.shape == (1, 1, 2, 3)
    assert array[0, 0].tolist() == [[0.0, 0.5, 1.0], [0.0, 1.0, 0.75]]
    (image,) = to_output_type(pictures.to(torch.bfloat16), "pil")
    assert np.asarray(image).tolist() == [[[0, 128, 255], [0, 255, 191]]]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "longdouble", ">f4", "<f8"])
def test_embeddings_of_all_kinds_of_arrays(kind: str) -> None:
    numbers = np.arange(6).reshape(2, 3).astype(kind)
    numbers.flags.writeable = False
    assert image_embeddings("thing", numbers, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
