"""Short names of the schedulers."""

from __future__ import annotations

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpm-sde": "DPMSolverSDEScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "unclip": "UnCLIPScheduler",
}


def find_scheduler_class(name: str) -> str | None:
    """Return the class name of a scheduler, or None if no scheduler has this name.

    Args:
        name: Short name or class name, in upper or lower case.
    """
    class_names = {key.lower(): value for short_name, value in SCHEDULERS.items() for key in (short_name, value)}
    return class_names.get(name.lower())
