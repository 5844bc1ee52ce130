"""Training helpers that scripts for the reference import from its `training_utils`."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import checked_save_path, read_json, write_json
from kandinsky22.checkpoints.folder_save import folder_save
from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import validation
from kandinsky22.models.base import Model, stage_network
from kandinsky22.requirements import require

_STEPS = ("num_warmup_steps", "num_training_steps")
# Schedules of learning rates: name -> (function of transformers, its arguments).
SCHEDULES = {
    "constant": ("get_constant_schedule", ()),
    "constant_with_warmup": ("get_constant_schedule_with_warmup", _STEPS[:1]),
    "linear": ("get_linear_schedule_with_warmup", _STEPS),
    "cosine": ("get_cosine_schedule_with_warmup", _STEPS),
    "cosine_with_restarts": ("get_cosine_with_hard_restarts_schedule_with_warmup", (*_STEPS, "num_cycles")),
    "polynomial": ("get_polynomial_decay_schedule_with_warmup", (*_STEPS, "power")),
}
SETTINGS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) of timesteps.

    Source: Hang et al. 2023, https://arxiv.org/abs/2303.09556, which weights the training loss by it.

    Args:
        noise_scheduler: A scheduler with `alphas_cumprod`.
        timesteps: Integers.
    """
    alphas_cumprod: Tensor = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod)


def get_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    step_rules: str | None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule of learning rates, one of those of transformers.

    Args:
        name: "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts" or "polynomial".
        optimizer: The optimizer.
        step_rules: Must be None: the reference's "piecewise_constant" does not exist here.
        num_warmup_steps: Steps in which the rate grows from 0; None is accepted for "constant" only.
        num_training_steps: All steps; None is accepted for "constant" and "constant_with_warmup".
        num_cycles: Restarts of "cosine_with_restarts".
        power: Exponent of "polynomial".
        last_epoch: Step to resume after; -1 starts.

    Raises:
        InputError: If the name is unknown, or a number of steps is missing.
        MissingDependencyError: If transformers is not installed.
    """
    name = str(getattr(name, "value", name))
    validation.one_of("name", name, tuple(SCHEDULES))
    if step_rules is not None:
        raise invalid("step_rules", step_rules, "None", "use torch.optim.lr_scheduler.LambdaLR for rates in pieces")
    function, arguments = SCHEDULES[name]
    values = {
        "num_warmup_steps": num_warmup_steps,
        "num_training_steps": num_training_steps,
        "num_cycles": num_cycles,
        "power": power,
    }
    for argument in arguments:
        if values[argument] is None:
            raise invalid(argument, None, f"a number of steps, which the schedule {name!r} needs")
    options = {argument: values[argument] for argument in arguments}
    transformers = require("transformers", "get_scheduler", install="kandinsky22[train]")
    schedule: torch.optim.lr_scheduler.LambdaLR = getattr(transformers, function)(
        optimizer, last_epoch=last_epoch, **options
    )
    return schedule


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, on all devices.

    Args:
        seed: From 0 to 2**32 - 1, the range of numpy.

    Raises:
        InputError: If the seed is not such an integer.
    """
    number: object = seed
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**32:
        raise invalid("seed", seed, "an integer from 0 to 4294967295")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cast_training_params(model: nn.Module | list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """Convert the parameters of modules that are trained, in place; the others keep their dtype.

    Args:
        model: A module, or a list of modules.
        dtype: The new dtype.
    """
    for module in model if isinstance(model, list) else [model]:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.to(dtype)


def free_memory() -> None:
    """Collect unreachable objects, and return unused memory of CUDA devices to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class EMAModel:
    """Exponential moving average of a network's parameters.

    Args:
        parameters: The parameters, or the network.
        decay: Largest decay per step.
        min_decay: Smallest decay per step.
        update_after_step: Steps in which the average is only a copy.
        use_ema_warmup: Whether the decay grows as 1 - (1 + step / inv_gamma)^-power, instead of
            (1 + step) / (10 + step).
        inv_gamma: See `use_ema_warmup`.
        power: See `use_ema_warmup`.
        foreach: Accepted for the reference's sake: results are the same.
        model_cls: Class of the network, for `save_pretrained`; None for none.
        model_config: Config of the network, for `save_pretrained`; None for none.
        **options: Accepted for the reference's sake: `device`.

    Attributes:
        shadow_params: The averages, in the order of the parameters.
        optimization_step: Steps so far.
        cur_decay_value: Decay of the last step; None before the first.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: type[Model] | None = None,
        model_config: Any = None,
        **options: Any,
    ) -> None:
        if unknown := sorted(set(options) - {"device"}):
            raise InputError(f"EMAModel does not accept {', '.join(unknown)}")
        self.shadow_params = [parameter.detach().clone() for parameter in _parameters(parameters)]
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.model_cls, self.model_config = model_cls, model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self._stored: list[Tensor] | None = None

    # Averaging

    def get_decay(self, optimization_step: int) -> float:
        """Return the decay of a step.

        Args:
            optimization_step: Number of the step, from 1.
        """
        step = max(0, optimization_step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        growing = 1 - (1 + step / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + step) / (10 + step)
        return max(min(growing, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Move the averages towards the parameters. Those without gradient are copied.

        Args:
            parameters: The parameters, or the network.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for average, parameter in self._pairs(parameters):
            if parameter.requires_grad:
                average.sub_((1 - self.cur_decay_value) * (average - parameter.to(average.device)))
            else:
                average.copy_(parameter)

    def copy_to(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Copy the averages into a network.

        Args:
            parameters: The parameters, or the network.
        """
        for average, parameter in self._pairs(parameters):
            parameter.data.copy_(average)

    def store(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Keep a copy of the parameters on the CPU for `restore`.

        Args:
            parameters: The parameters, or the network.
        """
        self._stored = [parameter.detach().cpu().clone() for parameter in _parameters(parameters)]

    def restore(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Copy the parameters that `store` kept back into a network.

        Args:
            parameters: The parameters, or the network.

        Raises:
            InputError: If nothing is stored.
        """
        if self._stored is None:
            raise InputError("restore: there are no stored parameters; call store(parameters) first")
        for stored, parameter in zip(self._stored, _parameters(parameters), strict=True):
            parameter.data.copy_(stored)
        self._stored = None

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> None:
        """Move the averages, and convert those that are floating-point numbers.

        Args:
            device: Device; None leaves them where they are.
            dtype: Floating-point type; None leaves it.
            non_blocking: See `torch.Tensor.to`.
        """
        self.shadow_params = [
            average.to(device, dtype if average.is_floating_point() else None, non_blocking=non_blocking)
            for average in self.shadow_params
        ]

    def _pairs(self, parameters: Iterable[nn.Parameter] | nn.Module) -> Iterable[tuple[Tensor, nn.Parameter]]:
        listed = _parameters(parameters)
        if len(listed) != len(self.shadow_params):
            raise invalid("len(parameters)", len(listed), f"{len(self.shadow_params)}, the number of averages")
        return zip(self.shadow_params, listed, strict=True)

    # Files

    def state_dict(self) -> dict[str, Any]:
        """Return settings and averages."""
        return {**{name: getattr(self, name) for name in SETTINGS}, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the result of `state_dict`; settings that are missing stay.

        Args:
            state_dict: The settings and averages.

        Raises:
            InputError: If a decay is not from 0 to 1, or the averages are not a list of tensors.
        """
        for name in ("decay", "min_decay"):
            value = state_dict.get(name, getattr(self, name))
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise invalid(name, value, "a number from 0 to 1")
        averages = state_dict.get("shadow_params", self.shadow_params)
        if not isinstance(averages, list) or not all(isinstance(average, Tensor) for average in averages):
            raise invalid("shadow_params", averages, "a list of tensors")
        for name in SETTINGS:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self.shadow_params = [average.detach().clone() for average in averages]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the averages as a network, whose config file holds the settings too.

        Args:
            path: Folder to write to.

        Raises:
            InputError: If the class or config of the network is not known.
        """
        if self.model_cls is None or self.model_config is None:
            raise InputError("save_pretrained: pass model_cls= and model_config= to EMAModel")
        network = self.model_cls(**dict(self.model_config))
        self.copy_to(network.parameters())
        with folder_save(checked_save_path(path, "path")) as save:
            stage_network(network, save, "", variant=None, max_shard_size="10GB")
            file = save.stage() / network.config_name
            write_json(file, {**read_json(file), **{name: getattr(self, name) for name in SETTINGS}}, flush=False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model_cls: type[Model], foreach: bool = False) -> EMAModel:
        """Return the average that `save_pretrained` wrote.

        Args:
            path: The folder.
            model_cls: Class of the network.
            foreach: Ignored.

        Raises:
            CheckpointError: If files are missing or damaged.
        """
        settings = read_json(Path(path) / "config.json")
        network = model_cls.from_pretrained(path)
        average = cls(network.parameters(), model_cls=model_cls, model_config=network.config)
        average.load_state_dict({name: settings[name] for name in SETTINGS if name in settings})
        return average


def _parameters(parameters: Iterable[nn.Parameter] | nn.Module) -> list[nn.Parameter]:
    return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
