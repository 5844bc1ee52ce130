"""What is made of named components: it loads, saves and shares them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch

from kandinsky22.checkpoints.atomic_files import read_json, write_json
from kandinsky22.checkpoints.hub import Source
from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.models.base import LAYOUT_VERSION, checked_dtype
from kandinsky22.pipelines.component_io import (
    PRIOR_PREFIX,
    Stored,
    check_component,
    index_entry,
    load_component,
    needed_files,
    save_component,
)

C = TypeVar("C", bound="Composite")


class Composite:
    """Base of all pipelines. A subclass takes its components as arguments and hands them to `register_modules`.

    Components are attributes, and may be replaced by assignment; one of the wrong kind raises InputError.
    """

    config_name: ClassVar[str] = "model_index.json"
    defaults_name: ClassVar[str] = "generation_defaults.json"
    embedded_part: ClassVar[str] = "decoder"  # of the embedded model, the folder that a class is made from

    def __init__(self) -> None:
        self.origin: str | None = None
        self._component_names: tuple[str, ...] = ()
        self._generation_defaults: dict[str, Any] = {}

    # Components

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """Names of the components that the class is made of."""
        return tuple(inspect.signature(cls).parameters)

    def register_modules(self, **components: Any) -> None:
        """Make these objects the pipeline's components; raises InputError for one of the wrong kind."""
        self._component_names = (*self._component_names, *components)
        for name, component in components.items():
            setattr(self, name, component)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_component_names", ()):
            check_component(type(self).__name__, name, value)
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """All components by name: the arguments that make another pipeline of them."""
        return {name: getattr(self, name) for name in self._component_names}

    @classmethod
    def from_pipe(cls: type[C], pipeline: Composite, **components: Any) -> C:
        """This pipeline made of another one's components, shared and not copied; keywords replace or add some.

        Raises InputError if a component is neither in `pipeline` nor given, or is not one of this class.
        """
        names = cls.component_names()
        if not names:
            raise InputError(f"{cls.__name__} is no certain pipeline: call from_pipe of the class that is wanted")
        if not isinstance(pipeline, Composite):
            raise InputError(f"pipeline: one of kandinsky22 is needed, not {pipeline!r}")
        cls._check_names(components)
        # A pipeline of prior and decoder holds the prior's components under a prefix.
        prefix = PRIOR_PREFIX if "prior" in names and "prior_prior" in pipeline.components else ""
        shared = {name: pipeline.components.get(prefix + name) for name in names if name not in components}
        missing = [name for name in shared if prefix + name not in pipeline.components]
        if missing := [name for name in missing if cls._needs(name)]:
            raise InputError(f"{type(pipeline).__name__} has no {', '.join(missing)}; {cls.__name__} needs it: pass it")
        made = cls(**shared, **components)
        made._settings_of(pipeline, prefix)
        return made

    def _settings_of(self, other: Composite, prefix: str) -> None:
        """Take over what else `other`, whose components have that prefix, knows about itself."""
        self.origin = other.origin
        defaults = other._generation_defaults
        self._set_defaults(
            {name.removeprefix(prefix): value for name, value in defaults.items() if name.startswith(prefix)}
        )

    @classmethod
    def _check_names(cls, components: Iterable[str]) -> None:
        names = cls.component_names()
        if unknown := sorted(set(components) - set(names)):
            raise InputError(f"{cls.__name__} has no {', '.join(unknown)}; its components are {', '.join(names)}")

    @classmethod
    def _needs(cls, name: str) -> bool:
        return inspect.signature(cls).parameters[name].default is inspect.Parameter.empty

    # Files

    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        **components: Any,
    ) -> C:
        """The pipeline of a checkpoint: a folder, a Hub id, or "embedded". Networks are on the CPU, not in training.

        Components passed by name are used as they are, and not loaded; None leaves one out. Called on
        DiffusionPipeline itself, this gives the class that the checkpoint names. Classes that hold prior and decoder
        find the prior by `prior=` (a folder, a Hub id or a prior pipeline), in the model card, or in a folder beside.
        `torch_dtype` is float32 unless given ("auto": as stored); a `variant` is used by the components that have it.
        Raises CheckpointError for what is missing or damaged, InputError for a component that does not fit.
        """
        checked_dtype(torch_dtype)
        source = Source(pretrained_model_name_or_path, revision, cache_dir, token, local_files_only)
        return cls._load(source, Stored(torch_dtype, variant, use_safetensors), components)

    @classmethod
    def _load(cls: type[C], source: Source, stored: Stored, given: dict[str, Any]) -> C:
        names = cls.component_names()
        source = replace(source, part=cls.embedded_part)
        folder = source.fetch(lambda files: {cls.config_name, cls.defaults_name, "README.md"} & set(files))
        index = read_json(folder / cls.config_name)
        if not names:
            return cast(C, cls._named_class(index, folder)._load(source, stored, given))
        given = dict(given)
        prior = given.pop("prior", None) if "prior" not in names and "prior_prior" in names else None
        cls._check_names(given)
        absent = [name for name in names if name not in given]
        present = [name for name in absent if name in index and (prior is None or not name.startswith(PRIOR_PREFIX))]
        folder = source.fetch(lambda files: needed_files(files, present, stored))
        _check_variant(folder, present, stored)
        loaded = {name: load_component(name, index[name], folder, stored) for name in present}
        defaults = _read_defaults(folder / cls.defaults_name)
        absent = [name for name in absent if name not in loaded]
        if wanted := [name for name in absent if name.startswith(PRIOR_PREFIX)]:
            found = cls._load_prior(source, stored, prior, wanted)
            if "prior" not in found.components:
                raise InputError(f"prior: a prior pipeline, or where one is, is needed, not a {type(found).__name__}")
            loaded |= {name: found.components.get(name.removeprefix(PRIOR_PREFIX)) for name in wanted}
            defaults = {PRIOR_PREFIX + name: value for name, value in found.generation_defaults.items()} | defaults
            absent = [name for name in absent if name not in wanted]
        if missing := [name for name in absent if cls._needs(name)]:
            raise CheckpointError(
                f"{source.name} is a {index.get('_class_name')} without {', '.join(missing)}; "
                f"{cls.__name__} needs it: pass it by name, or load another checkpoint"
            )
        pipe = cls(**given, **loaded)
        pipe.origin = os.fspath(source.name)
        pipe._set_defaults(defaults)
        return pipe

    @classmethod
    def _named_class(cls, index: Mapping[str, Any], folder: Path) -> type[Composite]:
        import kandinsky22

        name = index.get("_class_name")
        found = getattr(kandinsky22, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, Composite) and found.component_names()):
            raise CheckpointError(f"{folder / cls.config_name}: _class_name {name!r} is not a pipeline of kandinsky22")
        return found

    @classmethod
    def _load_prior(cls, source: Source, stored: Stored, prior: Any, wanted: list[str]) -> Composite:
        """The prior pipeline that supplies the components `wanted` (with prefix); the others of it are not loaded."""
        if isinstance(prior, Composite):
            return prior
        where = source.prior() if prior is None else replace(source, name=prior, part="prior", revision=None)
        folder = where.fetch(lambda files: {cls.config_name} & set(files))
        kind = cls._named_class(read_json(folder / cls.config_name), folder)
        unused = {name: None for name in kind.component_names() if PRIOR_PREFIX + name not in wanted}
        return kind._load(where, stored, unused)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write all components in the published layout, weights as safetensors, then the index that names them.

        Raises CheckpointError if the place cannot be written, InputError unless `safe_serialization`: the other format
        can hold programs that run when it is read.
        """
        if safe_serialization is not True:
            raise InputError(f"safe_serialization={safe_serialization!r}: pipelines are saved as safetensors (True)")
        folder = Path(save_directory)
        for name, component in self.components.items():
            if component is not None:
                save_component(component, folder / name, variant=variant, max_shard_size=max_shard_size)
        about = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        entries = {name: index_entry(name, component) for name, component in self.components.items()}
        if self._generation_defaults:
            write_json(folder / self.defaults_name, self._generation_defaults)
        write_json(folder / self.config_name, {**entries, **about})

    # Calls

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Call arguments that suit this checkpoint best, to be passed to the pipeline; empty if it brings none."""
        return dict(self._generation_defaults)

    @generation_defaults.setter
    def generation_defaults(self, arguments: Mapping[str, Any]) -> None:
        if unknown := sorted(set(arguments) - self._call_arguments()):
            raise InputError(f"generation_defaults: {type(self).__name__} takes no {', '.join(unknown)}")
        self._generation_defaults = dict(arguments)

    def _set_defaults(self, arguments: Mapping[str, Any]) -> None:
        """Keep those defaults that this class can be called with: a checkpoint serves several classes."""
        accepted = self._call_arguments()
        self._generation_defaults = {name: value for name, value in arguments.items() if name in accepted}

    def _call_arguments(self) -> set[str]:
        call = next((vars(base)["__call__"] for base in type(self).__mro__ if "__call__" in vars(base)), None)
        return set(inspect.signature(call).parameters) - {"self"} if call else set()


def _check_variant(folder: Path, components: Iterable[str], stored: Stored) -> None:
    """Raise CheckpointError if a variant was asked for and no component has it, though some have weights."""
    if stored.variant is None:
        return
    plain = replace(stored, variant=None)
    networks = [name for name in components if (folder / name).is_dir() and plain.weights(os.listdir(folder / name))]
    if networks and not any(stored.for_folder(folder / name).variant for name in networks):
        raise CheckpointError(f"{folder} has no weights of variant {stored.variant!r} for {', '.join(networks)}")


def _read_defaults(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
