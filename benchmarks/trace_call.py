"""Count the functions of kandinsky22 that a call passes through until the first network runs.

python -m benchmarks.trace_call
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import kandinsky22

ROOT = str(Path(kandinsky22.__file__).parent)


def trace(pipe: Any, network: str, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
    """Return the functions that a call enters before a network's forward, in the order of their first use.

    Args:
        pipe: The pipeline to call.
        network: Name of the component whose forward ends the trace.
        *arguments: Arguments of the call.
        **options: Keyword arguments of the call.

    Returns:
        Pairs of file (relative to the package) and qualified name, each once.
    """
    entered: dict[tuple[str, str], None] = {}

    def stop(*_: Any) -> None:
        sys.setprofile(None)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            entered[
                code.co_filename[len(ROOT) + 1 :], code.co_qualname if sys.version_info >= (3, 11) else code.co_name
            ] = None

    handle = getattr(pipe, network).register_forward_pre_hook(stop)
    sys.setprofile(profile)
    try:
        pipe(*arguments, **options)
    finally:
        sys.setprofile(None)
        handle.remove()
    return list(entered)


def main() -> None:
    """Print the trace of the combined pipeline with the embedded model."""
    pipe = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    functions = trace(pipe, "prior_text_encoder", "a red circle", num_inference_steps=2, prior_num_inference_steps=2)
    for file, name in functions:
        print(f"{file:40} {name}")
    print(f"{len(functions)} functions in {len({file for file, _ in functions})} files")


if __name__ == "__main__":
    main()
