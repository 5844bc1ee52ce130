"""What the API says about a model: its default size and settings, read from its files without loading networks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import DISTILLED, EMBEDDED, embedded_folder
from kandinsky22.sampling.presets import PRESETS
from kandinsky22.serve.settings import ModelSettings

DEFAULT_SIDE = 512  # of the published models
# Defaults of the pipelines' arguments, for models whose files say nothing.
DEFAULTS: dict[str, Any] = {"steps": 100, "guidance": 4.0, "prior_steps": 25, "prior_guidance": 4.0}
NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "prior_num_inference_steps": "prior_steps",
    "prior_guidance_scale": "prior_guidance",
}


@functools.cache
def model_facts(model: ModelSettings) -> dict[str, Any]:
    """Return a model as the API shows it.

    Args:
        model: The model.
    """
    folder = _folder(model)
    side, defaults = DEFAULT_SIDE, dict(DEFAULTS)
    if folder is not None:
        latents = _read(folder / "unet" / "config.json").get("sample_size")
        if isinstance(latents, int):
            side = latents * _scale(folder if model.location != EMBEDDED else embedded_folder("decoder"))
        defaults |= _named(_read(folder / "generation_defaults.json"))
    if model.location == EMBEDDED:
        prior = _named(_read(embedded_folder("prior") / "generation_defaults.json"))
        defaults |= {f"prior_{name}": value for name, value in prior.items() if not name.startswith("prior_")}
    return {
        "id": model.id,
        "name": model.id,
        "kind": model.kind,
        "default_width": side,
        "default_height": side,
        "defaults": defaults,
        "presets": [name for name, preset in PRESETS.items() if not preset.distilled or may_be_distilled(model)],
    }


def may_be_distilled(model: ModelSettings) -> bool:
    """Return whether a model has a distilled adapter; True for models on the Hub, whose files are not read here.

    Args:
        model: The model.
    """
    folder = embedded_folder("decoder") if model.location == EMBEDDED else _folder(model)
    return folder is None or any((folder / DISTILLED).glob("*.safetensors"))


def _folder(model: ModelSettings) -> Path | None:
    if model.location == EMBEDDED:
        return embedded_folder(model.kind)
    return Path(model.location) if Path(model.location).is_dir() else None


def _scale(folder: Path) -> int:
    """Return the side of the square of pixels that a latent pixel stands for."""
    channels = _read(folder / "movq" / "config.json").get("block_out_channels")
    return 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else 8


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {NAMES[name]: value for name, value in settings.items() if name in NAMES}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
