"""What a person sees of a training: a progress bar or lines, a log file, and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kandinsky22.requirements import require

LOG = "log.jsonl"


class Progress:
    """Progress of one stage.

    Args:
        folder: Folder of the stage.
        name: Name of the stage.
        step: Number of steps that have been taken before.
        total: Number of steps.
        report: Receives a line of text where no progress bar shows.
        tensorboard: Whether TensorBoard's files are written.
        active: Whether this process reports at all.
        shows_bar: Whether a progress bar shows on a terminal.

    Raises:
        MissingDependencyError: TensorBoard is requested and not installed.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        step: int,
        total: int,
        report: Callable[[str], None],
        *,
        tensorboard: bool,
        active: bool,
        shows_bar: bool = True,
    ) -> None:
        self._folder, self._name, self._total, self._report, self._active = folder, name, total, report, active
        self._first, self._started = step, time.monotonic()
        is_terminal = active and shows_bar and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, initial=step, desc=name, unit="step", disable=not is_terminal)
        self._shows_bar = is_terminal
        self._writer: Any = None
        if active and tensorboard:
            require("tensorboard", "--report-to tensorboard")
            self._writer = require("torch.utils.tensorboard", "--report-to tensorboard").SummaryWriter(
                str(folder / "tensorboard")
            )

    def advance(self) -> None:
        """Count a step."""
        self._bar.update(1)

    def log(self, step: int, values: Mapping[str, float], *, shown: bool = True) -> None:
        """Write a line to the log.

        Args:
            step: Number of steps that have been taken.
            values: Values by name.
            shown: Whether the person at the terminal sees it.
        """
        if not self._active:
            return
        rounded = {name: float(f"{value:.5g}") for name, value in values.items()}
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{self._name}/{name}", value, step)
        if self._shows_bar:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in rounded.items()})
        elif shown:
            texts = ", ".join(f"{name} {value:.4g}" for name, value in rounded.items())
            self._report(f"{self._name}: step {step} of {self._total}: {texts}{self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        seconds, done = time.monotonic() - self._started, step - self._first
        if done <= 0 or seconds <= 0:
            return ""
        rate = done / seconds
        left = (self._total - step) / rate
        unit = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
        return f", {rate:.3g} steps/s, {unit} left"

    def note(self, text: str) -> None:
        """Show a line above the progress bar.

        Args:
            text: The line.
        """
        if self._active:
            if self._shows_bar:
                self._bar.clear()
            self._report(f"{self._name}: {text}")

    def image(self, step: int, picture: Any) -> None:
        """Add a picture to TensorBoard's files.

        Args:
            step: Number of steps that have been taken.
            picture: RGB image.
        """
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(f"{self._name}/samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """End the bar and TensorBoard's files."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
