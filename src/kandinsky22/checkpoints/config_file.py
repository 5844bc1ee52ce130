"""Reading the config file of a component."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.hub import CheckpointSource, model_folder
from kandinsky22.checkpoints.load_arguments import LoadArguments, checked_flag


class ConfigFile:
    """Mixin for classes that are built from a config file: networks and schedulers.

    Attributes:
        config_name: Name of the file.
    """

    config_name: ClassVar[str]

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the content of the config file, for `from_config`.

        Args:
            pretrained_model_name_or_path: Folder, Hub id, "embedded", or the file itself.
            subfolder: Folder of the component inside the checkpoint; None for the checkpoint's top folder.
            cache_dir: Folder of downloaded files; None for the default one of `huggingface_hub`.
            revision: Branch, tag or commit of a Hub repository; None for the default branch.
            local_files_only: Whether to use only files that are already on this machine.
            token: Token for private Hub repositories; None or True for the stored one, False for none.
            **options: Arguments of the reference: `force_download`; `return_unused_kwargs` returns the other arguments
                too, `return_commit_hash` None instead of a commit.

        Returns:
            The config, a dict; a tuple of it and what the two options name, if they are True.

        Raises:
            CheckpointError: If the file is missing or damaged.
            InputError: If an argument is invalid.
        """
        returns_unused = checked_flag("return_unused_kwargs", options.pop("return_unused_kwargs", None))
        returns_commit = checked_flag("return_commit_hash", options.pop("return_commit_hash", None))
        arguments = LoadArguments.of(cls.__name__, options)
        source = CheckpointSource(
            pretrained_model_name_or_path,
            revision,
            cache_dir,
            arguments.token if token is None else token,
            local_files_only,
            force_download=arguments.force_download,
        )
        path: Any = pretrained_model_name_or_path
        if isinstance(path, str | os.PathLike) and os.path.isfile(path):
            config = read_json(path)
        else:
            config = cls._read_config(source, subfolder)
        extras = [arguments.others] * returns_unused + [None] * returns_commit
        return (config, *extras) if extras else config

    @classmethod
    def _read_config(cls, source: CheckpointSource, subfolder: str | None) -> dict[str, Any]:
        folder = model_folder(source, subfolder, lambda names: [name for name in names if name == cls.config_name])
        return read_json(folder / cls.config_name)
