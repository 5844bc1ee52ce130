"""Quantization: networks with weights of 8 or 4 bits, converted in place or loaded from a quantized checkpoint.

Linear layers use torchao's tensors, convolutions our own (`quantized_layers.py`); those of "int8-static" are all ours
(`int8_layers.py`). Embeddings, norms, convolutions with fewer than 16 channels (the first and last layer of the UNet),
and layers whose weights their parent module reads (`reads_child_weights`) stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kandinsky22.errors import ConfigError, InputError, MissingDependencyError, invalid
from kandinsky22.inputs.validation import names_among
from kandinsky22.runtime.calibration import CALIBRATION_STEPS, Range, observed_ranges, random_steps
from kandinsky22.runtime.calls import changes_networks
from kandinsky22.runtime.device_offload import offload_of, reads_child_weights
from kandinsky22.runtime.lazy_component import loaded
from kandinsky22.runtime.network_state import attached_state, check_run_by_torch, state_of, unwrapped

KINDS: Mapping[str, str] = {
    "int8": "weights of 8 bits, activations and products in the network's dtype",
    "int8-dynamic": "weights of 8 bits, activations rounded to 8 bits at each call; integer products",
    "int8-static": "weights of 8 bits, activations rounded to 8 bits in ranges that a calibration measured",
    "int4": "weights of 4 bits in linear layers, of 8 bits in convolutions; bfloat16 on CPUs only",
}
Calibration: TypeAlias = Sequence[str] | Callable[[], object]
NETWORKS = ("prior", "prior_prior", "unet")  # components that pipelines quantize by default: by far the largest ones
ENTRY = "quantization_config"  # key in config.json
MIN_CHANNELS = 16  # convolutions with fewer input or output channels are not quantized
STATIC = "int8-static"
# Layers that "int8-static" leaves alone: each is a small part of a step, or runs once per picture, and its error acts
# on everything that follows. They encode the image embedding, the hint and the timestep, and are the prior's first and
# last layers. So do those that `_stays_float` names.
FLOAT_LAYERS = frozenset(
    (
        *("image_embeds", "image_proj", "input_hint_block", "time_emb_proj", "add_k_proj", "add_v_proj"),
        *("proj_in", "embedding_proj", "encoder_hidden_states_proj", "proj_to_clip_embeddings"),
    )
)


def quantize(network: nn.Module, kind: str, ranges: Mapping[str, Range] | None = None) -> None:
    """Quantize the layers of a network in place. Their original weights are released one by one.

    Args:
        network: A network with `nn.Linear` and `nn.Conv2d` layers.
        kind: One of `KINDS`.
        ranges: For "int8-static": ranges of the inputs of `calibrated_layers`, by name; None measures them with random
            inputs.

    Raises:
        InputError: If the kind is unknown, the network is quantized already, or the kind is "int4" and the network is
            not in bfloat16 on a CPU.
        MissingDependencyError: If torchao is not installed.
    """
    check_quantizable(network, kind)
    if kind == STATIC and ranges is None:
        ranges = measure_ranges(network, lambda: random_steps(unwrapped(network)))
    _replace_layers(unwrapped(network), kind)
    for name, measured in (ranges or {}).items():
        layer: Any = unwrapped(network).get_submodule(name)
        layer.set_input_range(*measured)
    attached_state(network).quantization = kind


def measure_ranges(network: nn.Module, run: Callable[[], object]) -> dict[str, Range]:
    """Return the ranges of the inputs that "int8-static" rounds, by the name of the layer.

    The layers of networks without convolutions (the prior) round each token in a range of its own: nothing is run for
    them, and the result is empty.

    Args:
        network: A network that is not quantized.
        run: Function that runs the network.

    Raises:
        InputError: If a layer did not run.
    """
    network = unwrapped(network)
    if _rounds_per_token(network):
        return {}
    names = [name for _, name in _layers(network, STATIC)]
    ranges = observed_ranges({name: network.get_submodule(name) for name in names}, run)
    if len(ranges) < len(names):
        missing = [name for name in names if name not in ranges]
        raise InputError(
            f"calibration did not run {len(missing)} of {len(names)} layers of {type(network).__name__}, the first of "
            f"them {missing[0]}: it must denoise images with all resolution levels"
        )
    return ranges


def check_quantizable(network: nn.Module, kind: str) -> None:
    """Check that `quantize` accepts these arguments.

    Args:
        network: A network with `nn.Linear` and `nn.Conv2d` layers.
        kind: One of `KINDS`.

    Raises:
        InputError: If the kind is unknown, the network is quantized already or has adapters, or the kind is "int4" and
            the network is not in bfloat16 on a CPU.
        MissingDependencyError: If torchao is not installed.
    """
    _check_kind(kind)
    network = unwrapped(network)
    name = type(network).__name__
    if kind_of(network) is not None:
        raise InputError(f"{name} is quantized already ({kind_of(network)}); load it again to quantize it differently")
    adapters = state_of(network).adapters
    if adapters is not None and adapters.names:
        raise InputError(
            f"{name} has adapters ({', '.join(adapters.names)}): quantize it before loading them, or make them part of "
            "its weights first: fuse_lora(), then unload_lora_weights()"
        )
    dtypes = {str(p.dtype) for p in network.parameters()}
    devices = {p.device.type for p in network.parameters()}
    if kind == "int4" and (dtypes != {"torch.bfloat16"} or devices != {"cpu"}):
        raise invalid(
            "kind",
            kind,
            f"int8 or int8-dynamic for a {name} of {', '.join(sorted(dtypes))} on {', '.join(sorted(devices))}",
            "int4 weights compute in bfloat16 on CPUs: call to(torch.bfloat16) first",
        )


def kind_of(network: nn.Module) -> str | None:
    """Return how a network is quantized (one of `KINDS`), None if it is not.

    Args:
        network: Any module, compiled or not.
    """
    return state_of(network).quantization


# Checkpoints


def stored_as(network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the form in which a network's quantization and tensors are saved, which any machine can read.

    Args:
        network: A network, quantized or not.

    Returns:
        Entries for config.json, and the state dict.
    """
    tensors, kind = network.state_dict(), kind_of(network)
    if kind is None:
        return {}, tensors
    if kind == "int4":
        for name, layer in _int4_linears(network):
            tensors[f"{name}.weight_qdata"] = layer.portable_weight()
    return {ENTRY: {"quant_method": "kandinsky22", "kind": kind}}, tensors


def prepare(network: nn.Module, entry: Any, dtype: torch.dtype | None) -> None:
    """Replace the layers of a network that has no weights yet by those that a quantized checkpoint fills.

    Args:
        network: A network on the meta device.
        entry: Value of `ENTRY` in config.json; None for a checkpoint that is not quantized.
        dtype: Floating-point type that was requested; None for the stored one.

    Raises:
        ConfigError: If the entry is another library's.
        InputError: If the weights are int4 and the dtype is not bfloat16.
        MissingDependencyError: If torchao is not installed.
    """
    if entry is None:
        return
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS or entry.get("quant_method") != "kandinsky22":
        expected = f"quant_method 'kandinsky22' and a kind among {', '.join(KINDS)}"
        raise invalid(ENTRY, entry, expected, error=ConfigError)
    if kind == "int4" and dtype not in (None, torch.bfloat16):
        raise invalid("torch_dtype", dtype, "torch.bfloat16 or 'auto'", "the weights are int4 and compute in bfloat16")
    _check_kind(kind)
    _replace_layers(network, kind)
    attached_state(network).quantization = kind


def arrange(network: nn.Module) -> None:
    """Convert weights that were read from a checkpoint to the order that suits this CPU.

    Args:
        network: A network with its weights, quantized or not.
    """
    if kind_of(network) == "int4":
        for _, layer in _int4_linears(network):
            layer.arrange_weight()


def _check_kind(kind: Any) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise invalid("kind", kind, f"one of {', '.join(KINDS)}")
    if kind != STATIC and importlib.util.find_spec("torchao") is None:
        raise MissingDependencyError(
            f"{kind} weights need torchao, which is not installed: pip install 'kandinsky22[quantize]'"
        )


def _int4_linears(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with 4-bit weights and their paths."""
    for name, layer in network.named_modules():
        if getattr(layer, "kind", None) == "int4":
            yield name, layer


def _replace_layers(network: nn.Module, kind: str) -> None:
    per_token = _rounds_per_token(network)
    for parent, path in _layers(network, kind):
        name = path.rpartition(".")[2]
        setattr(parent, name, _quantized(parent.get_submodule(name), kind, per_token=per_token))


def _layers(network: nn.Module, kind: str) -> list[tuple[nn.Module, str]]:
    """Return the parent modules and the full names of the layers that are quantized."""
    return [
        (parent, f"{path}.{name}" if path else name)
        for path, parent in network.named_modules()
        for name, layer in parent.named_children()
        if not reads_child_weights(parent)
        and (isinstance(layer, nn.Linear) or _is_wide_convolution(layer))
        and not (kind == STATIC and _stays_float(network, (*path.split("."), name)))
    ]


def _stays_float(network: nn.Module, path: Sequence[str]) -> bool:
    """Return whether "int8-static" leaves a layer alone.

    The shortcuts of the UNet's last block are 1 % of a step, and more than half of the error of all layers together
    (benchmarks/int8_sensitivity.py): their inputs have no norm, a range of hundreds, and no layer follows that would
    reduce the error.

    Args:
        network: The network.
        path: Parts of the layer's name.
    """
    if FLOAT_LAYERS.intersection(path):
        return True
    blocks = getattr(network, "up_blocks", ())
    return path[-1] == "conv_shortcut" and tuple(path[:2]) == ("up_blocks", str(len(blocks) - 1))


def _is_wide_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS


def _rounds_per_token(network: nn.Module) -> bool:
    return not any(isinstance(module, nn.Conv2d) for module in network.modules())


def _quantized(layer: nn.Module, kind: str, *, per_token: bool) -> nn.Module:
    """Return a quantized form of a layer."""
    from kandinsky22.runtime.int8_layers import Int8Conv2d, Int8Linear
    from kandinsky22.runtime.quantized_layers import GROUP, ROWS_INT4, QuantizedConv2d, QuantizedLinear

    if isinstance(layer, nn.Conv2d):
        return Int8Conv2d(layer) if kind == STATIC else QuantizedConv2d(layer, dynamic=kind == "int8-dynamic")
    assert isinstance(layer, nn.Linear)
    if kind == STATIC:
        return Int8Linear(layer, per_token=per_token)
    supports_int4 = layer.in_features % GROUP == 0 and layer.out_features % ROWS_INT4 == 0
    layer_kind = "int8" if kind == "int4" and not supports_int4 else kind
    if layer.weight.is_meta:
        return QuantizedLinear(layer_kind, layer.in_features, layer.out_features, layer.bias)
    return QuantizedLinear.from_linear(layer, layer_kind)


# Pipelines


class QuantizeMixin:
    """Mixin for classes with `components`: quantizes the networks among them."""

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    @changes_networks
    def quantize(
        self, kind: str = "int8", components: Iterable[str] | None = None, calibration: Calibration | None = None
    ) -> None:
        """Convert networks in place to weights of 8 or 4 bits.

        Images change; the documentation has figures for how much, and for what is gained. `save_pretrained` writes the
        quantized weights, and `from_pretrained` reads them.

        Args:
            kind: "int8", "int8-dynamic", "int8-static" or "int4".
            components: Names of the networks; None for the prior and the UNet, as far as the pipeline has them.
            calibration: For "int8-static": how the UNet runs while the ranges of its layers' inputs are measured.
                Prompts, for pipelines of text to image, which denoise them in 8 steps; or a function without arguments
                that calls the pipeline. None denoises latents for two random image embeddings.

        Raises:
            InputError: If the kind is unknown or unsupported here, if a component cannot be quantized, is quantized
                already, is offloaded or runs by OpenVINO, or if the calibration does not run the UNet. Nothing has
                changed then.
            MissingDependencyError: If torchao is not installed, which "int8-static" does not need.
        """
        _check_kind(kind)
        _check_calibration(calibration, kind)
        check_run_by_torch(self.components, "quantize()")
        networks: dict[str, Any] = {name: loaded(self.components.get(name)) for name in NETWORKS}
        networks = {name: network for name, network in networks.items() if network is not None}
        names = list(networks)
        if components is not None:
            names = names_among("components", components, names, "networks that can be quantized")
        for name in names:
            if (offload := offload_of(networks[name])) is not None:
                raise InputError(f"{name} is offloaded by {offload.method}(); call remove_all_hooks() first")
            check_quantizable(networks[name], kind)
        ranges: dict[str, Mapping[str, Range]] = {}
        if kind == STATIC:
            ranges = {name: measure_ranges(networks[name], _run(self, networks, calibration)) for name in names}
        for name in names:
            quantize(networks[name], kind, ranges.get(name))


def _check_calibration(calibration: Any, kind: str) -> None:
    if calibration is None:
        return
    if kind != STATIC:
        raise invalid("calibration", calibration, f"None for kind={kind!r}", f"only {STATIC!r} has a calibration")
    is_text = isinstance(calibration, Sequence) and not isinstance(calibration, str)
    if not callable(calibration) and not (
        is_text and calibration and all(isinstance(prompt, str) and prompt for prompt in calibration)
    ):
        expected = "a list of prompts, a function without arguments that calls the pipeline, or None"
        raise invalid("calibration", calibration, expected)


def _run(pipe: Any, networks: Mapping[str, Any], calibration: Calibration | None) -> Callable[[], object]:
    """Return a function that runs the UNet of a pipeline for its calibration."""
    if callable(calibration):
        return calibration
    if calibration is not None:
        arguments = {**pipe.generation_defaults, "num_inference_steps": CALIBRATION_STEPS, "output_type": "latent"}
        return lambda: pipe(list(calibration), generator=torch.Generator().manual_seed(0), **arguments)
    prior = networks.get("prior", networks.get("prior_prior"))
    embeds = None
    if prior is not None:  # embeddings with the mean and the deviation of real ones
        noise = torch.randn(2, prior.config.embedding_dim, generator=torch.Generator().manual_seed(0))
        embeds = prior.post_process_latents(noise.to(prior.device, prior.dtype))
    return lambda: random_steps(networks["unet"], embeds)
