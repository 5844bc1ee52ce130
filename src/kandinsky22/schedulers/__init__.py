"""The mathematics of sampling: how noise is added in training and taken away step by step. No networks in here."""

from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.ddim import DDIMScheduler
from kandinsky22.schedulers.ddpm import DDPMScheduler
from kandinsky22.schedulers.deis import DEISMultistepScheduler
from kandinsky22.schedulers.dpm_solver import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from kandinsky22.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from kandinsky22.schedulers.heun import HeunDiscreteScheduler, KDPM2DiscreteScheduler
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
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
