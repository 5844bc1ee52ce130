"""Whole checkpoints: downloading, describing and converting them."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22 import __version__
from kandinsky22.adapters.files import convert_adapter
from kandinsky22.adapters.files import needed_files as adapter_files
from kandinsky22.checkpoints.atomic_files import checked_save_path, read_json
from kandinsky22.checkpoints.hub import (
    DISTILLED,
    EMBEDDED,
    CheckpointSource,
    embedded_fallback_folder,
    licence_in_card,
)
from kandinsky22.checkpoints.hub_files import file_digest
from kandinsky22.checkpoints.weights import indexed_files, select_weight_files
from kandinsky22.errors import CheckpointError, InputError, invalid
from kandinsky22.kernels import half_precision
from kandinsky22.models.tiny_decoder import SUBFOLDER, TinyDecoder
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.decoder_base import DecoderPipeline
from kandinsky22.pipelines.load_options import LoadOptions
from kandinsky22.pipelines.preparation import NOTHING_PACKED, check_preparation, pack_checkpoint
from kandinsky22.runtime.calibration import CALIBRATION_STEPS
from kandinsky22.runtime.device import dtype_name
from kandinsky22.runtime.quantize import STATIC, Calibration

CARD = "README.md"
INT8 = "int8"
STORED_DTYPES = ("float16", "bfloat16", "float32")
TEXT_TO_IMAGE = ("KandinskyV22Pipeline", "KandinskyV22CombinedPipeline")  # classes that draw prompts for a calibration


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file of a component.

    Attributes:
        name: Path of the file relative to the checkpoint, with `/`.
        bytes: Its size.
        sha256: Its digest; None if it was not computed.
    """

    name: str
    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
    """A component of a checkpoint.

    Attributes:
        class_name: Name of its class.
        files: Its weight files; none for schedulers and tokenizers.
        parameters: Number of stored elements by type, such as {"F16": 67832495}; None if they are in PyTorch files,
            which are not opened.
    """

    class_name: str
    files: tuple[WeightFile, ...]
    parameters: Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint.

    Attributes:
        class_name: Name of its pipeline class.
        folder: Its folder.
        licence: Licence that its card names; None if it names none.
        components: Its components by name; also "distilled" and "tiny_decoder" if it has them.
    """

    class_name: str
    folder: Path
    licence: str | None
    components: Mapping[str, ComponentInfo]

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.bytes for component in self.components.values() for file in component.files)

    @property
    def parameters(self) -> int:
        """Number of all stored elements that could be counted."""
        return sum(sum((component.parameters or {}).values()) for component in self.components.values())

    @property
    def digest(self) -> str | None:
        """SHA-256 over names and digests of all weight files; None if these were not computed."""
        files = sorted((file.name, file.sha256) for part in self.components.values() for file in part.files)
        if any(sha256 is None for _, sha256 in files):
            return None
        return hashlib.sha256("".join(f"{name} {sha256}\n" for name, sha256 in files).encode()).hexdigest()


def pull(source: CheckpointSource, *, variant: str | None = None, expected_kind: str | None = None) -> list[Path]:
    """Download a checkpoint and the prior that belongs to it into the Hub cache: only files that loading reads.

    The distilled adapter and the tiny decoder of the checkpoint are downloaded too.

    Args:
        source: The checkpoint. With `checks_digests`, interrupted downloads are continued and digests are compared.
        variant: Variant of the weight files; None for the plain files.
        expected_kind: "decoder", "inpaint" or "control"; None accepts every kind, also a prior alone.

    Returns:
        The folder of the checkpoint, then that of its prior.

    Raises:
        CheckpointError: If a file cannot be downloaded, or has another digest than the Hub's twice.
        InputError: If the checkpoint is of another kind.
    """
    options = LoadOptions(None, variant).checked()
    pipeline_class = _pipeline_class(source)
    if expected_kind is not None and pipeline_class.embedded_subfolder != expected_kind:
        expected = f"weights for {expected_kind}, not for {pipeline_class.embedded_subfolder}"
        raise invalid("model", str(source.name), expected)
    folders = [pipeline_class._fetch_all(source, options, {})]
    if _needs_prior(pipeline_class):
        folders.append(DiffusionPipeline._fetch_all(source.matching_prior(), options, {}))
    if _has_decoder(pipeline_class):
        _fetch_extras(source)
    return folders


def describe_checkpoint(folder: Path, *, with_digests: bool = True) -> CheckpointInfo:
    """Return a description of a checkpoint, its distilled adapter and its tiny decoder. No weights are loaded.

    Args:
        folder: Its folder.
        with_digests: Whether the SHA-256 of weight files is computed, which reads all of them.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    index = read_json(folder / DiffusionPipeline.config_name)
    entries = {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }
    components = {
        name: _describe_component(folder, name, entry[1], with_digests=with_digests) for name, entry in entries.items()
    }
    components |= _describe_extras(folder, with_digests=with_digests)
    return CheckpointInfo(str(index.get("_class_name")), folder, licence_in_card(folder / CARD), components)


def convert(
    source: CheckpointSource,
    output: Path,
    *,
    dtype: str,
    with_prior: bool = True,
    max_shard_size: str = "10GB",
    prior: str | None = None,
    prepare: bool = False,
    calibration: Sequence[str] | None = None,
) -> None:
    """Write a checkpoint in another floating-point type, or with 8-bit weights, as safetensors.

    The result has the published layout. The prior that belongs to a decoder is written into the subfolder `prior`, and
    a card names the licence of the original. The distilled adapter and the tiny decoder of the original are converted
    too. The folder appears when all of it is complete.

    Args:
        source: The checkpoint. Of the embedded model, `embedded_subfolder` is converted.
        output: Folder that does not exist, or is empty.
        dtype: "float16", "bfloat16" or "float32"; "int8" for prior and UNet with 8-bit weights and the rest in float16,
            which needs torchao. If `prepare` is True, "int8" rounds activations to 8 bits too ("int8-static"), and the
            rest is in bfloat16, or in float32 on CPUs that do not multiply bfloat16.
        with_prior: Whether the prior is written too.
        max_shard_size: Largest weight file.
        prior: Prior to write, a folder or Hub id; None for the one that belongs to the decoder.
        prepare: Whether packed weights for this machine are written too, see `runtime.prepared`.
        calibration: Prompts that the model draws while the ranges of activations are measured; None for random image
            embeddings. Only for a decoder of text to image that is prepared in "int8".

    Raises:
        CheckpointError: If the checkpoint cannot be loaded, if the folder cannot be written, or if it cannot be
            prepared on this machine.
        InputError: If an argument is invalid.
        MissingDependencyError: If the type is "int8" and torchao is not installed.
    """
    if dtype not in (*STORED_DTYPES, INT8):
        raise invalid("dtype", dtype, f"one of {', '.join((*STORED_DTYPES, INT8))}")
    if prepare:
        check_preparation()
        if dtype in map(dtype_name, half_precision.SLOW_TYPES):
            fast = [name for name in STORED_DTYPES if name not in map(dtype_name, half_precision.SLOW_TYPES)]
            raise invalid("dtype", dtype, f"one of {', '.join((*fast, INT8))}", f"this CPU does not multiply {dtype}")
    output = checked_save_path(output, "output")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} exists and is not empty; choose another folder, or remove it")
    pipeline_class = _pipeline_class(source)
    sources = {"": source}
    if prior is not None and not (with_prior and _needs_prior(pipeline_class)):
        raise invalid("prior", prior, f"None: no prior is written with a {pipeline_class.__name__} here")
    if with_prior and _needs_prior(pipeline_class):
        sources["prior"] = source.matching_prior(prior)
    _check_calibration(calibration, pipeline_class, dtype if prepare else None)
    licence = licence_in_card(source.fetch(lambda names: {CARD} & set(names)) / CARD)
    staging = output.parent / f".{output.name}.converting-{secrets.token_hex(8)}"
    try:
        prepared: list[str] = []
        for subfolder, part in sources.items():
            pipe = _load(part, _stored_dtype(dtype, is_prepared=prepare))
            if dtype == INT8 and not prepare:
                pipe.quantize(INT8)
            elif dtype == INT8:
                prompts = calibration if part is source else None
                pipe.quantize(STATIC, calibration=prompts and _drawing(pipe, part, prior, prompts))
            pipe.save_pretrained(staging / subfolder, max_shard_size=max_shard_size)
            if _has_decoder(type(pipe)):
                _convert_extras(part, staging / subfolder, _stored_dtype(dtype, is_prepared=prepare))
            del pipe
            if prepare:
                prepared += pack_checkpoint(staging / subfolder)
        if prepare and not prepared:
            raise CheckpointError(f"{output} was not written: {NOTHING_PACKED}")
        (staging / CARD).write_text(_card(source, dtype, licence, has_prior="prior" in sources), encoding="utf-8")
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pipeline_class(source: CheckpointSource) -> type[DiffusionPipeline]:
    """Return the class that the index of a checkpoint names."""
    name = DiffusionPipeline.config_name
    folder = source.fetch(lambda names: {name} & set(names))
    return DiffusionPipeline._class_in_index(read_json(folder / name), folder)


def _needs_prior(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Return whether a class is a decoder, whose prior is a checkpoint of its own."""
    return issubclass(pipeline_class, DecoderPipeline)


def _has_decoder(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Return whether a class draws pictures, for which checkpoints have a distilled adapter and a tiny decoder."""
    return "unet" in pipeline_class.component_names()


def _fetch_extras(source: CheckpointSource) -> Path:
    """Return the folder with the distilled adapter and the tiny decoder of a checkpoint, as far as it has them.

    All kinds of the embedded model use those of the decoder.
    """
    if source.name == EMBEDDED:
        source = dataclasses.replace(source, embedded_subfolder="decoder")
    return source.fetch(_extra_files)


def _extra_files(names: Sequence[str]) -> list[str]:
    """Return the files of the distilled adapter and of the tiny decoder among all files of a checkpoint."""
    adapter, tiny_decoder = (
        [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        for folder in (DISTILLED, SUBFOLDER)
    )
    selected = [f"{DISTILLED}/{name}" for name in adapter_files(adapter)]
    if TinyDecoder.config_name in tiny_decoder:
        network = (TinyDecoder.config_name, *select_weight_files(tiny_decoder))
        selected += [f"{SUBFOLDER}/{name}" for name in network]
    return selected


def _convert_extras(source: CheckpointSource, output: Path, dtype: str) -> None:
    """Write the distilled adapter and the tiny decoder of a checkpoint in another floating-point type."""
    import torch

    folder = _fetch_extras(source)
    present = {path.parent.name for path in map(Path, _extra_files(_files_in(folder, (DISTILLED, SUBFOLDER))))}
    if DISTILLED in present:
        convert_adapter(folder / DISTILLED, output / DISTILLED, getattr(torch, dtype))
    if SUBFOLDER in present:
        network = TinyDecoder.from_pretrained(folder / SUBFOLDER, torch_dtype=getattr(torch, dtype))
        network.save_pretrained(output / SUBFOLDER)


def _files_in(folder: Path, subfolders: Sequence[str]) -> list[str]:
    """Return the files in some folders of a checkpoint, with `/`."""
    return [f"{name}/{path.name}" for name in subfolders for path in (folder / name).glob("*") if path.is_file()]


def _check_calibration(
    calibration: Sequence[str] | None, pipeline_class: type[DiffusionPipeline], prepared_dtype: str | None
) -> None:
    if calibration is None:
        return
    if prepared_dtype != INT8 or pipeline_class.__name__ not in TEXT_TO_IMAGE:
        expected = f"None, or a decoder of text to image that is prepared in int8, not a {pipeline_class.__name__}"
        raise invalid("calibration", calibration, expected)
    if isinstance(calibration, str) or not calibration or not all(calibration):
        raise invalid("calibration", calibration, "a list of prompts")


def _stored_dtype(dtype: str, *, is_prepared: bool) -> str:
    """Return the floating-point type of the networks that are written."""
    import torch

    if dtype == INT8:
        fast = "float32" if torch.bfloat16 in half_precision.SLOW_TYPES else "bfloat16"
        return fast if is_prepared else "float16"
    return dtype


def _drawing(pipe: Any, source: CheckpointSource, prior: str | None, prompts: Sequence[str]) -> Calibration:
    """Return a calibration that draws prompts, one by one; a decoder does so with the prior that belongs to it."""
    import torch

    if "prior_prior" in pipe.components:
        return list(prompts)

    def draw() -> None:
        encoder = _load(source.matching_prior(prior), "bfloat16")
        generator = torch.Generator().manual_seed(0)
        embeddings = [encoder([prompt], generator=generator, **encoder.generation_defaults) for prompt in prompts]
        del encoder  # the decoder needs the memory
        settings = {**pipe.generation_defaults, "num_inference_steps": CALIBRATION_STEPS, "output_type": "latent"}
        for each in embeddings:
            pipe(
                image_embeds=each.image_embeds,
                negative_image_embeds=each.negative_image_embeds,
                generator=generator,
                **settings,
            )

    return draw


def _load(source: CheckpointSource, dtype: str) -> Any:
    import torch

    pipeline_class: Any = _pipeline_class(source)
    return pipeline_class.from_pretrained(
        source.name,
        torch_dtype=getattr(torch, dtype),
        revision=source.revision,
        cache_dir=source.cache_dir,
        token=source.token,
    )


def _card(source: CheckpointSource, dtype: str, licence: str | None, *, has_prior: bool) -> str:
    """Return the card of a converted checkpoint."""
    entries = [f"license: {licence}"] if licence else []
    entries += ["prior:", "- prior"] if has_prior else []
    name = Path(source.name).name if Path(source.name).is_dir() else source.name
    text = f"Converted from {name} to {dtype} by kandinsky22 {__version__}."
    return "\n".join(["---", *entries, "---", "", text, ""])


def _describe_component(folder: Path, name: str, class_name: str, *, with_digests: bool) -> ComponentInfo:
    component = folder / name
    fallback = embedded_fallback_folder(component)
    if not component.is_dir() and fallback is not None:
        component = fallback
    names = [path.name for path in component.iterdir() if path.is_file()] if component.is_dir() else []
    selected = LoadOptions().weight_files(names)
    paths = [component / file for file in selected]
    if selected and selected[0].endswith(".json"):
        paths = indexed_files(component / selected[0], fallback)
    return _component_info(name, class_name, paths, with_digests=with_digests)


def _describe_extras(folder: Path, *, with_digests: bool) -> dict[str, ComponentInfo]:
    """Return descriptions of the distilled adapter and of the tiny decoder, as far as a checkpoint has them."""
    paths = [folder / name for name in _extra_files(_files_in(folder, (DISTILLED, SUBFOLDER)))]
    weights = [path for path in paths if path.suffix != ".json"]
    extras = {}
    for name, class_name in ((DISTILLED, "LoRA adapter"), (SUBFOLDER, TinyDecoder.__name__)):
        if files := [path for path in weights if path.parent.name == name]:
            extras[name] = _component_info(name, class_name, files, with_digests=with_digests)
    return extras


def _component_info(name: str, class_name: str, paths: list[Path], *, with_digests: bool) -> ComponentInfo:
    files = tuple(
        WeightFile(f"{name}/{path.name}", path.stat().st_size, file_digest(path) if with_digests else None)
        for path in paths
    )
    return ComponentInfo(class_name, files, _count_elements(paths))


def _count_elements(paths: list[Path]) -> dict[str, int] | None:
    """Return the number of elements in safetensors files by their type, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    for path in paths:
        if path.suffix != ".safetensors":
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  # the file is no mapping
                    tensor = file.get_slice(key)
                    size = 1
                    for side in tensor.get_shape():
                        size *= side
                    counts[tensor.get_dtype()] += size
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: damaged ({error})") from error
    return dict(counts)
