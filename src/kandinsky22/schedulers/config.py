"""Scheduler settings: validated, immutable, and readable by code that expects a plain dictionary."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
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


MAX_TIMESTEPS = 100_000  # a hundred times what networks are trained with
MAX_ITEMS = 4 * MAX_TIMESTEPS  # elements of a schedule: a step has up to 4 network evaluations
SMALLEST_BETA = 1e-7  # 1 - beta is 1 in single precision below half of the machine epsilon, 6e-8
LARGEST_BETA = 0.5
# First positional arguments of most constructors.
BETA_ARGUMENTS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
THRESHOLD_ARGUMENTS = ("prediction_type", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
SIGMA_ARGUMENTS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


# Settings whose default is that of every class: a default of another class is a default here.
COMMON_DEFAULTS = {"num_train_timesteps", "trained_betas", "prediction_type"}


def as_int(value: Any) -> int | None:
    """Return `value` as an int, or None if it is not an integer.

    Args:
        value: Any object. Integers of Python and numpy and tensors with one integer are accepted; True and False are
            not.
    """
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except Exception:  # besides TypeError: tensors without values
        return None


def as_items(values: Any) -> list[Any] | None:
    """Return the elements of a sequence, or of an array or tensor with one dimension; None for anything else.

    Args:
        values: Any object. Those with more elements than any schedule are not accepted.
    """
    try:
        has_elements = getattr(values, "ndim", 0) == 1 and hasattr(values, "tolist")
        if not has_elements and (not isinstance(values, Sequence) or isinstance(values, str | bytes)):
            return None
        if len(values) > MAX_ITEMS:
            return None
        return list(values.tolist() if has_elements else values)
    except Exception:  # sparse and meta tensors have no elements, and sequences of a caller may fail in any way
        return None


def _is_between(value: Any, lowest: float, highest: float) -> bool:
    """Return whether a value is a number, not a bool or NaN, in a closed range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _is_beta(value: Any) -> bool:
    return _is_between(value, SMALLEST_BETA, 1)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any, lowest: int, highest: int = MAX_TIMESTEPS) -> bool:
    number = as_int(value)
    return number is not None and lowest <= number <= highest


def _is_seed(value: Any) -> bool:
    return _is_integer(value, 0, 2**63 - 1)


class _Rule(NamedTuple):
    """Test of a setting's value, and the description of accepted values for messages."""

    accepts: Callable[[Any], bool]
    expected: str


_BOOL = _Rule(_is_bool, "True or False")
# Numbers beyond these bounds overflow or vanish in single precision, in which samples are computed.
_POSITIVE = _Rule(lambda value: _is_between(value, 1e-9, 1e9), "a number above 0 (1e-09 to 1e+09)")
_SIGMA = _Rule(
    lambda value: value is None or _is_between(value, 1e-6, 1e9), "None, or a number above 0 (1e-06 to 1e+09)"
)
_BETA = _Rule(
    lambda value: _is_between(value, SMALLEST_BETA, LARGEST_BETA) and value < LARGEST_BETA,
    f"a number above 0 ({SMALLEST_BETA} or more, smaller ones vanish in single precision) and below {LARGEST_BETA}, "
    "which leaves no signal",
)
_COUNT = _Rule(
    lambda value: _is_integer(value, 1),
    f"an integer above 0, at most {MAX_TIMESTEPS} (tables have an element per timestep)",
)
_RULES: Mapping[str, _Rule] = {
    "num_train_timesteps": _COUNT,
    "steps_offset": _Rule(lambda value: _is_integer(value, 0), f"an integer, 0 or more, at most {MAX_TIMESTEPS}"),
    "trained_betas": _Rule(
        lambda value: (
            value is None or (isinstance(value, tuple) and len(value) <= MAX_TIMESTEPS and all(map(_is_beta, value)))
        ),
        f"None, or a list of numbers above 0 ({SMALLEST_BETA} or more), at most 1",
    ),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "dynamic_thresholding_ratio": _Rule(lambda value: _is_between(value, 0, 1), "a number from 0 to 1"),
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
    "sigma_min": _SIGMA,
    "sigma_max": _SIGMA,
    "timestep_scaling": _POSITIVE,
    "original_inference_steps": _COUNT,
    "lambda_min_clipped": _Rule(
        lambda value: value == -math.inf or _is_between(value, -1e9, 1e9), "a finite number, or -inf"
    ),
    "disable_corrector": _Rule(
        lambda value: isinstance(value, tuple) and all(_is_integer(step, 0) for step in value),
        "a list of step indices, 0 or more",
    ),
    "noise_sampler_seed": _Rule(
        lambda value: (
            value is None
            or _is_seed(value)
            or (isinstance(value, tuple) and len(value) > 0 and all(map(_is_seed, value)))
        ),
        "None, an integer from 0 to 2**63 - 1, or a list of one per batch item",
    ),
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(dict[str, Any], Config):
    """Settings of a scheduler; also a `dict`, because `from_config` of other libraries expects one.

    Besides the fields, the dictionary contains `_class_name`, the names of the settings left at their defaults, and
    settings of other scheduler classes. The latter have no effect here. They take effect again when the config is
    passed to a class that has them.

    Attributes:
        num_train_timesteps: Number of timesteps that the network was trained with, 1 to 100,000.
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
    # Settings of files that have no effect with the only values of other settings that are accepted.
    inert_settings: ClassVar[frozenset[str]] = frozenset()
    # Order of the settings as positional arguments of the constructor, that of the reference.
    positional: ClassVar[tuple[str, ...]] = ()

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        for name in self.names():
            value = getattr(self, name)
            if name in self.choices:
                choices = ", ".join(map(str, self.choices[name]))
                several = "one of " if len(self.choices[name]) > 1 else ""
                known = (value is None or isinstance(value, str)) and value in self.choices[name]
                self._require(known, name, several + choices)
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
        settings, foreign_settings = _to_builtins(cls.owner, settings), _to_builtins(cls.owner, foreign or {})
        if foreign is not None:
            settings = {name: cls._translated(name, value) for name, value in settings.items()}
            names = foreign_settings.keys() & cls.supported_values.keys() - cls.inert_settings
            cls.parse({name: foreign_settings[name] for name in names}, owner=cls.owner)
        config = cls.parse(settings, owner=cls.owner)
        dict.update(config, foreign_settings)
        fixed = {name for name in TRAINING_SETTINGS if len(cls.choices.get(name, ())) == 1}  # never a choice of a user
        defaulted = sorted(set(cls.names()) - settings.keys() - fixed)
        if defaulted:
            dict.__setitem__(config, DEFAULTED_KEY, defaulted)
        return config

    @classmethod
    def _translated(cls, name: str, value: Any) -> Any:
        return cls.synonyms.get(name, {}).get(value, value) if isinstance(value, str) else value

    @classmethod
    def adapted(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings of another class or of a file in the form of this class.

        None, and 0 or 1 for a bool, become what the reference makes of them. None is False, or else the default.

        Args:
            settings: Settings by name.
        """
        adapted = {}
        for name, value in settings.items():
            is_bool = _RULES.get(name) is _BOOL
            if is_bool and (value is None or (isinstance(value, int) and value in (0, 1))):
                adapted[name] = bool(value)
            elif value is not None or name not in cls.names() or cls._accepts_none(name):
                adapted[name] = value
        return adapted

    @classmethod
    def _accepts_none(cls, name: str) -> bool:
        if name in cls.choices:
            return None in cls.choices[name]
        return name in _RULES and _RULES[name].accepts(None)

    def with_settings(self: SC, settings: Mapping[str, Any]) -> SC:
        """Return the config with other values of some settings. Names that this class does not have are stored.

        Args:
            settings: Settings by name.

        Raises:
            ConfigError: If a setting of this class is invalid.
        """
        names = set(self.names())
        previous = {name: value for name, value in self.items() if not name.startswith("_")}
        own = {name: previous[name] for name in names - set(self.get(DEFAULTED_KEY, ()))}
        foreign = {name: value for name, value in (previous | dict(settings)).items() if name not in names}
        return type(self).from_settings(own | {name: settings[name] for name in names & settings.keys()}, foreign)

    @classmethod
    def inherited_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a config of any class passes on to this class.

        These are the settings that were set explicitly, and those of `TRAINING_SETTINGS` that this class supports.

        Args:
            config: Config of a scheduler of any class and library.
        """
        defaulted = config.get(DEFAULTED_KEY)
        listed = defaulted if isinstance(defaulted, list | tuple | set | frozenset) else ()
        skipped = {name for name in listed if isinstance(name, str)}
        for name in skipped & TRAINING_SETTINGS & config.keys() & set(cls.names()):
            is_default = name in COMMON_DEFAULTS and config[name] == cls.__dataclass_fields__[name].default
            if not is_default and config[name] in cls.choices.get(name, (config[name],)):
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


def _to_builtins(owner: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with arrays and tensors converted to lists and numbers, which files can store."""
    converted = {}
    for name, value in settings.items():
        if hasattr(value, "tolist") and not isinstance(value, type):
            if _number_of_elements(value) > MAX_TIMESTEPS:
                raise invalid(f"{owner}: {name}", value, f"at most {MAX_TIMESTEPS} elements", error=ConfigError)
            try:
                value = value.tolist()
            except Exception as error:  # sparse and meta tensors have no elements to list
                raise invalid(f"{owner}: {name}", value, "a list of numbers", error=ConfigError) from error
        converted[name] = value
    return converted


def _number_of_elements(value: Any) -> int:
    return math.prod(getattr(value, "shape", ()))


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
        beta_start: First beta of the schedules linear, scaled_linear and sigmoid, 1e-7 to 0.5.
        beta_end: Last beta of these schedules, 1e-7 to 0.5.
        trained_betas: The betas themselves, one per training timestep, 1e-7 to 1; None uses `beta_schedule`.
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
        dynamic_thresholding_ratio: Quantile of magnitudes that serves as the threshold, 0 to 1.
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
