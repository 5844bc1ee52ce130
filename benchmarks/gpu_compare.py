"""Comparison of kandinsky22 with diffusers on an accelerator, in one process: agreement, time and memory.

    python -m benchmarks.gpu_compare --minutes 6

Networks have the published configs and random weights that are generated on the device; no file is read. Both libraries
use the same parameter tensors. A guided UNet step, MoVQ decoding and a complete decoder call are measured per size and
batch, the prior pipeline per batch. All cells are measured eagerly first, then with compiled networks until `--minutes`
have passed. Each cell prints a line of JSON, which `--out` also collects in a file. With float32, TF32 is off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare_weights

OURS, THEIRS = "kandinsky22", "diffusers"
DECODER_STEPS, PRIOR_STEPS = 10, 25
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Bench:
    """Pipelines of both libraries with the same parameters, and the measurements of a run.

    Args:
        options: Command line options.

    Attributes:
        records: Measurements, one per cell and stage.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        if options.dtype == "fp32":
            # Both libraries would use TF32 for convolutions, whose rounding hides how well results agree.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        self.torch, self.options = torch, options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, DTYPES[options.dtype])
        self.start = time.perf_counter()
        self.records: list[dict[str, Any]] = []
        config = compare_weights.CONFIGS[options.config]
        self.priors = self._prior_pipelines(config)
        self.decoders = self._decoder_pipelines(config)
        self.embedding_width = config["unet"]["encoder_hid_dim"]

    def _pair(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """Return the reference's network with random weights on the device, and ours with the same tensors."""
        import diffusers

        import kandinsky22

        torch = self.torch
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                theirs = getattr(diffusers, name)(**config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for key in ("positional_embedding", "prd_embedding", "clip_mean"):
                if isinstance(value := getattr(theirs, key, None), torch.Tensor):
                    value.normal_(std=0.02)  # zeros would hide differences
            if isinstance(std := getattr(theirs, "clip_std", None), torch.Tensor):
                std.fill_(1.0)
        with torch.device("meta"):
            ours = getattr(kandinsky22, name)(**config)
        ours.load_state_dict(theirs.state_dict(), assign=True)
        ours.reset_buffers()
        return {THEIRS: theirs, OURS: ours.to(self.device).eval()}

    def _prior_pipelines(self, config: dict[str, dict[str, Any]]) -> dict[str, Any]:
        import diffusers
        import transformers

        import kandinsky22

        self.torch.manual_seed(0)
        text, vision = (tower.to(self.device, self.dtype) for tower in compare_weights.make_towers(config, layers=1))
        side = vision.config.image_size
        networks = self._pair("PriorTransformer", config["prior"])
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = compare_weights.make_tokenizer(Path(folder) / "words")
        schedule = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0}
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        pipes = {}
        for library in (diffusers, kandinsky22):
            pipes[library.__name__] = library.KandinskyV22PriorPipeline(
                prior=networks[library.__name__],
                image_encoder=vision,
                text_encoder=text,
                tokenizer=tokenizer,
                scheduler=library.UnCLIPScheduler(**schedule),
                image_processor=processor,
            )
            pipes[library.__name__].set_progress_bar_config(disable=True)
        return pipes

    def _decoder_pipelines(self, config: dict[str, dict[str, Any]]) -> dict[str, Any]:
        import diffusers

        import kandinsky22

        unets = self._pair("UNet2DConditionModel", config["unet"])
        movqs = self._pair("VQModel", config["movq"])
        pipes = {}
        for library in (diffusers, kandinsky22):
            scheduler = library.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
            name = library.__name__
            pipes[name] = library.KandinskyV22Pipeline(unet=unets[name], scheduler=scheduler, movq=movqs[name])
            pipes[name].set_progress_bar_config(disable=True)
        return pipes

    # Stages

    def random(self, *shape: int, seed: int) -> Any:
        """Return normally distributed values, generated on the CPU and therefore the same on all devices.

        Args:
            *shape: Shape of the tensor.
            seed: Seed of the values.
        """
        values = self.torch.randn(*shape, generator=self.torch.Generator().manual_seed(seed))
        return values.to(device=self.device, dtype=self.dtype)

    def step(self, size: int, batch: int) -> dict[str, Callable[[], Any]]:
        """Return the calls of a guided UNet step on 2 x `batch` samples.

        Args:
            size: Side of the images in pixels.
            batch: Number of images.

        Returns:
            The calls by library.
        """
        sample = self.random(batch, 4, size // 8, size // 8, seed=1).repeat(2, 1, 1, 1)
        embeds = self.random(2 * batch, self.embedding_width, seed=2)
        ours, theirs = self.decoders[OURS].unet, self.decoders[THEIRS].unet
        condition = ours.encode_condition(embeds)
        graphs = self.decoders[OURS]._cuda_graphs
        bound = None if graphs is None else graphs.bind(ours, condition)
        timestep = self.torch.tensor(500, device=self.device)
        added = {"image_embeds": embeds}
        return {
            THEIRS: lambda: theirs(
                sample, timestep, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False
            )[0],
            OURS: lambda: ours.denoise(sample, timestep, condition) if bound is None else bound(sample, timestep),
        }

    def decode(self, size: int, batch: int) -> dict[str, Callable[[], Any]]:
        """Return the calls of MoVQ decoding.

        Args:
            size: Side of the images in pixels.
            batch: Number of images.

        Returns:
            The calls by library.
        """
        latents = self.random(batch, 4, size // 8, size // 8, seed=3)

        def call(library: str) -> Callable[[], Any]:
            return lambda: self.decoders[library].movq.decode(latents, force_not_quantize=True)[0]

        return {library: call(library) for library in (THEIRS, OURS)}

    def picture(self, size: int, batch: int) -> dict[str, Callable[[], Any]]:
        """Return the calls of the decoder pipeline.

        Args:
            size: Side of the images in pixels.
            batch: Number of images.

        Returns:
            The calls by library.
        """
        embeds, negatives = (self.random(batch, self.embedding_width, seed=seed) for seed in (4, 5))
        options = {"height": size, "width": size, "num_inference_steps": DECODER_STEPS, "output_type": "np"}

        def call(library: str) -> Callable[[], Any]:
            pipe = self.decoders[library]
            return lambda: self.torch.as_tensor(
                pipe(embeds, negatives, generator=self.generator(), return_dict=False, **options)[0]
            )

        return {library: call(library) for library in (THEIRS, OURS)}

    def prior(self, batch: int) -> dict[str, Callable[[], Any]]:
        """Return the calls of the prior pipeline.

        Args:
            batch: Number of prompts.

        Returns:
            The calls by library.
        """
        prompts = [f"a red cat, 4k photo, number {500 + index}" for index in range(batch)]
        options = {"num_inference_steps": PRIOR_STEPS, "return_dict": False}
        return {
            library: lambda pipe=self.priors[library]: pipe(prompts, generator=self.generator(), **options)[0]
            for library in (THEIRS, OURS)
        }

    def generator(self) -> Any:
        """Return a generator with a fixed seed."""
        return self.torch.Generator().manual_seed(0)

    # Measuring

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def measure(self, stage: str, calls: dict[str, Callable[[], Any]], rounds: int, **about: Any) -> None:
        """Measure alternating calls of both libraries, and compare their results.

        Args:
            stage: Name of the stage.
            calls: The calls by library.
            rounds: Number of timed calls per library.
            **about: Description of the cell for the record.
        """
        torch, results, first, peaks = self.torch, {}, {}, {}
        seconds: dict[str, list[float]] = {library: [] for library in calls}
        with torch.no_grad():
            for library, call in calls.items():
                start = self.now()
                results[library] = call()
                first[library] = self.now() - start
                call()
                self.reset_peak()
                call()
                peaks[library] = self.peak()
            for _ in range(rounds):
                for library, call in calls.items():
                    start = self.now()
                    call()
                    seconds[library].append(self.now() - start)
        expected, result = (results[library].float().cpu() for library in (THEIRS, OURS))
        medians = {library: statistics.median(values) for library, values in seconds.items()}
        record = {
            "stage": stage,
            "dtype": self.options.dtype,
            **about,
            "reference_ms": round(1000 * medians[THEIRS], 2),
            "ours_ms": round(1000 * medians[OURS], 2),
            "ratio": round(medians[THEIRS] / medians[OURS], 3),
            "reference_first_s": round(first[THEIRS], 2),
            "ours_first_s": round(first[OURS], 2),
            "reference_peak_gib": round(peaks[THEIRS], 2),
            "ours_peak_gib": round(peaks[OURS], 2),
            "difference": float((result - expected).abs().max() / expected.abs().max()),
            "at_s": round(self.elapsed),
        }
        assert result.isfinite().all()
        self.records.append(record)
        print(json.dumps(record), flush=True)
        self.write()

    def write(self) -> None:
        """Write all records so far to the file of `--out`: a time limit may end the process at any moment."""
        if (path := self.options.out) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"machine": describe(self), "records": self.records}, indent=1) + "\n")

    def now(self) -> float:
        """Return the seconds of the host's clock after the device has finished."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        """Reset the peak memory."""
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the peak of allocated memory in GiB."""
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def compile(self) -> None:
        """Compile the UNet and MoVQ of both libraries, each as its documentation recommends."""
        theirs = self.decoders[THEIRS]
        theirs.unet.compile(dynamic=False)
        theirs.movq.decoder.compile(dynamic=False)
        self.decoders[OURS].compile()

    def cells(self) -> Iterator[tuple[int, int]]:
        """Yield sizes and batches, from the smallest to the largest amount of work."""
        yield from sorted(
            ((size, batch) for size in self.options.sizes for batch in self.options.batches),
            key=lambda cell: cell[0] ** 2 * cell[1],
        )

    def run(self) -> None:
        """Measure all cells eagerly, then with compiled networks while there is time."""
        for batch in self.options.batches:
            self.measure("prior", self.prior(batch), 3, batch=batch, compiled=False)
        for size, batch in self.cells():
            about = {"size": size, "batch": batch, "compiled": False}
            self.measure("step", self.step(size, batch), self.options.rounds, **about)
            self.measure("decode", self.decode(size, batch), self.options.rounds, **about)
            self.measure("picture", self.picture(size, batch), 3, **about)
        if self.device.type == "cuda":
            self.decoders[OURS].enable_cuda_graphs()
            for size, batch in self.cells():
                about = {"size": size, "batch": batch, "compiled": False, "graphs": True}
                self.measure("step", self.step(size, batch), self.options.rounds, **about)
                self.measure("picture", self.picture(size, batch), 3, **about)
            self.decoders[OURS].disable_cuda_graphs()
        if not self.options.compile:
            return
        self.compile()
        longest = 0.0
        for size, batch in self.cells():
            start = self.elapsed
            if start + longest > 60 * self.options.minutes:
                print(f"compiled {size} x {size}, batch {batch}: left out, no time is left", file=sys.stderr)
                continue
            about = {"size": size, "batch": batch, "compiled": True}
            self.measure("step", self.step(size, batch), self.options.rounds, **about)
            self.measure("decode", self.decode(size, batch), self.options.rounds, **about)
            self.measure("picture", self.picture(size, batch), 3, **about)
            longest = max(longest, self.elapsed - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Args:
        arguments: Command line arguments; None takes those of the process.

    Returns:
        Exit code: 1 if float32 results differ by more than 1e-3, 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to test the script (cuda)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype; fp32 without TF32 (bf16)")
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published", help="config (published)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768], help="sides in pixels (512 768)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images per call (1 8)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per network; 3 per pipeline (7)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="measure eagerly only")
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit for compiled cells (6)")
    parser.add_argument("--out", type=Path, help="JSON file for all records")
    options = parser.parse_args(arguments)
    bench = Bench(options)
    bench.run()
    worst = max(record["difference"] for record in bench.records if record["stage"] in ("step", "decode"))
    return int(options.dtype == "fp32" and worst > 1e-3)


def describe(bench: Bench) -> dict[str, str]:
    """Return the name of the device and the versions of packages.

    Args:
        bench: The run.
    """
    import diffusers

    import kandinsky22

    name = bench.torch.cuda.get_device_name() if bench.device.type == "cuda" else bench.device.type
    versions = {"kandinsky22": kandinsky22, "diffusers": diffusers, "torch": bench.torch}
    return {"device": name, **{library: module.__version__ for library, module in versions.items()}}


if __name__ == "__main__":
    raise SystemExit(main())
