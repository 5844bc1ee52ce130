"""Methods of CLIP's towers that scripts written for the classes of transformers call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import checked_save_path
from kandinsky22.checkpoints.folder_save import FolderSave, folder_save
from kandinsky22.checkpoints.weights import check_save_arguments
from kandinsky22.errors import invalid
from kandinsky22.models.checkpointing import Checkpointing

ATTENTION = (None, "sdpa", "eager", "flash_attention_2")  # all compute the same; torch's fused one runs


class CLIPMethods:
    """Mixin for towers.

    Attributes:
        main_input_name: Name of the first argument of the tower.
        base_model_prefix: Name of the tower without its projection.
        config: Settings of the tower.
    """

    main_input_name: ClassVar[str]
    base_model_prefix: ClassVar[str]
    config: Any

    def _stage(self, save: FolderSave, variant: str | None, max_shard_size: int | str, safe: bool) -> None:
        raise NotImplementedError

    @property
    def _network(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    # Properties

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(p.dtype for p in self._network.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._network.parameters()).device

    @property
    def name_or_path(self) -> str:
        """Folder that the tower was loaded from; empty for one that was created in memory."""
        return str(self.config.name_or_path)

    @property
    def base_model(self) -> nn.Module:
        """The tower without its projection."""
        base: nn.Module = getattr(self, self.base_model_prefix)
        return base

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameter elements.

        Args:
            only_trainable: Whether to count only parameters that require gradients.
            exclude_embeddings: Whether to leave out the tables of `nn.Embedding` layers.
        """
        tables = [m.weight for m in self._network.modules() if exclude_embeddings and isinstance(m, nn.Embedding)]
        left_out = {id(table) for table in tables}
        counted = [p for p in self._network.parameters() if p.requires_grad or not only_trainable]
        return sum(p.numel() for p in counted if id(p) not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the size of the weights in bytes.

        Args:
            return_buffers: Whether buffers are included.
        """
        buffers = self._network.buffers() if return_buffers else ()
        return sum(tensor.nbytes for tensors in (self._network.parameters(), buffers) for tensor in tensors)

    # Training

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self._network.modules())

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Store only the inputs of layers in training steps, and compute the rest again for the gradients.

        Args:
            gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`; None for the usual ones.

        Raises:
            InputError: They are not a mapping.
        """
        if not isinstance(gradient_checkpointing_kwargs, Mapping | None):
            raise invalid("gradient_checkpointing_kwargs", gradient_checkpointing_kwargs, "a mapping, or None")
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

        def run(module: nn.Module, *args: Any) -> Any:
            import torch.utils.checkpoint  # takes a tenth of a second, and only training needs it

            return torch.utils.checkpoint.checkpoint(module, *args, **options)

        self._set_checkpointing(run)

    def gradient_checkpointing_disable(self) -> None:
        """Store all features of training steps again."""
        self._set_checkpointing(None)

    def _set_checkpointing(self, function: Any) -> None:
        for module in self._network.modules():
            if isinstance(module, Checkpointing):
                module._gradient_checkpointing_func = function
                module.gradient_checkpointing = function is not None

    def enable_input_require_grads(self) -> None:
        """Let gradients flow to the embeddings of tokens or patches although their weights are frozen."""
        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if (hook := vars(self).pop("_require_grads_hook", None)) is not None:
            hook.remove()

    def _renew_input_hook(self) -> None:
        """Move the hook of `enable_input_require_grads` to the present embeddings, which have just been replaced."""
        if "_require_grads_hook" in vars(self):
            self.enable_input_require_grads()

    # Parts

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer that embeds tokens or patches."""
        raise NotImplementedError

    def get_output_embeddings(self) -> None:
        """Return None: towers predict no tokens."""

    def tie_weights(self) -> None:
        """Do nothing: no weights are shared."""

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Accept the name of a way to compute attention: all compute the same, and torch's fused one runs.

        Args:
            attn_implementation: "sdpa", "eager", "flash_attention_2", or None.

        Raises:
            InputError: It is anything else.
        """
        if attn_implementation not in ATTENTION:
            raise invalid("attn_implementation", attn_implementation, "'sdpa', 'eager', 'flash_attention_2' or None")

    # Saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
    ) -> None:
        """Write config and weights under the file names of transformers, all together or, if it fails, nothing.

        Args:
            save_directory: Folder to write to.
            is_main_process: Whether anything is written: one of several processes does.
            state_dict: Must be None or the tower's own: other weights have to be loaded into the tower first.
            variant: Variant in the names of the weight files, such as "fp16"; None for none.
            max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
            safe_serialization: Whether to write safetensors instead of pickled files.
            push_to_hub: False: pipelines have a method to upload.

        Raises:
            CheckpointError: The folder cannot be written.
            InputError: An argument is invalid.
        """
        folder = checked_save_path(save_directory)
        check_save_arguments(variant, max_shard_size, safe_serialization)
        if push_to_hub:
            raise invalid("push_to_hub", push_to_hub, "False", "call push_to_hub() of the pipeline")
        if state_dict is not None and not _is_same(state_dict, self._network.state_dict()):
            raise invalid("state_dict", type(state_dict), "the tower's own", "call load_state_dict() first")
        if not is_main_process:
            return
        with folder_save(folder) as save:
            self._stage(save, variant, max_shard_size, safe_serialization)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Forward hook; at the level of the module, so that towers that have it can be pickled."""
    output.requires_grad_(True)


def _is_same(tensors: Any, own: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are those of a network: equal values of the same types under the same names."""
    if not isinstance(tensors, Mapping) or tensors.keys() != own.keys():
        return False
    return all(_has_equal_values(tensors[name], tensor) for name, tensor in own.items())


def _has_equal_values(value: Any, own: Tensor) -> bool:
    """Return whether a value is a tensor that equals another one; each may be on any device."""
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (own.shape, own.dtype):
        return False
    try:
        return torch.equal(value.cpu(), own.cpu())
    except NotImplementedError:  # a tensor without values, on the meta device
        return False
