"""Cells of the samplers benchmark: samplers, numbers of steps and guidance.

Besides the weights, the prompt and the seed, a cell determines an image. `python -m benchmarks.samplers` measures the
cells of the grid in its order, most important ones first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kandinsky22.adapters.files import distilled_steps, find_distilled_files
from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.sampling.presets import PRESETS, Preset, Sampler


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sampling method under its name in tables and curves.

    Attributes:
        scheduler: Class name of the scheduler.
        settings: Its settings.
        draws_noise: Whether its steps add noise.
    """

    scheduler: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draws_noise: bool = False

    def steps(self, steps: int) -> Sampler:
        """Return the sampler with a number of steps.

        Args:
            steps: Number of steps.
        """
        return Sampler(self.scheduler, steps, self.settings)


# With this spacing, samplers start from pure noise at the last timestep of training. The checkpoint's starts below it.
_TRAILING = {"timestep_spacing": "trailing"}
_SDE = {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}

KINDS: dict[str, Kind] = {
    "DDPM (specification)": Kind("DDPMScheduler", draws_noise=True),
    "DDPM": Kind("DDPMScheduler", _TRAILING, draws_noise=True),
    "UnCLIP (specification)": Kind("UnCLIPScheduler", draws_noise=True),
    "DDIM": Kind("DDIMScheduler", _TRAILING),
    "Euler": Kind("EulerDiscreteScheduler", _TRAILING),
    "Euler ancestral": Kind("EulerAncestralDiscreteScheduler", _TRAILING, draws_noise=True),
    "Heun": Kind("HeunDiscreteScheduler", _TRAILING),
    "KDPM2": Kind("KDPM2DiscreteScheduler", _TRAILING),
    "LMS": Kind("LMSDiscreteScheduler", _TRAILING),
    "PNDM": Kind("PNDMScheduler", _TRAILING),
    "DEIS": Kind("DEISMultistepScheduler", _TRAILING),
    "UniPC": Kind("UniPCMultistepScheduler", _TRAILING),
    "DPM++ 2M": Kind("DPMSolverMultistepScheduler", _TRAILING),
    "DPM++ 2S": Kind("DPMSolverSinglestepScheduler"),
    "DPM++ 2M SDE": Kind("DPMSolverMultistepScheduler", _SDE, draws_noise=True),
    "LCM": Kind("LCMScheduler", draws_noise=True),
}


def name_of(sampler: Sampler) -> str:
    """Return the name of a sampler in tables and curves.

    Args:
        sampler: The sampler.
    """
    for name, kind in KINDS.items():
        if kind.steps(sampler.steps) == sampler:
            return name
    settings = ", ".join(f"{key}={value}" for key, value in sampler.settings.items())
    return f"{sampler.scheduler.removesuffix('Scheduler')} ({settings})" if settings else sampler.scheduler


def draws_noise(sampler: Sampler) -> bool:
    """Return whether the steps of a sampler add noise; its results then have no distance to the solution.

    Args:
        sampler: The sampler.
    """
    return any(kind.draws_noise for kind in KINDS.values() if kind.steps(sampler.steps) == sampler)


SPECIFICATION = Preset(
    decoder=KINDS["DDPM (specification)"].steps(100), prior=KINDS["UnCLIP (specification)"].steps(25)
)


INTERVALS = "guidance_interval", "prior_guidance_interval"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Sampling of both stages.

    Attributes:
        decoder: Sampler of the decoder.
        prior: Sampler of the prior.
        guidance: Guidance scale of the decoder; None takes that of the model.
        prior_guidance: Guidance scale of the prior; None takes that of the model.
        options: Further arguments of the call, such as guidance_interval.
        distilled: Whether the decoder has the distilled adapter of the model.
    """

    decoder: Sampler
    prior: Sampler = SPECIFICATION.prior
    guidance: float | None = None
    prior_guidance: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distilled: bool = False

    @classmethod
    def of(cls, preset: Preset) -> Cell:
        """Return the cell of a preset.

        Args:
            preset: The preset.
        """
        intervals = {name: getattr(preset, name) for name in INTERVALS}
        options = {name: interval for name, interval in intervals.items() if interval is not None}
        return cls(
            preset.decoder, preset.prior, guidance=preset.guidance_scale, options=options, distilled=preset.distilled
        )

    def to_json(self) -> dict[str, Any]:
        """Return the cell for JSON."""
        return {
            "decoder": _sampler_to_json(self.decoder),
            "prior": _sampler_to_json(self.prior),
            "guidance": self.guidance,
            "prior_guidance": self.prior_guidance,
            "options": dict(self.options),
            **({"distilled": True} if self.distilled else {}),  # measurements of other cells keep their keys
        }

    def key(self, **context: Any) -> str:
        """Return a short digest of the cell and its context.

        Args:
            **context: Everything else that determines a measurement.
        """
        text = json.dumps({"cell": self.to_json(), **context}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        parts = [f"{name_of(self.decoder)} {self.decoder.steps}", f"prior {name_of(self.prior)} {self.prior.steps}"]
        parts += ["distilled"] if self.distilled else []
        parts += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        parts += [] if self.prior_guidance is None else [f"prior guidance {self.prior_guidance:g}"]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.options.items())])


def _sampler_to_json(sampler: Sampler) -> dict[str, Any]:
    return {"scheduler": sampler.scheduler, "steps": sampler.steps, "settings": dict(sampler.settings)}


STEPS = (4, 6, 8, 12, 25)

# Steps at which success is measured, half as many for methods with two evaluations per step. Other methods have one
# number of steps, with 12 evaluations.
DECODER_STEPS: dict[str, tuple[int, ...]] = {
    "DDPM (specification)": (12, 25, 50, 100),
    "DPM++ 2M": STEPS,
    "DDIM": STEPS,
    "UniPC": STEPS,
    "DPM++ 2M SDE": (6, 12),
    "Euler ancestral": (6, 12),
    "DDPM": (12,),
    "Heun": (3, 6),
    "KDPM2": (6,),
    "Euler": (12,),
    "LMS": (12,),
    "PNDM": (12,),
    "DEIS": (12,),
    "DPM++ 2S": (12,),
}
# The distance to the solution is cheap to measure, thus all methods that have one are included, with more steps.
DISTANCE_STEPS: dict[str, tuple[int, ...]] = {
    name: (2, 3, 6, 12, 25) if name in ("Heun", "KDPM2") else (*STEPS, 50)
    for name, kind in KINDS.items()
    if not kind.draws_noise
}
# Sampler of the decoder in cells about the prior and about guidance.
MIDDLE = KINDS["DPM++ 2M"].steps(12)
PRIOR_STEPS: dict[str, tuple[int, ...]] = {
    "UnCLIP (specification)": (5, 10, 25),
    "DPM++ 2M": (2, 3, 5, 10),
    "DPM++ 2M SDE": (3, 5, 10),
}
# Guidance scales (None for that of the model) with options: intervals save time, the others moderate strong guidance.
STRONG = 4.0
GUIDANCE: tuple[tuple[float | None, Mapping[str, Any]], ...] = (
    (None, {"guidance_interval": (0.0, 0.5)}),
    (None, {"guidance_interval": (0.25, 0.75)}),
    (None, {"guidance_interval": (0.5, 1.0)}),
    (1.0, {}),
    (STRONG, {}),
    (STRONG, {"guidance_interval": (0.25, 0.75)}),
    (STRONG, {"guidance_rescale": 0.7}),
    (STRONG, {"guidance_threshold": 0.995}),
)


def presets() -> dict[str, Preset]:
    """Return the presets with the number of steps that the embedded model's distilled adapter was made for."""
    steps = distilled_steps(find_distilled_files(EMBEDDED)[0])
    return {
        name: dataclasses.replace(preset, decoder=dataclasses.replace(preset.decoder, steps=steps))
        if preset.distilled and steps is not None
        else preset
        for name, preset in PRESETS.items()
    }


def grid() -> dict[str, list[Cell]]:
    """Return the cells of each group, most important first; a cell may be in several groups."""
    decoder = [Cell(KINDS[name].steps(steps)) for name, numbers in DECODER_STEPS.items() for steps in numbers]
    prior = [Cell(MIDDLE, KINDS[name].steps(steps)) for name, numbers in PRIOR_STEPS.items() for steps in numbers]
    guidance = [Cell(MIDDLE, guidance=scale, options=options) for scale, options in GUIDANCE]
    return {
        "presets": [Cell.of(preset) for preset in (SPECIFICATION, *presets().values())],
        "prior": prior,
        "guidance": guidance,
        "decoder": sorted(decoder, key=lambda cell: cell.decoder.steps),
    }


def distance_grid() -> list[Cell]:
    """Return the cells whose distance to the solution is measured."""
    return [Cell(KINDS[name].steps(steps)) for name, numbers in DISTANCE_STEPS.items() for steps in numbers]
