"""Guided UNet step or steps of the prior in bfloat16 and with weights of 8 bits, interleaved; errors; the profile.

    python -m benchmarks.int8_step --folder bench --threads 2
    python -m benchmarks.int8_step --folder bench --kinds int8-static --profile

The folder has random weights with the published configs, from `benchmarks.compare --make`. Each kind runs in a process
of its own, which runs one call at a time, in turn with the others. The table has the minimum and the median of
`--repeats` calls; "first" is the first call, which packs weights. Errors are root mean squares, relative to float32's
output.

With `--cpu-time`, the seconds are those of the processor, which other work on the machine changes less; use one thread
then. `openvino-int8` needs `pipe.to_openvino`, OpenVINO and NNCF.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("float32", "bfloat16", "int8-dynamic", "int8-static", "openvino-int8")
DEFAULT_KINDS = ("bfloat16", "int8-dynamic", "int8-static")
STAGES = ("step", "prior")


def load(kind: str, stage: str, folder: Path, dtype: str) -> Any:
    """Return a pipeline with the network of a stage, quantized.

    Args:
        kind: One of KINDS.
        stage: One of STAGES.
        folder: Folder of the weights.
        dtype: Type of whatever is not quantized, for the kinds of 8 bits.
    """
    import torch

    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    options: dict[str, Any] = {"torch_dtype": getattr(torch, kind if kind in ("float32", "bfloat16") else dtype)}
    if stage == "prior":
        pipe: Any = KandinskyV22PriorPipeline.from_pretrained(
            folder / "prior", image_encoder=None, text_encoder=None, **options
        )
    else:
        pipe = KandinskyV22Pipeline.from_pretrained(folder / "decoder", movq=None, **options)
    if kind == "openvino-int8":
        pipe.to_openvino(precision="int8")
    elif kind.startswith("int8"):
        pipe.quantize(kind)
    return pipe


def operator_times(call: Callable[[], Any], repeats: int = 3) -> dict[str, tuple[float, int]]:
    """Return the CPU seconds of this thread and the number of calls per operator of torch, the minimum of calls.

    Args:
        call: The call.
        repeats: How often it runs.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Times(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seconds: collections.Counter[str] = collections.Counter()
            self.calls: collections.Counter[str] = collections.Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            start = time.thread_time()
            result = function(*args, **(kwargs or {}))
            self.seconds[str(function)] += time.thread_time() - start
            self.calls[str(function)] += 1
            return result

    runs = []
    for _ in range(repeats):
        with Times() as times:
            call()
        runs.append(times)
    return {name: (min(run.seconds[name] for run in runs), count) for name, count in runs[0].calls.items()}


def serve(options: argparse.Namespace) -> None:
    """Answer each line of standard input: a path stores the result, "profile" measures operators, others time a call.

    Args:
        options: Command line options, with one kind.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    import torch

    from benchmarks.network_steps import bind_network

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with torch.no_grad():
        start = clock()
        pipe = load(options.kinds[0], options.stage, options.folder, options.dtype)
        call = bind_network(pipe, options.stage, options.size)
        ready = clock() - start
        start = clock()
        result = call()
        answer({"ready": ready, "first": clock() - start})
        for line in sys.stdin:
            command = line.strip()
            if command == "profile":
                answer(operator_times(call))
            elif command:
                torch.save(result.float(), command)
                answer({})
            else:
                start = clock()
                result = call()
                answer(clock() - start)


class Worker:
    """A process that runs one kind.

    Args:
        kind: One of KINDS.
        options: Command line options.
    """

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        settings = {"stage": options.stage, "dtype": options.dtype, "size": options.size, "threads": options.threads}
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        arguments += ["--folder", str(options.folder), "--kinds", kind, "--worker"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.int8_step", *arguments, *(["--cpu-time"] if options.cpu_time else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        self.kind, self.seconds = kind, list[float]()
        self.started = self._answer()

    def ask(self, command: str = "") -> Any:
        """Return the answer to a command; an empty one returns the seconds of a call.

        Args:
            command: See `serve`.
        """
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.kind} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def errors(workers: Sequence[Worker]) -> dict[str, float]:
    """Return the relative errors of results, by kind, if float32 is among them.

    Args:
        workers: Processes that have run.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for worker in workers:
            path = Path(folder) / worker.kind
            worker.ask(str(path))
            results[worker.kind] = torch.load(path)
    exact = results.get("float32")
    if exact is None:
        return {}
    size = exact.square().mean().sqrt()
    return {kind: ((result - exact).square().mean().sqrt() / size).item() for kind, result in results.items()}


def report(workers: Sequence[Worker], options: argparse.Namespace) -> None:
    """Print the table, and the shares of operators if requested.

    Args:
        workers: Processes that have run.
        options: Command line options.
    """
    relative = errors(workers)
    unit = "CPU seconds" if options.cpu_time else "seconds"
    print(f"| {unit} | ready | first | minimum | median | error |\n|---|---:|---:|---:|---:|---:|")
    for worker in workers:
        error = f"{relative[worker.kind]:.4f}" if relative else ""
        print(
            f"| {worker.kind} | {worker.started['ready']:.1f} | {worker.started['first']:.2f} | "
            f"{min(worker.seconds):.3f} | {statistics.median(worker.seconds):.3f} | {error} |"
        )
    for worker in workers if options.profile else ():
        times = worker.ask("profile")
        print(f"\n{worker.kind}: CPU milliseconds of one thread, calls, operator")
        for name, (seconds, calls) in sorted(times.items(), key=lambda entry: -entry[1][0])[:16]:
            print(f"{1000 * seconds:9.1f} {calls:6d}  {name}")


def parse() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_step", description=str(__doc__).split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--stage", choices=STAGES, default="step", help="guided UNet step, or 25 prior steps (step)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="what is measured (bfloat16 and both kinds of int8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type around 8 bits")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels (512)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--repeats", type=int, default=7, help="calls per kind (7)")
    parser.add_argument("--cpu-time", action="store_true", help="measure the processor's time")
    parser.add_argument("--profile", action="store_true", help="measure the operators, with one thread")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kinds is None:
        has_openvino = importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf")
        options.kinds = [*DEFAULT_KINDS, *(["openvino-int8"] if has_openvino else [])]
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.worker:
        serve(options)
        return
    workers = []
    try:
        for kind in options.kinds:
            try:
                workers.append(Worker(kind, options))
            except RuntimeError as error:
                print(f"left out: {error}", flush=True)
        for _ in range(options.repeats):
            for worker in workers:
                worker.seconds.append(worker.ask())
        report(workers, options)
    finally:
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    main()
