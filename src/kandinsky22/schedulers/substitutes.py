"""Schedulers of the reference that do not exist here, and what stands in for them when a checkpoint names them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kandinsky22.schedulers.base import Scheduler


@dataclasses.dataclass(frozen=True)
class Substitute:
    """The scheduler here that is nearest to one of the reference.

    Attributes:
        name: Its class name.
        relation: How it relates to the scheduler of the reference, as a phrase.
        settings: Settings that make it similar. They replace those of the file.
        renamed: Names of the file's settings here, by their names there.
        dropped: Settings of the file that mean something else here.
    """

    name: str
    relation: str = "the nearest method"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a file's config for the class here.

        Args:
            config: Content of the file.
        """
        kept = {self.renamed.get(name, name): value for name, value in config.items() if name not in self.dropped}
        return {**kept, **self.settings}


# Classes without betas get those of Kandinsky's decoder.
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_KARRAS = {**_BETAS, "use_karras_sigmas": True}
# EDM's range of sigmas is that of its own networks.
_SIGMAS_OF_EDM = frozenset({"sigma_min", "sigma_max", "sigma_schedule", "sigma_data", "rho"})
SUBSTITUTES: Mapping[str, Substitute] = {
    "DDIMParallelScheduler": Substitute("DDIMScheduler", "the same method"),
    "DDPMParallelScheduler": Substitute("DDPMScheduler", "the same method"),
    "CogVideoXDDIMScheduler": Substitute("DDIMScheduler", "the same method without its shift of the noise"),
    "CogVideoXDPMScheduler": Substitute("DPMSolverMultistepScheduler"),
    "DDIMInverseScheduler": Substitute("DDIMScheduler", "the method that it inverts"),
    "DPMSolverMultistepInverseScheduler": Substitute("DPMSolverMultistepScheduler", "the method that it inverts"),
    "EDMEulerScheduler": Substitute("EulerDiscreteScheduler", settings=_KARRAS, dropped=_SIGMAS_OF_EDM),
    "EDMDPMSolverMultistepScheduler": Substitute(
        "DPMSolverMultistepScheduler", settings=_KARRAS, dropped=_SIGMAS_OF_EDM
    ),
    "CosineDPMSolverMultistepScheduler": Substitute(
        "DPMSolverMultistepScheduler", settings={**_BETAS, "use_exponential_sigmas": True}, dropped=_SIGMAS_OF_EDM
    ),
    "SASolverScheduler": Substitute(
        "DPMSolverMultistepScheduler",
        settings={"algorithm_type": "sde-dpmsolver++"},
        renamed={"predictor_order": "solver_order"},
    ),
    "CMStochasticIterativeScheduler": Substitute(
        "LCMScheduler",
        "the other sampler of consistency models",
        settings=_BETAS,
        dropped=_SIGMAS_OF_EDM | {"clip_denoised", "s_noise", "num_train_timesteps"},
    ),
    "TCDScheduler": Substitute("LCMScheduler", "the nearest method for distilled networks"),
    "IPNDMScheduler": Substitute(
        "PNDMScheduler", settings={**_BETAS, "skip_prk_steps": True}, dropped=frozenset({"trained_betas"})
    ),
    "RePaintScheduler": Substitute("DDPMScheduler", "the method without its repetitions"),
    "FlaxDDIMScheduler": Substitute("DDIMScheduler", "the same method"),
    "FlaxDDPMScheduler": Substitute("DDPMScheduler", "the same method"),
    "FlaxDPMSolverMultistepScheduler": Substitute("DPMSolverMultistepScheduler", "the same method"),
    "FlaxEulerDiscreteScheduler": Substitute("EulerDiscreteScheduler", "the same method"),
    "FlaxLMSDiscreteScheduler": Substitute("LMSDiscreteScheduler", "the same method"),
    "FlaxPNDMScheduler": Substitute("PNDMScheduler", "the same method"),
}
_FLOW = "it is for networks that predict a flow, and those of Kandinsky 2.2 predict noise"
_CODES = "it samples discrete codes, and Kandinsky 2.2 samples numbers"
_NO_STEP = "pipelines cannot call it step by step"
# Parts of the names of schedulers that cannot draw with Kandinsky 2.2, and the reason.
_IMPOSSIBLE = {
    "Flow": _FLOW,
    "RF": _FLOW,
    "Helios": _FLOW,
    "SCM": _FLOW,
    "MiniMax": _FLOW,
    "Proteina": _FLOW,
    "Piflow": _FLOW,
    "VQDiffusion": _CODES,
    "Amused": _CODES,
    "DiscreteDDIM": _CODES,
    "BlockRefinement": _CODES,
    "EntropyBound": _CODES,
    "ScoreSde": _NO_STEP,
    "KarrasVe": _NO_STEP,
    "Wuerstchen": "it is for networks with continuous time, and those of Kandinsky 2.2 have timesteps",
    "ConsistencyDecoder": "it is part of a decoder of latents",
}


@dataclasses.dataclass(frozen=True)
class SubstituteReader:
    """Reads the file of a scheduler of the reference as the scheduler that stands in for it.

    Attributes:
        class_name: Class that the checkpoint names.
        substitute: What stands in for it.
    """

    class_name: str
    substitute: Substitute

    def from_pretrained(self, folder: str | os.PathLike[str]) -> Scheduler:
        """Return the scheduler, after a warning that names both classes.

        Args:
            folder: Folder with the `scheduler_config.json`.

        Raises:
            CheckpointError: If the file is missing or damaged.
            ConfigError: If a setting is invalid.
        """
        scheduler_class = getattr(importlib.import_module("kandinsky22.schedulers"), self.substitute.name)
        config = self.substitute.config(scheduler_class.load_config(folder))
        scheduler: Scheduler = scheduler_class.from_config(config)
        warnings.warn(
            f"the checkpoint's scheduler is a {self.class_name}, which does not exist here: "
            f"{self.substitute.name}, {self.substitute.relation}, is used instead",
            UserWarning,
            stacklevel=2,
        )
        return scheduler


def substitute_reader(class_name: str) -> SubstituteReader | None:
    """Return a reader of the files of a scheduler that does not exist here; None if nothing stands in for it.

    Args:
        class_name: Class that the checkpoint names.
    """
    substitute = SUBSTITUTES.get(class_name)
    return None if substitute is None else SubstituteReader(class_name, substitute)


def reason_against(class_name: str) -> str | None:
    """Return why a scheduler of the reference cannot draw with Kandinsky 2.2; None if it is not known to be one.

    Args:
        class_name: Class that the checkpoint names.
    """
    return next((reason for part, reason in _IMPOSSIBLE.items() if part in class_name), None)
