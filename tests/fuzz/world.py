"""Tiny checkpoints and pipelines that all targets share."""

from __future__ import annotations

import copy
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.cli.conftest import _tiny_pipeline, _tiny_unet
from tests.cli.helpers import DEFAULTS
from tests.pipelines.calls import TEN

import kandinsky22


class World:
    """Checkpoints in a folder, and pipelines that are loaded from them.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        # Neither the user's caches nor the network may be reached.
        os.environ |= {"KANDINSKY22_CACHE": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
        transformers.utils.logging.disable_progress_bar()
        self.folder = folder
        torch.manual_seed(2)
        combined = _tiny_pipeline(folder)
        combined.set_progress_bar_config(disable=True)
        combined.generation_defaults = DEFAULTS
        components = combined.components
        decoder = {name: components[name] for name in ("scheduler", "movq")}
        unets = {"": components["unet"], "Inpaint": _tiny_unet(in_channels=9)}
        unets["Controlnet"] = unets["ControlnetImg2Img"] = _tiny_unet(in_channels=8, addition_embed_type="image_hint")
        prior = {name: part for name, part in components.items() if name.startswith("prior_")}
        self.pipelines: dict[str, Any] = {}
        for name in TEN:
            middle = name.removeprefix("KandinskyV22").removesuffix("Pipeline")
            unet = unets.get(middle.removesuffix("Combined"), unets[""])
            parts = {**decoder, "unet": unet} | (prior if "Combined" in middle else {})
            if "Prior" in middle:
                parts = {key.removeprefix("prior_"): part for key, part in prior.items()}
            pipe = getattr(kandinsky22, name)(**parts)
            pipe.set_progress_bar_config(disable=True)
            self.pipelines[name] = pipe
        combined.save_pretrained(folder / "combined", max_shard_size="40KB")
        self.pipelines["KandinskyV22PriorPipeline"].save_pretrained(folder / "prior")
        self.pipelines["KandinskyV22Pipeline"].save_pretrained(folder / "decoder")
        inpaint = self.pipelines["KandinskyV22InpaintCombinedPipeline"]
        inpaint.generation_defaults = DEFAULTS
        inpaint.save_pretrained(folder / "inpaint")
        control = self.pipelines["KandinskyV22ControlnetPipeline"]
        control.save_pretrained(folder / "control" / "decoder")
        self.pipelines["KandinskyV22PriorPipeline"].save_pretrained(folder / "control" / "prior")

    @cached_property
    def files(self) -> list[str]:
        """Files of the checkpoints `combined`, `prior` and `decoder`, relative to the folder."""
        paths = [path for name in ("combined", "prior", "decoder") for path in (self.folder / name).rglob("*")]
        return sorted(str(path.relative_to(self.folder)) for path in paths if path.is_file())

    def pipeline(self, name: str) -> Any:
        """Return a shallow copy of a pipeline, whose components may be replaced."""
        return copy.copy(self.pipelines[name])
