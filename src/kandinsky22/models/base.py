"""Base class of the networks: a config with the constructor's arguments, and strict loading from files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from kandinsky22.adapters.merging import adapters_of
from kandinsky22.checkpoints.atomic_files import checked_save_path, read_json, write_json
from kandinsky22.checkpoints.conversion import convert_weights
from kandinsky22.checkpoints.folder_save import FolderSave, folder_save, read_consistently
from kandinsky22.checkpoints.hub import CheckpointSource, embedded_fallback_folder, model_folder
from kandinsky22.checkpoints.load_arguments import LoadArguments, check_use_safetensors, check_variant_name
from kandinsky22.checkpoints.weights import (
    check_save_arguments,
    check_stored_once,
    find_weight_files,
    read_tensors,
    replaced_weight_files,
    select_weight_files,
    write_weight_files,
)
from kandinsky22.errors import CheckpointError, ConfigError, invalid, printable
from kandinsky22.inputs.hub_uploads import HubUpload, requested_upload
from kandinsky22.kernels.linear import drop_packed
from kandinsky22.models.reference_methods import LAYOUT_VERSION as LAYOUT_VERSION
from kandinsky22.models.reference_methods import ReferenceMethods
from kandinsky22.models.stored_tensors import stored_tensors
from kandinsky22.runtime import quantize
from kandinsky22.runtime.device import mapped_device
from kandinsky22.runtime.device_offload import weights_in_memory
from kandinsky22.runtime.prepared import PACKED_FILE, attach_packed

M = TypeVar("M", bound="Model")
SHOWN_NAMES = 8  # names listed per kind of problem when weights do not fit


@dataclasses.dataclass(frozen=True)
class WeightOptions:
    """Options for reading the weights of a network.

    Attributes:
        dtype: Type to convert weights to; None for the stored type.
        variant: Variant of the weight files; None for files without one.
        use_safetensors: True reads only safetensors files, False only pickled ones; None prefers safetensors.
        ignore_mismatched_sizes: Whether tensors of another shape are newly initialised.
    """

    dtype: torch.dtype | None
    variant: str | None
    use_safetensors: bool | None
    ignore_mismatched_sizes: bool


class Model(ReferenceMethods):
    """Network with a `config`. Subclasses set `config_class` and build their layers from `self.config`.

    Networks may be built on the meta device and filled afterwards, therefore a subclass computes nothing from tensor
    values in its constructor. Buffers that are not part of a checkpoint are set in `reset_buffers`, which is called
    again once the weights are loaded.

    Attributes:
        compiled_blocks: Classes of the modules that `compile` of a pipeline compiles one by one.
    """

    compiled_blocks: ClassVar[tuple[type[nn.Module], ...]] = ()
    hf_device_map: dict[str, str]  # exists only after `from_pretrained(device_map=...)`: accelerate reads its length

    def __init__(self, /, *arguments: Any, **config: Any) -> None:
        super().__init__()
        self.config: Any = self._parsed(arguments, config)
        self.register_load_state_dict_post_hook(_end_loading)  # type: ignore[no-untyped-call]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameter elements.

        Args:
            only_trainable: Whether to count only parameters that require gradients.
            exclude_embeddings: Whether to leave out the tables of `nn.Embedding` layers.
        """
        tables = [module.weight for module in self.modules() if exclude_embeddings and isinstance(module, nn.Embedding)]
        left_out = {id(table) for table in tables}
        counted = [p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable)]
        return sum(p.numel() for p in counted)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> M:
        """Load a network, in evaluation mode, on the CPU.

        Weights that are not converted stay mapped from their file until they are used.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or "embedded".
            subfolder: Folder of the network inside the checkpoint; None for the checkpoint's top folder.
            torch_dtype: Type to convert weights to; None for float32, "auto" for the stored type.
            variant: Variant of the weight files, such as "fp16"; None for files without one.
            use_safetensors: True reads only safetensors files, False only pickled ones; None prefers safetensors.
            revision: Branch, tag or commit of a Hub repository; None for the default branch.
            cache_dir: Folder of downloaded files; None for the default one of `huggingface_hub`.
            local_files_only: Whether to use only files that are already on this machine.
            token: Token for private Hub repositories; None or True for the stored one, False for none.
            **options: Settings that replace those of the config file, and arguments of the reference. These act:
                `dtype`, another name of `torch_dtype`; `force_download`; `device_map`, a device or "auto";
                `output_loading_info`, which returns a dict of tensor names too; `ignore_mismatched_sizes`, which
                initialises tensors of another shape instead of refusing them. Others have no effect, which is logged,
                for unknown ones as a warning.

        Returns:
            The network; with `output_loading_info=True` a tuple of the network and the dict.

        Raises:
            CheckpointError: A file is missing or damaged, or its tensors are not exactly those of the network.
            ConfigError: The config is not one of Kandinsky 2.2, or of another class.
            InputError: An argument is invalid, such as a `torch_dtype` that is not a floating-point type.
        """
        arguments = LoadArguments.of(cls.__name__, options)
        settings = arguments.select(cls.__name__, {*cls.config_class.field_names(), *cls.config_class.supported_values})
        check_variant_name(variant)
        check_use_safetensors(use_safetensors)
        dtype = checked_dtype(arguments.dtype_or(torch_dtype))
        device = None if arguments.device_map is None else mapped_device(arguments.device_map)
        source = CheckpointSource(
            pretrained_model_name_or_path,
            revision,
            cache_dir,
            arguments.token if token is None else token,
            local_files_only,
            force_download=arguments.force_download,
        )
        folder = model_folder(
            source, subfolder, lambda names: [cls.config_name, *select_weight_files(names, variant, use_safetensors)]
        )
        weights = WeightOptions(dtype, variant, use_safetensors, arguments.ignore_mismatched_sizes)
        model, info = read_consistently(folder, lambda: cls._read(folder, settings, weights))
        if device is not None:
            model.to(device)
            model.hf_device_map = {"": str(device)}
        return cast(M, (model, info)) if arguments.output_loading_info else model

    @classmethod
    def _read(
        cls: type[M], folder: Path, settings: Mapping[str, Any], weights: WeightOptions
    ) -> tuple[M, dict[str, list[Any]]]:
        """Load a network from its folder; `settings` replace those of the config file."""
        dtype = weights.dtype
        config = {**read_json(folder / cls.config_name), **settings}
        saved_as = config.get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ConfigError(f"{folder / cls.config_name} is the config of a {saved_as}, not of a {cls.__name__}")
        try:
            quantization = config.pop(quantize.ENTRY, None)
            with torch.device("meta"):
                model = cls.from_config(config)
                quantize.prepare(model, quantization, dtype)
        except ConfigError as error:
            raise ConfigError(f"{folder / cls.config_name}: {error}") from error
        fallback = embedded_fallback_folder(folder)
        files = find_weight_files(folder, weights.variant, weights.use_safetensors, fallback)
        info = model._fill(files, dtype, ignore_mismatched_sizes=weights.ignore_mismatched_sizes)
        if not info["mismatched_keys"]:
            attach_packed(model, folder, files)
        return model.eval(), info

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **hub_options: Any,
    ) -> None:
        """Write config and weights in the published layout, all together or, if it fails, nothing.

        A save that is interrupted, even by the end of the process, leaves the files as they were, or is completed by
        the next load. Other files of the folder are left alone.

        Args:
            save_directory: Folder to write to; it may be the one that the network was loaded from.
            variant: Variant in the names of the weight files, such as "fp16"; None for none.
            max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
            safe_serialization: Whether to write safetensors instead of pickled files.
            push_to_hub: Whether all files of the folder are uploaded to the Hub afterwards.
            **hub_options: Arguments of the upload: `repo_id` (the name of the folder if it is left out),
                `commit_message`, `private`, `token`, `create_pr`, `revision` and `subfolder`, see `push_to_hub`.

        Raises:
            CheckpointError: The folder cannot be written, or the upload fails.
            InputError: An argument is invalid.
            MissingDependencyError: huggingface_hub is required and not installed.
        """
        folder = checked_save_path(save_directory)
        check_save_arguments(variant, max_shard_size, safe_serialization)
        upload = requested_upload(type(self).__name__, push_to_hub, hub_options, folder)
        with folder_save(folder) as save:
            stage_network(self, save, "", variant=variant, max_shard_size=max_shard_size, safe=safe_serialization)
        if upload is not None:
            upload.run(folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Save the network and upload it to a repository on the Hub, which is created if it does not exist.

        Args:
            repo_id: Repository, such as "owner/name".
            commit_message: Message of the commit; None names the class.
            private: Whether a new repository is private; None for the default of the owner.
            token: Access token of the Hub; None for the stored one.
            create_pr: Whether the commit opens a pull request.
            safe_serialization: See `save_pretrained`.
            variant: See `save_pretrained`.
            subfolder: Folder in the repository; None for its top folder.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            CheckpointError: The upload fails.
            InputError: An argument is invalid.
            MissingDependencyError: huggingface_hub is not installed.
        """
        message = f"Upload {type(self).__name__}" if commit_message is None else commit_message
        upload = HubUpload(repo_id, message, private, token, create_pr, subfolder=subfolder)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, safe_serialization=safe_serialization)
            return upload.run(folder)

    def _fill(
        self, files: Iterable[Path], dtype: torch.dtype | None, *, ignore_mismatched_sizes: bool = False
    ) -> dict[str, list[Any]]:
        """Replace the (meta) parameters by the tensors in `files`, which must be exactly the network's.

        Tensors of another shape are refused, or newly initialised. The result lists them in the reference's form.
        """
        files = list(files)
        expected = self.state_dict()
        tensors: dict[str, Tensor] = {}
        sources: dict[str, Path] = {}
        unexpected: list[str] = []
        mismatched: list[str] = []
        initialised: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        mistyped: list[str] = []
        replaceable = self._initialisable(expected) if ignore_mismatched_sizes else set()
        new_dtypes: dict[str, torch.dtype] = {}
        for file in files:
            for name, tensor in read_tensors(file):
                check_stored_once(sources, name, file)
                if name not in expected:
                    unexpected.append(printable(name))
                elif tensor.shape != expected[name].shape and name not in replaceable:
                    mismatched.append(f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}")
                elif not _is_convertible(tensor, expected[name].dtype, dtype):
                    mistyped.append(f"{name} {str(tensor.dtype).removeprefix('torch.')}")
                elif tensor.shape != expected[name].shape:
                    initialised.append((name, tuple(tensor.shape), tuple(expected[name].shape)))
                    new_dtypes[name] = tensor.dtype if dtype is None else dtype
                else:
                    tensors[name] = _own_memory(tensor)
        missing = [name for name in expected if name not in sources]
        kinds = {
            "missing": missing,
            "unexpected": unexpected,
            "of the wrong shape": mismatched,
            "of the wrong type": mistyped,
        }
        problems = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN_NAMES])}{', ...' if len(names) > SHOWN_NAMES else ''}"
            for kind, names in kinds.items()
            if names
        ]
        if problems:
            path = files[0] if len(files) == 1 else files[0].parent
            raise CheckpointError(f"{path} does not fit {type(self).__name__}: tensors {'; '.join(problems)}")
        if initialised:
            with torch.device("cpu"):
                new = type(self)(**self.config).state_dict()
            tensors |= {name: new[name].to(new_dtype) for name, new_dtype in new_dtypes.items()}
        self.load_state_dict(convert_weights(tensors, sources, dtype), assign=True)
        self.reset_buffers()
        quantize.arrange(self)
        assert not any(tensor.is_meta for tensor in self.buffers()), "a buffer is not set by reset_buffers"
        return {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": initialised, "error_msgs": []}

    def _initialisable(self, expected: Mapping[str, Tensor]) -> set[str]:
        """Return the names of the tensors that a new network of the class has: all but those of quantized layers."""
        with torch.device("meta"):
            new = type(self)(**self.config).state_dict()
        return {
            name
            for name, tensor in new.items()
            if name in expected and (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's own weights by name: fused adapters are part of them, applied ones are not.

        Args:
            *args: Arguments of torch's method.
            **kwargs: Arguments of torch's method.

        Returns:
            The weights by name.
        """
        tensors: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        own = adapters_of(self).stored_tensors(self)
        tensors.update({prefix + name: tensor for name, tensor in own.items()})
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Replace the network's own weights. Adapters stay applied, and an offloaded network stays offloaded.

        Fused adapters stay distinguished if the weights that they are part of have the same values as before.

        Args:
            state_dict: Weights by name.
            strict: Whether missing and unexpected names are an error.
            assign: Whether the tensors themselves become the weights, instead of their values.

        Returns:
            The names that are missing or unexpected, as torch's method returns them.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            _end_loading(self)  # an error may have stopped torch's method before the hook

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # torch calls this before it loads the modules inside, also where the network is a part of another module
        _begin_loading(self)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        drop_packed(self)  # copies would stay in the CPU's memory after a move
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        adapters_of(self).follow(self)
        return result

    def has_own_structure(self) -> bool:
        """Return whether no module was replaced that the methods besides `forward` rely on."""
        return True

    def reset_buffers(self) -> None:
        """Set the buffers that are not part of a checkpoint. The base class has none."""


_LOADING = "_loading"  # attribute of a network while torch loads its weights


def _begin_loading(network: nn.Module) -> None:
    """Bring the network's own weights into memory, where torch replaces them."""
    _end_loading(network)  # of a load that another module's hook has stopped
    with contextlib.ExitStack() as stack:
        stack.enter_context(weights_in_memory(network))
        adapters_of(network).begin_loading(network)
        stack.callback(adapters_of(network).end_loading, network)
        network.__dict__[_LOADING] = stack.pop_all()


def _end_loading(network: nn.Module, _incompatible_keys: Any = None) -> None:
    """Apply adapters and offload the network again once torch has loaded all its modules."""
    if (stack := network.__dict__.pop(_LOADING, None)) is not None:
        stack.close()


def _is_convertible(tensor: Tensor, expected: torch.dtype, requested: torch.dtype | None) -> bool:
    """Return whether a stored tensor can be used for one of the expected type, or converted to the requested one."""
    if not expected.is_floating_point:  # weights of a quantized network
        return tensor.dtype == expected
    # Networks cannot compute with types of 8 bits; these are accepted if they are converted.
    return tensor.is_floating_point() and (requested is not None or tensor.dtype.itemsize > 1)


def _own_memory(tensor: Tensor) -> Tensor:
    """Return the tensor; a copy if its elements share memory, as those of `expand` do."""
    is_shared = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return tensor.contiguous() if is_shared else tensor


def stage_network(
    network: Model,
    save: FolderSave,
    subfolder: str,
    *,
    variant: str | None,
    max_shard_size: int | str,
    safe: bool = True,
) -> None:
    """Write config and weights of a network as part of a save.

    Args:
        network: The network.
        save: The save.
        subfolder: Folder of the network in the saved folder; empty for that folder itself.
        variant: Variant in the names of the weight files; None for none.
        max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
        safe: Whether to write safetensors instead of pickled files.

    Raises:
        CheckpointError: If a file cannot be written.
    """
    folder = save.stage(subfolder)
    quantization, tensors = quantize.stored_as(network)
    tensors = tensors if quantization else stored_tensors(network, tensors)
    write_weight_files(folder, tensors, variant=variant, max_shard_size=max_shard_size, safe=safe)
    save.replace(subfolder, replaced_weight_files(variant, safe))
    save.replace(subfolder, {PACKED_FILE}.intersection)
    write_json(folder / network.config_name, {**network.stored_config(), **quantization}, flush=False)


def checked_dtype(torch_dtype: Any) -> torch.dtype | None:
    """Return the dtype that weights are converted to.

    Args:
        torch_dtype: None for float32, "auto" for no conversion, or a floating-point `torch.dtype`.

    Returns:
        The dtype, or None for no conversion.

    Raises:
        InputError: `torch_dtype` is something else.
    """
    if torch_dtype is None:
        return torch.float32
    if isinstance(torch_dtype, str) and torch_dtype == "auto":
        return None
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise invalid("torch_dtype", torch_dtype, "a floating-point torch.dtype, 'auto' or None (float32)")
    return torch_dtype
