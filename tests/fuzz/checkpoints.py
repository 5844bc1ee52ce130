"""Damaged checkpoints: configs, weights and other files of pipelines."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.calls import Calls, assert_finite
from tests.fuzz.harness import Case
from tests.fuzz.mutations import byte_edits, json_edits, mutate_bytes, mutate_json
from tests.fuzz.world import World

import kandinsky22

CLASSES = {
    "combined": "KandinskyV22CombinedPipeline",
    "prior": "KandinskyV22PriorPipeline",
    "decoder": "KandinskyV22Pipeline",
}


class Checkpoints:
    """Checkpoints with one or two damaged files; what loads is called.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "checkpoints"

    def __init__(self, world: World) -> None:
        self.world = world

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a checkpoint, and edits by file."""
        checkpoint = rng.choice(list(CLASSES))
        names = [name.split("/", 1)[1] for name in self.world.files if name.startswith(f"{checkpoint}/")]
        configs = [name for name in names if name.endswith(".json")]
        edits: dict[str, Any] = {}
        for _ in range(rng.choice([1, 1, 2])):
            file = rng.choice(configs if rng.random() < 0.6 else names)
            kind = rng.random()
            if kind < 0.12:
                edits[file] = {"as": rng.choice(["absent", "folder", "loop", "fifo", "empty", "device", "dangling"])}
            elif file.endswith(".json") and kind < 0.75:
                document = json.loads((self.world.folder / checkpoint / file).read_text())
                edits[file] = {"json": json_edits(rng, document)}
            else:
                edits[file] = {"bytes": byte_edits(rng)}
        return {"checkpoint": checkpoint, "edits": edits}

    def run(self, case: Case) -> None:
        """Load the damaged copy and make a call."""
        copied = self.world.folder / "damaged"
        shutil.rmtree(copied, ignore_errors=True)
        original = self.world.folder / case["checkpoint"]
        shutil.copytree(original, copied, copy_function=os.link)
        for file, edit in case["edits"].items():
            _damage(copied / file, edit)
        pipe = getattr(kandinsky22, CLASSES[case["checkpoint"]]).from_pretrained(copied)
        pipe.set_progress_bar_config(disable=True)
        assert_finite(pipe(**Calls.valid_call(CLASSES[case["checkpoint"]])))


def _damage(path: Path, edit: dict[str, Any]) -> None:
    data = path.read_bytes() if path.is_file() else b"{}"
    # The file is a hard link to the original, which must stay as it is.
    path.unlink(missing_ok=True)
    kind = edit.get("as")
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("no such file"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif "json" in edit:
        path.write_text(mutate_json(json.loads(data), edit["json"]))
    elif "bytes" in edit:
        path.write_bytes(mutate_bytes(data, edit["bytes"]))
