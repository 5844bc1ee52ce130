"""Schedulers: the mathematics of sampling, that is how noise is added in training and removed step by step.

`base.SchedulerProtocol` lists what a scheduler must offer to be used in a pipeline. Modules:

- `base`: the protocol, the base class `Scheduler`, `SchedulerOutput`;
- `configurable`: how configs are passed, stored and converted between classes;
- `config`: settings that several methods share; those of one method are next to its class;
- `noise_schedules`: betas and the spacing of timesteps;
- `ddpm`, `unclip`, `ddim`, `lcm`: methods that step from timestep to timestep;
- `pndm`: the same with a history of predictions;
- `sigmas`: base classes of the methods that step from sigma to sigma, and schedules of sigmas;
- `euler`, `heun`, `lms`: methods on variance-exploding samples;
- `dpm_solver_sde`, `brownian`: a stochastic method of two stages, and its noise;
- `exponential_integrator`, `dpm_solver`, `deis`, `unipc`: exponential integrators.

Schedulers know neither networks nor prompts.
"""

from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.ddim import DDIMScheduler
from kandinsky22.schedulers.ddpm import DDPMScheduler
from kandinsky22.schedulers.deis import DEISMultistepScheduler
from kandinsky22.schedulers.dpm_solver import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from kandinsky22.schedulers.dpm_solver_sde import DPMSolverSDEScheduler
from kandinsky22.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from kandinsky22.schedulers.heun import (
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from kandinsky22.schedulers.lcm import LCMScheduler
from kandinsky22.schedulers.lms import LMSDiscreteScheduler
from kandinsky22.schedulers.pndm import PNDMScheduler
from kandinsky22.schedulers.unclip import UnCLIPScheduler
from kandinsky22.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
