"""Scheduler settings: validated, immutable, and readable by code that expects a plain dictionary."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, invalid

SC = TypeVar("SC", bound="SchedulerConfig")

# Key of a config that lists the settings left at their defaults. Another class replaces those by its own defaults.
DEFAULTED_KEY = "_use_default_values"
# Settings that describe how the network was trained. They carry over between classes even if left at their defaults.
TRAINING_SETTINGS = {
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
}


def as_int(value: Any) -> int | None:
    """Return `value` as an int, or None if it is not an integer.

    Args:
        value: Any object. Integers of Python and numpy and tensors with one integer are accepted; True and False are
            not.
    """
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_fraction(value: Any) -> bool:
    return _is_positive(value) and value <= 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


class _Rule(NamedTuple):
    """Test of a setting's value, and the description of accepted values for messages."""

    accepts: Callable[[Any], bool]
    expected: str


_BOOL = _Rule(_is_bool, "True or False")
_POSITIVE = _Rule(_is_positive, "a number above 0")
_FRACTION = _Rule(_is_fraction, "a number above 0, at most 1")
_PROPER_FRACTION = _Rule(lambda value: _is_positive(value) and value < 1, "a number above 0, below 1")
_COUNT = _Rule(lambda value: (as_int(value) or 0) > 0, "an integer above 0")
_OPTIONAL_POSITIVE = _Rule(lambda value: value is None or _is_positive(value), "None, or a number above 0")
_RULES: Mapping[str, _Rule] = {
    "num_train_timesteps": _COUNT,
    "steps_offset": _Rule(lambda value: as_int(value) is not None and value >= 0, "an integer, 0 or more"),
    "trained_betas": _Rule(
        lambda value: value is None or (isinstance(value, tuple) and all(map(_is_fraction, value))),
        "None, or a list of numbers above 0, at most 1",
    ),
    "beta_start": _PROPER_FRACTION,
    "beta_end": _PROPER_FRACTION,
    "dynamic_thresholding_ratio": _FRACTION,
    "sample_max_value": _POSITIVE,
    "clip_sample_range": _POSITIVE,
    "clip_sample": _BOOL,
    "thresholding": _BOOL,
    "rescale_betas_zero_snr": _BOOL,
    "set_alpha_to_one": _BOOL,
    "use_karras_sigmas": _BOOL,
    "use_exponential_sigmas": _BOOL,
    "use_beta_sigmas": _BOOL,
    "use_lu_lambdas": _BOOL,
    "lower_order_final": _BOOL,
    "euler_at_final": _BOOL,
    "predict_x0": _BOOL,
    "skip_prk_steps": _BOOL,
    "sigma_min": _OPTIONAL_POSITIVE,
    "sigma_max": _OPTIONAL_POSITIVE,
    "timestep_scaling": _POSITIVE,
    "original_inference_steps": _COUNT,
    "lambda_min_clipped": _Rule(
        lambda value: isinstance(value, int | float) and value < math.inf, "a finite number, or -inf"
    ),
    "disable_corrector": _Rule(
        lambda value: isinstance(value, tuple) and all(as_int(step) is not None and step >= 0 for step in value),
        "a list of step indices, 0 or more",
    ),
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(dict[str, Any], Config):
    """Settings of a scheduler; also a `dict`, because `from_config` of other libraries expects one.

    Besides the fields, the dictionary contains `_class_name`, the names of the settings left at their defaults, and
    settings of other scheduler classes. The latter have no effect here. They take effect again when the config is
    passed to a class that has them.

    Attributes:
        num_train_timesteps: Number of timesteps that the network was trained with, 1 or more.
        beta_schedule: Name of the noise schedule, see `noise_schedules.training_betas`.
        prediction_type: Quantity that the network predicts: "epsilon" (the noise), "sample" (the clean sample x_0) or
            "v_prediction" (the velocity of Salimans & Ho 2022, https://arxiv.org/abs/2202.00512).

    Raises:
        ConfigError: If a setting is invalid. The message names the class, the setting, its value and what is accepted.
    """

    owner: ClassVar[str] = "Scheduler"  # name of the scheduler class
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}  # accepted values by setting
    # Values of other classes that mean one of this class's choices: setting -> their value -> our value.
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        for name in self.names():
            value = getattr(self, name)
            if name in self.choices:
                choices = ", ".join(map(str, self.choices[name]))
                several = "one of " if len(self.choices[name]) > 1 else ""
                self._require(value in self.choices[name], name, several + choices)
            elif name in _RULES:
                self._require(_RULES[name].accepts(value), name, _RULES[name].expected)
            dict.__setitem__(self, name, value)
        dict.__setitem__(self, "_class_name", self.owner)

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise invalid(f"{self.owner}: {name}", getattr(self, name), expected, error=ConfigError)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the settings of this class."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_settings(cls: type[SC], settings: Mapping[str, Any], foreign: Mapping[str, Any] | None = None) -> SC:
        """Build the config from settings by name.

        Args:
            settings: Settings of this class. Those left out get the defaults of this class.
            foreign: Settings of other classes, which are stored without effect. None means that `settings` were passed
                by a caller and do not come from the config of another class, so that `synonyms` are not translated.

        Returns:
            The validated config.

        Raises:
            ConfigError: If a setting is unknown or invalid.
        """
        if foreign is not None:
            translated = {
                name: values[settings[name]] for name, values in cls.synonyms.items() if settings.get(name) in values
            }
            settings = {**settings, **translated}
            cls.parse({name: value for name, value in foreign.items() if name in cls.supported_values}, owner=cls.owner)
        config = cls.parse(_to_builtins(settings), owner=cls.owner)
        dict.update(config, _to_builtins(foreign or {}))
        fixed = {name for name in TRAINING_SETTINGS if len(cls.choices.get(name, ())) == 1}  # never a choice of a user
        defaulted = sorted(set(cls.names()) - settings.keys() - fixed)
        if defaulted:
            dict.__setitem__(config, DEFAULTED_KEY, defaulted)
        return config

    @classmethod
    def inherited_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a config of any class passes on to this class.

        These are the settings that were set explicitly, and those of `TRAINING_SETTINGS` that this class supports.

        Args:
            config: Config of a scheduler of any class and library.
        """
        skipped = set(config.get(DEFAULTED_KEY) or ())
        for name in skipped & TRAINING_SETTINGS & config.keys() & set(cls.names()):
            if config[name] in cls.choices.get(name, (config[name],)):
                skipped.remove(name)
        return {name: value for name, value in config.items() if not name.startswith("_") and name not in skipped}

    def to_json(self) -> dict[str, Any]:
        """Return the content of a config file: all settings, those of other classes included, and the class name."""
        return {name: value for name, value in self.items() if name != DEFAULTED_KEY}

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a dict are otherwise filled key by key, which an immutable config refuses.
        return _restore, (type(self), dict(self))

    def _refuse_change(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self.owner}: a config cannot be changed; use from_config(config, setting=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse_change


def _to_builtins(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with arrays and tensors converted to lists and numbers, which files can store."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in settings.items()}


def _restore(cls: type[SC], content: Mapping[str, Any]) -> SC:
    config = cls(**{name: content[name] for name in cls.names()})
    dict.update(config, content)
    return config


@dataclasses.dataclass(frozen=True)
class ClipConfig(SchedulerConfig):
    """Settings of methods that can clip the predicted clean sample.

    Attributes:
        clip_sample: Whether the predicted clean sample is clipped.
        clip_sample_range: Largest magnitude after clipping, above 0.
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True)
class BetaScheduleConfig(SchedulerConfig):
    """Settings of methods that work with any schedule of betas.

    Attributes:
        beta_start: First beta of the schedules linear, scaled_linear and sigmoid, above 0, below 1.
        beta_end: Last beta of these schedules, above 0, below 1.
        trained_betas: The betas themselves, one per training timestep, above 0, at most 1; None uses `beta_schedule`.
    """

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
            raise invalid(
                f"{self.owner}: len(trained_betas)",
                len(self.trained_betas),
                f"one beta per training timestep, num_train_timesteps={self.num_train_timesteps}",
                error=ConfigError,
            )


@dataclasses.dataclass(frozen=True)
class TimestepSpacingConfig(SchedulerConfig):
    """Settings of methods with a choice of timestep spacing.

    Source: Lin et al. 2023, table 2, https://arxiv.org/abs/2305.08891.

    Attributes:
        timestep_spacing: "leading" (multiples of the stride from 0 upwards), "trailing" (multiples of the stride from
            the last timestep downwards) or "linspace" (evenly spaced, first and last timestep included).
        steps_offset: Number added to timesteps with leading spacing, 0 or more.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0


@dataclasses.dataclass(frozen=True)
class ZeroTerminalSNRConfig(SchedulerConfig):
    """Settings of methods that can start at pure noise.

    Source: Lin et al. 2023, section 3.1, https://arxiv.org/abs/2305.08891.

    Attributes:
        rescale_betas_zero_snr: Whether betas are rescaled so that the signal-to-noise ratio of the last timestep is 0.
    """

    rescale_betas_zero_snr: bool = False


@dataclasses.dataclass(frozen=True)
class ThresholdConfig(SchedulerConfig):
    """Settings of methods with dynamic thresholding.

    Source: Saharia et al. 2022, section 2.3, https://arxiv.org/abs/2205.11487.

    Attributes:
        thresholding: Whether the predicted clean sample is thresholded. It then replaces clipping.
        dynamic_thresholding_ratio: Quantile of magnitudes that serves as the threshold, above 0, at most 1.
        sample_max_value: Upper bound of the threshold, above 0.
    """

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


@dataclasses.dataclass(frozen=True)
class DiscreteTimeConfig(ThresholdConfig, ZeroTerminalSNRConfig, TimestepSpacingConfig, BetaScheduleConfig):
    """Settings of methods that step from timestep to timestep: DDPM, DDIM and latent consistency models."""


@dataclasses.dataclass(frozen=True)
class SigmaScheduleConfig(SchedulerConfig):
    """Settings of methods whose sigmas can follow another schedule than the timesteps; at most one may be set.

    Attributes:
        use_karras_sigmas: Whether sigmas follow `sigmas.karras_sigmas`.
        use_exponential_sigmas: Whether sigmas follow `sigmas.exponential_sigmas`.
        use_beta_sigmas: Whether sigmas follow `sigmas.beta_sigmas`.
    """

    # Names of the settings that select a schedule.
    sigma_schedules: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        enabled = [name for name in self.sigma_schedules if getattr(self, name)]
        if len(enabled) > 1:
            raise invalid(
                f"{self.owner}: ({', '.join(enabled)})",
                (True,) * len(enabled),
                "at most one of them to be True",
                error=ConfigError,
            )
