"""Presets: samplers and numbers of steps for both stages, from fast to accurate.

The values were chosen from measured curves (docs/samplers-tradeoff.md). The default arguments of calls stay those of
the specification; a preset is applied by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import invalid

if TYPE_CHECKING:
    from kandinsky22.schedulers import Scheduler

PRIOR_PREFIX = "prior_"  # prefix of the prior's components and arguments in pipelines that hold prior and decoder


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A scheduler with its number of steps.

    Attributes:
        scheduler: Class name of the scheduler.
        steps: Number of steps.
        settings: Settings that replace those of the checkpoint's scheduler.
    """

    scheduler: str
    steps: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def from_config(self, config: Any) -> Scheduler:
        """Return the scheduler.

        Args:
            config: Config of the checkpoint's scheduler, which supplies the noise schedule.
        """
        return make_scheduler(self.scheduler, config, self.settings)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Samplers of both stages; all other arguments stay the model's own.

    Attributes:
        decoder: Sampler of the decoder.
        prior: Sampler of the prior.
        guidance_interval: Argument of that name for the decoder; None leaves it to the model.
        prior_guidance_interval: The same for the prior.
    """

    decoder: Sampler
    prior: Sampler
    guidance_interval: tuple[float, float] | None = None
    prior_guidance_interval: tuple[float, float] | None = None


# Every preset states the same settings, so that applying one after another leaves nothing of the first.
_TRAILING = {"timestep_spacing": "trailing"}
_FIRST_STEPS = (0.0, 0.7)  # the last steps only add details and do not need guidance

# With few deterministic steps, samples of the prior fall between the alternatives that a prompt leaves open; noise
# selects one of them.
_STOCHASTIC = {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}

PRESETS: Mapping[str, Preset] = {
    "draft": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 4, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 4, _STOCHASTIC),
        guidance_interval=_FIRST_STEPS,
        prior_guidance_interval=_FIRST_STEPS,
    ),
    "balanced": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 8, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 5, _STOCHASTIC),
        guidance_interval=_FIRST_STEPS,
        prior_guidance_interval=_FIRST_STEPS,
    ),
    "best": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 25, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 20, _STOCHASTIC),
        guidance_interval=_FIRST_STEPS,
    ),
}


def find_preset(quality: Any) -> Preset:
    """Return the preset of that name.

    Args:
        quality: A key of `PRESETS`.

    Raises:
        InputError: For any other name.
    """
    if not isinstance(quality, str) or quality not in PRESETS:
        raise invalid("quality", quality, " or ".join(map(repr, PRESETS)))
    return PRESETS[quality]


def make_scheduler(name: str, config: Any, settings: Mapping[str, Any]) -> Scheduler:
    """Return a scheduler on the noise schedule of another one's config.

    Args:
        name: Class name of the scheduler.
        config: Config of the scheduler that supplies the noise schedule.
        settings: Settings that replace those of `config`.
    """
    from kandinsky22 import schedulers  # loads torch, which reading the table of presets must not

    scheduler: Scheduler = getattr(schedulers, name).from_config(config, **settings)
    return scheduler


def apply_quality(pipe: Any, quality: str) -> dict[str, Any]:
    """Give a pipeline the schedulers of a preset, and return the arguments to call it with.

    `pipe(prompt, **apply_quality(pipe, "balanced"))` generates with the preset.

    Args:
        pipe: A pipeline of the prior, the decoder, or both. Its schedulers are replaced.
        quality: "draft", "balanced" or "best".

    Returns:
        `pipe.generation_defaults`, with the preset's numbers of steps and guidance intervals.

    Raises:
        InputError: For any other `quality`.
    """
    preset = find_preset(quality)
    arguments = dict(pipe.generation_defaults)
    for name in ("scheduler", f"{PRIOR_PREFIX}scheduler"):
        scheduler = pipe.components.get(name)
        if scheduler is None:
            continue
        prefix = name.removesuffix("scheduler")
        if prefix or "prior" in pipe.components:
            sampler, interval = preset.prior, preset.prior_guidance_interval
        else:
            sampler, interval = preset.decoder, preset.guidance_interval
        setattr(pipe, name, sampler.from_config(scheduler.config))
        arguments[f"{prefix}num_inference_steps"] = sampler.steps
        if interval is not None:
            arguments[f"{prefix}guidance_interval"] = interval
    return arguments
