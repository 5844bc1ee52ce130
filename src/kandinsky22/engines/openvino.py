"""OpenVINO: graphs of networks are exported from PyTorch, stored on disk, compiled for a device, and called.

Only this module and `compression.py` import OpenVINO and NNCF. By default both packages report over the network that
they are imported and what they convert. Imports here switch that off (`without_reports`), and the export calls
OpenVINO's frontend itself instead of `openvino.convert_model`, which sends reports too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import flush_folder, flush_to_disk
from kandinsky22.checkpoints.fingerprint import tensors_digest
from kandinsky22.errors import InputError, KandinskyError, MissingDependencyError, invalid
from kandinsky22.inputs.validation import one_of
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.kernels.settings import NAMES, optimisations

logger = logging.getLogger(__name__)

DEVICES = ("CPU", "GPU", "NPU", "AUTO")
# Precisions, and what OpenVINO calls the ability to compute in them.
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16", "int8": "INT8"}
INT8 = "int8"
ELEMENT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Devices that compile a graph for fixed shapes only. On CPUs one graph with variable shapes holds one copy of the
# weights, and OpenVINO 2026.4 crashes when it compiles the UNet for fixed ones.
STATIC_DEVICES = ("NPU",)
MAX_SHAPES = 4  # compiled graphs per network on such devices, the least recently used ones discarded first
REPORTS_OFF = {"CI": "true", "NNCF_CI": "1"}  # environment variables
FORMAT = 1  # counts changes of the exported graphs, so that older ones on disk are not used

Compression = Callable[[Any], Any]
"""Function that returns an OpenVINO model with weights, or weights and activations, of 8 bits."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of OpenVINO for the networks of a pipeline.

    Attributes:
        device: One of `DEVICES`.
        precision: One of `CAPABILITIES`. With "int8", layers that are not quantized compute in `element`.
        element: Floating-point type of all other layers, one of `ELEMENT_TYPES`.
        folder: Folder of exported and compiled graphs; None stores none.
    """

    device: str
    precision: str
    element: str
    folder: Path | None


@dataclass(frozen=True)
class ExportedPart:
    """The part of a network that becomes a graph.

    Attributes:
        name: Name of the network and of the part, for files and messages.
        network: The network whose weights are exported.
        module: Module with the part as its `forward`. It takes and returns float32 tensors.
        example: Inputs for tracing; sides and batch size of the graph's inputs stay variable.
    """

    name: str
    network: Any
    module: nn.Module
    example: tuple[Tensor, ...]


class Graph:
    """A compiled graph. Several threads may call it; their calls run one after another.

    Args:
        part: What to export.
        settings: Where and how it runs.
        compress: Quantizes the exported graph; None leaves it as it is.
        compression: Name of that function, for the cache.
    """

    def __init__(
        self, part: ExportedPart, settings: EngineSettings, compress: Compression | None = None, compression: str = ""
    ) -> None:
        self._settings, self._name = settings, part.name
        self._lock = ObjectLock()
        self._requests: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        path = None if settings.folder is None else settings.folder / part.name / graph_key(part, compression)
        self._source: Any = None if path is None else _stored(path)
        is_reused = self._source is not None and _is_readable(self._source)
        if self._source is None:
            self._export(part, compress, path)
        elif not is_reused:
            self._export_again(part, compress)
        if settings.device in STATIC_DEVICES:
            return
        try:
            self._request(part.example)
        except InputError:
            if not is_reused:
                raise
            self._export_again(part, compress)  # the device may be right, and the stored graph damaged
            self._request(part.example)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the graph, in float32 on the CPU.

        Args:
            *inputs: The inputs, which are converted to float32.

        Raises:
            KandinskyError: If OpenVINO fails.
        """
        inputs = tuple(tensor.detach().to("cpu", torch.float32).contiguous() for tensor in inputs)
        with self._lock:
            request = self._request(inputs)
            try:
                request.infer([tensor.numpy() for tensor in inputs], share_inputs=True)
            except RuntimeError as error:
                raise KandinskyError(f"OpenVINO failed to run {self._name}: {error}") from error
            outputs = request.model_outputs
            # The next call overwrites the memory of the outputs.
            return tuple(torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(len(outputs)))

    def _export(self, part: ExportedPart, compress: Compression | None, path: Path | None) -> None:
        """Export the graph, and store it in the folder `path`; None stores nothing."""
        model = exported_model(part)
        if compress is not None:
            model = compress(model)
        self._source = model
        if path is not None and _store(model, path):
            self._source = _stored(path)

    def _export_again(self, part: ExportedPart, compress: Compression | None) -> None:
        """Replace a stored graph that cannot be read or compiled."""
        folder = self._source.parent
        logger.warning("OpenVINO's graph in %s cannot be used, and is exported again", folder)
        shutil.rmtree(folder, ignore_errors=True)
        self._export(part, compress, None if folder.exists() else folder)

    def _request(self, inputs: Sequence[Tensor]) -> Any:
        """Return the inference request for inputs of these shapes."""
        is_static = self._settings.device in STATIC_DEVICES
        key = tuple(tuple(tensor.shape) for tensor in inputs) if is_static else ()
        if key not in self._requests:
            while len(self._requests) >= MAX_SHAPES:
                self._requests.popitem(last=False)
            self._requests[key] = self._compile(key).create_infer_request()
        self._requests.move_to_end(key)
        return self._requests[key]

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        openvino, settings, source = _openvino(), self._settings, self._source
        if shapes:
            source = _read_again(source) if isinstance(source, Path) else source.clone()
        try:
            if shapes:
                source.reshape({index: openvino.PartialShape(list(shape)) for index, shape in enumerate(shapes)})
            return core().compile_model(source, settings.device, _compile_options(settings))
        except RuntimeError as error:
            advice = f"{self._name} could not be compiled for it ({error})"
            raise invalid("device", settings.device, "a device that compiles the network", advice) from error


def check_settings(settings: EngineSettings) -> None:
    """Check that OpenVINO is installed, has the device, and that the device computes in the precision.

    Args:
        settings: The settings.

    Raises:
        InputError: If a value is unknown or not available here.
        MissingDependencyError: If a package is not installed.
    """
    one_of("device", settings.device, DEVICES)
    one_of("precision", settings.precision, tuple(CAPABILITIES))
    check_installed(settings.precision)
    available = core().available_devices
    if settings.device == "AUTO":
        return
    if not any(name.split(".")[0] == settings.device for name in available):
        expected = f"one of {', '.join(dict.fromkeys([*available, 'AUTO']))}, which OpenVINO finds here"
        raise invalid("device", settings.device, expected)
    capabilities = core().get_property(settings.device, "OPTIMIZATION_CAPABILITIES")
    names = [name for name, capability in CAPABILITIES.items() if capability in capabilities]
    for name in (settings.precision, settings.element):
        if name not in names:
            raise invalid("precision", name, f"one of {', '.join(names)}, in which the {settings.device} here computes")


def check_installed(precision: str) -> None:
    """Check that the packages are installed.

    Args:
        precision: One of `CAPABILITIES`; quantization needs NNCF.

    Raises:
        MissingDependencyError: If one is missing.
    """
    for name in required_packages(precision):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"the engine openvino needs {name} for {precision}, which is not installed: "
                "pip install 'kandinsky22[openvino]'"
            )


def required_packages(precision: str | None) -> tuple[str, ...]:
    """Return the packages that determine the results, by the names under which they are imported and installed.

    Args:
        precision: One of `CAPABILITIES`; None for that of the networks.
    """
    return ("openvino", "nncf") if precision == INT8 else ("openvino",)


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Return a context manager inside of which OpenVINO and NNCF are imported without their reports.

    They send none from continuous integration, which they recognise by variables when they are first imported.
    """
    before = {name: os.environ.get(name) for name in REPORTS_OFF}
    os.environ.update(REPORTS_OFF)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _openvino() -> Any:
    with without_reports():
        import openvino
    return openvino


@functools.cache
def core() -> Any:
    """Return OpenVINO's object for devices, which is the same for the entire process."""
    return _openvino().Core()


def graph_key(part: ExportedPart, compression: str) -> str:
    """Return the name under which the exported graph is stored: a digest of weights, config, packages and compression.

    The digest reads evenly spread values of each weight, as fingerprints in recipes do.

    Args:
        part: What to export.
        compression: Name of the quantization; empty for none.
    """
    tensors = dict(part.network.named_parameters()) | dict(part.network.named_buffers())
    packages = ("kandinsky22", "torch", *required_packages(INT8 if compression else "float32"))
    facts = {
        "format": FORMAT,
        "part": part.name,
        "class": type(part.network).__name__,
        "config": {name: repr(value) for name, value in dict(part.network.config).items()},
        "weights": tensors_digest(tensors),
        "compression": compression,
        "versions": {name: _version(name) for name in packages},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # our own package, imported from a folder
        from kandinsky22 import __version__

        return __version__


def exported_model(part: ExportedPart) -> Any:
    """Return the OpenVINO model of a part, which shares memory with the network's weights where that is possible.

    The part is traced with plain operations: our own kernels are off, and with gradients enabled no layer overwrites
    its input.

    Args:
        part: What to export.
    """
    with without_reports():
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.inference_mode(False), torch.enable_grad(), optimisations(**dict.fromkeys(NAMES, False)):
        with warnings.catch_warnings():  # of the tracer, about sizes that are constant here
            warnings.simplefilter("ignore")
            traced: Any = torch.jit.trace(part.module.eval(), part.example, check_trace=False, strict=False)
            decoder = TorchScriptPythonDecoder(traced, example_input=part.example, shared_memory=True)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.validate_nodes_and_infer_types()
    return model


def _compile_options(settings: EngineSettings) -> dict[str, Any]:
    """Return OpenVINO's options for a device."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if settings.device not in STATIC_DEVICES:
        options["INFERENCE_PRECISION_HINT"] = ELEMENT_TYPES[settings.element]
    if settings.device == "CPU":
        # Pinned threads of several processes would share the first cores.
        options |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
    if settings.folder is not None and settings.device != "AUTO":
        # The weights stay in the exported graph's file, and the compiled one refers to them.
        options |= {"CACHE_DIR": str(settings.folder / "compiled"), "CACHE_MODE": "OPTIMIZE_SIZE"}
    return options


# Files


def _read_again(path: Path) -> Any:
    """Return a stored graph that could be read before.

    Raises:
        KandinskyError: If its files are damaged or missing now.
    """
    try:
        return _openvino().Core().read_model(path)
    except RuntimeError as error:
        raise KandinskyError(f"OpenVINO cannot read its graph in {path}: call to_openvino() again ({error})") from error


def _is_readable(path: Path) -> bool:
    """Return whether OpenVINO can read a stored graph. Its weights stay in their file."""
    try:
        core().read_model(path)
    except RuntimeError:
        return False
    return True


def _stored(folder: Path) -> Path | None:
    """Return the file of an exported graph; None if there is none."""
    path = folder / "model.xml"
    return path if path.is_file() and path.with_suffix(".bin").is_file() else None


def _store(model: Any, folder: Path) -> bool:
    """Write an exported graph into a new folder that appears when it is complete, and return whether that succeeded.

    Its files are on the disk before the folder gets its name, so that no power failure leaves an incomplete graph. A
    cache folder that cannot be written, whatever is wrong with it, stores nothing.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder.parent) as temporary:
            _openvino().save_model(model, temporary / "model.xml", compress_to_fp16=False)
            for file in temporary.iterdir():
                flush_to_disk(file)
            flush_folder(temporary)
            if _stored(folder) is None:  # otherwise, another process was sooner
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete graph
            with contextlib.suppress(OSError):
                os.replace(temporary, folder)
        flush_folder(folder.parent)
    except (OSError, RuntimeError) as error:
        logger.warning("OpenVINO's graph cannot be stored in %s: %s", folder, error)
        return False
    return _stored(folder) is not None


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".saving-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def changed_weights_error(name: str, reason: str) -> InputError:
    """Return the error for a network that has changed since it was exported.

    Args:
        name: Name of the component.
        reason: What has changed.
    """
    return InputError(
        f"{name} runs by OpenVINO as it was exported, and {reason}: call to_openvino() again, or to_torch()"
    )
