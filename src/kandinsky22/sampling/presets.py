"""Presets: samplers and numbers of steps for both stages, from fast to accurate.

The values were chosen from measured curves (docs/samplers-tradeoff.md). The default arguments of calls stay those of
the specification; a preset is applied by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.checkpoints.hub import DISTILLED
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
        guidance_scale: Argument of that name for the decoder; None leaves it to the model.
        distilled: Whether the decoder samples with the distilled adapter in its checkpoint's folder `distilled`. The
            number of steps in its file replaces that of `decoder`.
    """

    decoder: Sampler
    prior: Sampler
    guidance_interval: tuple[float, float] | None = None
    prior_guidance_interval: tuple[float, float] | None = None
    guidance_scale: float | None = None
    distilled: bool = False


# Every preset states the same settings, so that applying one after another leaves nothing of the first.
_TRAILING = {"timestep_spacing": "trailing"}
_FIRST_STEPS = (0.0, 0.7)  # the last steps only add details and do not need guidance

# With few deterministic steps, samples of the prior fall between the alternatives that a prompt leaves open; noise
# selects one of them.
_STOCHASTIC = {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}

UNGUIDED = 1.0  # guidance scale

PRESETS: Mapping[str, Preset] = {
    "instant": Preset(
        decoder=Sampler("LCMScheduler", 4),
        prior=Sampler("DPMSolverMultistepScheduler", 10, _STOCHASTIC),
        prior_guidance_interval=_FIRST_STEPS,
        guidance_scale=UNGUIDED,
        distilled=True,
    ),
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

    "instant" also loads the distilled adapter of the checkpoint that the decoder was loaded from, under the name
    "distilled", and applies it besides the active adapters. The other presets remove it. Its number of steps is for
    strength 1: image-to-image pipelines need more for one of them to remain.

    Args:
        pipe: A pipeline of the prior, the decoder, or both. Its schedulers are replaced.
        quality: "instant", "draft", "balanced" or "best".

    Returns:
        `pipe.generation_defaults`, with the preset's numbers of steps, guidance intervals and guidance scale.

    Raises:
        InputError: For any other `quality`, or if a pipeline without checkpoint should have a distilled adapter.
        CheckpointError: If the checkpoint has no distilled adapter, or a damaged one.
    """
    preset = find_preset(quality)
    steps = _apply_distilled(pipe, preset) if pipe.components.get("unet") is not None else None
    arguments = dict(pipe.generation_defaults)
    for name in ("scheduler", f"{PRIOR_PREFIX}scheduler"):
        scheduler = pipe.components.get(name)
        if scheduler is None:
            continue
        prefix = name.removesuffix("scheduler")
        if prefix or "prior" in pipe.components:
            sampler, interval, guidance = preset.prior, preset.prior_guidance_interval, None
        else:
            sampler, interval, guidance = preset.decoder, preset.guidance_interval, preset.guidance_scale
            sampler = sampler if steps is None else dataclasses.replace(sampler, steps=steps)
        setattr(pipe, name, sampler.from_config(scheduler.config))
        arguments[f"{prefix}num_inference_steps"] = sampler.steps
        if interval is not None:
            arguments[f"{prefix}guidance_interval"] = interval
        if guidance is not None:
            arguments[f"{prefix}guidance_scale"] = guidance
    return arguments


def _apply_distilled(pipe: Any, preset: Preset) -> int | None:
    """Apply the distilled adapter of the pipeline's checkpoint, or remove it, as the preset says.

    Returns:
        The adapter's number of steps; None if there is none.
    """
    if preset.distilled:
        steps: int | None = pipe.load_distilled_adapter()
        return steps
    if any(DISTILLED in names for names in pipe.get_list_adapters().values()):
        pipe.delete_adapters(DISTILLED)
    return None
