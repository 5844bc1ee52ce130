"""Trade-off between quality and time of samplers, on the embedded model.

Run from the root of the repository: `python -m benchmarks.samplers --help`.

Three quantities are measured for cells of samplers, steps and guidance (benchmarks/sampler_cells.py):

- success: the share of 400 prompts, half with one shape and half with two, whose images are right in every stated
  attribute, judged by pixel analysis. Prompts, initial noise and the noise of the prior are the same in all cells.
- distance: the distance of the latents from the solution of the same equation in 1,000 steps of a second-order method,
  with the same noise and embeddings. Methods that add noise end elsewhere on purpose and are left out.
- time: seconds from a prompt to its image, one image at a time, with all networks loaded and the cells interleaved.

Each measurement is a line of a JSON Lines file, and a rerun continues where the last one stopped. Measurements of other
weights or settings remain in the file and are not used. Tables and curves of the documentation come from the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded_prompts import Prompt, Share, draw_prompts
from benchmarks.embedded_success import Generate, run
from benchmarks.sampler_cells import INTERVALS, KINDS, Cell, distance_grid, grid
from benchmarks.sampler_report import preset_table, write_report
from kandinsky22 import AutoPipelineForText2Image, CheckpointError
from kandinsky22.adapters.files import file_digest, find_distilled_files
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.checkpoints.hub import DISTILLED

SUCCESS_GROUPS = tuple(grid())
GROUPS = (*SUCCESS_GROUPS, "others", "distance", "time")
# The presets were chosen on the prompts of seeds 0 and 1 together. Those of seed 2 were measured once, afterwards.
OTHER_SEEDS = (1, 2)
REFERENCE = Cell(KINDS["DPM++ 2M"].steps(1000))
# Offset of the prior's seeds, since the prior must not use the noise of the decoder. Seeds of prompts are below it, and
# CPU generators use 32 bits of a seed.
PRIOR_SEED_OFFSET = 2**31
PRESET_ROUNDS, ROUNDS = 9, 3  # images per preset and per other cell for times


class Store:
    """Measurements in a JSON Lines file, by kind and key; the last one of each counts.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._records = {(entry["kind"], entry["key"]): entry for entry in map(json.loads, lines)}

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return a measurement, or None.

        Args:
            kind: "success", "distance" or "time".
            key: Digest of everything that determines it.
        """
        return self._records.get((kind, key))

    def add(self, kind: str, key: str, **values: Any) -> None:
        """Append a measurement to the file.

        Args:
            kind: "success", "distance" or "time".
            key: Digest of everything that determines it.
            **values: Its values.
        """
        entry = {"kind": kind, "key": key, **values}
        self._records[kind, key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _generators(prompts: Sequence[Prompt], offset: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(prompt.seed + offset) for prompt in prompts]


def evaluations(scheduler: Any, steps: int) -> int:
    """Return the number of network evaluations.

    Args:
        scheduler: The scheduler.
        steps: Number of steps.
    """
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


class Bench:
    """The embedded model, the prompts and the measurements.

    Args:
        options: Command line options.
        seed: Seed of the prompts; None takes that of the options.
    """

    def __init__(self, options: argparse.Namespace, seed: int | None = None) -> None:
        self.pipe: Any = AutoPipelineForText2Image.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(options.device)
        self.defaults: dict[str, Any] = self.pipe.generation_defaults
        self.store = Store(options.results)
        self.batch = options.batch
        self.seed: int = options.seed if seed is None else seed
        self.prompts = draw_prompts(options.count // 2, held_out=(False,), seed=self.seed)
        count, half = options.references // 2, len(self.prompts) // 2
        self.distance_prompts = [*self.prompts[:count], *self.prompts[half:][:count]]
        self._configs = self.pipe.scheduler.config, self.pipe.prior_scheduler.config
        # Settings that the files leave out count too: another scheduler class replaces them by its defaults.
        stored = [dict(config) for config in self._configs]
        # Reading this attribute loads networks that are loaded lazily.
        networks = {name: part for name, part in self.pipe.components.items() if hasattr(part, "state_dict")}
        self._context = {
            "weights": weights_digest(networks),
            "schedulers": stored,
            "defaults": self.defaults,
            "seed": self.seed,
        }
        self._machine = f"{options.device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        self._embeddings: dict[str, dict[tuple[str, int], list[Tensor]]] = {}
        # digest of the model's distilled adapter; None if it has none
        self.adapter = None if self.pipe.origin is None else _adapter_digest(self.pipe.origin)

    def _key(self, kind: str, cell: Cell) -> str:
        """Return the digest of everything that determines a measurement."""
        extent = {
            "success": len(self.prompts),
            "distance": len(self.distance_prompts),
            "time": f"{self._machine}, {torch.get_num_threads()} threads",
        }
        adapter = {"adapter": self.adapter} if cell.distilled else {}
        return cell.key(**self._context, of=extent[kind], **adapter)

    def find(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        """Return a measurement, or None.

        Args:
            kind: "success", "distance" or "time".
            cell: The cell.
        """
        return self.store.get(kind, self._key(kind, cell))

    def _store(self, kind: str, cell: Cell, **values: Any) -> None:
        self.store.add(kind, self._key(kind, cell), cell=str(cell), **values)

    # Generation

    def _arguments(self, cell: Cell) -> dict[str, Any]:
        """Assign the cell's schedulers to the pipeline, and return the arguments of its call."""
        self.pipe.scheduler = cell.decoder.from_config(self._configs[0])
        self.pipe.prior_scheduler = cell.prior.from_config(self._configs[1])
        if cell.distilled:
            self.pipe.load_distilled_adapter()
        elif DISTILLED in self.pipe.get_active_adapters():
            self.pipe.delete_adapters(DISTILLED)
        steps = {"num_inference_steps": cell.decoder.steps, "prior_num_inference_steps": cell.prior.steps}
        scales = {"guidance_scale": cell.guidance, "prior_guidance_scale": cell.prior_guidance}
        scales = {name: value for name, value in scales.items() if value is not None}
        intervals = dict.fromkeys(INTERVALS)  # cells replace the guidance intervals of the model
        return self.defaults | intervals | steps | scales | dict(cell.options)

    def _embed(self, cell: Cell, prompts: Sequence[Prompt]) -> dict[tuple[str, int], list[Tensor]]:
        """Return embeddings and their negatives by text and seed, computed once per setting of the prior."""
        arguments = self._arguments(cell)
        prior_arguments = {name[6:]: value for name, value in arguments.items() if name.startswith("prior_")}
        cached = self._embeddings.setdefault(repr((cell.prior, prior_arguments)), {})
        missing = [prompt for prompt in prompts if (prompt.text, prompt.seed) not in cached]
        for batch in _batches(missing, self.batch):
            texts = [prompt.text for prompt in batch]
            generators = _generators(batch, PRIOR_SEED_OFFSET)
            embeds = self.pipe.prior_pipe(texts, generator=generators, **prior_arguments).to_tuple()
            for prompt, *pair in zip(batch, *embeds, strict=True):
                cached[prompt.text, prompt.seed] = pair
        return cached

    def _generate(self, cell: Cell, prompts: Sequence[Prompt], output_type: str = "pil") -> Generate:
        """Return a function that generates the cell's images; their noise depends on the prompts' seeds alone."""
        cached = self._embed(cell, prompts)
        arguments = {k: value for k, value in self._arguments(cell).items() if not k.startswith("prior_")}

        def generate(batch: Sequence[Prompt]) -> Sequence[Any]:
            pairs = [cached[prompt.text, prompt.seed] for prompt in batch]
            embeds, negatives = (torch.stack(part) for part in zip(*pairs, strict=True))
            decoder = self.pipe.decoder_pipe
            output = decoder(embeds, negatives, generator=_generators(batch), output_type=output_type, **arguments)
            return list(output.images)

        return generate

    # Measuring

    def measure_success(self, cell: Cell) -> str:
        """Measure the success of a cell.

        Args:
            cell: The cell.

        Returns:
            The result for the screen.
        """
        start = time.perf_counter()
        generate = self._generate(cell, self.prompts)
        right = [verdict.all_correct for _, verdict in run(generate, self.prompts, self.batch)]
        self._store(
            "success",
            cell,
            right="".join("01"[is_right] for is_right in right),
            evaluations=evaluations(self.pipe.scheduler, cell.decoder.steps),
            prior_evaluations=evaluations(self.pipe.prior_scheduler, cell.prior.steps),
            seconds=round(time.perf_counter() - start, 1),
        )
        return str(Share(sum(right), len(right)))

    def _latents(self, cell: Cell) -> Tensor:
        generate = self._generate(cell, self.distance_prompts, "latent")
        batches = _batches(self.distance_prompts, self.batch)
        return torch.stack([latents for batch in batches for latents in generate(batch)])

    def solution(self) -> Tensor:
        """Return the latents of the solution, stored in a file next to the measurements, since they take minutes."""
        path = self.store.path.with_name(f"solution-{self._key('distance', REFERENCE)}.pt")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._latents(REFERENCE), path)
        return torch.load(path, weights_only=True)

    def measure_distance(self, cell: Cell) -> str:
        """Measure the root mean square difference from the solution, relative to that of the solution.

        Args:
            cell: The cell.

        Returns:
            The result for the screen.
        """
        solution = self.solution()
        error = (self._latents(cell) - solution).flatten(1).square().mean(1).sqrt()
        distance = float((error / solution.flatten(1).square().mean(1).sqrt()).mean())
        count = evaluations(self.pipe.scheduler, cell.decoder.steps)
        self._store("distance", cell, distance=distance, evaluations=count)
        return f"{distance:.2g}"

    def _seconds(self, cell: Cell, number: int) -> tuple[float, float]:
        """Return the seconds of an image, and those of the UNet among them."""
        arguments = self._arguments(cell)
        prompt = self.prompts[number % len(self.prompts)]
        started: list[float] = []
        ended: list[float] = []
        before = self.pipe.unet.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        after = self.pipe.unet.register_forward_hook(lambda *_: ended.append(time.perf_counter()))
        start = time.perf_counter()
        try:
            self.pipe(prompt.text, generator=_generators([prompt])[0], **arguments)
        finally:
            before.remove()
            after.remove()
        return time.perf_counter() - start, sum(ended) - sum(started)

    def measure_times(self, cells: Sequence[Cell], rounds: int) -> None:
        """Measure times of single images, with the cells interleaved, since other work on the machine varies.

        Args:
            cells: The cells; the others are compared with the first, round by round.
            rounds: Number of images per cell.
        """
        self._seconds(cells[-1], 0)  # warm up
        table = [[self._seconds(cell, number) for cell in cells] for number in range(rounds)]
        for index, cell in enumerate(cells):
            seconds, unet = zip(*(row[index] for row in table), strict=True)
            faster = statistics.median(row[0][0] / row[index][0] for row in table)
            times = {"seconds": seconds, "unet": unet, "unet_median": statistics.median(unet)}
            self._store("time", cell, median=statistics.median(seconds), faster=faster, **times)
            print(f"{cell}: {statistics.median(seconds):.3f} s, {faster:.1f} times as fast", flush=True)


def _adapter_digest(model: str) -> str | None:
    try:
        return file_digest(find_distilled_files(model)[0])
    except CheckpointError:
        return None


def _missing(bench: Bench, kind: str, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that can be measured and have not been, each once."""
    different = {cell.key(): cell for cell in _measurable(bench, cells)}
    return [cell for cell in different.values() if bench.find(kind, cell) is None]


def _measurable(bench: Bench, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells without those whose adapter the model lacks."""
    return [cell for cell in cells if bench.adapter is not None or not cell.distilled]


def _measure(bench: Bench, kind: str, cells: Sequence[Cell], measure: Callable[[Cell], str]) -> None:
    """Measure missing cells and print the progress."""
    missing = _missing(bench, kind, cells)
    for number, cell in enumerate(missing, start=1):
        start = time.perf_counter()
        result = measure(cell)
        elapsed = time.perf_counter() - start
        print(f"{kind} {number} of {len(missing)}: {cell}: {result} ({elapsed:.0f} s)", flush=True)


def measure(bench: Bench, others: Sequence[Bench], groups: Sequence[str]) -> None:
    """Measure missing cells of groups.

    Args:
        bench: Benchmark with the first set of prompts.
        others: Benchmarks with other prompts.
        groups: Names of the groups, of GROUPS.
    """
    cells = grid()
    for group in SUCCESS_GROUPS:
        if group in groups:
            _measure(bench, "success", cells[group], bench.measure_success)
    for other in others if "others" in groups else ():
        _measure(other, "success", cells["presets"], other.measure_success)
    if "distance" in groups:
        _measure(bench, "distance", distance_grid(), bench.measure_distance)
    if "time" in groups:
        presets = _measurable(bench, cells["presets"])
        if _missing(bench, "time", presets):
            bench.measure_times(presets, PRESET_ROUNDS)
        missing = _missing(bench, "time", [cell for group in cells.values() for cell in group])
        if missing:
            bench.measure_times(missing, ROUNDS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="measure only these groups (all)")
    parser.add_argument("--count", type=int, default=400, help="prompts per cell, half with one shape (400)")
    parser.add_argument("--references", type=int, default=32, help="prompts whose distance is measured (32)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of prompts and images; others than 0 only print the presets (0)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images per batch, except for times (16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--device", default="cpu", help="device of the networks (cpu)")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/samplers.jsonl"), help="file of measurements"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of samplers-tradeoff.md (docs)")
    parser.add_argument("--report", action="store_true", help="only write tables and curves again")
    options = parser.parse_args(arguments)
    if options.count < 2 or options.references < 2:
        values = f"--count {options.count} --references {options.references}"
        parser.error(f"{values} is invalid: expected at least 2 each, one per number of shapes")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure missing cells, and write tables and curves into the documentation.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    # The page shows the prompts of seeds 0 and OTHER_SEEDS. For any other seed, the presets' table is printed.
    others = [Bench(options, seed) for seed in OTHER_SEEDS] if bench.seed == 0 else []
    if not options.report:
        measure(bench, others, options.only)
    if bench.seed == 0:
        write_report(bench.find, {other.seed: other.find for other in others}, options.docs)
    else:
        print(preset_table(bench.find))


if __name__ == "__main__":
    main()
