"""The loop of fine-tuning: steps on one or several devices, moving average, log, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import CheckpointError, InputError, NotFiniteError
from kandinsky22.training.finetuning import checkpoints
from kandinsky22.training.finetuning.batches import BatchPlan, Draw
from kandinsky22.training.finetuning.objectives import Objective
from kandinsky22.training.finetuning.optimizer import new_optimizer
from kandinsky22.training.finetuning.options import TrainingOptions
from kandinsky22.training.finetuning.preparation import Report
from kandinsky22.training.finetuning.progress import LOG, Progress
from kandinsky22.training.loop import load_optimizer

TOTAL_LOSS = "total_loss"  # in the log: the weighted sum of the losses of several streams


@dataclass(frozen=True)
class Stream:
    """Examples that every step contains.

    Attributes:
        objective: Objective of the examples.
        plan: Which examples each step has.
        weight: Weight of their loss in the sum that is minimised. The log has their losses without it, and the sum as
            `TOTAL_LOSS`.
        prefix: Beginning of the names of their losses in the log.
    """

    objective: Objective
    plan: BatchPlan
    weight: float = 1.0
    prefix: str = ""


@dataclass(frozen=True)
class Stage:
    """One network to be trained.

    Attributes:
        name: Name for the log: "prior", "decoder" or "subject".
        network: The network, some of whose parameters require gradients.
        streams: Examples of each step.
        write_results: Writes the weights (parameters by name) in the form that pipelines load, into a folder.
        signature: What a checkpoint must agree with to be continued, by name.
        draw_samples: Returns a sheet of sample pictures of the network in its present state; None for no sheets.
    """

    name: str
    network: nn.Module
    streams: Sequence[Stream]
    write_results: Callable[[Path, Mapping[str, Tensor]], None]
    signature: Mapping[str, Any]
    draw_samples: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Summary:
    """Result of a stage.

    Attributes:
        step: Number of steps that have been taken.
        parameters: Number of trained parameters.
        losses: Last validation losses by name; empty without held-out pictures.
        seconds: Wall time of this run in seconds.
    """

    step: int
    parameters: int
    losses: Mapping[str, float]
    seconds: float


def train_stage(
    stage: Stage,
    options: TrainingOptions,
    folder: Path,
    accelerator: Any,
    report: Report,
    *,
    shows_progress: bool = True,
) -> Summary:
    """Train a stage to its end, or until the person interrupts it.

    Args:
        stage: The stage.
        options: Options of the training.
        folder: Folder of its checkpoints, log and samples.
        accelerator: Result of `new_accelerator`.
        report: Receives lines of text for the person at the terminal.
        shows_progress: Whether a progress bar shows on a terminal.

    Returns:
        The summary. The network's trained parameters have their final values, or their moving averages.

    Raises:
        InputError: The checkpoint to be continued does not exist, or is of another training.
        CheckpointError: A checkpoint cannot be read or written.
        NotFiniteError: The loss is not finite.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    run = TrainingRun(stage, options, folder, accelerator, report, shows_progress=shows_progress)
    try:
        return run.train()
    finally:
        run.progress.close()


class TrainingRun:
    """State of a stage: network, optimizer, moving average and step.

    Args:
        stage: The stage.
        options: Options of the training.
        folder: Folder of its checkpoints, log and samples.
        accelerator: Result of `new_accelerator`.
        report: Receives lines of text for the person at the terminal.
        shows_progress: Whether a progress bar shows on a terminal.

    Raises:
        InputError: The checkpoint to be continued does not exist, or is of another training.
        CheckpointError: The checkpoint to be continued cannot be read.
    """

    def __init__(
        self,
        stage: Stage,
        options: TrainingOptions,
        folder: Path,
        accelerator: Any,
        report: Report,
        *,
        shows_progress: bool = True,
    ) -> None:
        self.stage, self.options, self.folder, self.accelerator = stage, options, folder, accelerator
        self.is_main = bool(accelerator.is_main_process)
        resumed = checkpoints.resumed_checkpoint(folder, options.resume)
        self.network = stage.network.to(accelerator.device).train()
        self.parameters = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        self.optimizer = accelerator.prepare_optimizer(new_optimizer(self.parameters, options))
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if options.use_ema else None
        self.step = 0
        self.losses: dict[str, float] = {}
        if resumed is not None:
            self._restore(resumed, checkpoints.read_checkpoint(resumed))
        for stream in stage.streams:
            stream.objective.follow(self.results)
        # only several processes need a wrapper, which replaces the network's forward
        self.wrapped = accelerator.prepare_model(self.network) if accelerator.num_processes > 1 else self.network
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.delete_unfinished(folder)
            _forget_later_lines(folder / LOG, self.step)
        tensorboard = options.report_to == "tensorboard"
        self.progress = Progress(
            folder,
            stage.name,
            self.step,
            options.max_train_steps,
            report,
            tensorboard=tensorboard,
            active=self.is_main,
            shows_bar=shows_progress,
        )
        if resumed is not None:
            self.progress.note(f"continues {resumed.name}")
        self._sums: dict[str, float] = {}
        self._summed = 0

    def train(self) -> Summary:
        """Take the remaining steps.

        Returns:
            The summary.

        Raises:
            CheckpointError: A checkpoint cannot be written.
            NotFiniteError: The loss is not finite.
            KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
        """
        options, started = self.options, time.monotonic()
        with _interruptible() as interruption:
            while self.step < options.max_train_steps:
                self.advance()
                is_last = self.step == options.max_train_steps
                if self.step % options.log_every == 0 or is_last:
                    self._log()
                if self.step % options.checkpointing_steps == 0 or is_last:
                    self.save()
                if self.step % options.validation_steps == 0 or is_last:
                    self._validate()
                if self._any(interruption.is_set()):
                    if checkpoints.checkpoint_name(self.step) not in [
                        p.name for p in checkpoints.checkpoints(self.folder)
                    ]:
                        self.save()
                    self.progress.note(
                        f"interrupted; {self.folder / checkpoints.checkpoint_name(self.step)} is written: "
                        "--resume continues it"
                    )
                    raise KeyboardInterrupt
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            for name, value in self.results().items():
                self.parameters[name].copy_(value)
        self.network.eval()
        count = sum(parameter.numel() for parameter in self.parameters.values())
        return Summary(self.step, count, dict(self.losses), time.monotonic() - started)

    def advance(self) -> None:
        """Take one step.

        Raises:
            NotFiniteError: The loss is not finite.
        """
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_at(self.step)
        self.backward()
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._add({"norm": float(norm)})
        self._summed += 1
        if self.average is not None:
            # An early average would be dominated by the initial values, thus its decay grows with the step.
            decay = min(options.ema_decay, self.step / (self.step + 10.0))
            values = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), values, 1.0 - decay)
        self.progress.advance()

    def backward(self) -> None:
        """Compute the gradients of the next step, averaged over its examples and added up over its streams.

        Raises:
            NotFiniteError: The loss is not finite.
        """
        passes = [(stream, draws) for stream in self.stage.streams for draws in self._own(stream.plan.draws(self.step))]
        count = self.options.gradient_accumulation_steps
        for number, (stream, draws) in enumerate(passes, start=1):
            is_last = number == len(passes)
            shared = contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.wrapped)
            with shared, self._attention():  # gradient checkpointing runs blocks again in the backward pass
                with self.accelerator.autocast():
                    losses = stream.objective.losses(self.wrapped, draws)
                self.accelerator.backward(losses["loss"] * (stream.weight / count))
            values = {stream.prefix + name: float(value.detach()) / count for name, value in losses.items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise NotFiniteError(
                    f"the loss is not finite at step {self.step + 1}: expected a lower --learning-rate, or another "
                    "--mixed-precision"
                )
            self._add(values)
            if len(self.stage.streams) > 1:
                self._add({TOTAL_LOSS: stream.weight * values[f"{stream.prefix}loss"]})

    def _own(self, draws: list[Draw]) -> Iterator[list[Draw]]:
        """Yield the examples of each pass of this process."""
        size, processes = self.options.train_batch_size, self.accelerator.num_processes
        for number in range(self.options.gradient_accumulation_steps):
            first = (number * processes + self.accelerator.process_index) * size
            yield draws[first : first + size]

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a pass: for few tokens on a CPU, the backward pass of fused attention is slower."""
        if self.accelerator.device.type == "cpu":
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    # Values

    def results(self) -> Mapping[str, Tensor]:
        """Return the trained parameters by name, or their moving averages."""
        if self.average is not None:
            return self.average
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def results_in_network(self) -> Iterator[None]:
        """Return a context in which the network has the values of `results`, and is in evaluation mode."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()} if self.average is not None else {}
        with torch.no_grad():
            for name in kept:
                self.parameters[name].copy_(self.results()[name])
        self.network.eval()
        try:
            yield
        finally:
            self.network.train()
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)

    def _add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _log(self) -> None:
        names = sorted(self._sums)
        means = torch.tensor([self._sums[name] / self._summed for name in names], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        values = dict(zip(names, means.tolist(), strict=True))
        ordered = {"loss": values.pop("loss")} | values if "loss" in values else values
        self.progress.log(self.step, {**ordered, "lr": self.options.learning_rate_at(self.step - 1)})
        self._sums, self._summed = {}, 0

    def _any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _validate(self) -> None:
        """Log the losses of held-out pictures, and write the sheet of samples."""
        if self.is_main:
            with self.results_in_network(), self.accelerator.autocast():
                losses = self.stage.streams[0].objective.validation_losses(self.network)
            if losses:
                self.losses = {f"validation_{name}": value for name, value in losses.items()}
                self.progress.log(self.step, self.losses)
            if self.stage.draw_samples is not None:
                with self.results_in_network(), torch.no_grad():
                    sheet = self.stage.draw_samples()
                path = self.folder / f"samples-{self.step:06d}.png"
                with atomic_write(path) as temporary:
                    sheet.save(temporary, format="PNG")
                self.progress.image(self.step, sheet)
                self.progress.note(f"samples: {path}")
        self.accelerator.wait_for_everyone()

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self.is_main:
            scaler = getattr(self.accelerator, "scaler", None)
            state = {
                "step": self.step,
                "signature": self._signature(),
                "parameters": {name: value.detach() for name, value in self.parameters.items()},
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "options": {name: value for name, value in dataclasses.asdict(self.options).items()},
            }
            checkpoints.save_checkpoint(
                self.folder,
                self.step,
                state,
                lambda path: self.stage.write_results(path, self.results()),
                self.options.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _signature(self) -> dict[str, Any]:
        options = self.options
        batch = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        fixed = {"pictures per step": batch, "seed": options.seed, "use_ema": options.use_ema}
        # The moments of 8 bits have a form of their own.
        return {**fixed, "use_8bit_adam": options.use_8bit_adam, **self.stage.signature}

    def _restore(self, path: Path, state: Mapping[str, Any]) -> None:
        stored, expected = state.get("signature", {}), self._signature()
        different = [
            f"{name} was {stored.get(name)!r} and is {expected.get(name)!r}"
            for name in sorted({*stored, *expected})
            if stored.get(name) != expected.get(name)
        ]
        if different:
            raise InputError(f"{path} belongs to another training: {'; '.join(different)}")
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["parameters"][name])
            load_optimizer(self.optimizer, state["optimizer"])
            if self.average is not None:
                device = self.accelerator.device
                self.average = {name: state["average"][name].to(device) for name in self.parameters}
            if state.get("scaler") is not None and getattr(self.accelerator, "scaler", None) is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit the network: {error}") from error
        self.step = int(state["step"])


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, so that no step is cut off; a second Ctrl-C raises KeyboardInterrupt."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _forget_later_lines(path: Path, step: int) -> None:
    """Delete the lines of steps that will be taken again from a log."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be incomplete
            if json.loads(line)["step"] <= step:
                lines.append(line)
    with atomic_write(path, flush=False) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
