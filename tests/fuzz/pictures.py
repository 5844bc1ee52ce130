"""Damaged picture files of all formats that Pillow can write."""

from __future__ import annotations

import io
import random
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
from tests.fuzz.harness import Case, Escape
from tests.fuzz.mutations import byte_edits, mutate_bytes
from tests.fuzz.world import World

from kandinsky22 import load_image

# PDF, EPS and formats of other programs cannot be read without those programs.
WRITE_ONLY = {"PDF", "PALM", "WMF", "EPS"}
MODES = ("RGB", "L", "P", "RGBA", "1", "I;16", "F", "CMYK", "LA")
# Other kinds of files of the same formats, by name: the format and its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"TIFF {name}": ("TIFF", {"compression": name})
        for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    },
    "JPEG progressive": ("JPEG", {"progressive": True, "subsampling": 2}),
    "PNG of a palette": ("PNG", {"bits": 4, "transparency": 0}),
    "WEBP lossless": ("WEBP", {"lossless": True}),
    **{f"{name} animated": (name, {"save_all": True}) for name in ("GIF", "PNG", "WEBP", "TIFF")},
    **{f"{name} rotated": (name, {"exif": True}) for name in ("JPEG", "PNG", "WEBP", "TIFF")},
}


class Pictures:
    """Pictures of all formats after byte mutations, loaded by `load_image`.

    Args:
        world: Checkpoints and pipelines; its folder holds the damaged files.
    """

    name = "pictures"

    def __init__(self, world: World) -> None:
        self.folder = world.folder

    @cached_property
    def originals(self) -> dict[str, bytes]:
        """One file for each format and mode that can be written and read again."""
        PIL.Image.init()
        pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        files: dict[str, bytes] = {}
        for kind in sorted(set(PIL.Image.SAVE) - WRITE_ONLY):
            for mode in MODES:
                buffer = io.BytesIO()
                try:
                    PIL.Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).save(buffer, kind)
                    PIL.Image.open(io.BytesIO(buffer.getvalue())).load()
                except Exception:  # this format has no such mode
                    continue
                files[f"{kind} {mode}"] = buffer.getvalue()
        return files | _variants(PIL.Image.fromarray(pixels))

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a format with edits of its bytes."""
        name = rng.choice(list(self.originals))
        return {"format": name, "edits": byte_edits(rng), "opened": rng.random() < 0.3}

    def run(self, case: Case) -> None:
        """Load the damaged file."""
        if case["format"] not in self.originals:
            return  # this Pillow cannot write it
        path = self.folder / "damaged picture"
        path.write_bytes(mutate_bytes(self.originals[case["format"]], case["edits"]))
        source: Any = path
        if case.get("opened"):
            try:
                source = PIL.Image.open(path)  # decoded by load_image
            except Exception:  # only Pillow sees it
                return
        picture = load_image(source)
        if picture.mode != "RGB" or 0 in picture.size:
            raise Escape(f"loaded as {picture.mode} {picture.size}")
        picture.load()


def _variants(picture: PIL.Image.Image) -> dict[str, bytes]:
    """Return the files of `VARIANTS` that this Pillow can write."""
    files: dict[str, bytes] = {}
    for name, (kind, options) in VARIANTS.items():
        buffer, arguments = io.BytesIO(), dict(options)
        if "exif" in options:
            arguments["exif"] = exif = PIL.Image.Exif()
            exif[0x0112] = 6  # orientation: a quarter turn
            exif.get_ifd(0x8769)[0x927C] = bytes(range(200))  # the camera's own notes
        if "save_all" in options:
            arguments["append_images"] = [picture.rotate(90), picture.rotate(180)]
        try:
            (picture.convert("P") if "bits" in options else picture).save(buffer, kind, **arguments)
        except Exception:  # Pillow was built without it
            continue
        files[name] = buffer.getvalue()
    return files
