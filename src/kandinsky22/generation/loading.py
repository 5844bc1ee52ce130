"""Load and prepare the networks of a request, and describe them for the recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22 import __version__
from kandinsky22.checkpoints.hub import EMBEDDED, CheckpointSource
from kandinsky22.errors import invalid
from kandinsky22.generation.adapters import apply_adapters
from kandinsky22.generation.engine_names import ENGINES, OPENVINO_DEVICES, TORCH
from kandinsky22.generation.request import Request
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.sampling.presets import make_scheduler

if TYPE_CHECKING:
    import torch

    from kandinsky22 import KandinskyV22CombinedPipeline


@dataclasses.dataclass(frozen=True)
class Networks:
    """Pipelines that share the networks of a request.

    Attributes:
        prior: Prior pipeline of the class that the subcommand uses.
        decoder: Decoder pipeline of the class that the subcommand uses.
        combined: Pipeline of all components, for settings that concern all networks.
        device: Device that runs the networks.
    """

    prior: Any
    decoder: Any
    combined: KandinskyV22CombinedPipeline
    device: torch.device


def load_networks(
    request: Request, *, prior_class: str, decoder_class: str, on_first_use: bool = False, used_once: bool = False
) -> Networks:
    """Return the networks of the requested model, on the CPU, with the requested schedulers.

    `prepare_networks` moves them to the device.

    Args:
        request: Settings of the command.
        prior_class: Name of the prior's pipeline class.
        decoder_class: Name of the decoder's pipeline class.
        on_first_use: Whether the weights of large networks are read when they first run, where that is possible: on
            CPUs, for networks that nothing changes.
        used_once: Whether such networks leave memory when the next one runs, and at the end of each call.

    Raises:
        InputError: If the device, dtype or engine is not available, if the checkpoint belongs to another kind of
            decoder, if prior and decoder have different embedding dimensions, or if a scheduler is unknown.
        CheckpointError: If a file of the checkpoint is missing or damaged.
        MissingDependencyError: If the packages of the engine are not installed.
    """
    import kandinsky22
    from kandinsky22.pipelines.network_reader import deferred_weights
    from kandinsky22.runtime.device import resolve_device, resolve_dtype
    from kandinsky22.runtime.prepared import prepared_dtype

    device = resolve_device("cpu" if request.engine is not None and request.device == "auto" else request.device)
    model = request.model_location
    is_prepared_for = model != EMBEDDED and device.type == "cpu"
    stored = prepared_dtype(Path(model) / "unet") if is_prepared_for else None
    dtype = resolve_dtype(request.dtype or stored, device)
    _check_quantization(request.quantize, dtype, device)
    _check_engine(request, dtype, device)
    if model == EMBEDDED:
        _use_one_thread()
    prior_type, decoder_type = getattr(kandinsky22, prior_class), getattr(kandinsky22, decoder_class)
    _check_model(model, decoder_type)
    defers = on_first_use and device.type == "cpu" and not _changes_weights(request)
    with deferred_weights() if defers else contextlib.nullcontext():
        decoder = decoder_type.from_pretrained(model, torch_dtype=dtype)
        set_scheduler(decoder, request.scheduler, request.scheduler_settings)
        # The combined class finds the prior that belongs to a model. It accepts the components of any decoder class.
        components = decoder.components | ({} if request.prior is None else {"prior": request.prior_location})
        combined: Any = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained(model, torch_dtype=dtype, **components)
    if defers:
        combined.load_on_first_use(used_once=used_once)
    prior = prior_type.from_pipe(combined)
    set_scheduler(prior, request.prior_scheduler, request.prior_scheduler_settings)
    return Networks(prior=prior, decoder=decoder, combined=combined, device=device)


def prepare_networks(networks: Networks, request: Request, *, low_memory: bool, compile: bool) -> None:
    """Apply what is requested: adapters, quantization, caching, the tiny decoder; move or offload, compile or export.

    Args:
        networks: The networks.
        request: Settings of the command.
        low_memory: Whether each network is in memory (GPU memory, if the device is a GPU) only while it runs.
        compile: Whether the networks' blocks are compiled on first use.

    Raises:
        CheckpointError: If an adapter does not fit the networks, or the tiny decoder cannot be read.
        InputError: If the tiny decoder does not fit the networks, or an option has no effect with the engine.
        MissingDependencyError: If an option needs a package that is not installed.
    """
    exported = request.engine is not None
    for option, enabled in (("--low-memory", low_memory), ("--compile", compile)):
        if exported and enabled:
            raise invalid("--engine", request.engine, f"{TORCH} with {option}", f"{option} is for networks of PyTorch")
    if request.lora:
        locations = request.lora_locations or tuple(adapter.name for adapter in request.lora)
        apply_adapters(networks.combined, request.lora, locations, permanently=exported or request.quantize is not None)
    if request.quantize is not None and not exported:
        networks.combined.quantize(request.quantize)
    if request.cache_every is not None:
        networks.decoder.enable_feature_caching(request.cache_every)
    if request.tiny_decoder is not None:
        # one network for both pipelines: the combined one moves it, the decoder uses it
        networks.decoder.enable_tiny_decoder(request.tiny_decoder_location or request.tiny_decoder.name)
        networks.combined.enable_tiny_decoder(networks.decoder.tiny_decoder)
    if networks.device.type == "cpu":
        if low_memory:
            networks.combined.enable_low_memory()
    elif low_memory:
        networks.combined.enable_model_cpu_offload(device=networks.device)
    else:
        networks.combined.to(networks.device)
    if compile:
        networks.combined.compile()
    if request.engine is not None:
        networks.combined.to_openvino(OPENVINO_DEVICES[request.engine], precision=request.quantize)


def set_scheduler(pipe: Any, class_name: str | None, settings: Mapping[str, Any] | None = None) -> None:
    """Replace a pipeline's scheduler by another one on the same noise schedule.

    Args:
        pipe: Pipeline of the prior or the decoder.
        class_name: Class name of the scheduler; None keeps the class.
        settings: Settings that replace those of the current scheduler's config; None or an empty mapping keeps them.

    Raises:
        InputError: If no scheduler has this class name.
    """
    current = type(pipe.scheduler).__name__
    if class_name in (None, current) and not settings:
        return
    new = class_name or current
    if new not in SCHEDULERS.values():
        raise invalid("scheduler", new, f"one of {', '.join(SCHEDULERS)}")
    pipe.scheduler = make_scheduler(new, pipe.scheduler.config, settings or {})


def model_digest(combined: KandinskyV22CombinedPipeline, *, with_image_encoder: bool, read_missing: bool = True) -> str:
    """Return the fingerprint of the networks' weights.

    Args:
        combined: Pipeline of all components.
        with_image_encoder: Whether the image encoder is included. Without input images it does not run, and the
            fingerprint would be the only reason to read its weights from disk.
        read_missing: Whether weights that were not read yet are read. If False and there are such, the result is "".
    """
    from torch import nn

    from kandinsky22.checkpoints.fingerprint import weights_digest
    from kandinsky22.runtime.lazy_component import loaded
    from kandinsky22.runtime.network_state import is_unread, state_of

    parts: dict[str, Any] = {}
    for name, component in combined.components.items():
        if "image_encoder" in name and not with_image_encoder:
            continue
        network = loaded(component)
        if not isinstance(network, nn.Module):
            continue
        source = state_of(network).source
        samples = None if source is None else source.samples()
        if samples is None and is_unread(network) and not read_missing:
            return ""
        parts[name] = samples or network
    return weights_digest(parts)


def software_versions(request: Request) -> dict[str, str]:
    """Return the versions of the packages that determine the pixels.

    Args:
        request: Settings of the command.
    """
    import PIL
    import torch

    from kandinsky22.engines.openvino import required_packages

    engine = () if request.engine is None else required_packages(request.quantize)
    return {
        "kandinsky22": __version__,
        "torch": str(torch.__version__),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "pillow": PIL.__version__,
        **{name: importlib.metadata.version(name) for name in engine},
    }


def hardware_name(device: torch.device) -> str:
    """Return the name of the GPU, or the architecture and instruction set of the CPU.

    Floating-point results differ in the last bits between kinds of processors.

    Args:
        device: Device that runs the networks.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _changes_weights(request: Request) -> bool:
    changes = (request.quantize, request.tiny_decoder, request.engine)
    return bool(request.lora) or any(change is not None for change in changes)


def _check_quantization(kind: str | None, dtype: torch.dtype, device: torch.device) -> None:
    import torch

    from kandinsky22.runtime.device import dtype_name

    if kind == "int4" and (dtype != torch.bfloat16 or device.type != "cpu"):
        expected = f"bfloat16 on a CPU for 4-bit weights, not {dtype_name(dtype)} on {device.type}"
        raise invalid("--quantize", kind, expected, "add --dtype bfloat16 --device cpu")


def _check_engine(request: Request, dtype: torch.dtype, device: torch.device) -> None:
    """Raise an error if the engine is unknown or not available, or another option has no effect with it."""
    if request.engine is None:
        return
    from kandinsky22.engines.openvino import INT8, EngineSettings, check_settings
    from kandinsky22.runtime.device import dtype_name

    if request.engine not in OPENVINO_DEVICES:
        raise invalid("--engine", request.engine, f"one of {', '.join(ENGINES)}")
    if device.type != "cpu":
        names = ", ".join(OPENVINO_DEVICES)
        raise invalid(
            "--device", str(device), f"cpu with --engine {request.engine}", f"its devices are engines: {names}"
        )
    if request.quantize not in (None, INT8):
        raise invalid("--quantize", request.quantize, f"{INT8} with --engine {request.engine}")
    if request.cache_every is not None:
        raise invalid("--cache-every", request.cache_every, f"1 with --engine {request.engine}, which runs all steps")
    element = dtype_name(dtype)
    check_settings(EngineSettings(OPENVINO_DEVICES[request.engine], request.quantize or element, element, folder=None))


def _use_one_thread() -> None:
    """Limit torch to one CPU thread for the rest of the process.

    Matrix products of the embedded model are so small that synchronising threads takes longer than computing. With one
    thread, a recipe also gives the same bits on any number of cores.
    """
    import torch

    torch.set_num_threads(1)


def _check_model(model: str, decoder_type: Any) -> None:
    """Raise InputError, before any weights are fetched, if the checkpoint belongs to another kind of decoder."""
    import kandinsky22
    from kandinsky22.checkpoints.atomic_files import read_json

    config_name = decoder_type.config_name
    source = CheckpointSource(model, embedded_subfolder=decoder_type.embedded_subfolder)
    folder = source.fetch(lambda files: {config_name} & set(files))
    class_name = str(read_json(folder / config_name).get("_class_name"))
    # Classes that share weights have the same folder in the embedded model.
    if getattr(getattr(kandinsky22, class_name, None), "embedded_subfolder", None) != decoder_type.embedded_subfolder:
        raise invalid("--model", model, f"weights for {decoder_type.__name__}, not for {class_name}")
