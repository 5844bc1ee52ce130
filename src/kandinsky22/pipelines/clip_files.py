"""Loading of CLIP towers, tokenizers and image processors.

Checkpoints name classes of transformers; ours of the same names are loaded. Settings are checked before anything is
built from them, and no code of a checkpoint runs. Whatever other libraries raise for a damaged file becomes a
`CheckpointError`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.conversion import convert_weights
from kandinsky22.checkpoints.weights import check_stored_once, check_weights, indexed_files, read_tensors
from kandinsky22.errors import CheckpointError, InputError, KandinskyError, printable
from kandinsky22.models.clip import CLIPTextModelWithProjection, CLIPTower, CLIPVisionModelWithProjection
from kandinsky22.models.clip_config import CLIPTowerConfig
from kandinsky22.pipelines.clip_image_processor import CONFIG_NAME, CLIPImageProcessor
from kandinsky22.pipelines.clip_settings import (
    PROCESSOR_RULES,
    TOKENIZER_RULES,
    check_settings,
    check_tower_settings,
    is_integer,
)
from kandinsky22.pipelines.clip_tokenizer import CLIPTokenizer

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
OWN_CLIP_CLASSES: Mapping[str, Any] = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "image_processor": CLIPImageProcessor,
}
LISTED_TENSORS = 8  # missing and unexpected tensors, each, that a message names


@contextlib.contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """Convert every exception into `CheckpointError`: other libraries raise many types for damaged files.

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


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer with a complete vocabulary.

    Args:
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
            if name == "vocab.json" and not all(is_integer(index) and index >= 0 for index in content.values()):
                raise CheckpointError(f"cannot read {folder / name}: it does not map tokens to their indices")
    if os.path.lexists(config := folder / "tokenizer_config.json"):
        check_settings(config, read_json(config), TOKENIZER_RULES, None)
    with reading(CLIPTokenizer.__name__, folder):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder)
        except InputError as error:
            raise CheckpointError(f"cannot load {CLIPTokenizer.__name__} from {folder}: {error}") from error
        _try_tokenizer(tokenizer)
    return tokenizer


def _try_tokenizer(tokenizer: CLIPTokenizer) -> None:
    """Tokenise as a call does, so that wrong settings are found now."""
    length = 8
    encoded = tokenizer(
        ["a picture", ""], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids, mask = encoded.input_ids, encoded.attention_mask
    if tuple(ids.shape) != (2, length) or ids.shape != mask.shape or not 0 <= int(ids.max()) < len(tokenizer):
        raise CheckpointError("its tokens are not indices of its vocabulary")
    tokenizer.decode(ids[0].tolist())


def load_image_processor(folder: Path) -> CLIPImageProcessor:
    """Return an image processor.

    Args:
        folder: Folder of the image processor.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    import PIL.Image

    path = folder / CONFIG_NAME
    settings = read_json(path)
    check_settings(path, settings, PROCESSOR_RULES, CLIPImageProcessor)
    with reading(CLIPImageProcessor.__name__, folder):
        processor = CLIPImageProcessor(**settings)
        pixels: Tensor = processor([PIL.Image.new("RGB", (3, 2))], return_tensors="pt").pixel_values
        if pixels.shape[1] != 3 or not bool(pixels.isfinite().all()):
            raise CheckpointError(f"cannot use {path}: it gives pixels of shape {tuple(pixels.shape)}")
    return processor


def tower_config(network_class: type[CLIPTower], folder: Path) -> CLIPTowerConfig:
    """Return the config of a CLIP tower.

    Args:
        network_class: Class of the tower.
        folder: Folder of the tower.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    settings = check_tower_settings(folder / "config.json", network_class)
    with reading(network_class.__name__, folder):
        config = network_class.config_class(**settings)
    config._name_or_path = os.fspath(folder)
    return config


def load_tower(network_class: type[CLIPTower], folder: Path, files: Iterable[Path], torch_dtype: Any) -> CLIPTower:
    """Load a CLIP tower, converted to the requested type, in evaluation mode.

    Args:
        network_class: Class of the tower.
        folder: Its folder.
        files: Its weight files.
        torch_dtype: Type of the weights: None for float32, "auto" for the one that the config names, or the stored one.

    Returns:
        The tower.

    Raises:
        CheckpointError: If files are missing or damaged, or do not fit the class.
    """
    config = tower_config(network_class, folder)
    files = list(files)
    if not files:
        raise CheckpointError(f"no weights in {folder}: expected model.safetensors or pytorch_model.bin")
    check_weights(files)
    dtype = torch.float32 if torch_dtype is None else config.dtype if torch_dtype == "auto" else torch_dtype
    with reading(network_class.__name__, folder):
        with torch.device("meta"):
            tower = network_class(config)
        tensors = _tower_tensors(tower, folder, files, dtype)
        tower.load_state_dict(tensors, assign=True)
        config.dtype = tower.dtype
    return tower.eval()


def _tower_tensors(tower: CLIPTower, folder: Path, files: list[Path], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the weights of a tower by name, in one type: `dtype`, or that of the first one.

    Files may hold other tensors too: those of a whole CLIP model, or constant positions. Other tensors of this tower
    mean that its config is not that of the weights.
    """
    expected, tensors, name_of = tower.state_dict(), dict[str, Tensor](), type(tower).__name__
    sources: dict[str, Path] = {}
    unexpected: list[str] = []
    for file in indexed_files(files[0]) if files[0].suffix == ".json" else files:
        for name, tensor in read_tensors(file):
            check_stored_once(sources, name, file)
            if name not in expected:
                if name.startswith(f"{tower.base_model_prefix}.") and not name.endswith("position_ids"):
                    unexpected.append(name)
                continue
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
                raise CheckpointError(f"{file} does not fit {name_of}: {name} {shapes}")
            tensors[name] = tensor
    missing = [name for name in expected if name not in tensors]
    differences = [
        f"{len(names)} {kind}: {', '.join(map(printable, names[:LISTED_TENSORS]))}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if differences:
        raise CheckpointError(f"{folder} does not fit {name_of}: {'; '.join(differences)}")
    return convert_weights(tensors, sources, dtype or next(iter(tensors.values())).dtype)


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
    if network_class is not CLIPVisionModelWithProjection:
        return True
    width, last = config.hidden_size, config.num_hidden_layers - 1
    expected = {
        "vision_model.embeddings.patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        f"vision_model.encoder.layers.{last}.mlp.fc2.weight": (width, config.intermediate_size),
        "visual_projection.weight": (config.projection_dim, width),
    }
    has_more_layers = f"vision_model.encoder.layers.{last + 1}.mlp.fc2.weight" in shapes
    return not has_more_layers and all(shapes.get(name) == shape for name, shape in expected.items())
