"""The training loop of every stage of the embedded model: a network, an objective and `Settings`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import CheckpointError, invalid
from kandinsky22.runtime.device import computes_bfloat16
from kandinsky22.training.muon import Muon

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SUMMARY = "summary.json"
STATE = ("step", "seconds", "average", "parameters", "optimizers")  # entries of a checkpoint
MIN_MUON_SIDE = 16  # smaller matrices, such as those of RGB values, are trained by AdamW
COUNTERS = ("steps",)  # entries of an optimizer's groups that are state and not hyperparameters


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of one stage; the defaults suit the small networks of the embedded model.

    The learning rate rises linearly during the warm-up, stays constant, and falls along half a cosine to zero during
    the decay. Nothing before the decay depends on `steps`: until the decay begins, a stage can be made longer without
    changing the steps that have been taken.

    Attributes:
        steps: Number of optimizer steps, at least 1.
        learning_rate: Largest learning rate.
        warmup: Number of steps of the warm-up.
        decay: Number of steps of the decay; None lets it begin at the end of the warm-up.
        weight_decay: Weight decay of AdamW for weight matrices; biases and gains have none.
        betas: Decay rates of AdamW's two moments.
        clip: Largest norm of the gradient of all parameters together.
        average: Decay rate of the running average of the parameters, from 0 to below 1.
        seed: Seed of all random numbers of the stage.
        bf16: Whether the objective runs under `bfloat16_autocast`.
        muon: Whether Muon instead of AdamW trains weight matrices and kernels.
        muon_interval: Number of steps between two updates of a matrix by Muon.
        log_every: Number of steps per line of the log.
        save_seconds: Time between two checkpoints, in seconds.

    Raises:
        InputError: `steps` or `average` is out of range.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200
    decay: int | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    average: float = 0.999
    seed: int = 0
    bf16: bool = False
    muon: bool = False
    muon_interval: int = 1
    log_every: int = 50
    save_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise invalid("steps", self.steps, "an integer from 1")
        if not 0.0 <= self.average < 1.0:
            raise invalid("average", self.average, "a number from 0 to below 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: Number of the step, counted from 0.
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        decay = self.steps - self.warmup if self.decay is None else self.decay
        progress = (step - (self.steps - decay)) / max(decay, 1)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@dataclasses.dataclass(frozen=True)
class StepRandomness:
    """Random generators of one step. They depend on seed and step alone, thus a resumed run needs no stored state.

    Attributes:
        step: Number of the step, counted from 0.
        numpy: Generator for numpy.
        torch: Generator for torch, on the CPU.
    """

    step: int
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> StepRandomness:
        """Return the generators of a step.

        Args:
            seed: Seed of the stage.
            step: Number of the step, counted from 0.
        """
        numpy = np.random.default_rng([seed, step])
        return cls(step, numpy, torch.Generator().manual_seed(int(numpy.integers(2**62))))


Objective: TypeAlias = Callable[[StepRandomness], Mapping[str, Tensor]]


class Summary(TypedDict):
    """State of a stage as its folder stores it in SUMMARY.

    Attributes:
        step: Number of steps that have been taken.
        finished: Whether all steps have been taken.
        seconds: Wall time in seconds, added up over resumptions.
        parameters: Number of trained parameters.
        settings: Fields of `Settings`.
    """

    step: int
    finished: bool
    seconds: float
    parameters: int
    settings: dict[str, Any]


def train(
    network: nn.Module, objective: Objective, settings: Settings, folder: str | Path, *, stop_at: int | None = None
) -> Summary:
    """Train the parameters of a network that require gradients, and leave their running average in it.

    Training resumes from the checkpoint in `folder`, if there is one, with the hyperparameters of `settings`.

    Args:
        network: Network, left in evaluation mode.
        objective: Function from the randomness of a step to scalar losses by name. The one named "loss" is minimised,
            all are logged.
        settings: Hyperparameters.
        folder: Folder of the checkpoint, the log and the summary.
        stop_at: Step before which training pauses, to be continued by a later call; None trains to the end.

    Returns:
        The summary.

    Raises:
        CheckpointError: The checkpoint cannot be read, or belongs to another network or to other optimizers.
        InputError: The network has no parameter that requires gradients.
    """
    run = _TrainingRun(network, settings, Path(folder))
    end = settings.steps if stop_at is None else min(stop_at, settings.steps)
    network.train()
    while run.step < end:
        run.advance(objective)
        if time.monotonic() - run.last_save > settings.save_seconds:
            run.save()
    run.save()
    network.load_state_dict(run.average, strict=False)
    network.eval()
    return run.summary()


def bfloat16_autocast(*, enabled: bool = True) -> torch.autocast:
    """Return a context manager that multiplies in bfloat16 on CPUs that compute in it; others are faster in float32.

    Args:
        enabled: Whether it does so at all.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled and computes_bfloat16())


def load_average(network: nn.Module, folder: str | Path) -> int:
    """Load the running average of a checkpoint into a network.

    Parameters that were frozen during the training have no average, and keep their values.

    Args:
        network: Network that was trained.
        folder: Folder of the stage.

    Returns:
        Number of steps that the checkpoint has been trained for.

    Raises:
        CheckpointError: The checkpoint cannot be read or belongs to another network. Checkpoints without the names of
            frozen parameters may lack parameters of the network.
    """
    path = Path(folder) / CHECKPOINT
    checkpoint = _read(path, "step", "average")
    average, parameters = checkpoint["average"], dict(network.named_parameters())
    without_average = set(parameters) - set(average)
    _check_parameters(path, average, parameters, without_average & set(checkpoint.get("frozen", without_average)))
    network.load_state_dict(average, strict=False)
    return int(checkpoint["step"])


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer, except its hyperparameters, which stay as they are.

    Args:
        optimizer: The optimizer.
        state: State of an optimizer of the same parameters.

    Raises:
        ValueError: The state is of other groups of parameters.
    """
    own = [
        {name: value for name, value in group.items() if name not in ("params", *COUNTERS)}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(dict(state))
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)


def is_finished(folder: str | Path) -> bool:
    """Return whether all steps of a stage have been taken.

    Args:
        folder: Folder of the stage.
    """
    path = Path(folder) / SUMMARY
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


class _TrainingRun:
    """State of a training run: network, running average, optimizer, step and time."""

    def __init__(self, network: nn.Module, settings: Settings, folder: Path) -> None:
        self.network, self.settings, self.folder = network, settings, folder
        self.parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise invalid("network", type(network), "a module with at least one parameter that requires gradients")
        self.optimizers = _optimizers(self.parameters, settings)
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            self._restore(folder / CHECKPOINT)
        self.started = self.last_save = time.monotonic()
        self.sums: dict[str, float] = {}
        self.summed_steps = 0

    def advance(self, objective: Objective) -> None:
        """Take one step."""
        settings = self.settings
        randomness = StepRandomness.of(settings.seed, self.step)
        torch.manual_seed(int(randomness.numpy.integers(2**62)))  # dropout uses the global generator
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = settings.learning_rate_at(self.step)
        with bfloat16_autocast(enabled=settings.bf16):
            values = objective(randomness)
        for parameter in self.parameters.values():
            parameter.grad = None
        values["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip, error_if_nonfinite=True)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        # An early average would be dominated by the random initial values, thus its decay rate grows with the step.
        decay_rate = min(settings.average, self.step / (self.step + 10.0))
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1.0 - decay_rate)
        self._log({**{name: float(value.detach()) for name, value in values.items()}, "norm": float(norm)})

    def save(self) -> None:
        """Write the checkpoint and the summary."""
        state = {
            "step": self.step,
            "seconds": self._elapsed_seconds(),
            "average": self.average,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "frozen": [name for name, _ in self.network.named_parameters() if name not in self.parameters],
        }
        with atomic_write(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
        with atomic_write(self.folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
        self.last_save = time.monotonic()

    def summary(self) -> Summary:
        """Return the state of the stage."""
        return {
            "step": self.step,
            "finished": self.step >= self.settings.steps,
            "seconds": round(self._elapsed_seconds(), 1),
            "parameters": sum(value.numel() for value in self.parameters.values()),
            "settings": dataclasses.asdict(self.settings),
        }

    def _restore(self, path: Path) -> None:
        checkpoint = _read(path, *STATE)
        _check_parameters(path, checkpoint["parameters"], self.parameters)
        _check_parameters(path, checkpoint["average"], self.parameters)
        states = checkpoint["optimizers"]
        if states.keys() != self.optimizers.keys():
            stored, own = (" and ".join(sorted(names)) for names in (states, self.optimizers))
            raise CheckpointError(
                f"{path} was trained by {stored}, which the settings replace by {own}: expected {stored}"
            )
        for name, optimizer in self.optimizers.items():
            try:
                load_optimizer(optimizer, states[name])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} does not fit the optimizer {name}: {error}") from error
        self.network.load_state_dict(checkpoint["parameters"], strict=False)
        self.average = {name: checkpoint["average"][name] for name in self.parameters}
        self.step, self.seconds = int(checkpoint["step"]), float(checkpoint["seconds"])

    def _elapsed_seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _log(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed_steps += 1
        if self.step % self.settings.log_every and self.step != self.settings.steps:
            return
        means = {name: float(f"{value / self.summed_steps:.5g}") for name, value in self.sums.items()}
        line = {"step": self.step, "seconds": round(self._elapsed_seconds(), 1), **means}
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sums, self.summed_steps = {}, 0


def _optimizers(parameters: Mapping[str, nn.Parameter], settings: Settings) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by name: AdamW, and Muon for matrices if requested.

    Weight decay is for matrices; gains and biases are left out, since they have a scale of their own.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    for_muon = [p for p in matrices if settings.muon and min(p.shape[0], p[0].numel()) >= MIN_MUON_SIDE]
    others = [p for p in matrices if all(p is not other for other in for_muon)]
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    if not for_muon:
        return {"adamw": adamw}
    muon = Muon(
        for_muon,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        interval=settings.muon_interval,
    )
    return {"adamw": adamw, "muon": muon}


def _check_parameters(
    path: Path, stored: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Raise an error unless a checkpoint has the parameters of a network, except optional ones, and no others."""
    mismatched = sorted((set(stored) ^ set(parameters)) - set(optional)) or sorted(
        name for name, value in stored.items() if value.shape != parameters[name].shape
    )
    if mismatched:
        raise CheckpointError(f"{path} belongs to another network; parameters differ: {', '.join(mismatched[:5])}")


def _read(path: Path, *names: str) -> dict[str, Any]:
    """Return the checkpoint in a file, which must have these entries."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the training checkpoint {path} cannot be read: {error}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not a training checkpoint: it holds a {type(checkpoint).__name__}")
    if missing := [name for name in names if name not in checkpoint]:
        raise CheckpointError(f"{path} is not a training checkpoint: it lacks {', '.join(missing)}")
    return checkpoint
