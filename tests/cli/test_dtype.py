"""`--dtype`: float32 by default, and "auto" is resolved before it is recorded."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.cli.helpers import Command, stored

from kandinsky22.runtime.device import dtype_name, resolve_dtype


def test_auto_is_resolved_before_it_is_recorded(command: Command, model: Path) -> None:
    common = ("generate", "a cat", "--model", model, "--device", "cpu", "--seed", 5)
    assert command(*common, "-o", "plain.png").code == 0
    assert stored(Path("plain.png"))["dtype"] == "float32"
    assert command(*common, "-o", "auto.png", "--dtype", "auto").code == 0
    assert stored(Path("auto.png"))["dtype"] == dtype_name(resolve_dtype("auto", torch.device("cpu")))
