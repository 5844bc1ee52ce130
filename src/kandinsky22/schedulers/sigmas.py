"""Noise levels sigma: base classes of the methods that step along them, and schedules of sigmas.

The noise level of x_t is sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t): the standard deviation of the noise after
division of the sample by sqrt(alpha_bar_t), which gives x_0 + sigma_t epsilon (Karras et al. 2022,
https://arxiv.org/abs/2206.00364). Methods differ in the scale of the sample that they step:

- variance preserving, as in training: x = (x_0 + sigma epsilon) / sqrt(sigma^2 + 1);
- variance exploding: x = x_0 + sigma epsilon.

Coefficients are Python floats, computed in double precision from sigmas in single precision. They change neither the
dtype nor the device of a sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs.validation import storing_device
from kandinsky22.schedulers.base import Scheduler, as_number
from kandinsky22.schedulers.config import SchedulerConfig, SigmaScheduleConfig, as_int, as_items
from kandinsky22.schedulers.noise_schedules import FloatArray, has_zero_terminal_snr, spaced_timesteps

SMALLEST_SIGMA = 1e-6
SMALLEST_ALPHA_BAR = 2.0**-24  # alpha_bar of pure noise, which makes its sigma finite; the smallest float16


def karras_sigmas(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> FloatArray:
    """Return sigmas that are evenly spaced in sigma^(1/rho).

    Source: Karras et al. 2022, equation 5, https://arxiv.org/abs/2206.00364.

    Args:
        sigma_max: First sigma, above `sigma_min`.
        sigma_min: Last sigma, above 0.
        count: Number of sigmas.
        rho: Exponent; larger values give shorter steps near `sigma_min`.

    Returns:
        Descending sigmas, (count,) float64.
    """
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (first + np.linspace(0, 1, count) * (last - first)) ** rho


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    """Return sigmas that are evenly spaced in lambda = -log sigma, half the log signal-to-noise ratio.

    Source: Lu et al. 2022, https://arxiv.org/abs/2206.00927.

    Args:
        sigma_max: First sigma, above `sigma_min`.
        sigma_min: Last sigma, above 0.
        count: Number of sigmas.

    Returns:
        Descending sigmas, (count,) float64.
    """
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))


def beta_quantiles(probabilities: FloatArray, shape: float = 0.6) -> FloatArray:
    """Return quantiles of the symmetric Beta distribution, by bisection.

    Args:
        probabilities: Probabilities, 0 to 1, (n,).
        shape: Both parameters of the distribution, above 0.

    Returns:
        Quantiles, 0 to 1, (n,).
    """
    nodes, weights = np.polynomial.legendre.leggauss(48)
    nodes, weights = (nodes + 1) / 2, weights / 2
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    tails = np.minimum(probabilities, 1 - probabilities)  # the distribution is symmetric
    low, high = np.zeros_like(tails), np.full_like(tails, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        # Integral of the density up to `middle`. The substitution x = middle u^5 removes the pole of the density at 0.
        x = middle[:, None] * nodes**5
        below = 5 * middle**shape * ((nodes ** (5 * shape - 1) * (1 - x) ** (shape - 1)) @ weights) / total
        low, high = np.where(below < tails, middle, low), np.where(below < tails, high, middle)
    return np.where(probabilities < 0.5, low, 1 - low)


def beta_sigmas(sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    """Return sigmas at even quantiles of a Beta distribution, dense at both ends.

    Source: Lee et al. 2024, https://arxiv.org/abs/2407.12173.

    Args:
        sigma_max: First sigma, above `sigma_min`.
        sigma_min: Last sigma.
        count: Number of sigmas.

    Returns:
        Descending sigmas, (count,) float64.
    """
    return sigma_min + beta_quantiles(1 - np.linspace(0, 1, count)) * (sigma_max - sigma_min)


SIGMA_SCHEDULES = {
    "use_karras_sigmas": karras_sigmas,
    "use_lu_lambdas": exponential_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def sigmas_to_timesteps(sigmas: FloatArray, training_sigmas: FloatArray) -> FloatArray:
    """Return the timesteps at which training had these noise levels, by linear interpolation in log sigma.

    Args:
        sigmas: Noise levels, (n,), 0 or more.
        training_sigmas: Noise levels of the training timesteps, (num_train_timesteps,), ascending.

    Returns:
        Timesteps, not rounded, (n,), 0 to num_train_timesteps - 1.
    """
    log_sigmas, log_training_sigmas = np.log(np.maximum(sigmas, 1e-10)), np.log(training_sigmas)
    if len(log_training_sigmas) == 1:
        return np.zeros_like(log_sigmas)
    below = np.searchsorted(log_training_sigmas, log_sigmas, side="right") - 1
    below = np.clip(below, 0, len(log_training_sigmas) - 2)
    spacing = log_training_sigmas[below] - log_training_sigmas[below + 1]
    fraction = np.clip((log_training_sigmas[below] - log_sigmas) / spacing, 0, 1)
    return (1 - fraction) * below + fraction * (below + 1)


def signal_scale(sigma: float) -> float:
    """Return sqrt(alpha_bar) = 1 / sqrt(sigma^2 + 1).

    Args:
        sigma: Noise level.
    """
    return 1 / math.hypot(sigma, 1)


def to_float32(sample: Tensor) -> Tensor:
    """Return half-precision tensors as float32, other tensors unchanged: steps are computed in float32 or float64.

    Args:
        sample: Any floating-point tensor.
    """
    return sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample


def _validated_sigmas(sigmas: Sequence[float] | Tensor) -> FloatArray:
    numbers = [as_number(value, fractional=True) for value in as_items(sigmas) or []]
    try:
        with np.errstate(over="ignore"):  # infinity is refused below, as is NaN, which None becomes
            values = np.asarray(numbers, dtype=np.float32).astype(np.float64)
    except OverflowError:
        values = np.empty(0)
    descending = all(a > b for a, b in itertools.pairwise(values[:-1].tolist()))
    # The last step may have no length, as that of a schedule that ends at the lowest sigma of training.
    if not descending or len(values) < 2 or not values[-2] >= values[-1] >= 0 or not values[0] < math.inf:
        raise invalid("sigmas", sigmas, "two or more finite numbers in descending order, the last 0 or more")
    if values[-2] < SMALLEST_SIGMA or 0 < values[-1] < SMALLEST_SIGMA:
        expected = f"sigmas of {SMALLEST_SIGMA} or more, and at the end 0 if the sample is to be clean"
        raise invalid("sigmas", sigmas, expected, "smaller ones vanish in single precision")
    return values


def without_repetitions(values: Any) -> Any:
    """Return timesteps or sigmas of a caller in which a value that repeats the one before is left out.

    That makes the timesteps of a method with several network evaluations per step those of its steps.

    Args:
        values: A list, tuple, array or tensor with one dimension. It is returned unchanged if the first value is
            repeated, or another one twice, which no such method does; and so is anything else.
    """
    items = as_items(values)
    if items is None:
        return values
    repeats = [index > 0 and _equal(items[index - 1], item) for index, item in enumerate(items)]
    if any(repeats[:2]) or any(first and second for first, second in itertools.pairwise(repeats)):
        return values
    return [item for item, repeated in zip(items, repeats, strict=True) if not repeated]


def _equal(first: Any, second: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return bool(numbers and first == second)


class StatefulScheduler(Scheduler):
    """Base class of methods whose steps use the predictions of earlier steps.

    The scheduler holds the state of one generation at a time: the index of the next network evaluation in `timesteps`,
    and the predictions so far. A step at another timestep than the next one starts a new generation there.

    Args:
        **settings: Settings, see `config_class`.
    """

    steps_before_set_timesteps: ClassVar[bool] = False  # whether all training timesteps can be stepped along at first
    _step_index: int | None = None  # index of the next network evaluation; None at the start of a generation
    _begin_index: int | None = None

    def _reset(self) -> None:
        """Drop the state of a generation."""
        self._step_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the next network evaluation in `timesteps`; None before the first of a generation."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index in `timesteps` at which generations start, see `set_begin_index`; None leaves it to the timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index at which the next generation starts; it matters only if two timesteps are equal.

        Args:
            begin_index: Index in `timesteps`.

        Raises:
            InputError: If it is not an index.
        """
        index = as_int(begin_index)
        if index is None or not 0 <= index < len(self._timestep_list):
            raise invalid("begin_index", begin_index, f"an integer from 0 to {len(self._timestep_list) - 1}")
        self._begin_index = index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep.

        If a timestep is evaluated twice, that is the index of the second evaluation, which starts a step.

        Args:
            timestep: The timestep.
            schedule_timesteps: The timesteps to search; None means `timesteps`.

        Raises:
            InputError: If the timestep is not one of them.
        """
        steps = self._timestep_list if schedule_timesteps is None else schedule_timesteps.tolist()
        indices = [index for index, each in enumerate(steps) if each == _as_float(timestep)]
        if not indices:
            shown = steps if len(steps) < 20 else f"{steps[:3]} to {steps[-1]}"
            raise invalid("timestep", timestep, f"one of the scheduler's timesteps, {shown}")
        return indices[min(1, len(indices) - 1)]

    def _index_for_timestep(self, timestep: float | Tensor) -> int:
        """Return the index of a timestep in `timesteps`, and start a new generation if it is not the next one."""
        if not self.steps_before_set_timesteps:
            self._require_timesteps()
        value = _as_float(timestep)
        is_next = (
            self._step_index is not None
            and self._step_index < len(self._timestep_list)
            and self._timestep_list[self._step_index] == value
        )
        if self._step_index is None or not is_next:
            index = self.index_for_timestep(timestep)
            begin = self._begin_index
            if begin is not None and begin < len(self._timestep_list) and self._timestep_list[begin] == value:
                index = begin
            elif self._timestep_list[0] == value:
                index = 0  # here the first of two equal timesteps starts the step
            self._reset()
            self._step_index = index
        return self._step_index


def _as_float(timestep: float | Tensor) -> float:
    try:
        return float(timestep)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


class SigmaScheduler(StatefulScheduler):
    """Base class of methods that step from sigma to sigma.

    Args:
        **settings: Settings, see `config_class`.

    Attributes:
        sigmas: Sigmas of the network evaluations, descending, and the sigma at which the last step ends,
            (evaluations + 1,) float32.
    """

    extra_timesteps: ClassVar[int] = 0  # see `extra` of spaced_timesteps
    spacing_type: ClassVar[type[np.floating[Any]]] = np.float32  # of timesteps before their sigmas are interpolated

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if has_zero_terminal_snr(config) or self.alphas_cumprod[-1] == 0:  # the latter after a beta of 1
            self.alphas_cumprod[-1] = SMALLEST_ALPHA_BAR
        self._training_sigmas: FloatArray = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        final = [self._final_sigma(self._training_sigmas)]
        self._set_sigmas(self._training_sigmas[::-1].copy(), final, self.timesteps.numpy(), None)
        self.num_inference_steps = None

    # Timesteps and sigmas

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Set `timesteps` and `sigmas` for a new generation: a number of steps, timesteps, or sigmas.

        Args:
            num_inference_steps: Number of steps, 1 to `num_train_timesteps`; None if timesteps or sigmas are passed.
            device: Device of `timesteps`; None leaves them on the CPU.
            timesteps: Descending training timesteps, 0 to `num_train_timesteps` - 1; None spaces them as configured.
            sigmas: Two or more descending noise levels. The last step ends at the last, which may be 0 or equal the
                one before. None follows the configured schedule.

        Raises:
            InputError: If not exactly one of `num_inference_steps`, `timesteps` and `sigmas` is passed, if its value is
                invalid, or if timesteps or sigmas are passed and the config has a schedule of sigmas.
        """
        device = storing_device(device)
        schedule = self._sigma_schedule()
        if schedule is not None and (timesteps is not None or sigmas is not None):
            name, value = ("sigmas", sigmas) if sigmas is not None else ("timesteps", timesteps)
            raise invalid(
                name, value, f"None, because the config has {schedule}=True", "pass num_inference_steps instead"
            )
        if sigmas is not None:
            if num_inference_steps is not None or timesteps is not None:
                raise invalid(
                    "(num_inference_steps, timesteps, sigmas)",
                    (num_inference_steps, timesteps, sigmas),
                    "exactly one of them to differ from None",
                )
            values = _validated_sigmas(self._one_per_step(sigmas))
            steps = self._sigmas_to_timesteps(values[:-1], "sigmas")
            self._set_sigmas(values[:-1], values[-1:].tolist(), steps, device)
            self.custom_timesteps = True
            return
        steps = np.asarray(self._requested_timesteps(num_inference_steps, timesteps), self.spacing_type)
        values = self._interpolated_sigmas(steps)
        if schedule is not None:
            sigma_max, sigma_min = self._sigma_bounds(values)
            if sigma_min > sigma_max:
                raise invalid(
                    "(sigma_min, sigma_max)",
                    (sigma_min, sigma_max),
                    f"sigma_min to be the smaller one; the sigmas of training are {values[-1]:.4g} to {values[0]:.4g}",
                )
            values = SIGMA_SCHEDULES[schedule](sigma_max, sigma_min, len(steps))
            steps = self._sigmas_to_timesteps(values, schedule)
        self._set_sigmas(values, [self._final_sigma(values)], steps, device)
        self.custom_timesteps = timesteps is not None

    def _spaced_timesteps(self, steps: int) -> Sequence[float]:
        spaced = spaced_timesteps(self.config, steps, extra=self.extra_timesteps)
        return spaced.astype(self.spacing_type).tolist()

    def _interpolated_sigmas(self, timesteps: FloatArray) -> FloatArray:
        """Return the sigmas of timesteps, by linear interpolation between those of training."""
        return np.interp(timesteps, np.arange(len(self._training_sigmas)), self._training_sigmas)

    def _sigma_schedule(self) -> str | None:
        """Return the name of the setting that selects a schedule of sigmas; None if none is selected."""
        config = self.config
        if not isinstance(config, SigmaScheduleConfig):
            return None
        return next((name for name in config.sigma_schedules if config[name]), None)

    def _sigma_bounds(self, sigmas: FloatArray) -> tuple[float, float]:
        """Return the largest and smallest sigma of a schedule: those of the config, or else those of `sigmas`."""
        names = self.config.names()
        sigma_max, sigma_min = (self.config[name] if name in names else None for name in ("sigma_max", "sigma_min"))
        return (
            float(sigmas[0]) if sigma_max is None else sigma_max,
            float(sigmas[-1]) if sigma_min is None else sigma_min,
        )

    def _final_sigma(self, sigmas: FloatArray) -> float:
        """Return the sigma at which the last step ends, after the `sigmas` of the network evaluations."""
        config = self.config
        ends_early = "final_sigmas_type" in config.names() and config["final_sigmas_type"] == "sigma_min"
        return float(self._training_sigmas[0]) if ends_early else 0.0

    def _sigmas_to_timesteps(self, sigmas: FloatArray, source: str) -> FloatArray:
        """Return the timesteps of sigmas; `source` is "sigmas" for those of a caller, or the setting of a schedule."""
        return sigmas_to_timesteps(sigmas, self._training_sigmas)

    def _set_sigmas(
        self, sigmas: FloatArray, final: list[float], timesteps: FloatArray, device: torch.device | str | None
    ) -> None:
        """Start a new generation with these sigmas, the `final` one if there is any, and timesteps."""
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, final]).astype(np.float32))
        self._sigma_list: list[float] = self.sigmas.double().tolist()
        dtype = torch.float32 if self.fractional_timesteps else torch.int64
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps)).to(device=device, dtype=dtype)
        self.num_inference_steps = len(timesteps)
        self._begin_index = None
        self._reset()

    # Noise

    def _signal_scale(self, sigma: float) -> float:
        """Return the factor of the clean sample at this sigma."""
        return signal_scale(sigma)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Return clean samples with the noise of a timestep, at the scale of this method's samples.

        Args:
            original_samples: Clean samples x_0, (B, ...).
            noise: Standard normal noise, (B, ...).
            timesteps: Elements of `timesteps`, or other timesteps from 0 to `num_train_timesteps` - 1, whose sigmas are
                interpolated: (B,), or one for all batch items.

        Raises:
            InputError: If `timesteps` are out of range, or their number is not 1 or B.
        """
        steps = torch.as_tensor(timesteps).flatten().tolist()
        if len(steps) not in (1, len(original_samples)) or not all(0 <= step < len(self) for step in steps):
            raise invalid(
                "timesteps",
                timesteps,
                f"one number, or one per batch item ({len(original_samples)}), from 0 to {len(self) - 1}",
            )
        sigma_of = dict(zip(self._timestep_list, self._sigma_list, strict=False))
        training_timesteps = np.arange(len(self))
        sigmas = [
            sigma_of.get(step, float(np.interp(step, training_timesteps, self._training_sigmas))) for step in steps
        ]
        shape = (-1, *[1] * (original_samples.ndim - 1))
        scale = torch.tensor([self._signal_scale(sigma) for sigma in sigmas], dtype=torch.float64).reshape(shape)
        sigma = torch.tensor(sigmas, dtype=torch.float64).reshape(shape)
        return scale.to(original_samples) * original_samples + (scale * sigma).to(original_samples) * noise


class VarianceExplodingScheduler(SigmaScheduler):
    """Base class of methods on variance-exploding samples, x = x_0 + sigma epsilon.

    The network's input is scaled to the variance of training. Timesteps may lie between those of training.

    Args:
        **settings: Settings, see `config_class`.
    """

    fractional_timesteps = True
    steps_before_set_timesteps = True

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        self.custom_timesteps = False

    def _set_sigmas(
        self, sigmas: FloatArray, final: list[float], timesteps: FloatArray, device: torch.device | str | None
    ) -> None:
        super()._set_sigmas(sigmas, final, timesteps, device)
        sigma_max = max(self._sigma_list)
        # The signal is negligible at the noisiest training timestep, but not where leading spacing starts.
        leading = self.config.get("timestep_spacing") == "leading"
        self.init_noise_sigma = torch.tensor(math.hypot(sigma_max, 1) if leading else sigma_max, dtype=torch.float32)

    def _signal_scale(self, sigma: float) -> float:
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return sample / sqrt(sigma^2 + 1), which has the variance of training.

        Args:
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            timestep: Current timestep, an element of `timesteps`. It is required here.

        Raises:
            InputError: If timesteps are not set, or `timestep` is not one of them.
        """
        if timestep is None:
            raise invalid("timestep", timestep, "one of the scheduler's timesteps")
        return sample * signal_scale(self._sigma_list[self._index_for_timestep(timestep)])

    def _denoised(self, prediction: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """Return the clean sample that a prediction implies: D(x; sigma) of Karras et al., equation 7."""
        scale = signal_scale(sigma)
        return self._threshold(self._predicted_x0(prediction, sample * scale, scale**2))
