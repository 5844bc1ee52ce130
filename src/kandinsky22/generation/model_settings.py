"""Settings whose accepted values the model and its schedulers decide, checked before any network is loaded."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints import hub
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.hub import EMBEDDED, CheckpointSource
from kandinsky22.errors import KandinskyError, invalid
from kandinsky22.generation.request import Request
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.sampling.presets import make_scheduler

SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")


def check_model_settings(request: Request) -> None:
    """Raise an error if the dtype, the quantization or a number of steps of a request is invalid.

    Numbers of steps are compared with what the scheduler supports if its config is on this machine: in the embedded
    model or a folder. For models of the Hub, only their schedulers do that.

    Args:
        request: The request.

    Raises:
        InputError: If a setting is invalid.
    """
    if request.dtype is not None:
        import torch

        from kandinsky22.runtime.device import resolve_dtype

        resolve_dtype(request.dtype, torch.device("cpu"))
    if request.quantize is not None:
        from kandinsky22.runtime.quantize import KINDS

        if request.quantize not in KINDS:
            raise invalid("quantize", request.quantize, f"one of {', '.join(KINDS)}")
    model = request.model_location
    if request.steps is not None:
        folder = _folder(model, "decoder")
        _check_steps("steps", request.steps, folder, request.scheduler, request.scheduler_settings)
    if request.prior_steps is not None:
        prior = EMBEDDED if request.prior_location is None and model == EMBEDDED else request.prior_location
        folder = _prior_folder(model) if prior is None else _folder(prior, "prior")
        _check_steps(
            "prior_steps", request.prior_steps, folder, request.prior_scheduler, request.prior_scheduler_settings
        )


def _folder(location: str, embedded: str) -> str | None:
    """Return the folder of a model, None if its files may not be on this machine.

    Args:
        location: A folder, a Hub id or "embedded".
        embedded: Name of the folder of the embedded model.
    """
    if location == EMBEDDED:
        return str(hub.embedded_folder(embedded))
    return location if os.path.isdir(location) else None


@functools.lru_cache(maxsize=64)  # a batch has many rows and few models
def _prior_folder(model: str) -> str | None:
    """Return the folder of the prior that belongs to a model, None if its files may not be on this machine."""
    if not os.path.isdir(model):
        return None
    try:
        prior = CheckpointSource(model).matching_prior()
    except KandinskyError:  # which loading the model reports
        return None
    return _folder(str(prior.name), "prior")


def _check_steps(
    name: str, steps: int, folder: str | None, scheduler: str | None, settings: Mapping[str, Any] | None
) -> None:
    """Raise an error if a scheduler does not support a number of steps.

    Args:
        name: Name of the setting.
        steps: The number.
        folder: Folder of the model; None checks nothing.
        scheduler: Class name of the scheduler; None for that of the model.
        settings: Settings of the scheduler; None for those of the model.
    """
    if folder is None:
        return
    fault = _fault_of_steps(steps, folder, scheduler, json.dumps(settings or {}, sort_keys=True))
    if fault is not None:
        raise invalid(name, steps, fault)


@functools.lru_cache(maxsize=256)  # a batch has many rows and few kinds of settings
def _fault_of_steps(steps: int, folder: str, scheduler: str | None, settings: str) -> str | None:
    """Return what a scheduler expects instead of a number of steps; None if it supports it or cannot be asked."""
    try:
        config = read_json(Path(folder, SCHEDULER_FILE))
        name = scheduler or config.get("_class_name")
        if name not in SCHEDULERS.values():
            return None
        instance = make_scheduler(str(name), config, json.loads(settings))
    except KandinskyError:  # which loading the model reports
        return None
    try:
        instance.set_timesteps(steps)
    except KandinskyError as error:
        return str(error).partition(" is invalid: expected ")[2] or str(error)
    return None
