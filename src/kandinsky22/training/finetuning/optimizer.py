"""The accelerator and the optimizer of a training, with clear errors where a package or a device lacks something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kandinsky22.errors import InputError, invalid
from kandinsky22.requirements import require
from kandinsky22.training.finetuning.options import TrainingOptions


def new_accelerator(options: TrainingOptions) -> Any:
    """Return the accelerator of the training.

    Args:
        options: Options of the training.

    Raises:
        MissingDependencyError: accelerate, or the package of an option, is not installed.
        InputError: The type is not one of the device.
    """
    accelerate = require("accelerate", "kandinsky22 train")
    if options.report_to == "tensorboard":  # now, and not when the first network is ready
        require("tensorboard", "--report-to tensorboard")
    if options.use_8bit_adam:
        require("bitsandbytes", "--use-8bit-adam")
    if options.mixed_precision == "fp16" and accelerate.PartialState().device.type == "cpu":
        raise invalid("--mixed-precision", "fp16", "no or bf16 on a CPU")
    try:
        return accelerate.Accelerator(mixed_precision=options.mixed_precision)
    except (ValueError, RuntimeError) as error:
        raise invalid("--mixed-precision", options.mixed_precision, "a type of the device", str(error)) from error


def new_optimizer(parameters: Mapping[str, nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """Return AdamW with weight decay for matrices; gains and biases have a scale of their own.

    Args:
        parameters: Parameters by name.
        options: Options of the training.

    Raises:
        MissingDependencyError: 8-bit moments are requested, and bitsandbytes is not installed or has no GPU.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": options.adam_weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": options.largest_learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if options.use_8bit_adam:
        bitsandbytes = require("bitsandbytes", "--use-8bit-adam")
        if next(iter(parameters.values())).device.type != "cuda":
            raise InputError("--use-8bit-adam needs a CUDA device: leave it out on other devices")
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)
        return optimizer
    devices = {parameter.device.type for parameter in parameters.values()}
    return torch.optim.AdamW(groups, **settings, fused=devices <= {"cpu", "cuda"})
