"""Configs of schedulers: constructor arguments, configs of other classes, files, and what code for the reference uses.

The base class here knows nothing about sampling: it validates settings and stores them.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.checkpoints.config_file import ConfigFile
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.checkpoints.load_arguments import LoadArguments, checked_flag
from kandinsky22.errors import ConfigError, invalid
from kandinsky22.inputs.hub_uploads import HubUpload, requested_upload
from kandinsky22.schedulers.config import SchedulerConfig

S = TypeVar("S", bound="Configurable")

# Classes whose configs the reference calls compatible with each other.
COMPATIBLE_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "LCMScheduler",
)


class Configurable(ConfigFile):
    """Base class of objects with a scheduler's config.

    Args:
        *arguments: Settings by position, in the order of the reference's constructor.
        **settings: Settings by name, the fields of `config_class`. Those left out get their defaults.

    Attributes:
        config (SchedulerConfig): The settings.

    Raises:
        ConfigError: If a setting is unknown, invalid or passed twice.
    """

    config_class: ClassVar[type[SchedulerConfig]] = SchedulerConfig
    config_name: ClassVar[str] = "scheduler_config.json"
    has_compatibles: ClassVar[bool] = True
    ignore_for_config: ClassVar[list[str]] = []
    _compatibles: ClassVar[tuple[str, ...]] = COMPATIBLE_CLASSES
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()
    config: SchedulerConfig

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        names, owner = self.config_class.positional, type(self).__name__
        if len(arguments) > len(names):
            expected = f"at most {len(names)}: {', '.join(names)}"
            raise invalid(f"{owner}: number of positional arguments", len(arguments), expected, error=ConfigError)
        by_position = dict(zip(names, arguments, strict=False))
        if repeated := sorted(by_position.keys() & settings.keys()):
            raise ConfigError(f"{owner}: {', '.join(repeated)} passed both by position and by name: expected once")
        self._build(self.config_class.from_settings({**by_position, **settings}))

    def _build(self, config: SchedulerConfig) -> None:
        """Initialise from a config: the constructor's work, which `from_config` shares."""
        self.config = config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={self.config[name]!r}' for name in self.config.names())})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a setting that is not an attribute, with the reference's deprecation warning."""
            config = vars(self).get("config")
            if config is None or name.startswith("_") or name not in config:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(
                f"{type(self).__name__}.{name} is a setting: read it as config.{name}", FutureWarning, stacklevel=2
            )
            return config[name]

    # Configs

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any], **overrides: Any) -> S:
        """Return a scheduler of this class with the config of another scheduler of any class, ours or not.

        Settings that this class does not have are stored without effect. Settings that the other scheduler left at its
        defaults get the defaults of this class, except those that describe the training of the network, which carry
        over. Settings that are None get what the reference makes of them: False, or else the default of this class.

        Args:
            config: Config of a scheduler.
            **overrides: Settings of this class that replace those of `config`. Settings that only other classes have
                are stored without effect, with a warning. `return_unused_kwargs=True` returns those too.

        Returns:
            The scheduler; with `return_unused_kwargs=True` a tuple of the scheduler and the settings without effect.

        Raises:
            InputError: If `config` is not a mapping.
            ConfigError: If an override is unknown or a setting is invalid.
        """
        if not hasattr(config, "items") or not all(isinstance(name, str) for name in config):
            raise invalid("config", config, "a mapping of settings by name", "read files with from_pretrained")
        returns_unused = checked_flag("return_unused_kwargs", overrides.pop("return_unused_kwargs", None))
        names = cls.config_class.names()
        unknown = sorted(overrides.keys() - names)
        refused = [name for name in unknown if name not in settings_of_all_classes() and not returns_unused]
        if refused:
            expected = f"known settings ({', '.join(names)})"
            raise invalid(f"{cls.__name__}: overrides", refused, expected, error=ConfigError)
        if unknown and not returns_unused:
            message = f"{cls.__name__} does not have the settings {', '.join(unknown)}: they are stored without effect"
            warnings.warn(message, UserWarning, stacklevel=2)
        stored = cls.config_class.inherited_settings({**config, **{name: overrides[name] for name in unknown}})
        foreign = {name: stored.pop(name) for name in stored.keys() - names}
        settings = {
            **cls.config_class.adapted(stored),
            **{name: value for name, value in overrides.items() if name in names},
        }
        scheduler = cls.__new__(cls)
        scheduler._build(cls.config_class.from_settings(settings, foreign))
        return cast(S, (scheduler, foreign)) if returns_unused else scheduler

    def register_to_config(self, **settings: Any) -> None:
        """Store settings in the config. As in the reference, tables such as `betas` are not computed again.

        Args:
            **settings: Settings by name. Those that this class does not have are stored without effect.

        Raises:
            ConfigError: If a setting of this class is invalid.
        """
        self.config = self.config.with_settings(settings)

    @property
    def compatibles(self) -> list[type[Configurable]]:
        """Classes that can be made from the config of this scheduler, this class included."""
        package = importlib.import_module("kandinsky22.schedulers")
        names = dict.fromkeys((type(self).__name__, *self._compatibles))
        return [getattr(package, name) for name in names if hasattr(package, name)]

    # Files

    @classmethod
    def from_pretrained(
        cls: type[S],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> S:
        """Load a scheduler from the `scheduler_config.json` of a folder or of a checkpoint on the Hub.

        Args:
            pretrained_model_name_or_path: Folder, Hub id, or "embedded".
            subfolder: Subfolder of the checkpoint with the file; None is its top folder.
            cache_dir: Folder for downloads; None is the default cache of the Hub's client.
            revision: Branch, tag or commit on the Hub; None is the default branch.
            local_files_only: Whether to use cached files only, without network requests.
            token: Access token for the Hub; None uses the stored one, if there is one; False sends none.
            **overrides: Settings that replace those of the file, and arguments of the reference: `force_download`
                downloads a cached file again, `return_unused_kwargs` returns unknown arguments too. Others have no
                effect, which is logged, for unknown ones as a warning.

        Returns:
            The scheduler, of this class whichever class the file names; with `return_unused_kwargs=True` a tuple of the
            scheduler and a dict.

        Raises:
            CheckpointError: If the file is missing or damaged.
            ConfigError: If a setting is invalid.
            InputError: If an argument is invalid.
        """
        returns_unused = checked_flag("return_unused_kwargs", overrides.pop("return_unused_kwargs", None))
        arguments = LoadArguments.of(cls.__name__, overrides)
        names = cls.config_class.names()
        unused = {name: value for name, value in arguments.others.items() if name not in names}
        settings = arguments.select(cls.__name__, {*names, *unused} if returns_unused else names)
        source = CheckpointSource(
            pretrained_model_name_or_path,
            revision,
            cache_dir,
            arguments.token if token is None else token,
            local_files_only,
            force_download=arguments.force_download,
        )
        settings = {name: value for name, value in settings.items() if name in names}
        scheduler = cls.from_config(cls._read_config(source, subfolder), **settings)
        return cast(S, (scheduler, unused)) if returns_unused else scheduler

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any
    ) -> None:
        """Write the config to `scheduler_config.json`, and upload it on request.

        Args:
            save_directory: Folder, which is created if it does not exist.
            push_to_hub: Whether all files of the folder are uploaded to the Hub afterwards.
            **hub_options: Arguments of the upload: `repo_id` (the name of the folder if it is left out),
                `commit_message`, `private`, `token`, `create_pr`, `revision` and `subfolder`, see `push_to_hub`.

        Raises:
            CheckpointError: If the file cannot be written, or the upload fails.
            InputError: If an argument is invalid.
            MissingDependencyError: If the Hub's client is required and not installed.
        """
        folder = checked_save_path(save_directory)
        upload = requested_upload(type(self).__name__, push_to_hub, hub_options, folder)
        write_json(folder / self.config_name, self.config.to_json())
        if upload is not None:
            upload.run(folder)

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any
    ) -> None:
        """Do the same as `save_pretrained`.

        Args:
            save_directory: See `save_pretrained`.
            push_to_hub: See `save_pretrained`.
            **hub_options: See `save_pretrained`.

        Raises:
            CheckpointError: If the file cannot be written, or the upload fails.
            InputError: If an argument is invalid.
            MissingDependencyError: If the Hub's client is required and not installed.
        """
        self.save_pretrained(save_directory, push_to_hub, **hub_options)

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
        """Upload `scheduler_config.json` to a repository on the Hub, which is created if it does not exist.

        Args:
            repo_id: Name of the repository, with or without the owner.
            commit_message: Message of the commit; None is a default.
            private: Whether a new repository is private; None is the owner's default.
            token: Access token; None uses the stored one.
            create_pr: Whether to open a pull request instead of committing.
            safe_serialization: Without effect, as in the reference: a scheduler has no weights.
            variant: Likewise.
            subfolder: Folder in the repository; None is its top folder.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            CheckpointError: If the upload fails.
            InputError: If an argument is invalid.
            MissingDependencyError: If the Hub's client is not installed.
        """
        message = f"Upload {type(self).__name__}" if commit_message is None else commit_message
        upload = HubUpload(repo_id, message, private, token, create_pr, subfolder=subfolder)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload.run(folder)

    def to_json_string(self) -> str:
        """Return the content of the config file."""
        return json.dumps(self.config.to_json(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the config to a file of any name.

        Args:
            json_file_path: The file.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        write_json(json_file_path, self.config.to_json())


def settings_of_all_classes() -> set[str]:
    """Return the names of all settings that any scheduler here or in the reference has."""
    names: set[str] = set()
    remaining: list[type[SchedulerConfig]] = [SchedulerConfig]
    while remaining:
        config_class = remaining.pop()
        names.update(config_class.names(), config_class.supported_values)
        remaining += config_class.__subclasses__()
    return names
