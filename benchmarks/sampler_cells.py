"""What the trade-off between speed and quality is measured on: cells of samplers, steps and guidance.

A cell says everything that decides over a picture beside the weights, the prompt and the seed. The grid is what
`python -m benchmarks.samplers` measures unless told otherwise, most important cells first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kandinsky22.sampling.presets import PRESETS, Preset, Sampler


@dataclasses.dataclass(frozen=True)
class Kind:
    """A method as curves and tables call it: the class, its settings, and whether it draws noise on the way."""

    scheduler: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draws_noise: bool = False

    def steps(self, steps: int) -> Sampler:
        """The method with a number of steps."""
        return Sampler(self.scheduler, steps, self.settings)


# The samplers start from pure noise, the last timestep of training; as spaced in the checkpoint they would start below.
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
}


def name_of(sampler: Sampler) -> str:
    """What a sampler is called in curves and tables."""
    for name, kind in KINDS.items():
        if kind.steps(sampler.steps) == sampler:
            return name
    shown = ", ".join(f"{key}={value}" for key, value in sampler.settings.items())
    return f"{sampler.scheduler.removesuffix('Scheduler')} ({shown})" if shown else sampler.scheduler


def draws_noise(sampler: Sampler) -> bool:
    """Whether the result depends on noise drawn on the way, so that it has no distance to a solution."""
    return any(kind.draws_noise for kind in KINDS.values() if kind.steps(sampler.steps) == sampler)


SPECIFICATION = Preset(
    decoder=KINDS["DDPM (specification)"].steps(100), prior=KINDS["UnCLIP (specification)"].steps(25)
)


INTERVALS = "guidance_interval", "prior_guidance_interval"


@dataclasses.dataclass(frozen=True)
class Cell:
    """How both stages are sampled. `guidance` and `prior_guidance` are the model's own unless given, and `options`
    are more arguments, such as guidance_interval or prior_guidance_interval."""

    decoder: Sampler
    prior: Sampler = SPECIFICATION.prior
    guidance: float | None = None
    prior_guidance: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, preset: Preset) -> Cell:
        """The cell that a preset asks for."""
        intervals = {name: getattr(preset, name) for name in INTERVALS}
        options = {name: interval for name, interval in intervals.items() if interval is not None}
        return cls(preset.decoder, preset.prior, options=options)

    def plain(self) -> dict[str, Any]:
        """The cell as JSON has it."""
        return {
            "decoder": _plain(self.decoder),
            "prior": _plain(self.prior),
            "guidance": self.guidance,
            "prior_guidance": self.prior_guidance,
            "options": dict(self.options),
        }

    def key(self, **context: Any) -> str:
        """A short digest of the cell and of whatever else decides over a measurement."""
        text = json.dumps({"cell": self.plain(), **context}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        parts = [f"{name_of(self.decoder)} {self.decoder.steps}", f"prior {name_of(self.prior)} {self.prior.steps}"]
        parts += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        parts += [] if self.prior_guidance is None else [f"prior guidance {self.prior_guidance:g}"]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.options.items())])


def _plain(sampler: Sampler) -> dict[str, Any]:
    return {"scheduler": sampler.scheduler, "steps": sampler.steps, "settings": dict(sampler.settings)}


STEPS = (4, 6, 8, 12, 25)

# Success over steps, at two evaluations a step for half as many of them. All other methods are measured once, at 12.
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
# The distance to the solution costs little, so all methods that have one are measured, and up to more steps.
DISTANCE_STEPS: dict[str, tuple[int, ...]] = {
    name: (2, 3, 6, 12, 25) if name in ("Heun", "KDPM2") else (*STEPS, 50)
    for name, kind in KINDS.items()
    if not kind.draws_noise
}
# The decoder that the prior and guidance are measured with.
MIDDLE = KINDS["DPM++ 2M"].steps(12)
PRIOR_STEPS: dict[str, tuple[int, ...]] = {
    "UnCLIP (specification)": (5, 10, 25),
    "DPM++ 2M": (2, 3, 5, 10),
    "DPM++ 2M SDE": (3, 5, 10),
}
# Scales, the model's own if None, with options: intervals save time, the others tame strong guidance.
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


def grid() -> dict[str, list[Cell]]:
    """The cells of each group, most important first; a cell may stand in several groups."""
    named = [SPECIFICATION, *PRESETS.values()]
    decoder = [Cell(KINDS[name].steps(steps)) for name, row in DECODER_STEPS.items() for steps in row]
    prior = [Cell(MIDDLE, KINDS[name].steps(steps)) for name, row in PRIOR_STEPS.items() for steps in row]
    guidance = [Cell(MIDDLE, guidance=scale, options=more) for scale, more in GUIDANCE]
    return {
        "presets": [Cell.of(preset) for preset in named],
        "prior": prior,
        "guidance": guidance,
        "decoder": sorted(decoder, key=lambda cell: cell.decoder.steps),
    }


def distance_grid() -> list[Cell]:
    """The cells whose distance to the solution is measured."""
    return [Cell(KINDS[name].steps(steps)) for name, row in DISTANCE_STEPS.items() for steps in row]
