"""Process that measures one series of benchmarks/growth.py: one network at growing sizes, batches or numbers of steps.

It prints a line of JSON for each measurement. Networks have random weights and are created in memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compare_weights, machine

STAGES = ("unet", "movq", "decoder", "prior")
AXES = ("size", "batch", "steps")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker measures.

    Attributes:
        stage: "unet" is one guided step, "movq" the decoding of latents, "decoder" all steps of the decoder without
            MoVQ, "prior" a call of the prior pipeline; one of STAGES.
        axis: What grows; one of AXES.
        values: Its values, ascending.
        size: Side of the images in pixels where another axis grows.
        steps: Number of steps where another axis grows.
        config: Name of a config of `compare_weights.CONFIGS`.
        dtype: Name of a dtype of torch.
        threads: Number of threads of torch.
        passes: Number of calls per value; the values alternate.
        call_seconds: Longest call; values for which arithmetic predicts more are left out.
        gib: Largest memory of the process; values that would exceed it are left out.
        seconds: Time limit for the whole series.
    """

    stage: str
    axis: str
    values: tuple[int, ...]
    size: int
    steps: int
    config: str
    dtype: str
    threads: int
    passes: int
    call_seconds: float
    gib: float
    seconds: float

    def at(self, value: int) -> dict[str, int]:
        """Return size, batch and steps for a value of the axis.

        Args:
            value: One of `values`.
        """
        return {"size": self.size, "batch": 1, "steps": self.steps} | {self.axis: value}


class Networks:
    """The networks of a task.

    Args:
        task: The task.
        device: "cpu", or "meta" to count operations without computing.
    """

    def __init__(self, task: Task, device: str = "cpu") -> None:
        import torch

        torch.manual_seed(0)
        self._torch, self._task, self._device = torch, task, device
        self._dtype = getattr(torch, task.dtype)
        config = compare_weights.CONFIGS[task.config]
        self._width = config["unet"]["encoder_hid_dim"]
        torch.set_default_dtype(self._dtype)
        try:
            with torch.device(device), torch.no_grad():
                self._create(config)
        finally:
            torch.set_default_dtype(torch.float32)

    def _create(self, config: dict[str, dict[str, Any]]) -> None:
        import kandinsky22

        stage = self._task.stage
        if stage in ("unet", "decoder"):
            self._unet = kandinsky22.UNet2DConditionModel(**config["unet"]).eval()
        if stage in ("movq", "decoder"):
            self._movq = kandinsky22.VQModel(**config["movq"]).eval()
        if stage == "decoder":
            scheduler = kandinsky22.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
            self._pipe = kandinsky22.KandinskyV22Pipeline(unet=self._unet, scheduler=scheduler, movq=self._movq)
        if stage == "prior":
            self._pipe = self._prior_pipeline(config)
        if stage in ("decoder", "prior"):
            self._pipe.set_progress_bar_config(disable=True)

    def _prior_pipeline(self, config: dict[str, dict[str, Any]]) -> Any:
        import transformers

        import kandinsky22

        prior = kandinsky22.PriorTransformer(**config["prior"]).eval()
        text, vision = (tower.to(self._dtype).eval() for tower in compare_weights.make_towers(config, layers=1))
        side = vision.config.image_size
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = compare_weights.make_tokenizer(Path(folder) / "words")
        return kandinsky22.KandinskyV22PriorPipeline(
            prior=prior,
            image_encoder=vision,
            text_encoder=text,
            tokenizer=tokenizer,
            scheduler=kandinsky22.UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
            ),
            image_processor=transformers.CLIPImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
        )

    def call(self, *, size: int, batch: int, steps: int, number: int = 0) -> None:
        """Do the work of the task once.

        Args:
            size: Side of the images in pixels.
            batch: Number of images.
            steps: Number of steps.
            number: Number of the call; each has other inputs.
        """
        with self._torch.no_grad():
            getattr(self, f"_call_{self._task.stage}")(size // 8, batch, steps, number)

    def _call_unet(self, side: int, batch: int, steps: int, number: int) -> None:
        condition = self._unet.encode_condition(self._random(2 * batch, self._width))
        self._unet.denoise(self._random(2 * batch, 4, side, side), 500 - number, condition)

    def _call_movq(self, side: int, batch: int, steps: int, number: int) -> None:
        self._movq.decode(self._random(batch, 4, side, side), force_not_quantize=True)

    def _call_decoder(self, side: int, batch: int, steps: int, number: int) -> None:
        embeds = self._random(2, batch, self._width)
        pixels = {"height": 8 * side, "width": 8 * side, "output_type": "latent"}
        self._pipe(embeds[0], embeds[1], num_inference_steps=steps, **pixels)

    def _call_prior(self, side: int, batch: int, steps: int, number: int) -> None:
        prompts = [f"a red cat, 4k photo, number {100 * (number + 1) + index}" for index in range(batch)]
        self._pipe(prompts, num_inference_steps=steps)

    def _random(self, *shape: int) -> Any:
        return self._torch.randn(*shape, dtype=self._dtype, device=self._device)


def operations(task: Task) -> dict[int, float] | None:
    """Return the floating-point operations of a call for each value, from the layers of the networks.

    They are counted on torch's meta device. Work grows in proportion to the batch; None for steps, of which all are
    equal.

    Args:
        task: The task.
    """
    if task.axis == "steps":
        return None
    if task.stage not in ("unet", "movq"):
        return {value: float(value) for value in task.values}  # in units of one image
    networks = Networks(task, "meta")
    return {value: float(sum(_count(networks, task, value).values())) for value in task.values}


def _count(networks: Networks, task: Task, value: int) -> dict[str, int]:
    return machine.count_operations(lambda: networks.call(**task.at(value)))


class Series:
    """A running task.

    Args:
        task: The task.
        report: Receives each measurement.
    """

    def __init__(self, task: Task, report: Callable[[dict[str, Any]], None]) -> None:
        self.task, self._report = task, report
        self._work = operations(task) or {value: float(value) for value in task.values}
        self._start = time.perf_counter()
        self._networks = Networks(task)
        self._last: dict[str, float] | None = None  # work, seconds and memory of the last new value

    def run(self) -> None:
        """Measure all values that are within the limits."""
        task = self.task
        self._networks.call(**task.at(task.values[0]), number=0)  # packs weights
        values = list(task.values)
        for number in range(task.passes):
            for value in list(values):
                if reason := self._reason_to_skip(value):
                    if number == 0:
                        self._report({"value": value, "left_out": reason})
                        values.remove(value)
                    continue
                self._measure(value, number)

    def _reason_to_skip(self, value: int) -> str | None:
        """Return why a value is left out, from the arithmetic and the last smaller value."""
        if self._last is None:
            return None
        factor = self._work[value] / self._last["work"]
        seconds = self._last["seconds"] * factor
        if seconds > self.task.call_seconds:
            return f"about {seconds:.0f} s a call"
        if time.perf_counter() - self._start + seconds > self.task.seconds:
            return "no time was left"
        gib = self._last["before"] + self._last["working"] * max(1.0, factor)
        return f"about {gib:.0f} GiB" if self.task.axis != "steps" and gib > self.task.gib else None

    def _measure(self, value: int, number: int) -> None:
        _free_memory()
        before = machine.status("RssAnon") or 0.0
        resettable = machine.forget_peak()
        resident = machine.status("VmRSS") or 0.0
        start = time.perf_counter()
        self._networks.call(**self.task.at(value), number=number + 1)
        seconds = time.perf_counter() - start
        peak = machine.peak_memory()
        record: dict[str, Any] = {"value": value, "pass": number, "seconds": seconds, "work": self._work[value]}
        if resettable:
            record |= {"peak_gib": peak, "working_gib": peak - resident, "before_gib": before}
        self._report(record)
        if number == 0:
            working = peak - resident if resettable else 0.0
            self._last = {"work": self._work[value], "seconds": seconds, "working": working, "before": resident}


def _free_memory() -> None:
    """Return freed memory to the system, where the C library can: it would hide what the next call needs."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def main() -> None:
    """Run the task that the first argument describes in JSON."""
    import torch

    fields = json.loads(sys.argv[1])
    task = Task(**(fields | {"values": tuple(fields["values"])}))
    torch.set_num_threads(task.threads)
    Series(task, lambda record: print(json.dumps(record), flush=True)).run()


if __name__ == "__main__":
    main()
