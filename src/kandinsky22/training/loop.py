"""The one training loop: every stage of the embedded model is a network, an objective and a `Settings`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kandinsky22.errors import CheckpointError, InputError

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one stage is trained; the defaults are those of the small networks of the embedded model.

    The learning rate rises linearly over `warmup` steps, holds, and falls along half a cosine to zero over the last
    `decay` steps (`None`: from the end of the warm-up on). A stage may be lengthened until its decay begins without
    changing a step already made, because nothing before that depends on `steps`.
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
    log_every: int = 50
    save_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if not 0.0 <= self.average < 1.0:
            raise InputError(f"average must be at least 0 and below 1, got {self.average}")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        decay = self.steps - self.warmup if self.decay is None else self.decay
        progress = (step - (self.steps - decay)) / max(decay, 1)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@dataclasses.dataclass(frozen=True)
class Draw:
    """The randomness of one step. It depends on the seed and the step alone, so a resumed run needs no saved state."""

    step: int
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Draw:
        numpy = np.random.default_rng([seed, step])
        return cls(step, numpy, torch.Generator().manual_seed(int(numpy.integers(2**62))))


Objective = Callable[[Draw], Mapping[str, Tensor]]


def train(
    network: nn.Module, objective: Objective, settings: Settings, folder: str | Path, *, stop_at: int | None = None
) -> dict[str, Any]:
    """Train the parameters of `network` that require gradients, and leave their running average in it.

    `objective` computes a mapping of scalars from a `Draw`; the entry "loss" is minimised, all of them are logged.
    `folder` holds the checkpoint (found there, training goes on from it), the log and a summary with the wall time,
    which adds up over resumptions. With `stop_at` training pauses before that step, and a later call takes it up.
    Returns the summary. Raises CheckpointError when the checkpoint is of another network.
    """
    run = _Run(network, settings, Path(folder))
    end = settings.steps if stop_at is None else min(stop_at, settings.steps)
    network.train()
    while run.step < end:
        run.advance(objective)
        if time.monotonic() - run.saved > settings.save_seconds:
            run.save()
    run.save()
    network.load_state_dict(run.average, strict=False)
    network.eval()
    return run.summary()


def load_average(network: nn.Module, folder: str | Path) -> int:
    """Put the running average of the checkpoint in `folder` into `network`; returns the number of steps it has had."""
    checkpoint = _read(Path(folder) / CHECKPOINT)
    network.load_state_dict(checkpoint["average"], strict=False)
    return int(checkpoint["step"])


def finished(folder: str | Path) -> bool:
    """Whether the stage trained in `folder` has made all its steps."""
    path = Path(folder) / SUMMARY
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it, so that an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Run:
    """State of one training: network, running average, optimizer, step and time."""

    def __init__(self, network: nn.Module, settings: Settings, folder: Path) -> None:
        self.network, self.settings, self.folder = network, settings, folder
        self.parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise InputError("the network has no parameter that requires gradients")
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parameters.values(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            self._restore(_read(folder / CHECKPOINT))
        self.started = self.saved = time.monotonic()
        self.sums: dict[str, float] = {}
        self.summed = 0

    def advance(self, objective: Objective) -> None:
        settings = self.settings
        draw = Draw.of(settings.seed, self.step)
        torch.manual_seed(int(draw.numpy.integers(2**62)))  # dropout and the like draw from the global generator
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            values = objective(draw)
        self.optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        # A young average would be dominated by the random start, so its memory grows with the step.
        keep = min(settings.average, self.step / (self.step + 10.0))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1.0 - keep)
        self._log({**{name: float(value.detach()) for name, value in values.items()}, "norm": float(norm)})

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self._seconds(),
            "average": self.average,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomically(self.folder / CHECKPOINT, lambda path: torch.save(state, path))
        text = json.dumps(self.summary(), indent=2) + "\n"
        write_atomically(self.folder / SUMMARY, lambda path: _write_text(path, text))
        self.saved = time.monotonic()

    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "finished": self.step >= self.settings.steps,
            "seconds": round(self._seconds(), 1),
            "parameters": sum(value.numel() for value in self.parameters.values()),
            "settings": dataclasses.asdict(self.settings),
        }

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        stored = checkpoint["parameters"]
        wrong = sorted(set(stored) ^ set(self.parameters)) or sorted(
            name for name, value in self.parameters.items() if stored[name].shape != value.shape
        )
        if wrong:
            raise CheckpointError(f"{self.folder / CHECKPOINT} is of another network: {', '.join(wrong[:5])}")
        self.network.load_state_dict(stored, strict=False)
        self.average = dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = int(checkpoint["step"]), float(checkpoint["seconds"])

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _log(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1
        if self.step % self.settings.log_every and self.step != self.settings.steps:
            return
        means = {name: float(f"{value / self.summed:.5g}") for name, value in self.sums.items()}
        line = {"step": self.step, "seconds": round(self._seconds(), 1), **means}
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sums, self.summed = {}, 0


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay is for matrices; gains and biases have a scale of their own."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the training checkpoint {path}: {error}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not a training checkpoint")
    return checkpoint


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
