"""Presets: how both stages are sampled, for the choice between time and quality.

The numbers were chosen from measured curves, see docs/samplers-tradeoff.md. Python's own defaults stay those of the
specification; a preset is applied by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kandinsky22.errors import InputError

PRIOR_PREFIX = "prior_"


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A scheduler by its class name, its number of steps, and settings that replace those of the checkpoint."""

    scheduler: str
    steps: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def from_config(self, config: Any) -> Any:
        """The scheduler itself, on the noise schedule of `config`."""
        return make_scheduler(self.scheduler, config, self.settings)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How the decoder and the prior are sampled; everything else stays the model's own. `guidance_interval` and
    `prior_guidance_interval` are the arguments of these names: where in the steps guidance acts; None leaves that to
    the model."""

    decoder: Sampler
    prior: Sampler
    guidance_interval: tuple[float, float] | None = None
    prior_guidance_interval: tuple[float, float] | None = None


# Each states the same settings, so that one preset after another leaves nothing of the first behind.
_TRAILING = {"timestep_spacing": "trailing"}
_EARLY = (0.0, 0.7)  # the last steps, where all is decided but details, need no guidance

# With few steps of a prior without noise, shapes fall between those that a prompt leaves open; noise decides.
_NOISY = {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}

PRESETS: Mapping[str, Preset] = {
    "draft": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 4, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 4, _NOISY),
        guidance_interval=_EARLY,
        prior_guidance_interval=_EARLY,
    ),
    "balanced": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 8, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 5, _NOISY),
        guidance_interval=_EARLY,
        prior_guidance_interval=_EARLY,
    ),
    "best": Preset(
        decoder=Sampler("DPMSolverMultistepScheduler", 25, _TRAILING),
        prior=Sampler("DPMSolverMultistepScheduler", 20, _NOISY),
        guidance_interval=_EARLY,
    ),
}


def preset(quality: Any) -> Preset:
    """The preset of that name; InputError names those there are."""
    if not isinstance(quality, str) or quality not in PRESETS:
        raise InputError(f"quality={quality!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[quality]


def make_scheduler(name: str, config: Any, settings: Mapping[str, Any]) -> Any:
    """The scheduler of class `name` on the noise schedule of `config`, with `settings` in place of the stored ones."""
    import kandinsky22

    return getattr(kandinsky22, name).from_config(config, **settings)


def apply_quality(pipe: Any, quality: str) -> dict[str, Any]:
    """Give a pipeline the schedulers of a preset, and return the arguments to call it with.

    `quality` is "draft", "balanced" or "best"; `pipe` any pipeline of prior, decoder or both. The arguments are
    `pipe.generation_defaults` with the preset's numbers of steps and intervals of guidance in their place:
    `pipe(prompt, **apply_quality(pipe, "balanced"))`. Raises InputError for other names.
    """
    chosen = preset(quality)
    arguments = pipe.generation_defaults
    for name in ("scheduler", f"{PRIOR_PREFIX}scheduler"):
        current = pipe.components.get(name)
        if current is None:
            continue
        prefix = name.removesuffix("scheduler")
        if prefix or "prior" in pipe.components:
            sampler, interval = chosen.prior, chosen.prior_guidance_interval
        else:
            sampler, interval = chosen.decoder, chosen.guidance_interval
        setattr(pipe, name, sampler.from_config(current.config))
        arguments[f"{prefix}num_inference_steps"] = sampler.steps
        if interval is not None:
            arguments[f"{prefix}guidance_interval"] = interval
    return dict(arguments)
