"""Settings of schedulers: validated, immutable, and readable by whatever expects a plain dictionary."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError

SC = TypeVar("SC", bound="SchedulerConfig")

# Key under which a config lists the settings nobody gave, so that another class can put its own defaults there.
DEFAULTED = "_use_default_values"
# What a network was trained with holds for every scheduler that can do it, though somebody left it at a default.
OF_TRAINING = {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type"}


def whole(value: Any) -> int | None:
    """`value` as an int if it is a whole number (of Python, numpy, or a tensor holding one); True and False are not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_fraction(value: Any) -> bool:
    return _is_positive(value) and value <= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_FLAG = (_is_flag, "True or False")
_POSITIVE = (_is_positive, "a number above 0")
_FRACTION = (_is_fraction, "a number above 0, at most 1")
_PART = (lambda value: _is_positive(value) and value < 1, "a number above 0, below 1")
_COUNT = (lambda value: (whole(value) or 0) > 0, "an integer above 0")
_OPTIONAL = (lambda value: value is None or _is_positive(value), "None, or a number above 0")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _COUNT,
    "steps_offset": (lambda value: whole(value) is not None and value >= 0, "an integer, 0 or more"),
    "trained_betas": (
        lambda value: value is None or (isinstance(value, tuple) and all(map(_is_fraction, value))),
        "None, or a list of numbers above 0, at most 1",
    ),
    "beta_start": _PART,
    "beta_end": _PART,
    "dynamic_thresholding_ratio": _FRACTION,
    "sample_max_value": _POSITIVE,
    "clip_sample_range": _POSITIVE,
    "clip_sample": _FLAG,
    "thresholding": _FLAG,
    "rescale_betas_zero_snr": _FLAG,
    "set_alpha_to_one": _FLAG,
    "use_karras_sigmas": _FLAG,
    "use_exponential_sigmas": _FLAG,
    "use_beta_sigmas": _FLAG,
    "use_lu_lambdas": _FLAG,
    "lower_order_final": _FLAG,
    "euler_at_final": _FLAG,
    "predict_x0": _FLAG,
    "skip_prk_steps": _FLAG,
    "sigma_min": _OPTIONAL,
    "sigma_max": _OPTIONAL,
    "timestep_scaling": _POSITIVE,
    "original_inference_steps": _COUNT,
    "lambda_min_clipped": (lambda value: isinstance(value, int | float) and value < math.inf, "a number, or -inf"),
    "disable_corrector": (
        lambda value: isinstance(value, tuple) and all(whole(step) is not None and step >= 0 for step in value),
        "a list of steps, counted from 0",
    ),
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(dict[str, Any], Config):
    """Settings of a scheduler. It is a `dict` as well, because that is what other libraries' `from_config` takes.

    Beside the fields, the dictionary holds `_class_name`, the names of the settings left at their default, and
    settings that only other scheduler classes know: those have no effect here, and count again when the config is
    handed on to such a class. Raises ConfigError naming the field, its value and what is accepted.
    """

    owner: ClassVar[str] = "Scheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    # What other classes call one of this class's choices: setting -> their value -> ours.
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        for name in self.names():
            value = getattr(self, name)
            if name in self.choices:
                self._require(value in self.choices[name], name, ", ".join(map(str, self.choices[name])))
            elif name in _RULES:
                accepts, accepted = _RULES[name]
                self._require(accepts(value), name, accepted)
            dict.__setitem__(self, name, value)
        dict.__setitem__(self, "_class_name", self.owner)

    def _require(self, holds: bool, name: str, accepted: str) -> None:
        if not holds:
            raise ConfigError(f"{self.owner}: {name}={getattr(self, name)!r} is not possible; accepted: {accepted}")

    @classmethod
    def names(cls) -> list[str]:
        """The settings this class has."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_settings(cls: type[SC], settings: Mapping[str, Any], foreign: Mapping[str, Any] | None = None) -> SC:
        """The config of these settings, carrying the `foreign` ones along, which only stored settings have."""
        if foreign is not None:
            known = {name: names[settings[name]] for name, names in cls.synonyms.items() if settings.get(name) in names}
            settings = {**settings, **known}
            cls.parse({name: value for name, value in foreign.items() if name in cls.only}, owner=cls.owner)
        config = cls.parse(_plain(settings), owner=cls.owner)
        dict.update(config, _plain(foreign or {}))
        fixed = {name for name in OF_TRAINING if len(cls.choices.get(name, ())) == 1}  # nobody could choose it
        defaulted = sorted(set(cls.names()) - settings.keys() - fixed)
        if defaulted:
            dict.__setitem__(config, DEFAULTED, defaulted)
        return config

    @classmethod
    def inherited(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a config of any class passes on to this one: settings that somebody chose, and the facts of training
        that this class can do."""
        skipped = set(config.get(DEFAULTED) or ())
        for name in skipped & OF_TRAINING & config.keys() & set(cls.names()):
            if config[name] in cls.choices.get(name, (config[name],)):
                skipped.remove(name)
        return {name: value for name, value in config.items() if not name.startswith("_") and name not in skipped}

    def to_json(self) -> dict[str, Any]:
        """What a config file holds: every setting, foreign ones included, and the class they were made for."""
        return {name: value for name, value in self.items() if name != DEFAULTED}

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles would otherwise be filled key by key, which a frozen config refuses.
        return _restore, (type(self), dict(self))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self.owner}: a config cannot be changed; use from_config(config, setting=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with arrays and array scalars as the numbers they hold, which is what files can keep."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in settings.items()}


def _restore(cls: type[SC], content: Mapping[str, Any]) -> SC:
    config = cls(**{name: content[name] for name in cls.names()})
    dict.update(config, content)
    return config


@dataclasses.dataclass(frozen=True)
class ClipConfig(SchedulerConfig):
    """For methods that can keep the predicted sample between minus and plus `clip_sample_range`."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True)
class TableConfig(SchedulerConfig):
    """For methods on any table of betas; `trained_betas` replaces the schedule."""

    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ConfigError(
                f"{self.owner}: trained_betas has {len(self.trained_betas)} numbers, "
                f"num_train_timesteps={self.num_train_timesteps}; accepted: one beta a training step"
            )


@dataclasses.dataclass(frozen=True)
class SpacingConfig(SchedulerConfig):
    """For methods with a choice of timestep spacing."""

    timestep_spacing: str = "leading"
    steps_offset: int = 0


@dataclasses.dataclass(frozen=True)
class TerminalConfig(SchedulerConfig):
    """For methods that can start at pure noise."""

    rescale_betas_zero_snr: bool = False


@dataclasses.dataclass(frozen=True)
class ThresholdConfig(SchedulerConfig):
    """For methods with dynamic thresholding; its settings act if `thresholding` is True, and then instead of
    clipping."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


@dataclasses.dataclass(frozen=True)
class DiscreteConfig(ThresholdConfig, TerminalConfig, SpacingConfig, TableConfig):
    """For methods that can do all of that."""


@dataclasses.dataclass(frozen=True)
class GridConfig(SchedulerConfig):
    """For methods whose noise levels may be spread in other ways than evenly over the timesteps: one of `grids`."""

    grids: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [name for name in self.grids if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(f"{self.owner}: {' and '.join(chosen)} are set; accepted: at most one of them")
