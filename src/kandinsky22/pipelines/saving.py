"""Mixin that saves pipelines to a folder and uploads them to the Hub."""

from __future__ import annotations

import os
import tempfile
from typing import Any, ClassVar

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.checkpoints.folder_save import folder_save
from kandinsky22.checkpoints.weights import check_save_arguments
from kandinsky22.inputs.hub_uploads import HubUpload, requested_upload
from kandinsky22.models.base import LAYOUT_VERSION
from kandinsky22.pipelines.component_io import index_entry, save_component

MAX_SHARD_SIZE = "10GB"


class SavingMixin:
    """Mixin for pipelines: save them in the published layout, and upload them."""

    config_name: ClassVar[str] = "model_index.json"
    defaults_name: ClassVar[str] = "generation_defaults.json"
    _components: dict[str, Any]
    _generation_defaults: dict[str, Any]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **hub_options: Any,
    ) -> None:
        """Write all components in the published layout, and the index that names them.

        Everything appears together or, if the save fails, nothing. A save that is interrupted, even by the end of the
        process, leaves the pipeline in the folder as it was, or is completed by the next load. Other files of the
        folder are left alone.

        Args:
            save_directory: Folder to write to.
            safe_serialization: Whether prior, UNet and MoVQ are written as safetensors instead of pickled files. The
                latter replace safetensors of the same variant, which would be read first.
            variant: Variant in the names of the weight files; None for none.
            max_shard_size: Largest weight file, in bytes or as text such as "5GB"; None for 10 GB.
            push_to_hub: Whether all files of the folder are uploaded to the Hub afterwards.
            **hub_options: Arguments of the upload: `repo_id` (the name of the folder if it is left out),
                `commit_message`, `private`, `token`, `create_pr`, `revision` and `subfolder`, see `push_to_hub`.

        Raises:
            CheckpointError: If the folder cannot be written, or the upload fails.
            InputError: If an argument is invalid.
            MissingDependencyError: If huggingface_hub is required and not installed.
        """
        folder = checked_save_path(save_directory)
        max_shard_size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
        check_save_arguments(variant, max_shard_size, safe_serialization)
        upload = requested_upload(type(self).__name__, push_to_hub, hub_options, folder)
        components = self._components
        entries = {name: index_entry(name, component) for name, component in components.items()}
        bookkeeping = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        with folder_save(folder) as save:
            for name, component in components.items():
                if component is not None:
                    save_component(
                        component, save, name, variant=variant, max_shard_size=max_shard_size, safe=safe_serialization
                    )
            save.replace("", {self.defaults_name}.intersection)  # those of another pipeline
            if self._generation_defaults:
                write_json(save.stage() / self.defaults_name, self._generation_defaults, flush=False)
            write_json(save.stage() / self.config_name, {**entries, **bookkeeping}, flush=False)
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
        *,
        max_shard_size: int | str | None = None,
        revision: str | None = None,
    ) -> str:
        """Save the pipeline and upload it to a repository on the Hub, which is created if it does not exist.

        Args:
            repo_id: Repository, such as "owner/name".
            commit_message: Message of the commit; None names the class.
            private: Whether a new repository is private; None for the default of the owner.
            token: Access token of the Hub; None for the stored one.
            create_pr: Whether the commit opens a pull request.
            safe_serialization: See `save_pretrained`.
            variant: See `save_pretrained`.
            subfolder: Folder in the repository; None for its top folder.
            max_shard_size: See `save_pretrained`.
            revision: Branch to write to; None for the default branch.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            InputError: If an argument is invalid.
            CheckpointError: If the upload fails.
            MissingDependencyError: If huggingface_hub is not installed.
        """
        message = f"Upload {type(self).__name__}" if commit_message is None else commit_message
        upload = HubUpload(repo_id, message, private, token, create_pr, revision, subfolder)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return upload.run(folder)
