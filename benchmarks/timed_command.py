"""Run a command line of kandinsky22 in this process, and write the wall time of its stages to a file.

    python -m benchmarks.timed_command STARTED FILE generate "a red circle" -o picture.png

STARTED is the start of the process, as of `time.time`. Functions of the package are replaced by wrappers that read the
clock before and after; the command itself runs as its console entry does. A stage that the package moves to another
thread counts where the main thread waits for it.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.stopwatch import Stopwatch

# Stages in the order in which they usually run; "other" is everything else: arguments, checks, messages.
STAGES = (
    "import",
    "other",
    "load",
    "fingerprint",
    "text encoding",
    "prior",
    "first step",
    "other steps",
    "decode",
    "save",
    "exit",
)
# Stage, module and function. Those of a module are called by the name that this module looks up.
WRAPPED = (
    ("load", "kandinsky22.cli.run", "load_networks"),
    ("load", "kandinsky22.cli.run", "prepare_networks"),
    ("load", "kandinsky22.runtime.lazy_component", "LazyComponent.load"),
    ("load", "kandinsky22.runtime.disk_offload", "DiskStorage.onload"),
    ("load", "kandinsky22.runtime.disk_offload", "DiskStorage.offload"),
    ("fingerprint", "kandinsky22.generation.stages", "build_recipe"),
    ("fingerprint", "kandinsky22.generation.stages", "with_digest"),
    ("fingerprint", "kandinsky22.pipelines.network_reader", "weight_samples"),
    ("text encoding", "kandinsky22.pipelines.prior_base", "PriorPipeline.encode_text"),
    ("prior", "kandinsky22.generation.stages", "run_prior"),
    ("first step", "kandinsky22.generation.stages", "run_decoder"),
    ("save", "kandinsky22.cli.saving", "ImageSaver.save"),
)
LOOP = ("kandinsky22.pipelines.denoising", "sample")  # generator of the steps of both stages


def owner_of(module: str, path: str) -> tuple[Any, str]:
    """Return the object that holds a function, and the function's name in it.

    Args:
        module: Name of the module.
        path: Name of the function in the module, with its class if it has one.

    Raises:
        AttributeError: There is no such function.
    """
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    getattr(owner, name)
    return owner, name


def time_imports(watch: Stopwatch) -> None:
    """Count the time of import statements as the stage "import", wherever they are.

    Args:
        watch: Receives the stages.
    """

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            with watch.stage("import"):
                return function(*arguments, **options)

        return wrapper

    builtins.__import__ = timed(builtins.__import__)
    importlib.import_module = timed(importlib.import_module)


def time_functions(watch: Stopwatch) -> None:
    """Replace the functions of WRAPPED and LOOP.

    Args:
        watch: Receives the stages.

    Raises:
        AttributeError: The package lacks one of them.
    """

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            with watch.stage(stage):
                return function(*arguments, **options)

        return wrapper

    for stage, module, path in WRAPPED:
        owner, name = owner_of(module, path)
        setattr(owner, name, timed(stage, getattr(owner, name)))
    owner, name = owner_of(*LOOP)
    setattr(owner, name, timed_steps(watch, getattr(owner, name)))


def timed_steps(watch: Stopwatch, loop: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return the generator of steps with stages for the first step, the others, and what follows the last one.

    Args:
        watch: Receives the stages. The loop of the prior runs in the stage "prior" and stays there.
        loop: Generator function that yields after each step.
    """

    @functools.wraps(loop)
    def wrapper(*arguments: Any, **options: Any) -> Iterator[Any]:
        key = "prior steps" if watch.current == "prior" else "decoder steps"
        watch.counts.setdefault(key, 0)
        for state in loop(*arguments, **options):
            watch.counts[key] += 1
            if key == "decoder steps":
                watch.switch("other steps")
            yield state
        if key == "decoder steps":
            watch.switch("decode")

    return wrapper


def main() -> int:
    """Run the command line of the process, and return its exit code."""
    started, path, arguments = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    watch = Stopwatch(started, "import")
    time_imports(watch)
    from kandinsky22.cli.main import main as run

    time_functions(watch)
    watch.switch("other")
    sys.argv = ["kandinsky22", *arguments]
    try:
        return run()
    finally:
        watch.write(path)


if __name__ == "__main__":
    sys.exit(main())
