"""How samplers trade quality for time, on the embedded model.

Run from the root of the repository: `python -m benchmarks.samplers --help`.

Three things are measured for cells of samplers, steps and guidance (benchmarks/sampler_cells.py):

- success: the share of 400 prompts, half with one shape and half with two, of which everything is right in the
  picture, judged by pixel analysis. Prompts, start noise and the noise of the prior are the same in every cell.
- distance: how far the latents are from the solution of the same equation in 1,000 steps of a second-order method, from
  the same noise and embeddings. It is measured for methods that draw no noise: others end elsewhere on purpose.
- time: from a prompt to its picture, one at a time, all networks loaded, the cells taking turns.

What is finished is kept in a file of JSON lines, one measurement each, and a rerun takes up where the last one stopped;
measurements of other weights or settings stay in the file and are not used. From it come the tables and curves in the
documentation.
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
from benchmarks.embedded_success import Drawer, run
from benchmarks.sampler_cells import INTERVALS, KINDS, Cell, distance_grid, grid
from benchmarks.sampler_report import preset_table, write_report
from kandinsky22 import AutoPipelineForText2Image
from kandinsky22.checkpoints.fingerprint import weights_digest

SUCCESS_GROUPS = tuple(grid())
GROUPS = (*SUCCESS_GROUPS, "others", "distance", "time")
# Presets were chosen on the first two sets of prompts, 0 and 1 together; the last was drawn once they were.
OTHER_SEEDS = (1, 2)
REFERENCE = Cell(KINDS["DPM++ 2M"].steps(1000))
# Added to seeds, so that the prior does not draw the numbers that the decoder starts from. Prompts' seeds are below it,
# and generators on a CPU know 32 bits.
OF_PRIOR = 2**31
ROUNDS, FEW_ROUNDS = 9, 3


class Store:
    """Measurements in a file of JSON lines, by kind and key; the last one of each counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._records = {(entry["kind"], entry["key"]): entry for entry in map(json.loads, lines)}

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """A measurement, if it was made."""
        return self._records.get((kind, key))

    def add(self, kind: str, key: str, **values: Any) -> None:
        """Keep a measurement, at once."""
        entry = {"kind": kind, "key": key, **values}
        self._records[kind, key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _generators(prompts: Sequence[Prompt], add: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(prompt.seed + add) for prompt in prompts]


def evaluations(scheduler: Any, steps: int) -> int:
    """How often a network is asked in so many steps."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


class Bench:
    """The embedded model, the prompts, and the measurements so far."""

    def __init__(self, options: argparse.Namespace, seed: int | None = None) -> None:
        self.pipe: Any = AutoPipelineForText2Image.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(options.device)
        self.defaults: dict[str, Any] = self.pipe.generation_defaults
        self.store = Store(options.results)
        self.batch = options.batch
        self.seed: int = options.seed if seed is None else seed
        self.prompts = draw_prompts(options.count // 2, held_out=(False,), seed=self.seed)
        few, half = options.references // 2, len(self.prompts) // 2
        self.few = [*self.prompts[:few], *self.prompts[half:][:few]]
        self._configs = self.pipe.scheduler.config, self.pipe.prior_scheduler.config
        # What nobody set counts too: it says which settings another class puts its own defaults in the place of.
        stored = [dict(config) for config in self._configs]
        networks = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        self._context = {
            "weights": weights_digest(networks),
            "schedulers": stored,
            "defaults": self.defaults,
            "seed": self.seed,
        }
        self._place = f"{options.device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        self._embeddings: dict[str, dict[tuple[str, int], list[Tensor]]] = {}

    def _key(self, kind: str, cell: Cell) -> str:
        """The digest of all that decides over the outcome of a measurement."""
        of = {
            "success": len(self.prompts),
            "distance": len(self.few),
            "time": f"{self._place}, {torch.get_num_threads()} threads",
        }
        return cell.key(**self._context, of=of[kind])

    def find(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        """A measurement, if it was made."""
        return self.store.get(kind, self._key(kind, cell))

    def _keep(self, kind: str, cell: Cell, **values: Any) -> None:
        self.store.add(kind, self._key(kind, cell), cell=str(cell), **values)

    # Drawing

    def _arguments(self, cell: Cell) -> dict[str, Any]:
        """Give the pipeline the cell's schedulers; the arguments to call it with."""
        self.pipe.scheduler = cell.decoder.from_config(self._configs[0])
        self.pipe.prior_scheduler = cell.prior.from_config(self._configs[1])
        steps = {"num_inference_steps": cell.decoder.steps, "prior_num_inference_steps": cell.prior.steps}
        scales = {"guidance_scale": cell.guidance, "prior_guidance_scale": cell.prior_guidance}
        given = {name: value for name, value in scales.items() if value is not None}
        everywhere = dict.fromkeys(INTERVALS)  # whatever the model's own: cells say where guidance acts
        return self.defaults | everywhere | steps | given | dict(cell.options)

    def _embed(self, cell: Cell, prompts: Sequence[Prompt]) -> dict[tuple[str, int], list[Tensor]]:
        """Embeddings and their negatives, by text and seed; made once for each setting of the prior."""
        arguments = self._arguments(cell)
        own = {name[6:]: value for name, value in arguments.items() if name.startswith("prior_")}
        known = self._embeddings.setdefault(repr((cell.prior, own)), {})
        missing = [prompt for prompt in prompts if (prompt.text, prompt.seed) not in known]
        for some in _batches(missing, self.batch):
            texts = [prompt.text for prompt in some]
            made = self.pipe.prior_pipe(texts, generator=_generators(some, OF_PRIOR), **own).to_tuple()
            for prompt, *pair in zip(some, *made, strict=True):
                known[prompt.text, prompt.seed] = pair
        return known

    def _drawer(self, cell: Cell, prompts: Sequence[Prompt], output_type: str = "pil") -> Drawer:
        """What draws the cell's pictures of `prompts`; the noise to start from depends on their seeds alone."""
        known = self._embed(cell, prompts)
        own = {name: value for name, value in self._arguments(cell).items() if not name.startswith("prior_")}

        def draw(some: Sequence[Prompt]) -> Sequence[Any]:
            pairs = [known[prompt.text, prompt.seed] for prompt in some]
            embeds, negatives = (torch.stack(part) for part in zip(*pairs, strict=True))
            decoder = self.pipe.decoder_pipe
            made = decoder(embeds, negatives, generator=_generators(some), output_type=output_type, **own)
            return list(made.images)

        return draw

    # Measuring

    def measure_success(self, cell: Cell) -> str:
        """Draw and judge all prompts."""
        begun = time.perf_counter()
        right = [verdict.all_right for _, verdict in run(self._drawer(cell, self.prompts), self.prompts, self.batch)]
        self._keep(
            "success",
            cell,
            right="".join("01"[good] for good in right),
            evaluations=evaluations(self.pipe.scheduler, cell.decoder.steps),
            prior_evaluations=evaluations(self.pipe.prior_scheduler, cell.prior.steps),
            seconds=round(time.perf_counter() - begun, 1),
        )
        return str(Share(sum(right), len(right)))

    def _latents(self, cell: Cell) -> Tensor:
        draw = self._drawer(cell, self.few, "latent")
        return torch.stack([latents for some in _batches(self.few, self.batch) for latents in draw(some)])

    def solution(self) -> Tensor:
        """The latents that all methods without noise lead to, kept beside the measurements: they take minutes."""
        path = self.store.path.with_name(f"solution-{self._key('distance', REFERENCE)}.pt")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._latents(REFERENCE), path)
        return torch.load(path, weights_only=True)

    def measure_distance(self, cell: Cell) -> str:
        """Root mean square of the difference to the solution, as a part of the solution's own."""
        solution = self.solution()
        error = (self._latents(cell) - solution).flatten(1).square().mean(1).sqrt()
        distance = float((error / solution.flatten(1).square().mean(1).sqrt()).mean())
        count = evaluations(self.pipe.scheduler, cell.decoder.steps)
        self._keep("distance", cell, distance=distance, evaluations=count)
        return f"{distance:.2g}"

    def _seconds(self, cell: Cell, number: int) -> float:
        arguments = self._arguments(cell)
        prompt = self.prompts[number % len(self.prompts)]
        begun = time.perf_counter()
        self.pipe(prompt.text, generator=_generators([prompt])[0], **arguments)
        return time.perf_counter() - begun

    def measure_times(self, cells: Sequence[Cell], rounds: int) -> None:
        """Time one picture at a time, the cells in turns, so that all meet the same disturbances; the first of them is
        what the others are compared with, round by round."""
        self._seconds(cells[-1], 0)  # whatever is set up at first use
        table = [[self._seconds(cell, number) for cell in cells] for number in range(rounds)]
        for index, cell in enumerate(cells):
            seconds = [row[index] for row in table]
            faster = statistics.median(row[0] / row[index] for row in table)
            self._keep("time", cell, median=statistics.median(seconds), faster=faster, seconds=seconds)
            print(f"{cell}: {statistics.median(seconds):.3f} s, {faster:.1f} times as fast", flush=True)


def _missing(bench: Bench, kind: str, cells: Sequence[Cell]) -> list[Cell]:
    """Those that are not measured yet, each once."""
    return [cell for cell in {cell.key(): cell for cell in cells}.values() if bench.find(kind, cell) is None]


def _measure(bench: Bench, kind: str, cells: Sequence[Cell], measure: Callable[[Cell], str]) -> None:
    """Measure what is missing, telling how far it is."""
    missing = _missing(bench, kind, cells)
    for number, cell in enumerate(missing, start=1):
        begun = time.perf_counter()
        found = measure(cell)
        took = time.perf_counter() - begun
        print(f"{kind} {number} of {len(missing)}: {cell}: {found} ({took:.0f} s)", flush=True)


def measure(bench: Bench, others: Sequence[Bench], groups: Sequence[str]) -> None:
    """Measure what is missing of these groups; `others` have other prompts."""
    cells = grid()
    for group in SUCCESS_GROUPS:
        if group in groups:
            _measure(bench, "success", cells[group], bench.measure_success)
    for other in others if "others" in groups else ():
        _measure(other, "success", cells["presets"], other.measure_success)
    if "distance" in groups:
        _measure(bench, "distance", distance_grid(), bench.measure_distance)
    if "time" in groups:
        presets = cells["presets"]
        if _missing(bench, "time", presets):
            bench.measure_times(presets, ROUNDS)
        others = _missing(bench, "time", [cell for group in cells.values() for cell in group])
        if others:
            bench.measure_times(others, FEW_ROUNDS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="pipeline folder, or the embedded model (default)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="leave out the others")
    parser.add_argument("--count", type=int, default=400, help="prompts a cell, half with one shape (400)")
    parser.add_argument("--references", type=int, default=32, help="prompts whose distance is measured (32)")
    parser.add_argument(
        "--seed", type=int, default=0, help="other prompts and pictures; prints the presets, leaves --docs alone (0)"
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at once, but for times (16)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--device", default="cpu", help="where the networks run (cpu)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/samplers.jsonl"), help="measurements")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of samplers-tradeoff.md (docs)")
    parser.add_argument("--report", action="store_true", help="measure nothing, write tables and curves anew")
    options = parser.parse_args(arguments)
    if options.count < 2 or options.references < 2:
        parser.error("--count and --references: at least 2 are needed, one for each number of shapes")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write what is known into the documentation."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    # The page is about the first prompts and the others that it names; of any more, the presets' table is printed.
    others = [Bench(options, seed) for seed in OTHER_SEEDS] if bench.seed == 0 else []
    if not options.report:
        measure(bench, others, options.only)
    if bench.seed == 0:
        write_report(bench.find, {other.seed: other.find for other in others}, options.docs)
    else:
        print(preset_table(bench.find))


if __name__ == "__main__":
    main()
