"""Interface and base class of schedulers: timesteps, predictions, noising, files.

Notation, as in DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239): a sample at timestep t is
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, where alpha_bar_t = `alphas_cumprod[t]` is the product of
1 - beta up to t, x_0 is the clean sample and epsilon is standard normal noise.

Coefficients are zero-dimensional float32 tensors on the CPU. Torch combines those with samples of any dtype and device
without a change of either.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import ConfigError, InputError, invalid
from kandinsky22.inputs.validation import storing_device
from kandinsky22.outputs import Output
from kandinsky22.schedulers.config import BETA_ARGUMENTS, ClipConfig, SchedulerConfig, ThresholdConfig, as_int, as_items
from kandinsky22.schedulers.configurable import Configurable
from kandinsky22.schedulers.noise_schedules import spaced_timesteps, training_betas

SMALLEST_SIGNAL = 1e-30  # alpha_bar; its sigma, 1e15, can be squared in single precision


@dataclasses.dataclass
class SchedulerOutput(Output):
    """Result of one step.

    Attributes:
        prev_sample: Sample at the previous, less noisy timestep, (B, C, ...).
        pred_original_sample: Predicted clean sample x_0, (B, C, ...); None if the scheduler does not compute it.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@runtime_checkable
class SchedulerProtocol(Protocol):
    """Interface that a scheduler must offer to be used in a pipeline, ours or one of another library.

    One generation uses it as follows::

        scheduler.set_timesteps(num_inference_steps, device=device)
        sample = noise * scheduler.init_noise_sigma  # text-to-image; image-to-image starts from add_noise
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            model_output = network(model_input, timestep)
            sample = scheduler.step(model_output, timestep, sample, return_dict=False)[0]

    Pipelines read the signatures of `set_timesteps` and `step` and pass these optional arguments where they exist:
    `timesteps` and `sigmas` to `set_timesteps`; `generator` and `prev_timestep` to `step`. A missing `order` counts as
    1. `step_starts`, the indices in `timesteps` with which steps begin, is needed only where steps differ in their
    number of network evaluations. `add_noise` is needed for image-to-image and inpainting only. `guidance_threshold`
    also needs `alphas_cumprod`, (num_train_timesteps,).
    """

    @property
    def config(self) -> Any:
        """Settings, readable as attributes and as a mapping; `prediction_type` and `variance_type` are used."""

    @property
    def timesteps(self) -> Tensor:
        """Timesteps in the order of network evaluations, descending, (evaluations,)."""

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the initial noise: the factor of standard normal noise."""

    @property
    def order(self) -> int:
        """Number of network evaluations per step: consecutive elements of `timesteps` that form one step."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Set `timesteps` for a new generation.

        Args:
            num_inference_steps: Number of steps, 1 or more.
            device: Device of `timesteps`; None leaves them on the CPU.
        """

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor) -> Tensor:
        """Return the network's input for a sample.

        Args:
            sample: Current sample, (B, C, ...).
            timestep: Current timestep, an element of `timesteps`.
        """

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Any:
        """Return the sample at the next of `timesteps`.

        Args:
            model_output: Network output, (B, C, ...), or (B, 2C, ...) with a learned variance in the second half.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample, not scaled, (B, C, ...).

        Returns:
            With `return_dict=False`, which implementations accept, a tuple whose first element is the sample.
        """

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean samples with the noise of a timestep.

        Args:
            original_samples: Clean samples, (B, C, ...).
            noise: Standard normal noise of that shape.
            timesteps: Elements of `timesteps`, one per batch item, or one for all.
        """


class NetworkOutput(NamedTuple):
    """Output of a network, divided along the channels.

    Attributes:
        prediction: Predicted noise, clean sample or velocity, (B, C, ...).
        variance: Learned variance, (B, C, ...); None if the network predicts none.
    """

    prediction: Tensor
    variance: Tensor | None


def dynamic_threshold(sample: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clip each batch item to a quantile of its magnitudes, and scale the result to [-1, 1].

    Source: dynamic thresholding, Saharia et al. 2022, section 2.3, https://arxiv.org/abs/2205.11487.

    Args:
        sample: Predicted clean samples, (B, ...).
        ratio: Quantile of the magnitudes that serves as the threshold, above 0, at most 1.
        maximum: Upper bound of the threshold, 1 or more. Thresholds below 1 are raised to 1.

    Returns:
        Thresholded samples, shape and dtype of `sample`.
    """
    values = sample.flatten(1)
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()  # torch.quantile does not support half precision
    limit = torch.quantile(values.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=maximum)
    return (torch.clamp(values, -limit, limit) / limit).reshape(sample.shape).to(sample.dtype)


def _validated_timesteps(timesteps: Sequence[float] | Tensor, fractional: bool) -> list[float]:
    """Return timesteps as numbers: integers, or any numbers if `fractional`, in descending order."""
    values = as_items(timesteps) or []
    numbers = [number for number in (as_number(value, fractional) for value in values) if number is not None]
    if not numbers or len(numbers) < len(values) or any(a <= b for a, b in itertools.pairwise(numbers)):
        kind = "numbers" if fractional else "integers"
        raise invalid("timesteps", timesteps, f"one or more {kind}, 0 or more, in descending order")
    return numbers


def as_number(value: Any, fractional: bool) -> float | None:
    """Return a timestep or a sigma of a caller as a number; None if it is not a finite number, 0 or more.

    Args:
        value: Any object.
        fractional: Whether it may lie between integers.
    """
    number: float | None = as_int(value)
    if number is None and isinstance(value, float | Tensor | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            return None
        number = number if fractional or number.is_integer() else None
    return number if number is not None and 0 <= number < math.inf else None


class Scheduler(Configurable):
    """Base class of our schedulers. It implements `SchedulerProtocol`, which describes the use, except `step`.

    Args:
        *arguments: Settings by position, in the order of the reference's constructor.
        **settings: Settings by name, the fields of `config_class`. Those left out get their defaults.

    Attributes:
        config (SchedulerConfig): The settings.
        betas (Tensor): Variances of the noise that each training timestep adds, (num_train_timesteps,).
        alphas (Tensor): 1 - `betas`.
        alphas_cumprod (Tensor): alpha_bar, the cumulative products of `alphas`.
        final_alpha_cumprod (Tensor): alpha_bar after the last step; 1 means a clean sample.
        init_noise_sigma (float | Tensor): Standard deviation of the initial noise.
        num_inference_steps (int | None): Number of steps; None before `set_timesteps`.
        custom_timesteps (bool): Whether `set_timesteps` received timesteps or sigmas instead of a number of steps.

    Raises:
        ConfigError: If a setting is unknown, invalid or passed twice.
    """

    order: ClassVar[int] = 1  # network evaluations per step
    fractional_timesteps: ClassVar[bool] = False  # whether timesteps need not be integers

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        self.betas = training_betas(config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._check_signal(config)
        self.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.init_noise_sigma: float | Tensor = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self.timesteps = torch.arange(config.num_train_timesteps, device="cpu").flip(0)

    def _check_signal(self, config: SchedulerConfig) -> None:
        """Raise ConfigError if the betas leave no signal before the last timestep, or are not numbers."""
        before_last, last = float(self.alphas_cumprod[-2:][0]), float(self.alphas_cumprod[-1])
        if not (0 <= last < 1 and before_last >= SMALLEST_SIGNAL and (last == 0 or last >= SMALLEST_SIGNAL)):
            names = [name for name in (*BETA_ARGUMENTS, "rescale_betas_zero_snr") if config.get(name) is not None]
            raise invalid(
                f"{config.owner}: ({', '.join(names)})",
                tuple(config[name] for name in names),
                f"betas with products of 1 - beta, alpha_bar, above {SMALLEST_SIGNAL} before the last timestep",
                "lower the betas or the number of timesteps",
                error=ConfigError,
            )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # Timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps in the order of network evaluations, (evaluations,) int64; assigning replaces them."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps = timesteps
        self._timestep_list: list[float] = timesteps.tolist()
        integers = [int(step) for step in timesteps.tolist()]
        self._previous_timesteps = dict(zip(integers, [*integers[1:], -1], strict=True))

    @property
    def step_starts(self) -> list[int]:
        """Indices in `timesteps` of the network evaluations with which the steps begin, ascending."""
        return list(range(0, len(self._timestep_list), self.order))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set `timesteps` for a new generation: a number of steps, spaced as configured, or the timesteps themselves.

        Args:
            num_inference_steps: Number of steps, 1 to `num_train_timesteps`; None if `timesteps` is passed.
            device: Device of `timesteps`; None leaves them on the CPU.
            timesteps: Descending training timesteps, 0 to `num_train_timesteps` - 1; None spaces them as configured.

        Raises:
            InputError: If not exactly one of `num_inference_steps` and `timesteps` is passed, its value is invalid, or
                the first timestep is pure noise, from which a network that predicts noise cannot start.
        """
        device = storing_device(device)
        values = self._requested_timesteps(num_inference_steps, timesteps)
        self.num_inference_steps = len(values)
        self.custom_timesteps = timesteps is not None
        self.timesteps = torch.tensor(values, dtype=torch.int64, device=device)

    def _requested_timesteps(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None
    ) -> Sequence[float]:
        """Return the validated timesteps that one of the two arguments requests."""
        if (num_inference_steps is None) == (timesteps is None):
            raise invalid(
                "(num_inference_steps, timesteps)",
                (num_inference_steps, timesteps),
                "exactly one of them to differ from None",
            )
        total = self.config.num_train_timesteps
        if timesteps is None:
            steps = as_int(num_inference_steps)
            if steps is None or not 0 < steps <= total:
                raise invalid("num_inference_steps", num_inference_steps, f"an integer from 1 to {total}")
            values = self._spaced_timesteps(steps)
        else:
            values = _validated_timesteps(self._one_per_step(timesteps), self.fractional_timesteps)
        if values[0] >= total:
            raise invalid(
                "timesteps[0]",
                values[0],
                f"a timestep below num_train_timesteps={total}",
                "choose lower timesteps or a smaller steps_offset",
            )
        self._require_signal(float(self._alpha_bar(int(values[0]))))
        return values

    def _one_per_step(self, timesteps: Any) -> Any:
        """Return custom timesteps with one element per step. Methods with more evaluations remove the others."""
        return timesteps

    def _spaced_timesteps(self, steps: int) -> Sequence[float]:
        """Return `steps` timesteps in descending order, spaced as configured."""
        return [int(step) for step in spaced_timesteps(self.config, steps).round()]

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep to which a step leads: the next less noisy one of `timesteps`, or -1 after the last.

        Args:
            timestep: Current timestep, an element of `timesteps`.

        Returns:
            The previous timestep, a tensor without dimensions if `timestep` is a tensor.

        Raises:
            InputError: If `timestep` is not an element of `timesteps`.
        """
        previous = self._previous(self._validated_timestep(timestep))
        return torch.tensor(previous) if isinstance(timestep, Tensor) else previous

    def _previous(self, t: int) -> int:
        """Return the timestep to which a step from `t` leads; -1 stands for the end of sampling."""
        if t not in self._previous_timesteps:
            raise invalid("timestep", t, f"one of the scheduler's timesteps, {list(self._previous_timesteps)}")
        return self._previous_timesteps[t]

    def _validated_timestep(self, timestep: int | Tensor) -> int:
        t, total = as_int(timestep), self.config.num_train_timesteps
        if t is None or not 0 <= t < total:
            raise invalid("timestep", timestep, f"an integer from 0 to {total - 1}")
        return t

    # Mathematics of a step

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the network's input for a sample: the sample itself, because its variance is the one of training.

        Args:
            sample: Current sample, (B, C, ...).
            timestep: Current timestep, which has no effect here.
        """
        return sample

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the previous timestep, and the predicted clean sample.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample, (B, C, ...).
        """
        raise NotImplementedError

    @staticmethod
    def _output(prev_sample: Tensor, x0: Tensor, return_dict: bool) -> SchedulerOutput | tuple[Tensor, ...]:
        return SchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _alpha_bar(self, timestep: int) -> Tensor:
        """Return alpha_bar of a timestep; negative timesteps stand for the end of sampling."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    @staticmethod
    def _split_output(model_output: Tensor, sample: Tensor) -> NetworkOutput:
        """Divide a network's output along dimension 1 into prediction and learned variance, if it has both."""
        if model_output.shape == sample.shape:
            return NetworkOutput(model_output, None)
        if sample.ndim > 1 and model_output.shape == (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
            prediction, variance = model_output.chunk(2, dim=1)
            return NetworkOutput(prediction, variance)
        raise invalid(
            "model_output.shape",
            tuple(model_output.shape),
            f"the shape of sample, {tuple(sample.shape)}, or twice its channels with a learned variance",
        )

    def _predicted_x0(self, prediction: Tensor, sample: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """Return the clean sample x_0 that a prediction implies, before clipping and thresholding."""
        if self.config.prediction_type == "sample":
            return prediction
        signal_scale, noise_scale = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "v_prediction":
            return signal_scale * sample - noise_scale * prediction
        self._require_signal(float(alpha_bar))
        return (sample - noise_scale * prediction) / signal_scale

    def _predicted_epsilon(self, prediction: Tensor, sample: Tensor, x0: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """Return the noise in `sample` that a prediction, or the clean sample `x0` derived from it, implies."""
        if self.config.prediction_type == "epsilon":
            return prediction
        if self.config.prediction_type == "v_prediction":
            return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * sample
        return (sample - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5

    def _threshold(self, x0: Tensor) -> Tensor:
        """Apply dynamic thresholding, or else clipping, as configured."""
        config = self.config
        if isinstance(config, ThresholdConfig) and config.thresholding:
            return dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        if isinstance(config, ClipConfig) and config.clip_sample:
            return x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0

    def _require_signal(self, alpha_bar: float) -> None:
        """Raise InputError at pure noise, where a prediction of the noise does not determine the clean sample.

        It determines the sign of each value, which is enough if samples are clipped.
        """
        config = self.config
        is_bounded = (isinstance(config, ClipConfig) and config.clip_sample) or (
            isinstance(config, ThresholdConfig) and config.thresholding
        )
        if alpha_bar == 0 and config.prediction_type == "epsilon" and not is_bounded:
            raise invalid(
                "prediction_type",
                self.config.prediction_type,
                "v_prediction or sample, because the timestep is pure noise, as with rescale_betas_zero_snr=True",
                "start at a lower timestep, as timestep_spacing='leading' does, or set clip_sample=True",
            )

    def _require_timesteps(self) -> int:
        """Return the number of steps; raise InputError before `set_timesteps`."""
        if self.num_inference_steps is None:
            raise InputError("step was called before set_timesteps, which determines the size of the steps")
        return self.num_inference_steps

    # Training and starting points

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, clean samples with noise.

        Source: Ho et al. 2020, equation 4, https://arxiv.org/abs/2006.11239.

        Args:
            original_samples: Clean samples x_0, (B, ...).
            noise: Standard normal noise, (B, ...).
            timesteps: Training timesteps, (B,), or one for all batch items.

        Raises:
            InputError: If `timesteps` are not integers of the training range, or their number is not 1 or B.
        """
        signal_scale, noise_scale = self._noising_scales(timesteps, original_samples)
        return signal_scale * original_samples + noise_scale * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return v = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0, the target of v_prediction.

        Source: Salimans & Ho 2022, section 4, https://arxiv.org/abs/2202.00512.

        Args:
            sample: Clean samples x_0, (B, ...).
            noise: Standard normal noise, (B, ...).
            timesteps: Training timesteps, (B,), or one for all batch items.

        Raises:
            InputError: If `timesteps` are not integers of the training range, or their number is not 1 or B.
        """
        signal_scale, noise_scale = self._noising_scales(timesteps, sample)
        return signal_scale * noise - noise_scale * sample

    def _noising_scales(self, timesteps: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), broadcast to `like`, rounded to its dtype at the end only."""
        steps, total = torch.as_tensor(timesteps).cpu().flatten(), self.config.num_train_timesteps
        if steps.is_floating_point() or steps.numel() not in (1, len(like)) or steps.min() < 0 or steps.max() >= total:
            raise invalid(
                "timesteps", timesteps, f"one integer, or one per batch item ({len(like)}), from 0 to {total - 1}"
            )
        alpha_bar = self.alphas_cumprod[steps].reshape(-1, *[1] * (like.ndim - 1))
        if like.dtype == torch.float64:
            alpha_bar = alpha_bar.double()
        return (alpha_bar**0.5).to(like), ((1 - alpha_bar) ** 0.5).to(like)
