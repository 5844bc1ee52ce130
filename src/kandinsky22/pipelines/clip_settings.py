"""Settings of CLIP towers, tokenizers and image processors, checked before anything is built from them.

Files of a checkpoint were written by others: no value of theirs may exhaust the memory, replace a method or run code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.errors import CheckpointError, describe
from kandinsky22.models.clip import CLIPTower
from kandinsky22.models.clip_config import ACTIVATIONS

MAX_SIDE = 2**12  # pixels; CLIP reads 224 to 448
MAX_TEXT_LENGTH = 2**16  # tokens; CLIP reads 77


@dataclasses.dataclass(frozen=True)
class Rule:
    """Test of a setting's value, and the description of accepted values for messages."""

    accepts: Callable[[Any], bool]
    expected: str


def is_integer(value: Any) -> bool:
    """Return whether a value of a JSON file is an integer; true and false are none.

    Args:
        value: The value.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _integer(lowest: int, highest: int) -> Rule:
    return Rule(lambda value: is_integer(value) and lowest <= value <= highest, f"{lowest} to {highest}, an integer")


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
    sides = [value]
    if isinstance(value, dict):
        entries = {name: side for name, side in value.items() if side is not None}
        if set(entries) not in ({"height", "width"}, {"shortest_edge"}):
            return False
        sides = list(entries.values())
    return all(is_integer(side) and 1 <= side <= MAX_SIDE for side in sides)


def _is_channel_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(map(_is_number, numbers)) and (not isinstance(value, list) or len(value) == 3)


_BOOL = _one_of(True, False)
_TEXT = Rule(lambda value: isinstance(value, str), "text")
_SIZE = Rule(_is_size, f"1 to {MAX_SIDE} pixels, or an object with height and width or shortest_edge")
_CHANNELS = Rule(_is_channel_numbers, "three numbers")
_TOKEN_ID = Rule(lambda value: value is None or (is_integer(value) and -1 <= value < 2**20), "a token id, or null")
_DTYPE = _one_of(
    None, "auto", *(f"{p}{n}" for p in ("", "torch.") for n in ("float16", "bfloat16", "float32", "float64"))
)
# Upper bounds are several times those of the largest CLIP models: larger values are damage, and would fill the memory.
TOWER_RULES: Mapping[str, Rule] = {
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
    "return_dict": _BOOL,
    "use_return_dict": _one_of(True),  # another name of return_dict, which cannot be set
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
PROCESSOR_RULES: Mapping[str, Rule] = {
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
TOKENIZER_RULES: Mapping[str, Rule] = {
    "model_max_length": Rule(
        lambda value: _is_number(value) and 1 <= value <= MAX_TEXT_LENGTH and value == int(value),
        f"1 to {MAX_TEXT_LENGTH} tokens",
    ),
    "add_prefix_space": _BOOL,
    "do_lower_case": _BOOL,
    "padding_side": _one_of("left", "right"),
    "truncation_side": _one_of("left", "right"),
    "model_input_names": Rule(
        lambda value: isinstance(value, list) and {"input_ids", "attention_mask"} <= {*map(str, value)},
        "a list with 'input_ids' and 'attention_mask'",
    ),
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


def check_tower_settings(path: Path, network_class: type[CLIPTower]) -> Mapping[str, Any]:
    """Return the settings of a CLIP tower's config file.

    Args:
        path: The file.
        network_class: Class of the tower.

    Raises:
        CheckpointError: If a setting has a value that is not accepted.
    """
    settings, config_class = read_json(path), network_class.config_class
    parts = [settings, *(settings[name] for name in ("text_config", "vision_config") if settings.get(name) is not None)]
    for part in parts:
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{path}: text_config and vision_config are objects, not {describe(part)}")
        check_settings(path, part, TOWER_RULES, config_class)
        if "hidden_act" in part and part["hidden_act"] not in ACTIVATIONS:
            expected = f"one of {', '.join(ACTIVATIONS)}"
            raise CheckpointError(f"{path}: hidden_act is {describe(part['hidden_act'])}: expected {expected}")
        width, heads = part.get("hidden_size"), part.get("num_attention_heads")
        if width is not None and heads is not None and width % heads:
            raise CheckpointError(f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
        side, patch = part.get("image_size"), part.get("patch_size")
        if side is not None and patch is not None and patch > side:
            raise CheckpointError(f"{path}: patch_size={patch} is larger than image_size={side}")
    nested = settings.get({"clip_text_model": "text_config"}.get(config_class.defaults["model_type"], "vision_config"))
    return nested if settings.get("model_type") == "clip" and nested is not None else settings
