"""Base class of all pipelines: named components that it loads, saves and shares."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch

from kandinsky22._exports import MODULE_OF
from kandinsky22.adapters.methods import AdapterMixin
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.folder_save import read_consistently
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.checkpoints.load_arguments import LoadArguments
from kandinsky22.errors import CheckpointError, InputError, describe, invalid
from kandinsky22.models.tiny_decoder import SUBFOLDER
from kandinsky22.pipelines.call_settings import CallSettingsMixin
from kandinsky22.pipelines.component_io import (
    check_component,
    check_variant,
    load_component,
    needed_files,
)
from kandinsky22.pipelines.consistency import check_consistency
from kandinsky22.pipelines.feature_caching import FeatureCachingMixin
from kandinsky22.pipelines.load_options import LoadOptions
from kandinsky22.pipelines.openvino_engine import OpenVINOMixin
from kandinsky22.pipelines.preparation import PreparedMixin
from kandinsky22.pipelines.reference_methods import ReferenceMethodsMixin
from kandinsky22.pipelines.saving import SavingMixin
from kandinsky22.pipelines.tiny_decoding import TinyDecoderMixin
from kandinsky22.runtime.calls import check_idle, loading_networks
from kandinsky22.runtime.compile import CompileMixin
from kandinsky22.runtime.cuda_graphs import CudaGraphMixin, DenoisingGraphs
from kandinsky22.runtime.device import STRATEGIES, floating_dtype, mapped_device
from kandinsky22.runtime.lazy_component import LazyComponent
from kandinsky22.runtime.placement import OffloadMixin
from kandinsky22.runtime.quantize import QuantizeMixin
from kandinsky22.sampling.presets import PRIOR_PREFIX

logger = logging.getLogger(__name__)

P = TypeVar("P", bound="DiffusionPipeline")


class DiffusionPipeline(
    SavingMixin,
    CallSettingsMixin,
    OffloadMixin,
    FeatureCachingMixin,
    TinyDecoderMixin,
    CompileMixin,
    CudaGraphMixin,
    QuantizeMixin,
    PreparedMixin,
    OpenVINOMixin,
    AdapterMixin,
    ReferenceMethodsMixin,
):
    """Base class of all pipelines.

    A subclass takes its components as constructor arguments and passes them to `register_modules`. Components are
    attributes and may be replaced by assignment; one of the wrong kind raises InputError. Components of different
    checkpoints that do not fit each other are refused by the constructor, and by the next call after an assignment.
    `DiffusionPipeline.from_pretrained` gives the class that a checkpoint names.

    Attributes:
        origin: Name of the checkpoint that the pipeline was loaded from; None for a pipeline constructed from objects.
    """

    embedded_subfolder: ClassVar[str] = "decoder"  # folder of the embedded model that this class is loaded from

    def __init__(self) -> None:
        super().__init__()
        self.origin: str | None = None
        self._hub_options: dict[str, Any] = {}  # those that the checkpoint was found with
        self._components: dict[str, Any] = {}

    # Components

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """Return the names of the components of this class; empty for the base class."""
        return tuple(inspect.signature(cls).parameters)

    def register_modules(self, **components: Any) -> None:
        """Make these objects the components of the pipeline.

        Args:
            **components: Objects by component name; None leaves one out.

        Raises:
            InputError: If an object is of the wrong kind, or if two components do not fit each other.
        """
        for name, component in components.items():
            if name not in self._components:
                self._store_component(name, None)
            setattr(self, name, component)
        check_consistency(type(self).__name__, self._components)

    def __setattr__(self, name: str, value: Any) -> None:
        components = getattr(self, "_components", {})
        if name not in components:
            super().__setattr__(name, value)
            return
        check_component(type(self).__name__, name, value)
        if not _is_equal_scheduler(components[name], value):
            check_idle(self, name)
        self._store_component(name, value)
        self._offload_like_others(name, value)

    def _store_component(self, name: str, component: Any) -> None:
        """Make an object, which was checked, a component."""
        self._components[name] = component
        if name == "unet" and self._cuda_graphs is not None:
            self._cuda_graphs = DenoisingGraphs()  # recorded ones keep the previous network in memory

    if not TYPE_CHECKING:  # classes annotate their components, and other names are errors

        def __getattr__(self, name: str) -> Any:
            # Called only for names that are not ordinary attributes; `_components` is one, after the constructor.
            if name.startswith("_") or name not in self._components:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            component = self._components[name]
            return component.load() if isinstance(component, LazyComponent) else component

    def __delattr__(self, name: str) -> None:
        if name in getattr(self, "_components", {}):
            self._remove_component(name)
        else:
            super().__delattr__(name)

    def _remove_component(self, name: str) -> None:
        del self._components[name]

    def __copy__(self: P) -> P:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _components=dict(self._components))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "_hub_options" in state:
            state["_hub_options"] = {**state["_hub_options"]}
            state["_hub_options"].pop("token", None)  # it is a secret
        return state

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._components})

    @property
    def components(self) -> dict[str, Any]:
        """All components by name: the arguments that make another pipeline of them.

        A component that is loaded on first use may be a `LazyComponent` here.
        """
        return dict(self._components)

    @property
    def _parts(self) -> dict[str, Any]:
        """All components by name, and the tiny decoder if there is one."""
        return self._components | ({} if self._tiny_decoder is None else {SUBFOLDER: self._tiny_decoder})

    @classmethod
    def from_pipe(
        cls: type[P], pipeline: DiffusionPipeline, *, torch_dtype: torch.dtype | None = None, **components: Any
    ) -> P:
        """Return a pipeline of this class with the components of another one, shared and not copied.

        Args:
            pipeline: The other pipeline.
            torch_dtype: Floating-point type that the networks, which both pipelines share, are converted to; None
                leaves them as they are. `dtype` is another name of it.
            **components: Components that replace or complement those of `pipeline`.

        Raises:
            InputError: If a component is missing, or is not one of this class.
        """
        torch_dtype = LoadArguments(dtype=components.pop("dtype", None)).dtype_or(torch_dtype)
        if torch_dtype is not None:
            floating_dtype(torch_dtype, "torch_dtype")
        names = cls.component_names()
        if not names:
            raise InputError(f"{cls.__name__} is a base class: call from_pipe on the pipeline class you want")
        if not isinstance(pipeline, DiffusionPipeline):
            raise invalid("pipeline", pipeline, "a pipeline of kandinsky22")
        cls._check_component_names(components)
        # A pipeline of prior and decoder holds the prior's components under a prefix.
        prefix = PRIOR_PREFIX if "prior" in names and "prior_prior" in pipeline._components else ""
        shared = {name: pipeline._components.get(prefix + name) for name in names if name not in components}
        absent = [name for name in shared if prefix + name not in pipeline._components and cls._is_required(name)]
        if absent:
            raise InputError(
                f"{type(pipeline).__name__} has no {', '.join(absent)}, which {cls.__name__} requires: pass it by name"
            )
        pipe = cls(**shared, **components)
        pipe._copy_settings(pipeline, prefix)
        return pipe if torch_dtype is None else pipe.to(dtype=torch_dtype)

    def _copy_settings(self, other: DiffusionPipeline, prefix: str) -> None:
        """Copy origin, defaults and other settings of a pipeline whose components have this prefix."""
        self.origin, self._hub_options = other.origin, dict(other._hub_options)
        self._progress_bar_config = dict(other._progress_bar_config)
        self._feature_caching = other._feature_caching
        self._cuda_graphs = other._cuda_graphs
        if self._components.get("movq") is not None:
            self._tiny_decoder = other._tiny_decoder
        self._copy_defaults(other, prefix)

    def _require(self, *components: str) -> None:
        """Raise InputError if one of these components was left out, or if two components do not fit each other."""
        if missing := [name for name in components if self._components.get(name) is None]:
            missing_names = ", ".join(missing)
            raise InputError(f"{type(self).__name__} was constructed without {missing_names}, which this call requires")
        check_consistency(type(self).__name__, self._components)

    def _require_add_noise(self) -> None:
        """Raise InputError if the scheduler cannot add noise to an encoded image."""
        scheduler = self._components["scheduler"]
        if not hasattr(scheduler, "add_noise"):
            raise InputError(
                f"scheduler: {type(scheduler).__name__} has no add_noise, which starting from an image requires"
            )

    @classmethod
    def _check_component_names(cls, components: Iterable[str]) -> None:
        names = cls.component_names()
        if unknown := sorted(set(components) - set(names)):
            raise InputError(f"{cls.__name__} has no component {', '.join(unknown)}: expected {', '.join(names)}")

    @classmethod
    def _is_required(cls, name: str) -> bool:
        return inspect.signature(cls).parameters[name].default is inspect.Parameter.empty

    # Loading

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | Literal["auto"] | Mapping[str, Any] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        **components: Any,
    ) -> P:
        """Return the pipeline of a checkpoint, its networks on the CPU and in evaluation mode.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or "embedded".
            torch_dtype: Floating-point type of the networks; None for float32, "auto" for what is stored. A mapping
                sets the type per component name, where "default" stands for all others, which are float32 without it.
            variant: Variant of the weight files, such as "fp16", for the components that have it; None for the plain
                files.
            revision: Branch, tag or commit on the Hub; None for the default branch.
            cache_dir: Folder of the Hub cache; None for the default.
            local_files_only: Make no network request and use only cached files.
            token: Access token of the Hub; None for the stored one.
            use_safetensors: Format of the weights: True for safetensors, False for .bin; None prefers safetensors.
            **components: Components that are used as they are instead of being loaded; None leaves one out. Classes
                that hold prior and decoder also take `prior`: a folder, a Hub id, or a prior pipeline. Without it the
                prior is found in the model card or in a neighbouring folder. These arguments of the reference act too:
                `dtype`, another name of `torch_dtype`; `force_download` (bool), which downloads cached files again;
                `device_map`, which moves the networks after loading to a device ("cuda"), or to the accelerator if
                there is one ("balanced", "auto"), where they are offloaded if they do not fit. Others have no effect,
                which is logged, for unknown ones as a warning.

        Returns:
            A pipeline of this class; called on `DiffusionPipeline`, one of the class that the checkpoint names.

        Raises:
            CheckpointError: If files are missing or damaged.
            InputError: If an argument or a component is invalid.
        """
        arguments = LoadArguments.of(cls.__name__, components)
        options = LoadOptions(arguments.dtype_or(torch_dtype), variant, use_safetensors).checked()
        device = None if arguments.device_map is None else mapped_device(arguments.device_map)
        source = CheckpointSource(
            pretrained_model_name_or_path,
            revision,
            cache_dir,
            arguments.token if token is None else token,
            local_files_only,
            force_download=arguments.force_download,
        )
        pipe = cls._load(source, options, arguments)
        if device is not None:
            pipe._place(device, may_offload=arguments.device_map in STRATEGIES)
        return pipe

    @classmethod
    def download(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        *,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ) -> str:
        """Download the files of a checkpoint that `from_pretrained` would read, without reading weights.

        Args:
            pretrained_model_name: A Hub id. A folder, or "embedded", has its files already.
            variant: Variant of the weight files; None for the plain files.
            revision: Branch, tag or commit on the Hub; None for the default branch.
            cache_dir: Folder of the Hub cache; None for the default.
            local_files_only: Make no network request and use only cached files.
            token: Access token of the Hub; None for the stored one.
            use_safetensors: Format of the weights: True for safetensors, False for .bin; None prefers safetensors.
            **options: Other arguments of `from_pretrained`.

        Returns:
            Path of the folder that holds the files. Classes of prior and decoder download both, and return that of the
            decoder.

        Raises:
            CheckpointError: If the checkpoint cannot be found or reached.
            InputError: If an argument is invalid.
        """
        arguments = LoadArguments.of(cls.__name__, options)
        load_options = LoadOptions(None, variant, use_safetensors).checked()
        source = CheckpointSource(
            pretrained_model_name,
            revision,
            cache_dir,
            arguments.token if token is None else token,
            local_files_only,
            cls.embedded_subfolder,
            arguments.force_download,
        )
        return str(cls._fetch_all(source, load_options, arguments.others))

    @classmethod
    def _fetch_all(cls, source: CheckpointSource, options: LoadOptions, passed: Mapping[str, Any]) -> Path:
        """Download everything that is not passed, and return the folder."""
        folder = source.fetch(cls._top_files)
        index = read_json(folder / cls.config_name)
        names = cls.component_names()
        if not names:
            return cls._class_in_index(index, folder)._fetch_all(source, options, passed)
        stored = [name for name in names if name not in passed and name in index]
        folder = source.fetch(lambda files: [*cls._top_files(files), *needed_files(files, stored, options)])
        if any(name.startswith(PRIOR_PREFIX) for name in set(names) - set(stored) - set(passed)):
            DiffusionPipeline._fetch_all(source.matching_prior(passed.get("prior")), options, {})
        return folder

    @classmethod
    def _top_files(cls, files: Iterable[str]) -> list[str]:
        """Return the names of the files that describe a checkpoint."""
        return sorted({cls.config_name, cls.defaults_name, "README.md"} & set(files))

    @classmethod
    def _load(cls: type[P], source: CheckpointSource, options: LoadOptions, arguments: LoadArguments) -> P:
        """Load everything that is not passed."""
        with loading_networks():
            if not os.path.isdir(source.name):
                return cls._read(source, options, arguments)
            return read_consistently(Path(source.name), lambda: cls._read(source, options, arguments))

    @classmethod
    def _read(cls: type[P], source: CheckpointSource, options: LoadOptions, arguments: LoadArguments) -> P:
        """Load everything that is not passed, once."""
        source = replace(source, embedded_subfolder=cls.embedded_subfolder)
        folder = source.fetch(cls._top_files)
        index = read_json(folder / cls.config_name)
        names = cls.component_names()
        if not names:
            return cast(P, cls._class_in_index(index, folder)._load(source, options, arguments))
        holds_prior = "prior_prior" in names
        components = arguments.select(cls.__name__, (*names, "prior") if holds_prior else names)
        prior = components.pop("prior", None) if holds_prior else None

        stored = [
            name
            for name in names
            if name not in components and name in index and (prior is None or not name.startswith(PRIOR_PREFIX))
        ]
        folder = source.fetch(lambda files: needed_files(files, stored, options))
        check_variant(folder, stored, options)
        for name in stored:
            components[name] = load_component(name, index[name], folder, options)
            logger.info("loaded %s as %s from %s", name, _class_name(components[name]), folder / name)
        defaults = _read_defaults(folder / cls.defaults_name)

        from_prior = [name for name in names if name.startswith(PRIOR_PREFIX) and name not in components]
        if from_prior:
            prior_pipe = cls._prior_pipeline(source, options, prior, from_prior)
            parts = prior_pipe._components
            components |= {name: parts.get(name.removeprefix(PRIOR_PREFIX)) for name in from_prior}
            defaults = {
                PRIOR_PREFIX + name: value for name, value in prior_pipe._generation_defaults.items()
            } | defaults

        if missing := [name for name in names if name not in components and cls._is_required(name)]:
            stored_class = _text(index.get("_class_name"))
            raise CheckpointError(
                f"{source.name} is a {stored_class} without {', '.join(missing)}, which {cls.__name__} requires: "
                "pass it by name, or load another checkpoint"
            )
        pipe = cls(**components)
        pipe.origin, pipe._hub_options = os.fspath(source.name), source.hub_options
        pipe._set_defaults(defaults)
        return pipe

    @classmethod
    def _class_in_index(cls, index: Mapping[str, Any], folder: Path) -> type[DiffusionPipeline]:
        """Return the pipeline class that `model_index.json` names."""
        name = index.get("_class_name")
        if isinstance(name, str) and MODULE_OF.get(name, "").startswith("pipelines."):
            pipeline_class = getattr(importlib.import_module(f"kandinsky22.{MODULE_OF[name]}"), name)
            if issubclass(pipeline_class, DiffusionPipeline) and pipeline_class.component_names():
                return cast(type[DiffusionPipeline], pipeline_class)
        raise CheckpointError(
            f"{folder / cls.config_name}: _class_name {describe(name)} is not a pipeline of kandinsky22"
        )

    @classmethod
    def _prior_pipeline(
        cls, source: CheckpointSource, options: LoadOptions, prior: Any, required: list[str]
    ) -> DiffusionPipeline:
        """Return the prior pipeline that supplies these components (with prefix); its others are not loaded."""
        if not isinstance(prior, DiffusionPipeline):
            prior_source = source.matching_prior(prior)
            folder = prior_source.fetch(lambda files: {cls.config_name} & set(files))
            prior_class = cls._class_in_index(read_json(folder / cls.config_name), folder)
            unused = {name: None for name in prior_class.component_names() if PRIOR_PREFIX + name not in required}
            prior = prior_class._load(prior_source, options.for_prior(), LoadArguments(others=unused))
        if "prior" not in prior._components:
            raise invalid("prior", type(prior), "a prior pipeline, or the folder or Hub id of one")
        return cast(DiffusionPipeline, prior)

    def __repr__(self) -> str:
        lines = [f"  {name}: {_class_name(component)}" for name, component in self._components.items()]
        origin = f" from {self.origin}" if self.origin else ""
        return "\n".join([f"{type(self).__name__}{origin}", *lines])


def _text(name: Any) -> str:
    """Return a class name of a file for a message."""
    return name if isinstance(name, str) and name.isidentifier() else describe(name)


def _is_equal_scheduler(current: Any, replacement: Any) -> bool:
    """Return whether a scheduler, which calls only copy, is replaced by one that gives the same results."""
    if current is replacement:
        return True
    try:
        same = type(current) is type(replacement) and bool(current.config == replacement.config)
    except (AttributeError, ValueError):  # a component without config, or a config that contains arrays
        return False
    return same and hasattr(current, "set_timesteps")


def _class_name(component: Any) -> str:
    component_class = component.component_class if isinstance(component, LazyComponent) else type(component)
    return str(component_class.__name__)


def _read_defaults(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
