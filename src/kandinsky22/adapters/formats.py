"""Layouts of adapter files: names of tensors in, updates of a network's parameters out.

Four layouts are read, in one file or mixed:

- PEFT: ``down_blocks.1.attentions.0.to_q.lora_A.weight`` and ``lora_B``, with settings (alpha) in the file's header.
- Attention processors, as scripts of 2023 wrote them: ``....processor.add_k_proj_lora.down.weight`` and ``up``.
- Flattened names: ``lora_unet_down_blocks_1_attentions_0_to_q.lora_down.weight``, ``lora_up`` and ``alpha``.
- Whole weights: names and shapes of the network itself, of all or some of its parameters.

Names may begin with a wrapper (``base_model.model.``) or with the network that they belong to (``unet.``, ``prior.``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky22.adapters.updates import Adapter, LowRankUpdate, ReplacementUpdate, WeightUpdate
from kandinsky22.errors import CheckpointError, describe, printable

SHOWN_NAMES = 4  # names listed per kind of problem
WRAPPERS = ("base_model.model.", "model.", "module.", "_orig_mod.", "transformer.", "lora_unet_", "lora_transformer_")
UNET, PRIOR = "unet", "prior"  # roles of networks
ROLES = {"unet.": UNET, "prior_prior.": PRIOR, "prior.": PRIOR, "lora_prior_": PRIOR}  # by beginning of a name

PEFT = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
PROCESSOR = re.compile(
    r"(?P<layer>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\."
    r"(?P<part>down|up)\.weight"
)
LINEAR = re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight")
FLAT = re.compile(r"(?P<layer>.+)\.lora_(?P<part>down|up)\.weight")
ALPHA = re.compile(
    r"(?P<layer>.+?)(?:\.processor\.(?P<projection>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora|\.lora)?\.alpha"
)
LAYOUTS = (PROCESSOR, LINEAR, PEFT, FLAT, ALPHA)
PARTS = {"A": "down", "B": "up", "down": "down", "up": "up", None: "alpha"}
# Methods besides LoRA, which have other tensors. Applying the rest of such a file would give another result.
UNSUPPORTED = re.compile(
    r"lora_magnitude_vector|dora_scale|lora_mid|lora_embedding_|lora_B(?:\.[^.]+)?\.bias|hada_w|lokr_|oft_|ia3_|\.diff(?:_b)?$"
)
# Settings of PEFT for variants of LoRA that compute something else
UNSUPPORTED_SETTINGS = (
    *("use_dora", "fan_in_fan_out", "use_qalora"),
    *("kasa_config", "arrow_config", "alora_invocation_tokens"),
)
# Beginnings of PEFT's `init_lora_weights` that change the base weights, as `peft/tuners/lora/layer.py` does
LOFTQ = "loftq"
CHANGED_BASE = ("pissa", "corda", "olora", "lora_ga", LOFTQ)
MAX_ALPHA = 1e9  # of a file; far beyond any that training uses


@dataclasses.dataclass
class Layer:
    """The tensors that a file has for one layer or parameter.

    Attributes:
        name: Name of the layer, or of the parameter, without wrappers.
        role: Network that the file names: `UNET`, `PRIOR`, or None if it names none.
        parts: Tensors by "down", "up", "alpha" or "value", with their names in the file.
    """

    name: str
    role: str | None
    parts: dict[str, tuple[str, Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Names of the tensors in the file."""
        return [key for key, _ in self.parts.values()]


class Problems:
    """What does not fit, by kind."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, names: Iterable[str]) -> None:
        """Record names.

        Args:
            kind: What is wrong with them, as the end of a sentence.
            names: Names of tensors in the file, with details.
        """
        self._names.setdefault(kind, []).extend(map(printable, names))

    def raise_if_any(self, origin: str, owners: Iterable[str]) -> None:
        """Raise the error that lists all problems.

        Args:
            origin: Name of the file.
            owners: Class names of the networks.

        Raises:
            CheckpointError: If there are problems.
        """
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN_NAMES])}{', ...' if len(names) > SHOWN_NAMES else ''}"
            for kind, names in self._names.items()
        ]
        if parts:
            raise CheckpointError(f"{origin} does not fit {' and '.join(owners)}: tensors {'; '.join(parts)}")


def match_updates(
    tensors: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    *,
    origin: str,
    settings: Mapping[str, Any] | None = None,
    prefix: str | None = None,
) -> dict[str, Adapter]:
    """Return the updates that the tensors of a file are, per network.

    Every tensor must fit a parameter.

    Args:
        tensors: Tensors by name, in any of the layouts.
        networks: Networks by role, `UNET` or `PRIOR`.
        origin: Name of the file, for messages.
        settings: Settings of PEFT from the file's header or config: alpha, rank; None for none. Names may begin with
            the role, "unet.r" for example.
        prefix: Beginning of the names that are read, without the dot; tensors of other names are ignored. None reads
            all.

    Returns:
        Adapters by role, for the networks that the file has tensors for.

    Raises:
        CheckpointError: If a tensor fits no parameter, has another shape, lacks its partner, or belongs to a method
            other than LoRA, or if ranks disagree. The message lists them.
    """
    settings = {} if settings is None else settings
    if prefix is not None:
        tensors, settings = _below(tensors, prefix), _below(settings, prefix) or settings
        if not tensors:
            raise CheckpointError(f"{origin} has no tensors whose names begin with {prefix + '.'!r}")
    role_of_prefix = ROLES.get(f"{prefix}.")
    problems = Problems()
    owners = [type(network).__name__ for network in networks.values()]
    if not tensors:
        raise CheckpointError(f"{origin} has no tensors")
    layers = _group(tensors, problems, role_of_prefix)
    targets = {role: _Targets(network) for role, network in networks.items()}
    homes = _homes(layers, targets)
    adapters: dict[str, dict[str, WeightUpdate]] = {}
    for layer in layers:
        home = homes.get(id(layer))
        if home is None:
            absent = layer.role is not None and layer.role not in networks
            problems.add(f"of the {layer.role}" if absent else "that fit nothing", layer.keys)
            continue
        role, parameter = home
        update = _update(layer, targets[role].shapes[parameter], _Settings(settings, role, origin), problems)
        if update is None:
            continue
        if parameter in adapters.setdefault(role, {}):
            problems.add("for a parameter that has others", layer.keys)
        adapters[role][parameter] = update
    problems.raise_if_any(origin, owners)
    return dict(adapters)


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in entries.items() if name.startswith(start)}


def _group(tensors: Mapping[str, Tensor], problems: Problems, default_role: str | None) -> list[Layer]:
    """Return the tensors by layer."""
    layers: dict[tuple[str, str | None], Layer] = {}
    for key, tensor in tensors.items():
        if UNSUPPORTED.search(key):
            problems.add("of a method other than LoRA", [key])
            continue
        layer_name, part = _layer_and_part(key)
        name, role = _without_wrappers(layer_name)
        layer = layers.setdefault((name, role or default_role), Layer(name, role or default_role))
        if part in layer.parts:
            problems.add("stored twice", [key])
        layer.parts[part] = key, tensor
    return list(layers.values())


def _layer_and_part(key: str) -> tuple[str, str]:
    """Return the layer's name and the part of an update that a tensor is."""
    for layout in LAYOUTS:
        if (match := layout.fullmatch(key)) is not None:
            groups = match.groupdict()
            projection = groups.get("projection")
            projection = "to_out.0" if projection == "to_out" else projection
            layer = match["layer"] if projection is None else f"{match['layer']}.{projection}"
            return layer, PARTS[groups.get("part")]
    return key, "value"


def _without_wrappers(name: str) -> tuple[str, str | None]:
    """Return the name within its network, and the role of the network if the name says it."""
    role, stripped = None, True
    while stripped:
        stripped = False
        for start in (*WRAPPERS, *ROLES):
            if name.startswith(start):
                name, stripped = name[len(start) :], True
                role = ROLES.get(start, role)
    return name, role


class _Targets:
    """The parameters of a network by the names that files have for them."""

    def __init__(self, network: nn.Module) -> None:
        self.shapes = parameter_shapes(network)
        self._by_flat_name = {
            name.removesuffix(".weight").replace(".", "_"): name for name in self.shapes if name.endswith(".weight")
        }

    def find(self, layer: Layer) -> str | None:
        """Return the name of the parameter that the tensors of a layer belong to; None if there is none."""
        if "value" in layer.parts:
            return layer.name if layer.name in self.shapes else None
        name = f"{layer.name}.weight"
        return name if name in self.shapes else self._by_flat_name.get(layer.name)


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters; quantized layers count with the weight that they stand for.

    Args:
        network: Any module.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for path, module in network.named_modules():
        shape = getattr(module, "unquantized_shape", None)
        if shape is not None:
            shapes = {name: value for name, value in shapes.items() if not name.startswith(f"{path}.")}
            shapes[f"{path}.weight"] = tuple(shape)
    return shapes


def _homes(layers: Iterable[Layer], targets: Mapping[str, _Targets]) -> dict[int, tuple[str, str]]:
    """Return role and parameter per layer. Where several networks have a name, the shape decides, then the others."""
    homes: dict[int, tuple[str, str]] = {}
    shared: list[tuple[Layer, dict[str, str]]] = []
    for layer in layers:
        names = {role: each.find(layer) for role, each in targets.items() if layer.role in (None, role)}
        candidates = {role: name for role, name in names.items() if name is not None}
        if len(candidates) == 1:
            homes[id(layer)] = next(iter(candidates.items()))
        elif candidates:
            shared.append((layer, candidates))
    roles = {role for role, _ in homes.values()}
    for layer, candidates in shared:
        fitting = [role for role, name in candidates.items() if _shape(layer) == targets[role].shapes[name]]
        preferred = [role for role in fitting if role in roles] or fitting
        if len(preferred) == 1:
            homes[id(layer)] = preferred[0], candidates[preferred[0]]
    return homes


def _shape(layer: Layer) -> tuple[int, ...] | None:
    """Return the shape of the parameter that complete tensors of a layer fit."""
    if "value" in layer.parts:
        return tuple(layer.parts["value"][1].shape)
    if not {"down", "up"} <= layer.parts.keys():
        return None
    down, up = layer.parts["down"][1], layer.parts["up"][1]
    return (up.shape[0], *down.shape[1:]) if down.ndim and up.ndim else None


def _update(layer: Layer, shape: tuple[int, ...], settings: _Settings, problems: Problems) -> WeightUpdate | None:
    """Return the update of a parameter, or None after recording why there is none."""
    if mistyped := [f"{key} {value.dtype}" for key, value in layer.parts.values() if not _is_number(key, value)]:
        problems.add("of the wrong type", mistyped)
        return None
    if "value" in layer.parts:
        key, value = layer.parts["value"]
        if tuple(value.shape) != shape:
            problems.add("of the wrong shape", [f"{key} {tuple(value.shape)} instead of {shape}"])
            return None
        return ReplacementUpdate(value)
    if not {"down", "up"} <= layer.parts.keys():
        problems.add("without their partner", layer.keys)
        return None
    (down_key, down), (up_key, up) = layer.parts["down"], layer.parts["up"]
    down, up = _matrix(down, shape), _matrix(up, shape[:2])
    rank = len(down) if down.ndim else 0
    if up.ndim != 2 or down.ndim != len(shape) or (up.shape[0], *down.shape[1:]) != shape:
        sizes = f"{down_key} {tuple(down.shape)} and {up_key} {tuple(up.shape)} for {shape}"
        problems.add("of the wrong shape", [sizes])
        return None
    if up.shape[1] != rank or rank < 1:
        problems.add("whose ranks disagree", [f"{down_key} has {rank}, {up_key} {up.shape[1]}"])
        return None
    stated = settings.rank(layer.name)
    if stated is not None and stated != rank:
        problems.add("whose rank is not that of the file's settings", [f"{down_key} {rank} instead of {stated}"])
        return None
    stored = layer.parts.get("alpha")
    if stored is not None and stored[1].numel() != 1:
        problems.add("of the wrong shape", [f"{stored[0]} {tuple(stored[1].shape)} instead of ()"])
        return None
    alpha = settings.alpha(layer.name, rank) if stored is None else float(stored[1])
    if not abs(alpha) < MAX_ALPHA:  # also not a number
        problems.add(
            "whose alpha is not a finite number below 1e9", [f"{down_key if stored is None else stored[0]} {alpha}"]
        )
        return None
    return LowRankUpdate(down, up, alpha)


def _is_number(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor has a type that its role allows: alpha may be an integer."""
    is_integer = tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return tensor.is_floating_point() or (is_integer and key.endswith("alpha"))


def _matrix(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a factor with as many dimensions as `shape`: 1x1 kernels and matrices stand for each other."""
    if tensor.ndim == 4 and len(shape) == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    if tensor.ndim == 2 and len(shape) == 4:
        return tensor[:, :, None, None]
    return tensor


def _check_initialisation(value: Any, origin: str) -> None:
    """Check that an adapter was trained on the base weights themselves.

    Raises:
        CheckpointError: If its initialisation has changed them, so that the adapter alone gives another result.
    """
    name = value.lower() if isinstance(value, str) else ""
    if not name.startswith(CHANGED_BASE):
        return
    advice = (
        "train it with another initialisation, because PEFT does not convert it to a plain LoRA"
        if name.startswith(LOFTQ)
        else "convert it to a plain LoRA where it was trained, with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    raise CheckpointError(
        f"{origin} has the setting init_lora_weights={describe(value)}, which changes the base weights too, and is not "
        f"supported: {advice}"
    )


class _Settings:
    """Settings of PEFT for one network, as far as they concern the result."""

    def __init__(self, settings: Mapping[str, Any], role: str, origin: str) -> None:
        own = [_below(settings, start[:-1]) for start, named in ROLES.items() if named == role and start[-1] == "."]
        self._settings = next((entries for entries in own if entries), settings)
        self._origin = origin
        kind = self._settings.get("peft_type") or "LORA"
        if str(getattr(kind, "value", kind)).upper() != "LORA":
            raise CheckpointError(f"{origin} is an adapter of the kind {describe(kind)}: expected LORA")
        for name in UNSUPPORTED_SETTINGS:
            if self._settings.get(name):
                raise CheckpointError(f"{origin} has the setting {name}, which is not supported")
        _check_initialisation(self._settings.get("init_lora_weights"), origin)
        if not isinstance(self._settings.get("use_rslora") or False, bool):
            flag = describe(self._settings["use_rslora"])
            raise CheckpointError(f"{origin}: use_rslora is {flag}: expected true or false")

    def rank(self, layer: str) -> int | None:
        """Return the rank that the settings state for a layer; None if they state none."""
        rank = self._number("r", "rank_pattern", layer, literal=False)
        if rank is not None and not rank.is_integer():
            raise CheckpointError(f"{self._origin}: r is {rank}: expected an integer")
        return None if rank is None else int(rank)

    def alpha(self, layer: str, rank: int) -> float:
        """Return alpha for a layer, in the meaning that the scale is alpha / rank; without settings it is the rank."""
        alpha = self._number("lora_alpha", "alpha_pattern", layer, literal=True)
        if alpha is None:
            return float(rank)
        # rsLoRA (https://arxiv.org/abs/2312.03732): the scale is alpha / √rank
        return alpha * rank**0.5 if self._settings.get("use_rslora") else alpha

    def _number(self, name: str, patterns_name: str, layer: str, *, literal: bool) -> float | None:
        """Return a setting of a layer; None if it is not stated, or depends on a pattern that need not be read."""
        value, patterns = self._settings.get(name), self._settings.get(patterns_name) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{self._origin}: {patterns_name} is {describe(patterns)}: expected names of layers")
        for pattern, number in patterns.items():
            path = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", path):
                if literal:
                    raise CheckpointError(f"{self._origin}: {patterns_name} has {describe(pattern)}: expected a name")
                return None
            if layer == path or (not str(pattern).startswith("^") and layer.endswith(f".{path}")):
                value = number
                break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_ALPHA:
            raise CheckpointError(f"{self._origin}: {name} is {describe(value)}: expected a number")
        return float(value)
