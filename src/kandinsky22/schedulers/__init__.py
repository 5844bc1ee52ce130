"""The mathematics of sampling: how noise is added in training and taken away step by step. No networks in here."""

from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.ddim import DDIMScheduler
from kandinsky22.schedulers.ddpm import DDPMScheduler
from kandinsky22.schedulers.unclip import UnCLIPScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "Scheduler", "SchedulerOutput", "UnCLIPScheduler"]
