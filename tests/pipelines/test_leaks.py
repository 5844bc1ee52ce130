"""Generations in a row keep memory flat."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from tests.pipelines.tiny import seeded

from kandinsky22 import AutoPipelineForText2Image
from kandinsky22.runtime import pages

GENERATIONS, SETTLED = 50, 10


def resident() -> int:
    """Bytes of this process that are in memory, after what is free was given back."""
    gc.collect()
    pages.trim()
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's own account")
def test_fifty_generations_take_no_more_memory_than_ten() -> None:
    pipe = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    early = 0
    for number in range(GENERATIONS):
        if number == SETTLED:
            early = resident()
        pipe(
            f"a red circle, number {number}",
            num_inference_steps=2,
            prior_num_inference_steps=2,
            generator=seeded(number),
        )
    # what is kept on purpose, such as the last sixteen texts, comes to less than a megabyte
    assert resident() - early < 4e6
