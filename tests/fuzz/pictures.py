"""Damaged picture files of all formats that Pillow can write."""

from __future__ import annotations

import io
import random
from functools import cached_property

import numpy as np
import PIL.Image
from tests.fuzz.harness import Case, Escape
from tests.fuzz.mutations import byte_edits, mutate_bytes
from tests.fuzz.world import World

from kandinsky22 import load_image

# PDF, EPS and formats of other programs cannot be read without those programs.
WRITE_ONLY = {"PDF", "PALM", "WMF", "EPS"}


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
            for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "F"):
                buffer = io.BytesIO()
                try:
                    PIL.Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).save(buffer, kind)
                    PIL.Image.open(io.BytesIO(buffer.getvalue())).load()
                except Exception:  # this format has no such mode
                    continue
                files[f"{kind} {mode}"] = buffer.getvalue()
        return files

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a format with edits of its bytes."""
        return {"format": rng.choice(list(self.originals)), "edits": byte_edits(rng)}

    def run(self, case: Case) -> None:
        """Load the damaged file."""
        if case["format"] not in self.originals:
            return  # this Pillow cannot write it
        path = self.folder / "damaged picture"
        path.write_bytes(mutate_bytes(self.originals[case["format"]], case["edits"]))
        picture = load_image(path)
        if picture.mode != "RGB" or 0 in picture.size:
            raise Escape(f"loaded as {picture.mode} {picture.size}")
        picture.load()
