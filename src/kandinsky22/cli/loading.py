"""From model options to a pipeline that is ready to draw, and what is to be said of it in a recipe."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from kandinsky22 import __version__
from kandinsky22.cli.options import SCHEDULERS
from kandinsky22.errors import InputError
from kandinsky22.hub import EMBEDDED

if TYPE_CHECKING:
    from kandinsky22.pipelines.base import DiffusionPipeline

PUBLISHED = "kandinsky-community/kandinsky-2-2-decoder"


def load_text_to_image(
    model: str, prior: str | None, scheduler: str | None, device: str, dtype: str
) -> DiffusionPipeline:
    """The prior and decoder of `model` on their device, the decoder with the scheduler of that class name if given."""
    import torch

    from kandinsky22 import AutoPipelineForText2Image
    from kandinsky22.runtime.device import resolve_device, resolve_dtype

    place = resolve_device(device)
    if model == EMBEDDED:
        # Its products are so small that threads wait for each other longer than they work; and with one, a recipe
        # gives the same bits on any number of cores.
        torch.set_num_threads(1)
    options: dict[str, Any] = {} if prior is None else {"prior": prior}
    pipe = AutoPipelineForText2Image.from_pretrained(model, torch_dtype=resolve_dtype(dtype, place), **options)
    _use_scheduler(pipe, scheduler)
    return pipe.to(place)


def _use_scheduler(pipe: Any, name: str | None) -> None:
    """Replace the decoder's scheduler by class `name`, set up from the checkpoint's own."""
    import kandinsky22

    if name is None or name == type(pipe.scheduler).__name__:
        return
    if name not in SCHEDULERS.values():
        raise InputError(f"unknown scheduler {name!r}; accepted: {', '.join(SCHEDULERS)}")
    pipe.scheduler = getattr(kandinsky22, name).from_config(pipe.scheduler.config)


def model_digest(pipe: Any) -> str:
    """The digest of the networks that draw from text."""
    from torch import nn

    from kandinsky22.runtime.digest import weights_digest

    # The image encoder only reads pictures, and most of it would have to be fetched from disk for this.
    parts = {name: part for name, part in pipe.components.items() if "image_encoder" not in name}
    return weights_digest({name: part for name, part in parts.items() if isinstance(part, nn.Module)})


def versions() -> dict[str, str]:
    """Versions of the software that decides over a picture's bits."""
    import torch
    import transformers

    return {"kandinsky22": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def hardware(pipe: Any) -> str:
    """What computes: arithmetic differs in the last bits between kinds of processors."""
    import torch

    if pipe.device.type == "cuda":
        return torch.cuda.get_device_name(pipe.device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
