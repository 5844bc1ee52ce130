"""Methods that scripts for the reference call on any pipeline, besides those that are the pipeline's own.

Some act, some have nothing to do here and say so once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from PIL.Image import Image

from kandinsky22.errors import CheckpointError, InputError, invalid
from kandinsky22.inputs import validation
from kandinsky22.inputs.image_processor import VaeImageProcessor
from kandinsky22.inputs.images import Array
from kandinsky22.models.attention_settings import AttentionSettings
from kandinsky22.models.base import LAYOUT_VERSION
from kandinsky22.pipelines.component_io import index_entry

if TYPE_CHECKING:
    from kandinsky22.models import VQModel


class PipelineConfig(Mapping[str, Any]):
    """Entries of the `model_index.json` of a pipeline: `config.name`, `config["name"]` and `dict(config)` all work.

    Args:
        entries: The entries of the file.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __getattr__(self, name: str) -> Any:
        if name == "_entries" or name not in self._entries:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries!r})"


class ReferenceMethodsMixin(AttentionSettings):
    """Mixin with the reference's generic methods."""

    _optional_components: ClassVar[list[str]] = []
    origin: str | None
    hf_device_map: dict[str, str] | None
    _components: dict[str, Any]

    # What a pipeline is

    @property
    def config(self) -> PipelineConfig:
        """Library and class of each component, as in `model_index.json`."""
        entries = {name: tuple(index_entry(name, part)) for name, part in self._components.items()}
        named = {} if self.origin is None else {"_name_or_path": self.origin}
        return PipelineConfig(
            {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION, **named, **entries}
        )

    @property
    def name_or_path(self) -> str | None:
        """Name of the checkpoint that the pipeline was loaded from: another name of `origin`."""
        return self.origin

    # Memory

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Do nothing: attention here never holds the scores of all tokens, which slicing would avoid.

        Args:
            slice_size: Ignored.
        """
        self.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Do nothing, see `enable_attention_slicing`."""

    def enable_vae_slicing(self) -> None:
        """Decode images of a batch one at a time, see `VQModel.enable_slicing`."""
        self._autoencoder("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images of a batch together again."""
        self._autoencoder("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode images in tiles, see `VQModel.enable_tiling`."""
        self._autoencoder("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images as a whole again."""
        self._autoencoder("disable_vae_tiling").disable_tiling()

    def _autoencoder(self, method: str) -> VQModel:
        movq = self._components.get("movq")
        if movq is None:
            raise InputError(f"{method}: {type(self).__name__} has no movq, the autoencoder of the decoders")
        model: VQModel = movq
        return model

    def reset_device_map(self) -> None:
        """Undo `from_pretrained(device_map=...)`: end offloading and move all networks to the CPU."""
        if self.hf_device_map is None:
            return
        pipe: Any = self  # the methods are those of OffloadMixin
        pipe.remove_all_hooks()
        pipe.to("cpu")
        self.hf_device_map = None

    # Images and the Hub

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Image]:
        """Return PIL images.

        Args:
            images: One image (H, W, C) or several (N, H, W, C) in [0, 1], with C = 1 or 3.
        """
        return VaeImageProcessor.numpy_to_pil(images)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
        **options: Any,
    ) -> str:
        """Save the pipeline and upload it to a repository on the Hub, which is created if it does not exist.

        Args:
            repo_id: Repository, such as "owner/name".
            commit_message: Message of the commit; None names the class.
            private: Whether a new repository is private; None for the default of the owner.
            token: Access token of the Hub; None for the stored one.
            create_pr: Whether the commit opens a pull request.
            max_shard_size: See `save_pretrained`.
            variant: See `save_pretrained`.
            **options: Other arguments of `save_pretrained`, and `revision`, the branch to write to.

        Returns:
            Address of the commit.

        Raises:
            InputError: If an argument is invalid.
            CheckpointError: If the upload fails.
            MissingDependencyError: If huggingface_hub is not installed.
        """
        validation.strict_bool("create_pr", create_pr)
        revision = options.pop("revision", None)
        with tempfile.TemporaryDirectory() as folder:
            pipe: Any = self  # the method is that of DiffusionPipeline
            pipe.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant, **options)
            return upload_folder(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                revision=revision,
            )


def upload_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload a folder to a repository on the Hub.

    Args:
        folder: The folder.
        repo_id: Repository, created if it does not exist.
        commit_message: Message of the commit.
        private: Whether a new repository is private; None for the default of the owner.
        token: Access token of the Hub; None for the stored one.
        create_pr: Whether the commit opens a pull request.
        revision: Branch to write to; None for the default branch.

    Returns:
        Address of the commit.

    Raises:
        InputError: If the repository's name is no name.
        CheckpointError: If the upload fails.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    hub = _hub_client()
    try:
        created = hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )
    except hub.errors.HFValidationError as error:
        raise invalid("repo_id", repo_id, "a repository such as 'owner/name'") from error
    except Exception as error:  # the client and its HTTP library raise many types of exceptions
        message = " ".join(str(error).split())
        raise CheckpointError(f"cannot upload to {repo_id} on the Hub: {message}") from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def _hub_client() -> Any:
    from kandinsky22.errors import MissingDependencyError

    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
