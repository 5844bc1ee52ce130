"""From model options to networks that are ready to draw, and what is to be said of them in a recipe."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

from kandinsky22 import __version__
from kandinsky22.checkpoints.hub import EMBEDDED, Source
from kandinsky22.cli.options import SCHEDULERS
from kandinsky22.cli.request import Request
from kandinsky22.errors import InputError
from kandinsky22.sampling.presets import make_scheduler


@dataclasses.dataclass(frozen=True)
class Networks:
    """The prior and the decoder that a subcommand draws with, `whole`, made of both, and the device they work on."""

    prior: Any
    decoder: Any
    whole: Any
    device: Any


def load_networks(classes: tuple[str, str], request: Request) -> Networks:
    """The networks of the request's model as pipelines of the `classes` (prior, decoder), with the schedulers it asks
    for. They are on the CPU until `settle` brings them to the device."""
    import torch

    import kandinsky22
    from kandinsky22.runtime.device import dtype_name, resolve_device, resolve_dtype

    place = resolve_device(request.device)
    torch_dtype = resolve_dtype(request.dtype, place)
    model = request.model
    if request.quantize == "int4" and (torch_dtype != torch.bfloat16 or place.type != "cpu"):
        given = f"{dtype_name(torch_dtype)} on {place.type}"
        raise InputError(f"--quantize int4 computes in bfloat16 on a CPU, not {given}: see --dtype")
    if model == EMBEDDED:
        # Its products are so small that threads wait for each other longer than they work; and with one, a recipe
        # gives the same bits on any number of cores.
        torch.set_num_threads(1)
    reader, drawer = (getattr(kandinsky22, name) for name in classes)
    _check_model(model, drawer)
    decoder = drawer.from_pretrained(model, torch_dtype=torch_dtype)
    use_scheduler(decoder, request.scheduler, request.scheduler_settings)
    # Any decoder's parts will do here: this is how a model's prior is found.
    options = decoder.components | ({} if request.prior is None else {"prior": request.prior})
    whole: Any = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained(model, torch_dtype=torch_dtype, **options)
    made, read = whole.prior_prior.config.embedding_dim, decoder.unet.config.encoder_hid_dim
    if made != read:
        raise InputError(f"the prior makes embeddings of {made} numbers, {model} reads {read}: they do not fit")
    first = reader.from_pipe(whole)
    use_scheduler(first, request.prior_scheduler, request.prior_scheduler_settings)
    return Networks(first, decoder, whole, place)


def settle(networks: Networks, request: Request, *, low_memory: bool, compiled: bool) -> None:
    """Make the networks as small as is asked for and bring them to where they work; with `low_memory` each only while
    it works, in memory or on the GPU."""
    if request.quantize is not None:
        networks.whole.quantize(request.quantize)
    if request.cache_every is not None:
        networks.decoder.enable_feature_caching(request.cache_every)
    if not low_memory:
        networks.whole.to(networks.device)
    elif networks.device.type == "cpu":
        networks.whole.enable_low_memory()
    else:
        networks.whole.enable_model_cpu_offload(device=networks.device)
    if compiled:
        networks.whole.compile()


def _check_model(model: str, drawer: Any) -> None:
    """Raise InputError, before weights are fetched, if the checkpoint is for pipelines of another kind."""
    import kandinsky22
    from kandinsky22.checkpoints.atomic_files import read_json

    folder = Source(model, part=drawer.embedded_part).fetch(lambda files: {drawer.config_name} & set(files))
    name = str(read_json(folder / drawer.config_name).get("_class_name"))
    # Classes that the embedded model serves from one folder are those that share weights.
    if getattr(getattr(kandinsky22, name, None), "embedded_part", None) != drawer.embedded_part:
        raise InputError(f"--model {model} is a {name}; weights of a {drawer.__name__} are needed here")


def use_scheduler(pipe: Any, name: str | None, settings: Mapping[str, Any] | None = None) -> None:
    """Give the pipeline the scheduler of class `name` on the noise schedule of its own, `settings` put in the place of
    that one's; with neither it keeps its own."""
    own = type(pipe.scheduler).__name__
    if name in (None, own) and not settings:
        return
    if (name or own) not in SCHEDULERS.values():
        raise InputError(f"unknown scheduler {name or own!r}; accepted: {', '.join(SCHEDULERS)}")
    pipe.scheduler = make_scheduler(name or own, pipe.scheduler.config, settings or {})


def model_digest(whole: Any, *, sees: bool) -> str:
    """The digest of the networks that draw; of the image encoder too if it `sees` pictures."""
    from torch import nn

    from kandinsky22.checkpoints.fingerprint import weights_digest

    # Without a picture to read, most of the image encoder would have to be fetched from disk for this.
    parts = {name: part for name, part in whole.components.items() if sees or "image_encoder" not in name}
    return weights_digest({name: part for name, part in parts.items() if isinstance(part, nn.Module)})


def versions() -> dict[str, str]:
    """Versions of the software that decides over a picture's bits."""
    import PIL
    import torch
    import transformers

    return {
        "kandinsky22": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
    }


def hardware(device: Any) -> str:
    """What computes: arithmetic differs in the last bits between kinds of processors."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
