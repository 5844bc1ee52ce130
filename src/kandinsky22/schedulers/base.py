"""What all schedulers share: noise schedules, timesteps, predictions, files.

A sample at timestep t is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t (`alphas_cumprod[t]`) is the product of
1 - beta up to t (Ho et al. 2020, https://arxiv.org/abs/2006.11239). Coefficients are zero-dimensional float32 tensors
on the CPU: they take part in arithmetic with samples of any type on any device without changing either.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import read_json, write_json
from kandinsky22.checkpoints.hub import Source, model_folder
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.outputs import Output
from kandinsky22.schedulers.config import (
    ClipConfig,
    SchedulerConfig,
    SpacingConfig,
    TableConfig,
    TerminalConfig,
    ThresholdConfig,
    whole,
)

S = TypeVar("S", bound="Scheduler")
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclasses.dataclass
class SchedulerOutput(Output):
    """One step: the sample at the previous (less noisy) timestep, and the clean sample predicted on the way."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], steps: int) -> Tensor:
    """Betas whose products follow `alpha_bar`, a function of time in [0, 1]; capped at 0.999 (Nichol & Dhariwal 2021,
    https://arxiv.org/abs/2102.09672)."""
    curve = [alpha_bar(i / steps) for i in range(steps + 1)]
    return torch.tensor([min(1 - later / earlier, 0.999) for earlier, later in itertools.pairwise(curve)])


def _cosine(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(time: float) -> float:
    """The logarithm of the signal-to-noise ratio is Laplace distributed over time (https://arxiv.org/abs/2407.03297)."""
    distance = 0.5 - time
    snr = math.exp(-0.5 * math.copysign(1, distance) * math.log(1 - 2 * math.fabs(distance) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(time: float) -> float:
    return math.exp(-12 * time)


_CURVES = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}


def noise_schedule(config: SchedulerConfig) -> Tensor:
    """The betas of a config, one a training step, float32."""
    steps = config.num_train_timesteps
    if not isinstance(config, TableConfig):
        return betas_from_alpha_bar(_CURVES[config.beta_schedule], steps)
    first, last = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float32) ** 2
    elif config.beta_schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32)) * (last - first) + first
    else:
        betas = betas_from_alpha_bar(_CURVES[config.beta_schedule], steps)
    return zero_terminal_snr(betas) if rescaled(config) else betas


def rescaled(config: SchedulerConfig) -> bool:
    """Whether the last timestep is pure noise."""
    return isinstance(config, TerminalConfig) and config.rescale_betas_zero_snr


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(a_t) so that the last timestep is pure noise and the first stays as it was (Lin et al. 2023,
    algorithm 1, https://arxiv.org/abs/2305.08891)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal[0], signal[-1]
    products = ((signal - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def spaced_timesteps(config: SchedulerConfig, steps: int, end: int | None = None, spare: int = 0) -> Floats:
    """`steps` of the training timesteps below `end`, descending, not rounded yet (Lin et al. 2023, table 2). `spare`
    more are spaced and left out: the least noisy ones."""
    total = config.num_train_timesteps
    end = total if end is None else end
    spacing, offset = "linspace", 0
    if isinstance(config, SpacingConfig):
        spacing, offset = config.timestep_spacing, config.steps_offset
    points = steps + spare
    if spacing == "linspace":
        return np.linspace(0, end - 1, points)[::-1][:steps]
    if spacing == "trailing":
        # Rounding in arange can add an element below the last step; it is not one of the steps asked for.
        return np.arange(end, 0, -total / steps)[:steps].round() - 1.0
    return np.arange(points)[::-1][:steps] * float(end // points) + offset


def dynamic_threshold(sample: Tensor, ratio: float, maximum: float) -> Tensor:
    """Scale each sample of a batch down by the `ratio` quantile of its magnitudes, kept within [1, maximum], and clip
    it to [-1, 1] (Saharia et al. 2022, section 2.3, https://arxiv.org/abs/2205.11487)."""
    values = sample.flatten(1)
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()  # quantiles are not defined for half precision
    limit = torch.quantile(values.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=maximum)
    return (torch.clamp(values, -limit, limit) / limit).reshape(sample.shape).to(sample.dtype)


def _descending(timesteps: Sequence[int] | Tensor) -> list[int]:
    given = list(timesteps) if isinstance(timesteps, Sequence) or getattr(timesteps, "ndim", 0) == 1 else []
    chosen = [step for step in map(whole, given) if step is not None and step >= 0]
    if not chosen or len(chosen) < len(given) or any(a <= b for a, b in itertools.pairwise(chosen)):
        raise InputError(f"timesteps={timesteps}; accepted: one integer or more, 0 or more, descending")
    return chosen


class Scheduler:
    """A way from noise to a sample in a number of steps. Networks, prompts and progress are the caller's business.

    `set_timesteps`, then for each of `timesteps`: `scale_model_input`, the network, `step`. Settings are keyword
    arguments and live in `config`; impossible ones raise ConfigError.
    """

    config_class: ClassVar[type[SchedulerConfig]] = SchedulerConfig
    config_name: ClassVar[str] = "scheduler_config.json"
    order: ClassVar[int] = 1  # network calls a step
    config: SchedulerConfig

    def __init__(self, **settings: Any) -> None:
        self._build(self.config_class.from_settings(settings))

    def _build(self, config: SchedulerConfig) -> None:
        self.config = config
        self.betas = noise_schedule(config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0)  # what precedes timestep 0: no noise at all
        self.init_noise_sigma = 1.0  # standard deviation of the noise that sampling starts from
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self.timesteps = torch.arange(config.num_train_timesteps).flip(0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={self.config[name]!r}' for name in self.config.names())})"

    # Files and configs

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any], **overrides: Any) -> S:
        """A scheduler of this class from the config of any other, ours or not.

        Settings this class does not have are kept in its config without effect; those the other scheduler left at its
        defaults get the defaults of this class, but for what the network was trained with, which carries over. Raises
        ConfigError for impossible values and unknown `overrides`.
        """
        if not hasattr(config, "items"):
            raise InputError(f"config: {config!r} given; accepted: a mapping. Files are read by from_pretrained")
        names = cls.config_class.names()
        unknown = overrides.keys() - names
        if unknown:
            raise ConfigError(f"{cls.__name__}: no setting {', '.join(sorted(unknown))}; accepted: {', '.join(names)}")
        stored = cls.config_class.inherited(config)
        foreign = {k: stored.pop(k) for k in stored.keys() - names}
        scheduler = cls.__new__(cls)
        scheduler._build(cls.config_class.from_settings({**stored, **overrides}, foreign))
        return scheduler

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
        """The scheduler whose `scheduler_config.json` lies in a folder, or in a checkpoint on the Hub.

        `overrides` replace stored settings. Raises CheckpointError if the file is missing or damaged.
        """
        source = Source(pretrained_model_name_or_path, revision, cache_dir, token, local_files_only)
        folder = model_folder(source, subfolder, lambda names: [name for name in names if name == cls.config_name])
        return cls.from_config(read_json(folder / cls.config_name), **overrides)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` into a folder, made if missing; CheckpointError if that is impossible."""
        write_json(Path(save_directory) / self.config_name, self.config.to_json())

    # Timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps in the order they are visited, (steps,) int64. Assigning replaces them."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps = timesteps
        self._order: list[float] = timesteps.tolist()
        order = [int(step) for step in timesteps.tolist()]
        self._previous = dict(zip(order, [*order[1:], -1], strict=True))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the timesteps: a number of steps, spaced as configured, or the descending `timesteps` themselves.

        Raises InputError unless exactly one is given and it fits into the training steps.
        """
        chosen = self._choose(num_inference_steps, timesteps)
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)

    def _choose(self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None) -> list[Any]:
        """The checked timesteps that one or the other asks for."""
        if (num_inference_steps is None) == (timesteps is None):
            raise InputError(
                f"num_inference_steps={num_inference_steps}, timesteps={timesteps}; accepted: exactly one of them"
            )
        total = self.config.num_train_timesteps
        if timesteps is None:
            steps = whole(num_inference_steps)
            if steps is None or not 0 < steps <= total:
                raise InputError(f"num_inference_steps={num_inference_steps!r}; accepted: an integer from 1 to {total}")
            chosen: list[Any] = self._spaced(steps)
        else:
            chosen = _descending(timesteps)
        if chosen[0] >= total:
            raise InputError(
                f"timesteps start at {chosen[0]}, outside num_train_timesteps={total}; "
                "accepted: lower timesteps, or a smaller steps_offset"
            )
        return chosen

    def _spaced(self, steps: int) -> list[Any]:
        """`steps` timesteps, descending."""
        return [int(step) for step in spaced_timesteps(self.config, steps).round()]

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep after `timestep` in the order of visits (less noisy); -1 after the last."""
        t = self._checked(timestep)
        if t not in self._previous:
            raise InputError(f"timestep={t}; accepted: one of the scheduler's timesteps, {list(self._previous)}")
        return self._previous[t]

    def _checked(self, timestep: int | Tensor) -> int:
        t, total = whole(timestep), self.config.num_train_timesteps
        if t is None or not 0 <= t < total:
            raise InputError(f"timestep={timestep!r}; accepted: an integer from 0 to {total - 1}")
        return t

    # Mathematics of a step

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """What the network is given for `sample`: the sample itself, for methods that keep its variance at 1."""
        return sample

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Any:
        """One step from `timestep` to the previous one; `model_output` is the network's answer for `sample`."""
        raise NotImplementedError

    def _alpha_bar(self, timestep: int) -> Tensor:
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    @staticmethod
    def _split(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction and learned variance, if the network gave both along dimension 1."""
        if model_output.shape == sample.shape:
            return model_output, None
        if sample.ndim > 1 and model_output.shape == (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
            prediction, variance = model_output.chunk(2, dim=1)
            return prediction, variance
        raise InputError(
            f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}; "
            "accepted: the same shape, or twice the channels with a learned variance"
        )

    def _original(self, prediction: Tensor, sample: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """The clean sample that a prediction implies, not limited yet."""
        if self.config.prediction_type == "sample":
            return prediction
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "v_prediction":
            return signal * sample - noise * prediction
        return (sample - noise * prediction) / signal

    def _noise(self, prediction: Tensor, sample: Tensor, original: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """The noise in `sample` that a prediction implies."""
        if self.config.prediction_type == "epsilon":
            return prediction
        if self.config.prediction_type == "v_prediction":
            return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * sample
        return (sample - alpha_bar**0.5 * original) / (1 - alpha_bar) ** 0.5

    def _limit(self, original: Tensor) -> Tensor:
        """Dynamic thresholding, or else clipping, as configured."""
        config = self.config
        if isinstance(config, ThresholdConfig) and config.thresholding:
            return dynamic_threshold(original, config.dynamic_thresholding_ratio, config.sample_max_value)
        if isinstance(config, ClipConfig) and config.clip_sample:
            return original.clamp(-config.clip_sample_range, config.clip_sample_range)
        return original

    # Training and starting points

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t of clean samples (B, ...) and noise of that shape, at `timesteps`: one for all, or (B,)."""
        signal, rest = self._weights(timesteps, original_samples)
        return signal * original_samples + rest * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """What a network with v_prediction learns: sqrt(a_t) noise - sqrt(1 - a_t) sample (Salimans & Ho 2022,
        https://arxiv.org/abs/2202.00512). Shapes as in `add_noise`."""
        signal, rest = self._weights(timesteps, sample)
        return signal * noise - rest * sample

    def _weights(self, timesteps: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), shaped to multiply `like` and rounded to its type only at the end."""
        steps, total = torch.as_tensor(timesteps).cpu().flatten(), self.config.num_train_timesteps
        if steps.is_floating_point() or steps.numel() not in (1, len(like)) or steps.min() < 0 or steps.max() >= total:
            raise InputError(
                f"timesteps={timesteps}; accepted: one integer, or one for each of {len(like)} samples, "
                f"from 0 to {total - 1}"
            )
        alpha_bar = self.alphas_cumprod[steps].reshape(-1, *[1] * (like.ndim - 1))
        if like.dtype == torch.float64:
            alpha_bar = alpha_bar.double()
        return (alpha_bar**0.5).to(like), ((1 - alpha_bar) ** 0.5).to(like)
