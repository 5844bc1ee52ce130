"""Reading of CLIP towers, tokenizers and image processors, whose classes come from transformers.

Files of a checkpoint were written by others. Their settings are checked before anything is built from them, the classes
are those that the specification names, and no code of a checkpoint runs. Whatever transformers raises for a damaged
file becomes a `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.weights import check_weights
from kandinsky22.errors import CheckpointError, KandinskyError, describe
from kandinsky22.kernels import host_memory

TOWERS = ("text_encoder", "image_encoder")
# Classes that `model_index.json` may name. The longer names are implementations of the first, or its former name.
CLIP_CLASSES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "image_processor": (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ),
}
LISTED_TENSORS = 8  # missing tensors that a message names
MAX_SIDE = 2**12  # pixels; CLIP reads 224 to 448
MAX_TEXT_LENGTH = 2**16  # tokens; CLIP reads 77


# Settings


@dataclasses.dataclass(frozen=True)
class Rule:
    """Test of a setting's value, and the description of accepted values for messages."""

    accepts: Callable[[Any], bool]
    expected: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _integer(lowest: int, highest: int) -> Rule:
    return Rule(lambda value: _is_integer(value) and lowest <= value <= highest, f"{lowest} to {highest}, an integer")


def _number(lowest: float, highest: float) -> Rule:
    return Rule(lambda value: _is_number(value) and lowest <= value <= highest, f"a number from {lowest} to {highest}")


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.expected}, or null")


def _one_of(*values: Any) -> Rule:
    return Rule(
        lambda value: any(type(value) is type(v) and value == v for v in values),
        " or ".join(map(_json_text, values)),
    )


def _json_text(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value))


def _is_size(value: Any) -> bool:
    sides = value.values() if isinstance(value, dict) and value else [value]
    sides = [side for side in sides if side is not None]
    known = not isinstance(value, dict) or set(value) <= {"height", "width", "shortest_edge", "longest_edge"}
    return bool(sides) and known and all(_is_integer(side) and 1 <= side <= MAX_SIDE for side in sides)


def _is_channel_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(map(_is_number, numbers)) and (not isinstance(value, list) or len(value) == 3)


_BOOL = _one_of(True, False)
_TEXT = Rule(lambda value: isinstance(value, str), "text")
_SIZE = Rule(_is_size, f"1 to {MAX_SIDE} pixels, or an object with height and width or shortest_edge")
_CHANNELS = Rule(_is_channel_numbers, "three numbers")
_TOKEN_ID = Rule(lambda value: value is None or (_is_integer(value) and -1 <= value < 2**20), "a token id, or null")
_DTYPE = _one_of(None, *(f"{p}{n}" for p in ("", "torch.") for n in ("float16", "bfloat16", "float32", "float64")))
# Upper bounds are several times those of the largest CLIP models: larger values are damage, and would fill the memory.
_TOWER_RULES: Mapping[str, Rule] = {
    "hidden_size": _integer(1, 2**14),
    "intermediate_size": _integer(1, 2**16),
    "projection_dim": _integer(1, 2**14),
    "num_hidden_layers": _integer(1, 256),
    "num_attention_heads": _integer(1, 2**10),
    "vocab_size": _integer(1, 2**20),
    "max_position_embeddings": _integer(1, 2**12),
    "num_channels": _integer(3, 3),
    "image_size": _integer(1, MAX_SIDE),
    "patch_size": _integer(1, MAX_SIDE),
    "hidden_act": _TEXT,
    "layer_norm_eps": _number(1e-30, 1),
    "attention_dropout": _number(0, 1),
    "initializer_range": _number(0, 1e3),
    "initializer_factor": _number(0, 1e3),
    "bos_token_id": _TOKEN_ID,
    "eos_token_id": _TOKEN_ID,
    "pad_token_id": _TOKEN_ID,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "return_dict": _one_of(True),
    "use_return_dict": _one_of(True),
    "torchscript": _one_of(False),
    "output_attentions": _one_of(False),
    "output_hidden_states": _BOOL,
    "is_decoder": _one_of(False),
    "tie_word_embeddings": _BOOL,
    "model_type": _TEXT,
    # other names are repositories with code
    "attn_implementation": _one_of(None, "eager", "sdpa", "flash_attention_2"),
    "_attn_implementation": _one_of(None, "eager", "sdpa", "flash_attention_2"),
    "quantization_config": _one_of(None),
}
_PROCESSOR_RULES: Mapping[str, Rule] = {
    "crop_size": _SIZE,
    "size": _SIZE,
    "image_mean": _CHANNELS,
    "image_std": Rule(
        lambda value: _is_channel_numbers(value) and all(value if isinstance(value, list) else [value]),
        "three numbers that are not 0",
    ),
    "rescale_factor": _number(1e-9, 1e3),
    "resample": _optional(_integer(0, 5)),
    **{f"do_{step}": _optional(_BOOL) for step in ("center_crop", "convert_rgb", "normalize", "rescale", "resize")},
}
_TOKENIZER_RULES: Mapping[str, Rule] = {
    "model_max_length": Rule(
        lambda value: _is_number(value) and 1 <= value <= MAX_TEXT_LENGTH and value == int(value),
        f"1 to {MAX_TEXT_LENGTH} tokens",
    ),
    "add_prefix_space": _BOOL,
    "do_lower_case": _BOOL,
    "padding_side": _one_of("left", "right"),
    "truncation_side": _one_of("left", "right"),
}


def check_settings(path: Path, settings: Mapping[str, Any], rules: Mapping[str, Rule], config_class: Any) -> None:
    """Check the settings of a file before an object is built from them.

    Args:
        path: The file, for messages.
        settings: Its content.
        rules: Rules by name of the setting; settings without a rule may have any value.
        config_class: Class that makes attributes of the settings: none may replace a method.

    Raises:
        CheckpointError: If a setting has a value that is not accepted.
    """
    for name, value in settings.items():
        if name in rules and not rules[name].accepts(value):
            raise CheckpointError(f"{path}: {name} is {describe(value)}: expected {rules[name].expected}")
        if name.startswith("__") or name == "self" or callable(getattr(config_class, name, None)):
            raise CheckpointError(f"{path}: {describe(name)} is not the name of a setting")


def _check_tower_settings(path: Path, network_class: Any) -> None:
    from transformers import activations

    settings, config_class = read_json(path), getattr(network_class, "config_class", None)
    parts = [settings, *(settings[name] for name in ("text_config", "vision_config") if settings.get(name) is not None)]
    for part in parts:
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{path}: text_config and vision_config are objects, not {describe(part)}")
        check_settings(path, part, _TOWER_RULES, config_class)
        if "hidden_act" in part and part["hidden_act"] not in activations.ACT2FN:
            raise CheckpointError(f"{path}: hidden_act is {describe(part['hidden_act'])}: expected a function of torch")
        width, heads = part.get("hidden_size"), part.get("num_attention_heads")
        if width is not None and heads is not None and width % heads:
            raise CheckpointError(f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
        side, patch = part.get("image_size"), part.get("patch_size")
        if side is not None and patch is not None and patch > side:
            raise CheckpointError(f"{path}: patch_size={patch} is larger than image_size={side}")


# Loading


@contextlib.contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """Convert every exception into `CheckpointError`: transformers raises many types for damaged files.

    Args:
        name: What is loaded, for messages.
        folder: Where it is.

    Returns:
        A context manager.

    Raises:
        CheckpointError: For any exception of the block except interruptions and those of kandinsky22.
    """
    try:
        yield
    except KandinskyError:
        raise
    except BaseException as error:
        # Rust code raises PanicException, which derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot load {name} from {folder}: {reason or type(error).__name__}") from error


def clip_class(role: str, class_name: str) -> Any:
    """Return the class of transformers that a component is loaded with.

    Args:
        role: Name of the component without the prefix of a prior's component.
        class_name: One of `CLIP_CLASSES[role]`.

    Raises:
        CheckpointError: If the installed release has no such class.
    """
    import transformers

    names = [class_name, CLIP_CLASSES[role][0]]
    if role == "image_processor" and importlib.util.find_spec("torchvision") is None:
        # Without torchvision the plain name prints a warning and then gives this class.
        names.insert(0, "CLIPImageProcessorPil")
    for name in names:
        with contextlib.suppress(Exception):  # lazily imported: a missing dependency raises here
            if isinstance(found := getattr(transformers, name, None), type):
                return found
    raise CheckpointError(f"transformers {transformers.__version__} has no {class_name}; pass {role}=")


def load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    """Return a tokenizer with a complete vocabulary.

    Args:
        tokenizer_class: Class of transformers.
        folder: Folder of the tokenizer.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    present = {name: os.path.isfile(folder / name) for name in ("tokenizer.json", "vocab.json", "merges.txt")}
    missing = [name for name in ("vocab.json", "merges.txt") if not present[name]]
    if missing and not present["tokenizer.json"]:
        raise CheckpointError(f"missing file: {folder / missing[0]} (the tokenizer's vocabulary)")
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"):
        if os.path.lexists(folder / name):
            content = read_json(folder / name)
            if name == "vocab.json" and not all(_is_integer(index) and index >= 0 for index in content.values()):
                raise CheckpointError(f"cannot read {folder / name}: it does not map tokens to their indices")
    if os.path.lexists(config := folder / "tokenizer_config.json"):
        check_settings(config, read_json(config), _TOKENIZER_RULES, None)
    tokenizer = _from_pretrained(tokenizer_class, folder)
    with reading(tokenizer_class.__name__, folder):
        _try_tokenizer(tokenizer)
    return tokenizer


def _try_tokenizer(tokenizer: Any) -> None:
    """Tokenise as a call does, so that wrong settings are found now."""
    length = 8
    encoded = tokenizer(
        ["a picture", ""], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids, mask = encoded.input_ids, encoded.attention_mask
    if tuple(ids.shape) != (2, length) or ids.shape != mask.shape or not 0 <= int(ids.max()) < len(tokenizer):
        raise CheckpointError("its tokens are not indices of its vocabulary")
    tokenizer.decode(ids[0].tolist())


def load_image_processor(processor_class: Any, folder: Path) -> Any:
    """Return an image processor.

    Args:
        processor_class: Class of transformers.
        folder: Folder of the image processor.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    import PIL.Image

    path = folder / "preprocessor_config.json"
    check_settings(path, read_json(path), _PROCESSOR_RULES, processor_class)
    processor = _from_pretrained(processor_class, folder)
    with reading(processor_class.__name__, folder):
        pixels = torch.as_tensor(processor([PIL.Image.new("RGB", (3, 2))], return_tensors="pt").pixel_values)
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(pixels.isfinite().all()):
            raise CheckpointError(f"cannot use {path}: it gives pixels of shape {tuple(pixels.shape)}")
    return processor


def tower_config(network_class: Any, folder: Path) -> Any:
    """Return the config of a CLIP tower.

    Args:
        network_class: Class of the tower.
        folder: Folder of the tower.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    _check_tower_settings(folder / "config.json", network_class)
    return _from_pretrained(network_class.config_class, folder)


def load_tower(network_class: Any, folder: Path, files: Iterable[Path], torch_dtype: Any, **options: Any) -> nn.Module:
    """Load a CLIP tower, converted to the requested type, in evaluation mode.

    Args:
        network_class: Class of the tower.
        folder: Its folder.
        files: Its weight files.
        torch_dtype: Type of the weights: None for float32, "auto" for the stored one.
        **options: The options `variant` and `use_safetensors` of transformers.

    Returns:
        The tower.

    Raises:
        CheckpointError: If files are missing or damaged, or do not fit the class.
    """
    _check_tower_settings(folder / "config.json", network_class)
    files = list(files)
    check_weights(files)
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    # transformers would keep in memory what it has read of a float32 file that it converts
    convert_here = (
        isinstance(dtype, torch.dtype)
        and dtype != torch.float32
        and _stored_in_float32(files)
        and not getattr(network_class, "_keep_in_fp32_modules", None)
    )
    network, report = _from_pretrained(
        network_class,
        folder,
        **{_dtype_argument(): torch.float32 if convert_here else dtype},
        **options,
        output_loading_info=True,
        **_low_memory_options(),
    )
    if missing := sorted(report["missing_keys"]):
        listed = ", ".join(missing[:LISTED_TENSORS])
        raise CheckpointError(f"{folder} does not fit {network_class.__name__}: {len(missing)} missing: {listed}")
    with reading(network_class.__name__, folder):
        if convert_here:
            _convert(network, dtype)
            setattr(network.config, _dtype_argument(), dtype)
        for name, parameter in network.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point():
                raise CheckpointError(f"{folder} does not fit {network_class.__name__}: {name} has no numbers")
    tower: nn.Module = network.eval()
    return tower


def is_readable_tower(network_class: Any, config: Any, files: Iterable[Path]) -> bool:
    """Return whether safetensors files have valid headers, with the tensors of a tower of this config.

    Only headers are read. Names and shapes at both ends of the network stand for all of them.

    Args:
        network_class: Class of the tower.
        config: Its config.
        files: The files.
    """
    files = list(files)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        check_weights(files)
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            elif file.suffix != ".json":
                return False
    except (OSError, SafetensorError, ValueError):
        return False
    if "Vision" not in network_class.__name__:
        return True
    width, last = config.hidden_size, config.num_hidden_layers - 1
    expected = {
        "vision_model.embeddings.patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        f"vision_model.encoder.layers.{last}.mlp.fc2.weight": (width, config.intermediate_size),
        "visual_projection.weight": (config.projection_dim, width),
    }
    return all(shapes.get(name) == shape for name, shape in expected.items())


def _from_pretrained(component_class: Any, folder: Path, **options: Any) -> Any:
    """Call transformers' `from_pretrained` on a local folder; no code of the checkpoint is trusted."""
    import transformers

    load = functools.partial(component_class.from_pretrained, os.fspath(folder), local_files_only=True, **options)
    if not issubclass(component_class, nn.Module | _config_base()):  # which have no code to trust, and warn
        load = functools.partial(load, trust_remote_code=False)
    with reading(component_class.__name__, folder), _without_progress_bars(transformers):
        return load()


def _config_base() -> type:
    import transformers

    base: type = getattr(transformers, "PretrainedConfig", None) or transformers.PreTrainedConfig
    return base


def _transformers_release() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _dtype_argument() -> str:
    return "dtype" if _transformers_release() >= (4, 56) else "torch_dtype"


def _low_memory_options() -> dict[str, Any]:
    """Return options that avoid a second copy of the weights; releases from 5.0 never make one."""
    older = _transformers_release() < (5, 0) and importlib.util.find_spec("accelerate") is not None
    return {"low_cpu_mem_usage": True} if older else {}


def _stored_in_float32(files: Iterable[Path]) -> bool:
    """Return whether all floating-point tensors of these safetensors files are float32."""
    dtypes: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
                dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        elif file.suffix != ".json":
            return False
    return "F32" in dtypes and all(dtype == "F32" or not dtype.startswith(("F", "BF")) for dtype in dtypes)


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters one tensor at a time and drop each mapped source, so that peak memory does not double."""
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = host_memory.convert_and_drop(tensor.data, dtype)


@contextlib.contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    """Hide the progress bars of transformers: reading local files does not need one per component."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
